"""The import rules of the repository, held by reading every module's syntax tree."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("kernels", "mining", "train")
MODULES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


@cache
def imported_names(path: Path) -> set[str]:
    """Dotted names of everything that a module imports, at its top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            # `import torch` followed by torch.distributed.all_reduce imports nothing by name, and counts all the same.
            names.add(f"{node.value.id}.{node.attr}")
    return names


def importers_of(package: str) -> set[str]:
    found = set()
    for path in MODULES:
        if any(name == package or name.startswith(f"{package}.") for name in imported_names(path)):
            found.add(str(path.relative_to(ROOT)))
    return found


def below(folder: str) -> set[str]:
    return {str(path.relative_to(ROOT)) for path in MODULES if path.is_relative_to(ROOT / folder)}


def test_the_rules_see_the_modules():
    assert importers_of("torch"), "no module imports torch: the rules below would hold for an empty list as well"
    assert len(MODULES) > 20


def test_kernels_import_neither_mining_nor_train():
    assert not (importers_of("mining") | importers_of("train")) & below("kernels")


def test_mining_does_not_import_train_or_models():
    for package in ("train", "deepspeed", "open_clip", "timm", "PIL", "torchvision"):
        assert not importers_of(package) & below("mining"), package


@pytest.mark.parametrize(
    ("package", "importer"), [("open_clip", "train/models/clip_library.py"), ("streaming", "mining/mds.py")]
)
def test_only_one_module_imports_a_slow_package(package, importer):
    statements = {path: path.read_text(encoding="utf-8") for path in MODULES}
    pattern = re.compile(rf"^\s*(import|from) {package}\b", re.MULTILINE)
    found = {str(path.relative_to(ROOT)) for path, text in statements.items() if pattern.search(text)}
    assert found <= {importer}
    assert f'import_module("{package}")' in (ROOT / importer).read_text(encoding="utf-8")


def test_only_the_benchmarks_import_open_clips_trainer():
    assert importers_of("open_clip_train") == {"train/data/peers.py"}
    assert importers_of("train.data.peers") == {"train/data/bench.py", "train/bench/contenders.py"}


def test_kernels_import_nothing_but_torch_and_triton():
    for package in ("numpy", "faiss", "deepspeed", "streaming", "webdataset"):
        users = {path for path in importers_of(package) & below("kernels") if not path.startswith("kernels/bench/")}
        assert not users, package


def test_only_the_engine_imports_deepspeed():
    assert importers_of("deepspeed") == {"train/engine.py"}


def test_only_the_index_imports_faiss_and_the_benchmark_that_compares_with_it():
    assert importers_of("faiss") == {"mining/index.py", "kernels/bench/peers.py"}


def test_only_named_files_import_torch_distributed():
    allowed = {"train/distributed.py", *(path for path in below("kernels") if path.endswith("/function.py"))}
    benches = {path for path in importers_of("torch.distributed") if path.startswith("kernels/bench/")}
    assert importers_of("torch.distributed") - benches <= allowed


def test_triton_stays_in_kernels():
    for path in importers_of("triton"):
        is_kernel = re.fullmatch(r"kernels/\w+/kernel(_\w+)?\.py", path)
        assert is_kernel or path == "kernels/launch.py" or path.startswith("kernels/bench/"), path


def test_index_imports_torch_before_faiss():
    source = (ROOT / "mining/index.py").read_text(encoding="utf-8")
    assert 0 <= source.index("import torch") < source.index("import faiss")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_is_named_after_a_drawer(path):
    assert path.stem not in ("utils", "helpers", "common", "misc")
    assert not path.stem.startswith("legacy_")
    assert not path.stem.endswith("_v2")


def test_kernels_import_without_deepspeed_faiss_and_streaming():
    code = (
        "import sys, kernels\n"
        "heavy = {'deepspeed', 'faiss', 'streaming', 'webdataset', 'open_clip', 'mining', 'train'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
