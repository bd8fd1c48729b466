"""open_clip, imported here alone: without `transformers`, which takes seconds on every rank to import.

open_clip treats it as optional: only Hugging Face text towers, and the captions that CoCa writes, need it.
"""

import importlib
import sys
from types import ModuleType
from typing import Any


def _import_without_transformers() -> ModuleType:
    if "transformers" in sys.modules:
        return importlib.import_module("open_clip")
    # With None in its place Python raises ImportError, and open_clip goes on as if it were not installed.
    sys.modules["transformers"] = None
    try:
        return importlib.import_module("open_clip")
    finally:
        del sys.modules["transformers"]


open_clip = _import_without_transformers()
PreprocessCfg = open_clip.transform.PreprocessCfg


def import_text_library(model_config: dict[str, Any]) -> None:
    """Give open_clip `transformers` after all when the text tower of this model config is one of Hugging Face's."""
    if not model_config["text_cfg"].get("hf_model_name"):
        return
    from open_clip import hf_model, model

    if hf_model.transformers is None:
        model.HFTextEncoder = importlib.reload(hf_model).HFTextEncoder
