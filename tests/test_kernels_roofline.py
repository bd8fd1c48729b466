"""The arithmetic of the estimates, against calculations by hand."""

import pytest

from kernels.bench import compiled, roofline
from kernels.bench.chips import CHIPS

KIB = 1024


def entry_with(**changes):
    entry = {
        "blocks": [128, 128, 64],
        "warps": 8,
        "registers": 128,
        "shared_bytes": 96 * KIB,
        "matrix": ["wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16"],
        "special_count": 128,
        "instruction_count": 2304,
    }
    return entry | changes


@pytest.mark.parametrize(
    ("chip", "changes", "expected"),
    [
        # 128 registers * 256 threads = 32768 of 65536; 2 * 97 KiB of 228.
        ("sm_90", {}, (2, "registers")),
        # 129 registers are given out as 136.
        ("sm_90", {"registers": 129}, (1, "registers")),
        # 65536 / (40 * 256) = 6 programs by registers; 228 / (50 + 1) = 4 by shared memory.
        ("sm_90", {"registers": 40, "shared_bytes": 50 * KIB}, (4, "shared memory")),
        # 164 / 97 = 1 on an A100.
        ("sm_80", {}, (1, "shared memory")),
        ("sm_90", {"registers": 16, "shared_bytes": 0}, (8, "threads")),
        ("sm_90", {"registers": 16, "shared_bytes": 0, "warps": 1}, (32, "programs")),
        # 512 registers of each of four SIMDs of 64 lanes: 131072; 8 waves of 64 lanes * 64 registers = 32768.
        ("gfx942", {"registers": 64, "shared_bytes": 16 * KIB}, (4, "registers")),
        ("gfx942", {"registers": 64, "shared_bytes": 64 * KIB}, (1, "shared memory")),
    ],
)
def test_programs_on_a_processor(chip, changes, expected):
    assert roofline.programs_per_processor(entry_with(**changes), CHIPS[chip]) == expected


def test_work_of_a_tile_of_cosines_by_hand():
    work = roofline.work_of("sm_90/bf16/768/sigmoid_negative_sum[TERMS=8,PRECISION=ieee]", entry_with())
    # 2 * 128 * 128 * 768 FLOP; 256 rows of 768 bfloat16 numbers.
    assert (work.useful_flop, work.executed_flop) == (25_165_824, 25_165_824)
    assert (work.cache_bytes, work.memory_bytes) == (393_216, 0)


def test_work_of_stored_weights_by_hand():
    key = "sm_90/bf16/768/sigmoid_weights[SPLIT,PRECISION=ieee]"
    work = roofline.work_of(key, entry_with())
    # Two bfloat16 numbers for each of 16384 weights.
    assert work.memory_bytes == 65_536
    assert work.cache_bytes == 393_216 + 65_536


def test_float16_rows_have_float32_weights_and_their_products_the_rate_of_tf32():
    work = roofline.work_of("sm_90/fp16/768/sigmoid_weights[PRECISION=ieee]", entry_with())
    assert work.memory_bytes == 4 * 128 * 128
    assert work.cache_bytes == 393_216 + 4 * 128 * 128
    settings = {"blocks": [128, 64, 32]}
    halves = roofline.estimate("sm_90/fp16/512/add_products[PRECISION=tf32]", entry_with(**settings))
    singles = roofline.estimate("sm_90/fp32/512/add_products[PRECISION=tf32]", entry_with(**settings))
    assert halves.matrix_clocks == singles.matrix_clocks


def test_the_top_k_forms_two_products_a_tile():
    work = roofline.work_of("sm_90/bf16/512/topk_sweep[PRECISION=ieee]", entry_with())
    assert work.useful_flop == 2 * (2 * 128 * 128 * 512)
    assert work.cache_bytes == 2 * (256 * 512 * 2)


def test_three_passes_of_tf32_are_executed_and_one_is_useful():
    key = "sm_90/fp32/64/sigmoid_negative_sum[TERMS=8,PRECISION=tf32x3]"
    work = roofline.work_of(key, entry_with(blocks=[128, 64, 32]))
    assert work.useful_flop == 2 * 128 * 64 * 64
    assert work.executed_flop == 3 * work.useful_flop
    assert work.cache_bytes == (128 + 64) * 64 * 4


def test_work_of_the_product_by_hand():
    key = "sm_90/bf16/640/add_products[SPLIT,PRECISION=ieee]"
    work = roofline.work_of(key, entry_with(blocks=[128, 256, 32]))
    # D = 640 in three blocks of 256, a sixth of them empty; the sum runs over 8192 columns; weights are two numbers.
    useful_columns = 640 / 3
    assert work.useful_flop == pytest.approx(2 * 128 * useful_columns * 8192)
    assert work.executed_flop == 2 * 128 * 256 * 8192 * 2
    weight_bytes, result_bytes = 128 * 8192 * 2 * 2, 128 * useful_columns * 8
    assert work.cache_bytes == pytest.approx(weight_bytes + useful_columns * 8192 * 2 + result_bytes)
    assert work.memory_bytes == pytest.approx(weight_bytes / 3 + result_bytes)


def test_estimate_by_hand_for_an_h100():
    one = roofline.estimate("sm_90/bf16/768/sigmoid_negative_sum[TERMS=8,PRECISION=ieee]", entry_with())
    # 989.4e12 / (132 * 1.83e9) = 4095.9 FLOP a clock and processor.
    assert one.matrix_clocks == pytest.approx(25_165_824 / 4095.88, rel=1e-4)
    assert one.cache_clocks == 393_216 / 38
    # 128 special functions by each of 256 lanes, 16 a clock; 2304 instructions by 256 lanes, 128 a clock.
    assert (one.special_clocks, one.issue_clocks) == (2048, 4608)
    # Two programs share a processor: the slowest of these alone counts, here the bytes.
    assert (one.programs, one.slowest) == (2, "cache")
    assert one.busy == pytest.approx(one.matrix_clocks / one.cache_clocks)
    assert one.useful_tflops == pytest.approx(989.4 * one.busy, rel=1e-6)
    # m64n128k16 is 262144 FLOP: 96 of them.
    assert one.matrix_instructions == 96


def test_a_program_alone_waits_for_its_own_arithmetic():
    one = roofline.estimate("sm_90/bf16/768/sigmoid_negative_sum[TERMS=8,PRECISION=ieee]", entry_with(registers=200))
    assert one.programs == 1
    assert one.busy == pytest.approx(one.matrix_clocks / (one.cache_clocks + 4608))


@pytest.mark.parametrize(
    ("instruction", "flop"),
    [
        ("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16", 2 * 64 * 256 * 16),
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", 2 * 16 * 8 * 16),
        ("v_mfma_f32_32x32x8_bf16", 2 * 32 * 32 * 8),
        ("v_mfma_f32_32x32x2_f32", 2 * 32 * 32 * 2),
        ("tcgen05.mma.cta_group::1.kind::f16", None),
    ],
)
def test_flop_of_a_matrix_instruction_by_its_name(instruction, flop):
    assert roofline.flop_of(instruction) == flop


def test_peaks_agree_with_clock_and_width_of_the_matrix_units():
    # Dense bfloat16 FLOP a clock and processor, from the makers' architecture papers.
    for name, flop in {"sm_80": 2048, "sm_90": 4096, "gfx942": 2048}.items():
        chip = CHIPS[name]
        peak = flop * chip.num_processors * chip.clock_ghz / 1e3
        assert chip.matrix_tflops["bf16"] == pytest.approx(peak, rel=0.01)


def test_every_kernel_of_the_table_has_an_estimate_that_is_marked_as_one():
    table = compiled.read_table()
    for key, entry in table["entries"].items():
        if roofline.kernel_of(key)[3] not in roofline.WITHOUT_PRODUCT:
            assert 0 < roofline.estimate(key, entry).busy <= 1, key
    text = roofline.estimates_table(table)
    assert text.startswith("ESTIMATE from compiled code")
    assert "not a measurement" in text.splitlines()[0]
    for chip in CHIPS.values():
        assert chip.board in text


def test_an_unknown_kernel_is_refused():
    with pytest.raises(ValueError, match="no arithmetic for kernel 'other'"):
        roofline.work_of("sm_90/bf16/64/other[PRECISION=ieee]", entry_with())
