"""The product top-k: blockwise against its float64 definition and a per-pair loop, whatever the tiles, and bad
input."""

import dataclasses
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F

from kernels import product_topk
from kernels.topk import TopK
from kernels.topk.blockwise import Tiles, product_topk_blockwise
from kernels.topk.function import OPERATION
from kernels.topk.operands import base_operand, query_operand, screening_product
from kernels.topk.problem import Problem


def unit_rows(num_rows: int, dim: int, *, seed: int, dtype: torch.dtype = torch.float16, spread: float = 1.0):
    """Rows around a common direction, so that most cosines are positive."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(1, dim, generator=generator)
    return F.normalize(common + spread * torch.randn(num_rows, dim, generator=generator), dim=1).to(dtype)


def towers(num_rows: int, *, dtype: torch.dtype = torch.float16, spread: float = 1.0) -> list[torch.Tensor]:
    return [
        unit_rows(num_rows, 24, seed=1, dtype=dtype, spread=spread),
        unit_rows(num_rows, 17, seed=2, dtype=dtype, spread=spread),
    ]


def search(base: list[torch.Tensor], queries: torch.Tensor, k: int, **settings):
    return product_topk(base[0][queries], base[1][queries], *base, k, query_ids_Q=queries, **settings)


def assert_equal(found, expected) -> None:
    for field in dataclasses.fields(TopK):
        name = field.name
        value, wanted = getattr(found, name), getattr(expected, name)
        assert value.dtype == wanted.dtype
        assert value.equal(wanted), name


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
def test_result_equals_a_loop_over_all_pairs(backend):
    image, text = towers(30)
    image[7], text[9], text[11] = image[3], text[3], text[3]
    image_group, text_group = torch.arange(30), torch.arange(30)
    image_group[7], text_group[9] = 3, 3
    groups = {
        "image_group_Q": image_group,
        "image_group_N": image_group,
        "text_group_Q": text_group,
        "text_group_N": text_group,
    }
    found = search(
        [image, text], torch.arange(30), 6, text_ceiling=0.99, image_ceiling=0.9, floor=0.1, backend=backend, **groups
    )
    for query in range(30):
        candidates, excluded = [], 0
        for other in range(30):
            s_image = sum(a * b for a, b in zip(image[query].tolist(), image[other].tolist(), strict=True))
            s_text = sum(a * b for a, b in zip(text[query].tolist(), text[other].tolist(), strict=True))
            same = image_group[query] == image_group[other] or text_group[query] == text_group[other]
            if other == query:
                continue
            if same or s_image > 0.9 or s_text > 0.99:
                excluded += 1
            elif max(s_image, 0) * max(s_text, 0) > 0.1:
                candidates.append((-max(s_image, 0) * max(s_text, 0), other, s_image, s_text))
        candidates = sorted(candidates)[:6]
        assert found.num_excluded_Q[query] == excluded
        assert found.ids_QK[query].tolist() == [other for _, other, _, _ in candidates] + [-1] * (6 - len(candidates))
        for column, place in (("image_similarity_QK", 2), ("text_similarity_QK", 3)):
            expected = [candidate[place] for candidate in candidates] + [0.0] * (6 - len(candidates))
            assert getattr(found, column)[query].tolist() == pytest.approx(expected, abs=1e-15)
    assert found.num_excluded_Q.sum() >= 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("k", [1, 7, 100, 400])
@pytest.mark.parametrize("limits", [{}, {"image_ceiling": 0.8, "text_ceiling": 0.75, "floor": 0.2}])
def test_blockwise_equals_the_definition(dtype, k, limits):
    base = towers(300, dtype=dtype)
    queries = torch.arange(5, 300, 7)
    groups = torch.arange(300) // 3
    settings = {"text_group_Q": groups[queries], "text_group_N": groups, **limits}
    expected = search(base, queries, k, backend="reference", **settings)
    found = search(base, queries, k, backend="blockwise", **settings)
    assert found.ids_QK.equal(expected.ids_QK)
    assert found.num_excluded_Q.equal(expected.num_excluded_Q)
    for name in ("image_similarity_QK", "text_similarity_QK"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=1e-15)


@pytest.mark.parametrize("tiles", [(64, 64, 3), (20, 7, 16), (58, 64, 100), (5, 1000, 33)])
@pytest.mark.parametrize("k", [2, 30])
def test_any_tiling_gives_the_same_bits(tiles, k):
    base = towers(230)
    queries, groups = torch.arange(0, 230, 4), torch.arange(230) // 2
    rows = tuple(tower[queries] for tower in base)
    problem = Problem(rows, tuple(base), k, queries, (None, (groups[queries], groups)), (0.9, 0.9), 0.01)
    answer, excluded = product_topk_blockwise(problem)
    found, found_excluded = product_topk_blockwise(problem, Tiles(tiles[0], tiles[1], tiles[2]))
    for value, wanted in zip(found.columns(), answer.columns(), strict=True):
        assert value.equal(wanted)
    assert found_excluded.num_excluded_QC.equal(excluded.num_excluded_QC)
    assert found_excluded.excluded_example_QC.equal(excluded.excluded_example_QC)


def test_large_random_search_is_exact_through_many_tiles():
    base = [unit_rows(9000, 48, seed=seed, spread=2.0) for seed in (1, 2)]
    queries = torch.arange(0, 9000, 60)
    assert_equal(search(base, queries, 50, backend="blockwise"), search(base, queries, 50, backend="reference"))


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
def test_equal_scores_are_ordered_by_lower_id(backend):
    row = torch.tensor([[1.0, 0.0]])
    base = [row.repeat(700, 1).half(), row.repeat(700, 1).half()]
    found = search(base, torch.tensor([0, 3, 699]), 5, backend=backend)
    assert found.ids_QK.tolist() == [[1, 2, 3, 4, 5], [0, 1, 2, 4, 5], [0, 1, 2, 3, 4]]


def test_a_base_of_equal_rows_stays_within_its_memory():
    row = torch.tensor([[1.0, 0.0]])
    base = [row.repeat(20000, 1).half()] * 2
    problem = Problem((base[0][:64], base[1][:64]), tuple(base), 4, torch.arange(64))
    assert product_topk_blockwise(problem, Tiles(base_tile=512))[0].ids_QK[0].tolist() == [1, 2, 3, 4]


def hostile_towers(num_rows: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Zeros, tiny and huge norms, opposite and equal rows among ordinary ones; similarities far apart between the towers."""
    towers_of = [
        unit_rows(num_rows, 40, seed=1, dtype=torch.float64, spread=0.3),
        unit_rows(num_rows, 23, seed=2, dtype=torch.float64, spread=4.0),
    ]
    for rows in towers_of:
        rows[::17] = 0
        rows[3::19] *= 2.0**-9
        rows[5::23] *= 200
        rows[7::29] *= -1
        rows[9::31] = rows[9]
    return [rows.to(dtype) for rows in towers_of]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("limits", [{}, {"image_ceiling": 0.9, "text_ceiling": 0.6}])
@pytest.mark.parametrize("k", [3, 60])
def test_rows_of_any_length_are_ranked_as_defined(dtype, limits, k):
    base = hostile_towers(5000, dtype)
    queries = torch.arange(0, 5000, 61)
    settings = {"valid_N": torch.arange(5000) % 11 != 2, **limits}
    found = search(base, queries, k, backend="blockwise", **settings)
    expected = search(base, queries, k, backend="reference", **settings)
    assert found.num_excluded_QC.equal(expected.num_excluded_QC)
    if dtype == torch.float16:
        # Its sums are exact, and so are ties.
        assert_equal(found, expected)
    else:
        for name in ("image_similarity_QK", "text_similarity_QK"):
            torch.testing.assert_close(
                getattr(found, name).sum(1), getattr(expected, name).sum(1), rtol=1e-12, atol=1e-12
            )


def test_pairs_that_take_no_part_may_hold_nan_and_others_may_not():
    base = towers(300)
    queries = torch.arange(0, 300, 7)
    expected = search(base, queries, 5, backend="blockwise", valid_N=torch.arange(300) != 33)
    for rows in base:
        rows[33] = torch.nan
    assert_equal(search(base, queries, 5, backend="blockwise", valid_N=torch.arange(300) != 33), expected)
    with pytest.raises(ValueError, match="base image features must be finite unit rows, but row 33 holds"):
        search(base, queries, 5, backend="blockwise")


@pytest.mark.parametrize("scale", [1.0, 0.02])
def test_screening_product_is_positive_wherever_the_sum_of_cosines_reaches_the_limit(scale):
    query, base = hostile_towers(300, torch.float32), hostile_towers(300, torch.float32)
    scales = (torch.full((300,), 1 / scale), torch.full((300,), scale))
    operands = query_operand(query, scales), base_operand(base, 4)
    exact = [rows.double() @ other.double().T for rows, other in zip(query, base, strict=True)]
    total = exact[0] / torch.tensor(scale).double() + exact[1] * torch.tensor(scale).double()
    for column in range(0, 300, 3):
        # Each query's limit is what one base row reaches to the last bit, where that is no negative number.
        operands[0].set_limit((total[:, column] * (1 - 2.0**-23)).clamp(min=0))
        product = torch.empty(300, len(operands[1].rows_BE), dtype=torch.bfloat16)
        screening_product(operands[0].rows_BE, operands[1].rows_BE, product)
        place = column % 4 * (len(operands[1].rows_BE) // 4) + column // 4
        assert (product[total[:, column] > 0, place] > 0).all()


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
def test_two_dissimilarities_make_no_pair(backend):
    image = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.6, 0.8]])
    found = search([image, image], torch.tensor([0]), 2, backend=backend)
    assert found.ids_QK.tolist() == [[2, -1]]
    assert found.image_similarity_QK.tolist() == [[pytest.approx(0.6), 0.0]]


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
def test_a_query_from_elsewhere_excludes_nobody_as_itself(backend):
    base = towers(20)
    found = product_topk(base[0][4:5], base[1][4:5], *base, 3, query_ids_Q=torch.tensor([-1]), backend=backend)
    assert found.ids_QK[0, 0] == 4


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
def test_no_queries_and_no_base_give_empty_answers(backend):
    base = towers(20)
    assert search(base, torch.zeros(0, dtype=torch.int64), 3, backend=backend).ids_QK.shape == (0, 3)
    empty = [rows[:0] for rows in base]
    found = product_topk(base[0][:2], base[1][:2], *empty, 3, query_ids_Q=torch.tensor([-1, -1]), backend=backend)
    assert found.ids_QK.tolist() == [[-1] * 3] * 2


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
@pytest.mark.parametrize("spread", [1.0, 3.0])
def test_search_in_parts_of_the_base_goes_on_from_the_score_reached(backend, spread):
    base = towers(90, spread=spread)
    queries = torch.arange(0, 90, 3)
    whole = search(base, queries, 12, backend="reference")
    ids, score = torch.zeros(30, 0, dtype=torch.int64), torch.zeros(30, 0, dtype=torch.float64)
    floor, listed = torch.zeros(30, dtype=torch.float64), 0
    for start in range(0, 90, 30):
        part = [rows[start : start + 30] for rows in base]
        own = torch.where((queries >= start) & (queries < start + 30), queries - start, -1)
        found = product_topk(
            base[0][queries], base[1][queries], *part, 12, query_ids_Q=own, floor=floor, backend=backend
        )
        listed += int((found.ids_QK >= 0).sum())
        ids = torch.cat([ids, found.ids_QK.where(found.ids_QK < 0, found.ids_QK + start)], dim=1)
        score = torch.cat([score, found.image_similarity_QK * found.text_similarity_QK], dim=1)
        score, order = score.sort(dim=1, descending=True, stable=True)
        ids, score = ids.gather(1, order)[:, :12], score[:, :12]
        floor = score[:, -1].contiguous()
    assert ids.equal(whole.ids_QK)
    # Without the floor every part would list twelve for nearly every query.
    assert listed < 3 * 30 * 12 * 0.8


def every_setting(num_rows: int) -> dict[str, Any]:
    groups = torch.arange(num_rows) // 3
    return {
        "image_group_Q": groups,
        "image_group_N": groups,
        "text_group_Q": groups // 2,
        "text_group_N": groups // 2,
        "image_ceiling": 0.8,
        "text_ceiling": 0.75,
        "floor": torch.full((num_rows,), 0.1, dtype=torch.float64),
        "valid_N": torch.arange(num_rows) % 7 != 3,
    }


@pytest.mark.parametrize(("mode", "with_settings"), [(torch.inference_mode, False), (torch.enable_grad, True)])
def test_a_model_around_it_compiles_to_one_graph_with_the_same_bits(with_settings, mode):
    torch._dynamo.reset()

    def mine(image, text, settings):
        """Something before and after the search, for torch.compile to work on."""
        base = [F.normalize(rows.float(), dim=1).half() for rows in (image, text)]
        found = product_topk(*base, *base, 5, query_ids_Q=torch.arange(len(image)), **settings)
        return dataclasses.replace(found, image_similarity_QK=2 * found.image_similarity_QK)

    compiled = torch.compile(mine, fullgraph=True, backend="aot_eager", dynamic=True)
    for num_rows in (40, 63):
        image, text = (rows.float().requires_grad_() for rows in towers(num_rows))
        settings = every_setting(num_rows) if with_settings else {}
        with mode():
            found, expected = compiled(image, text, settings), mine(image, text, settings)
        assert_equal(found, expected)
        assert not found.image_similarity_QK.requires_grad
        assert (found.num_excluded_Q.sum() > 0) == with_settings


@pytest.mark.parametrize("with_settings", [False, True])
@pytest.mark.parametrize("backend", ["reference", "blockwise"])
def test_torch_finds_nothing_wrong_with_the_operation(backend, with_settings):
    base = towers(30)
    values = every_setting(30) if with_settings else dict.fromkeys(every_setting(30))
    groups = [values[name] for name in ("image_group_Q", "image_group_N", "text_group_Q", "text_group_N")]
    limits = [values["image_ceiling"] or 1.0, values["text_ceiling"] or 1.0, 0.0, values["floor"], values["valid_N"]]
    verdict = torch.library.opcheck(OPERATION, (*base, *base, 4, torch.arange(30), *groups, *limits, backend))
    assert set(verdict.values()) == {"SUCCESS"}


def test_autocast_around_the_call_changes_no_bit():
    base = towers(60, dtype=torch.float32)
    expected = search(base, torch.arange(60), 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal(search(base, torch.arange(60), 5), expected)


def test_matrix_precision_is_as_before_afterwards():
    search(towers(20), torch.arange(20), 3, backend="blockwise")
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, "k=0 must be an int of at least 1"),
        ({"floor": 1.0}, r"floor=1.0 .* must lie in \[0, 1\)"),
        ({"floor": torch.zeros(3, dtype=torch.float64)}, "float64 with one for each of 4 queries"),
        ({"floor": torch.full((4,), -0.1, dtype=torch.float64)}, "floor holds a negative number"),
        ({"image_ceiling": 0.0}, r"image_ceiling=0.0 .* must lie in \(0, 1\]"),
        ({"text_ceiling": 1.5}, "text_ceiling=1.5"),
        ({"query_ids_Q": torch.arange(3)}, "rows do not match"),
        ({"query_ids_Q": torch.arange(4).int()}, "query_ids_Q must be an int64 vector"),
        ({"image_group_Q": torch.arange(4)}, "image_group_Q and image_group_N belong together"),
        ({"text_group_Q": torch.arange(4), "text_group_N": torch.arange(19)}, "group numbers need one for each pair"),
        ({"backend": "faiss"}, "backend='faiss' must be one of"),
        ({"query_image_QD": torch.zeros(4, 25).half()}, "matrices of one width"),
        ({"query_image_QD": torch.zeros(4, 24)}, "share one floating dtype"),
        (
            {"query_image_QD": torch.full((4, 24), torch.nan).half()},
            "query image features must be finite unit rows, but row 0 holds",
        ),
    ],
)
def test_bad_input_is_refused_with_its_name_and_remedy(changes, message):
    base = towers(20)
    arguments = {
        "query_image_QD": base[0][:4],
        "query_text_QD": base[1][:4],
        "base_image_ND": base[0],
        "base_text_ND": base[1],
        "k": 3,
        "query_ids_Q": torch.arange(4),
        "backend": "blockwise",
        **changes,
    }
    with pytest.raises(ValueError, match=message):
        product_topk(**arguments)
