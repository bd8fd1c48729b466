"""`python -m kernels.bench.compiled`: what every Triton kernel compiles to on every chip, without a GPU.

Writes `compiled.json` beside this file: registers, spills, shared memory and matrix instructions of every
specialisation that a launch can ask for, for bfloat16, float16 and float32 rows of the usual widths.
`--check` compiles all of it anew and compares; `--roofline` prints estimates made from it.
"""

import argparse
import ast
import functools
import hashlib
import importlib
import inspect
import json
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from kernels.bench.chips import CHIPS
from kernels.launch import Specialisation

TABLE = Path(__file__).with_name("compiled.json")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DIMS = (64, 512, 640, 768, 1024, 1152)
# Constants that the block table already fixes, and that would only lengthen a name.
UNNAMED = ("ACC", "INTERPRET", "EVEN", "IMAGE_EVEN", "TEXT_EVEN")
MATRIX_INSTRUCTIONS = {
    "cuda": r"(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)[\w.:]*",
    "hip": r"v_mfma_\w+",
}
SPECIAL_FUNCTIONS = {"cuda": r"\bMUFU\b", "hip": r"\bv_(?:exp|log|rcp|rsq|sqrt)_f32\w*"}
ERROR_EXIT_CODE = 1
USER_ERROR_EXIT_CODE = 2


def main(arguments: Sequence[str]) -> None:
    options = _parser().parse_args(arguments)
    if not (options.check or options.roofline):
        refuse_partial_write(options.chip)
    if options.roofline:
        # It reads this module's table.
        from kernels.bench.roofline import estimates_table

        print(estimates_table(read_table(), options.chip))
        return
    known = {} if options.check or options.anew or not TABLE.exists() else read_table()["entries"]
    entries = compile_all(options.chip or list(CHIPS), known)
    if options.check:
        differences = compare(read_table()["entries"], entries, options.chip or list(CHIPS))
        print("\n".join([*differences, f"{len(entries)} specialisations, {len(differences)} differences"]))
        if differences:
            raise SystemExit(ERROR_EXIT_CODE)
        return
    write_table(entries)
    print(f"written: {TABLE}, {len(entries)} specialisations")


def refuse_partial_write(chips: Sequence[str] | None) -> None:
    if chips:
        raise ValueError("--chip goes with --check or --roofline: the table is written for all chips at once")


def _parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python -m kernels.bench.compiled", description=__doc__)
    result.add_argument("--check", action="store_true", help="compare with the table instead of writing it")
    result.add_argument(
        "--chip", action="append", choices=CHIPS, help="with --check or --roofline: only this chip, repeatable"
    )
    result.add_argument("--anew", action="store_true", help="compile what has not changed since the table, too")
    result.add_argument("--roofline", action="store_true", help="print estimates made from the table; compiles nothing")
    return result


def kernel_modules() -> list[ModuleType]:
    """Every kernels/<operation>/kernel.py that lists specialisations."""
    root = Path(__file__).parents[1]
    names = sorted(f"kernels.{path.parent.name}.kernel" for path in root.glob("*/kernel.py"))
    modules = [importlib.import_module(name) for name in names]
    return [module for module in modules if hasattr(module, "specialisations")]


def every_specialisation(chips: Sequence[str]) -> Iterator[tuple[str, str, Specialisation]]:
    """(key, chip, specialisation), each once; two of one key that differ are a bug of the names."""
    seen: dict[str, str] = {}
    for chip in chips:
        for dtype_name, dtype in DTYPES.items():
            for dim in DIMS:
                for module in kernel_modules():
                    for one in module.specialisations(chip, dtype, dim):
                        key = f"{chip}/{dtype_name}/{dim}/{variant(one)}"
                        if key not in seen:
                            seen[key] = digest(one)
                            yield key, chip, one
                        assert seen[key] == digest(one), f"{key} names two different specialisations"


def variant(one: Specialisation) -> str:
    """kernel[FLAG,NAME=value,...]: what tells a kernel's specialisations apart, blocks left out."""
    parts = []
    for name, value in one.constexprs.items():
        if isinstance(value, bool):
            parts += [name] if value and name not in UNNAMED else []
        elif name not in UNNAMED and not name.startswith("BLOCK"):
            parts.append(f"{name}={value}")
    return f"{one.kernel}[{','.join(parts)}]"


def digest(one: Specialisation) -> str:
    """Changes with anything that decides the compiled code: source of the kernel and of what it calls, constants,
    types."""
    settings = {
        "source": sorted(_sources(one.function).items()),
        "signature": one.signature,
        "constexprs": {name: str(value) for name, value in one.constexprs.items()},
        "aligned": sorted(one.aligned),
        "options": [one.num_warps, one.num_stages, one.options],
        "triton": triton.__version__,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


@functools.cache
def _sources(function: triton.JITFunction) -> dict[str, str]:
    """Syntax trees (comments, docstrings and layout do not count) of a kernel and, by name, of all that it uses."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function.fn)))
    body = tree.body[0].body
    if ast.get_docstring(tree.body[0]) is not None:
        del body[0]
    found = {function.fn.__name__: ast.dump(tree)}
    for node in ast.walk(tree):
        value = function.fn.__globals__.get(node.id) if isinstance(node, ast.Name) else None
        if isinstance(value, triton.JITFunction):
            if value is not function:
                found |= _sources(value)
        elif isinstance(value, triton.language.constexpr):
            found[node.id] = repr(value.value)
    return found


def compile_all(chips: Sequence[str], known: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Table entries by key. Those of `known` stand for what their digests say has not changed. Prints how far it is."""
    wanted = list(every_specialisation(chips))
    done = {(key.split("/")[0], entry["digest"]): entry for key, entry in known.items()}
    entries = {}
    for number, (key, chip, one) in enumerate(wanted, 1):
        identity = (chip, digest(one))
        if identity not in done:
            done[identity] = measure(one, chip)
            print(f"{number}/{len(wanted)} {key}", file=sys.stderr, flush=True)
        entries[key] = done[identity]
    return entries


def measure(one: Specialisation, chip: str) -> dict[str, Any]:
    """Compile for the chip and read what the code needs. Special functions and instructions are counted in the text,
    once for a loop."""
    target = CHIPS[chip].target
    names = one.function.arg_names
    source = ASTSource(
        fn=one.function,
        signature={name: one.signature.get(name, "constexpr") for name in names},
        constexprs=dict(one.constexprs),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in one.aligned},
    )
    options = {"num_warps": one.num_warps, "num_stages": one.num_stages, **one.options}
    compiled = triton.compile(source, target=target, options=options)
    read = _read_nvidia if target.backend == "cuda" else _read_amd
    return {
        "digest": digest(one),
        "blocks": [value for name, value in one.constexprs.items() if name.startswith("BLOCK")],
        "warps": one.num_warps,
        "stages": one.num_stages,
        **read(compiled, target),
    }


def _read_nvidia(compiled: Any, target: Any) -> dict[str, Any]:
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        ptx_path, cubin_path = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        ptx_path.write_text(ptx)
        cubin_path.write_bytes(compiled.asm["cubin"])
        architecture = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
        contraction = [] if compiled.metadata.enable_fp_fusion else ["--fmad=false"]
        # As Triton calls it, whose own report is not kept.
        command = [get_ptxas(target.arch).path, "-v", *contraction, "--regAllocOptLevel=2"]
        report = _output_of([*command, f"--gpu-name={architecture}", ptx_path, "-o", "/dev/null"])
        machine_code = _output_of([knobs.nvidia.cuobjdump.path, "-sass", cubin_path])
    stores, loads = map(int, re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report).groups())
    return {
        "registers": int(re.search(r"Used (\d+) registers", report)[1]),
        "spill_bytes": stores + loads,
        "shared_bytes": compiled.metadata.shared,
        **_count(ptx, machine_code, r"^\s+/\*[0-9a-f]{4,}\*/\s+\S", "cuda"),
    }


def _read_amd(compiled: Any, target: Any) -> dict[str, Any]:
    assembly = compiled.asm["amdgcn"]

    def note(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])

    return {
        # Matrix accumulators lie in the same file on this chip, and are part of the count.
        "registers": note("vgpr_count"),
        "spill_bytes": 4 * note("vgpr_spill_count") + note("private_segment_fixed_size"),
        # Kept in lanes of vector registers: two instructions each, and no memory.
        "parked_scalars": note("sgpr_spill_count"),
        "shared_bytes": note("group_segment_fixed_size") or compiled.metadata.shared,
        **_count(assembly, assembly, r"^\t[a-z]\w+", "hip"),
    }


def _count(text: str, machine_code: str, instruction: str, backend: str) -> dict[str, Any]:
    matrix = re.findall(MATRIX_INSTRUCTIONS[backend], text)
    return {
        "matrix": sorted(set(matrix)),
        "matrix_count": len(matrix),
        "special_count": len(re.findall(SPECIAL_FUNCTIONS[backend], machine_code)),
        "instruction_count": len(re.findall(instruction, machine_code, re.MULTILINE)),
    }


def _output_of(command: Sequence[Any]) -> str:
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{command[0]} failed: {run.stderr.strip()}")
    return run.stdout + run.stderr


def read_table() -> dict[str, Any]:
    """{"triton": version, "entries": {key: entry}}."""
    if not TABLE.exists():
        raise FileNotFoundError(f"{TABLE} is missing: write it with python -m kernels.bench.compiled")
    return json.loads(TABLE.read_text())


def write_table(entries: dict[str, dict[str, Any]]) -> None:
    """One line an entry, sorted, so that a change shows as the lines that changed."""
    lines = [f"  {json.dumps(key)}: {json.dumps(entries[key], sort_keys=True)}" for key in sorted(entries)]
    body = ",\n".join(lines)
    TABLE.write_text(f'{{\n "triton": {json.dumps(triton.__version__)},\n "entries": {{\n{body}\n }}\n}}\n')


def compare(recorded: dict[str, Any], compiled: dict[str, Any], chips: Sequence[str]) -> list[str]:
    """A line for every entry that is missing, superfluous or different."""
    recorded = {key: entry for key, entry in recorded.items() if key.split("/")[0] in chips}
    lines = [f"not in the table: {key}" for key in sorted(compiled.keys() - recorded.keys())]
    lines += [f"no longer compiled: {key}" for key in sorted(recorded.keys() - compiled.keys())]
    for key in sorted(compiled.keys() & recorded.keys()):
        changed = {
            name: (recorded[key].get(name), value)
            for name, value in compiled[key].items()
            if recorded[key].get(name) != value
        }
        if changed:
            lines.append(f"changed: {key}: " + ", ".join(f"{n} {old} -> {new}" for n, (old, new) in changed.items()))
    return lines


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR_EXIT_CODE)
