"""MosaicML Streaming, imported here alone: without `transformers`, which takes seconds in every process to import.

Streaming asks for it to recognise tokenised batches and for a tokenizer of its C4 example; nothing of that is used here.
"""

import importlib
import sys
from types import ModuleType

USED_OF_TRANSFORMERS = {
    "transformers.models.auto.tokenization_auto": "AutoTokenizer",
    "transformers.feature_extraction_utils": "BatchFeature",
    "transformers.tokenization_utils_base": "BatchEncoding",
}


def _import_without_transformers() -> ModuleType:
    if "transformers" in sys.modules:
        return importlib.import_module("streaming")
    stand_ins = {}
    for path, name in USED_OF_TRANSFORMERS.items():
        parts = path.split(".")
        for length in range(1, len(parts) + 1):
            stand_ins.setdefault(".".join(parts[:length]), ModuleType(".".join(parts[:length])))
        # A class without instances: that no batch is one of it is the truth.
        setattr(stand_ins[path], name, type(name, (), {}))
    sys.modules.update(stand_ins)
    try:
        return importlib.import_module("streaming")
    finally:
        for name in stand_ins:
            del sys.modules[name]


streaming = _import_without_transformers()
