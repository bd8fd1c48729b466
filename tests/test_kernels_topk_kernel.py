"""The product top-k's Triton sweep under the interpreter: equal to the float64 definition, whatever the shapes, blocks and
buffers."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from kernels.topk import TopK, product_topk
from tests.interpreted import interpreted


def towers(num_rows: int, *, dims=(24, 17), dtype: torch.dtype = torch.float16, spread: float = 1.0):
    """Rows around a common direction, so that most cosines are positive."""
    rows = []
    for seed, dim in enumerate(dims):
        generator = torch.Generator().manual_seed(seed)
        common = torch.randn(1, dim, generator=generator)
        noise = torch.randn(num_rows, dim, generator=generator)
        rows.append(F.normalize(common + spread * noise, dim=1).to(dtype))
    return rows


def assert_equals_the_definition(base, queries, k, *, exact: bool = True, **settings) -> TopK:
    arguments = (base[0][queries], base[1][queries], *base, k)
    found = product_topk(*arguments, query_ids_Q=queries, backend="triton", **settings)
    expected = product_topk(*arguments, query_ids_Q=queries, backend="reference", **settings)
    for field in dataclasses.fields(TopK):
        value, wanted = getattr(found, field.name), getattr(expected, field.name)
        assert value.dtype == wanted.dtype
        if exact or not value.is_floating_point():
            assert value.equal(wanted), field.name
        else:
            torch.testing.assert_close(value, wanted, rtol=0, atol=1e-15)
    return found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 7, 100])
@interpreted
def test_kernel_equals_the_definition(dtype, k):
    base = towers(83, dtype=dtype)
    assert_equals_the_definition(base, torch.arange(2, 83, 5), k, exact=dtype == torch.float16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@interpreted
def test_exact_products_equal_float64_whatever_they_are_computed_with(dtype):
    # Only the interpreter's process loads the kernels.
    from kernels.topk.kernel import exact_products

    base, queries = (rows for rows in towers(40, dims=(150, 150), dtype=dtype))
    rows, ids = torch.arange(7).repeat_interleave(5), torch.arange(35) % 40
    found = exact_products(queries, base, rows, ids)
    expected = (queries[rows].double() * base[ids].double()).sum(1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)
    assert found[11:13].equal(exact_products(queries, base, rows[11:13], ids[11:13]))


@interpreted
def test_everything_excluded_is_counted_by_cause():
    base = towers(90)
    base[0][7] = base[0][3]
    queries, groups = torch.arange(0, 90, 4), torch.arange(90) // 3
    valid = torch.arange(90) % 11 != 5
    base[1][~valid] = torch.nan
    settings = {
        "image_group_Q": groups[queries],
        "image_group_N": groups,
        "text_group_Q": (groups // 2)[queries],
        "text_group_N": groups // 2,
        "image_ceiling": 0.75,
        "text_ceiling": 0.7,
        "floor": 0.1,
        "valid_N": valid,
    }
    clean = [base[0], base[1].where(valid[:, None], 0)]
    queries_of = (clean[0][queries], clean[1][queries])
    found = product_topk(*queries_of, *base, 5, query_ids_Q=queries, backend="triton", **settings)
    expected = product_topk(*queries_of, *clean, 5, query_ids_Q=queries, backend="reference", **settings)
    for field in dataclasses.fields(TopK):
        assert getattr(found, field.name).equal(getattr(expected, field.name)), field.name
    assert (found.num_excluded_QC.sum(0) > 0).all()
