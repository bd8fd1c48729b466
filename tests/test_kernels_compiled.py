"""The table of what every Triton kernel compiles to: complete, up to date, within every chip's limits."""

import re
import subprocess
import sys

import pytest
import torch
import triton

from kernels.bench import compiled
from kernels.bench.chips import CHIPS
from kernels.launch import Specialisation

KIB = 1024
# Per program, from the makers' programming guides; `chips.py` must not grow beyond them.
SHARED_LIMITS = {"sm_80": 163 * KIB, "sm_90": 227 * KIB, "sm_100": 227 * KIB, "gfx942": 64 * KIB}
EXPECTED_MATRIX = {
    ("sm_80", "bf16"): r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16\.bf16\.f32",
    ("sm_90", "bf16"): r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.bf16\.bf16",
    ("sm_100", "bf16"): r"tcgen05\.mma\.cta_group::1\.kind::f16",
    ("gfx942", "bf16"): r"v_mfma_f32_32x32x8_bf16",
    ("sm_80", "fp16"): r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.f16\.f16\.f32",
    ("sm_90", "fp16"): r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.f16\.f16",
    ("sm_100", "fp16"): r"tcgen05\.mma\.cta_group::1\.kind::f16",
    ("gfx942", "fp16"): r"v_mfma_f32_32x32x8_f16",
    # float32 rows: one or three TF32 products on NVIDIA, a float32 product on AMD.
    ("sm_80", "fp32"): r"mma\.sync\.aligned\.m16n8k8\.row\.col\.f32\.tf32\.tf32\.f32",
    ("sm_90", "fp32"): r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k8\.f32\.tf32\.tf32",
    ("sm_100", "fp32"): r"tcgen05\.mma\.cta_group::1\.kind::tf32",
    ("gfx942", "fp32"): r"v_mfma_f32_32x32x2_f32",
}
KERNELS_WITHOUT_PRODUCT = ("merge", "exact")


@pytest.fixture(scope="module")
def table():
    return compiled.read_table()


def kernel_named(key: str) -> str:
    return key.split("/")[-1].split("[")[0]


def test_table_covers_exactly_the_specialisations_that_exist(table):
    digests = {key: compiled.digest(one) for key, _, one in compiled.every_specialisation(list(CHIPS))}
    recorded = {key: entry["digest"] for key, entry in table["entries"].items()}
    changed = {key for key in digests.keys() | recorded.keys() if digests.get(key) != recorded.get(key)}
    assert not changed, (
        f"run python -m kernels.bench.compiled: {len(changed)} entries are out of date: {sorted(changed)[:5]}"
    )
    assert table["triton"] == triton.__version__


def test_table_covers_every_chip_dtype_and_width(table):
    places = {tuple(key.split("/")[:3]) for key in table["entries"]}
    assert places == {
        (chip, dtype, dim)
        for chip in ("sm_80", "sm_90", "sm_100", "gfx942")
        for dtype in ("bf16", "fp16", "fp32")
        for dim in ("64", "512", "640", "768", "1024", "1152")
    }


def test_no_kernel_spills(table):
    assert not {key: entry["spill_bytes"] for key, entry in table["entries"].items() if entry["spill_bytes"]}


def test_scalars_parked_in_vector_registers_are_recorded_apart(table):
    # AMD's compiler keeps them in lanes of vector registers: no memory is involved, which `spill_bytes` proves.
    assert all(("parked_scalars" in entry) == key.startswith("gfx") for key, entry in table["entries"].items())


def test_shared_memory_is_within_every_chips_limit(table):
    assert {name: chip.shared_limit_bytes for name, chip in CHIPS.items()} == SHARED_LIMITS
    over = {key for key, entry in table["entries"].items() if entry["shared_bytes"] > SHARED_LIMITS[key.split("/")[0]]}
    assert not over


def test_every_product_runs_on_matrix_units(table):
    for key, entry in table["entries"].items():
        chip, dtype, *_ = key.split("/")
        if kernel_named(key) in KERNELS_WITHOUT_PRODUCT:
            assert entry["matrix"] == [], key
            continue
        assert entry["matrix_count"] >= 1, key
        # float16's weights are float32 numbers.
        operand = "fp32" if dtype == "fp16" and kernel_named(key) == "add_products" else dtype
        for instruction in entry["matrix"]:
            assert re.fullmatch(EXPECTED_MATRIX[chip, operand], instruction), key


def test_every_kernel_module_is_found():
    names = {module.__name__ for module in compiled.kernel_modules()}
    assert names == {"kernels.contrastive.kernel", "kernels.sigmoid.kernel", "kernels.topk.kernel"}


# One of each shape of code: bounds, weights split in halves, a product read the other way, a reduction, and AMD's.
THINNED = [
    "sm_80/fp32/640/topk_sweep[PRECISION",
    "sm_90/bf16/768/weights[WANT_SCALE,WANT_WEIGHTS,SPLIT",
    "sm_90/bf16/512/add_products[TRANSPOSED,SPLIT",
    "sm_100/bf16/1024/statistics[PRECISION",
    "gfx942/bf16/1152/sigmoid_weights",
]


@pytest.mark.parametrize("prefix", THINNED)
def test_compiling_anew_gives_the_recorded_numbers(prefix, table, tmp_path, monkeypatch):
    # A cache of earlier compilations would answer in place of the compiler.
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    chips = [prefix.split("/")[0]]
    key, chip, one = next(found for found in compiled.every_specialisation(chips) if found[0].startswith(prefix))
    assert compiled.measure(one, chip) == table["entries"][key]


@triton.jit
def _double(x_ptr, out_ptr, BLOCK: triton.language.constexpr):
    """Once."""
    offsets = triton.language.arange(0, BLOCK)
    triton.language.store(out_ptr + offsets, 2 * triton.language.load(x_ptr + offsets))


def double_with(block: int, **changes) -> Specialisation:
    settings = {
        "kernel": "double",
        "function": _double,
        "signature": {"x_ptr": "*fp32", "out_ptr": "*fp32"},
        "constexprs": {"BLOCK": block},
        "aligned": ("x_ptr", "out_ptr"),
        "num_warps": 4,
        "num_stages": 1,
    }
    return Specialisation(**settings | changes)


def test_digest_changes_with_blocks_warps_and_types_only():
    digests = {
        compiled.digest(double_with(128)),
        compiled.digest(double_with(256)),
        compiled.digest(double_with(128, num_warps=8)),
        compiled.digest(double_with(128, aligned=())),
        compiled.digest(double_with(128, signature={"x_ptr": "*bf16", "out_ptr": "*fp32"})),
        compiled.digest(double_with(128, options={"enable_fp_fusion": False})),
    }
    assert len(digests) == 6
    assert compiled.digest(double_with(128)) == compiled.digest(double_with(128, kernel="another name"))


def test_digest_follows_the_functions_that_a_kernel_calls():
    from kernels.sigmoid import kernel

    assert {"negative_sum_kernel", "_logit_tile", "_log1p", "cosine_tile"} <= set(
        compiled._sources(kernel.negative_sum_kernel)
    )


def test_a_kernel_without_product_has_no_matrix_instruction(tmp_path, monkeypatch):
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    entry = compiled.measure(double_with(1024), "sm_90")
    assert (entry["matrix"], entry["matrix_count"], entry["spill_bytes"], entry["shared_bytes"]) == ([], 0, 0, 0)
    assert entry["registers"] < 64
    assert entry["instruction_count"] > 4


def test_differences_are_named():
    recorded = {"sm_80/a": {"registers": 10}, "sm_80/b": {"registers": 10}, "sm_90/c": {"registers": 10}}
    lines = compiled.compare(recorded, {"sm_80/b": {"registers": 12}, "sm_80/d": {"registers": 1}}, ["sm_80"])
    assert lines == [
        "not in the table: sm_80/d",
        "no longer compiled: sm_80/a",
        "changed: sm_80/b: registers 10 -> 12",
    ]
    assert compiled.compare(recorded, {"sm_80/a": recorded["sm_80/a"], "sm_80/b": recorded["sm_80/b"]}, ["sm_80"]) == []


def test_the_table_is_written_one_line_an_entry_and_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "TABLE", tmp_path / "compiled.json")
    entries = {"b": {"registers": 2, "blocks": [1]}, "a": {"registers": 1}}
    compiled.write_table(entries)
    assert compiled.read_table() == {"triton": triton.__version__, "entries": entries}
    lines = (tmp_path / "compiled.json").read_text().splitlines()
    assert lines[3].startswith('  "a"')
    assert lines[4].startswith('  "b"')


def test_a_missing_table_names_its_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "TABLE", tmp_path / "compiled.json")
    with pytest.raises(FileNotFoundError, match=r"compiled\.json is missing: write it with python -m"):
        compiled.read_table()


def test_writing_one_chips_part_is_refused_in_one_line():
    run = subprocess.run(
        [sys.executable, "-m", "kernels.bench.compiled", "--chip", "sm_999"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    with pytest.raises(ValueError, match="--chip goes with --check or --roofline"):
        compiled.refuse_partial_write(["sm_80"])


def test_float64_compiles_too():
    from kernels.sigmoid import kernel

    one = kernel.specialisations("sm_90", torch.float64, 123)[0]
    assert compiled.measure(one, "sm_90")["spill_bytes"] == 0
