"""`python -m kernels.bench.tune` as far as a machine without a GPU can run it."""

import pytest
import torch

from kernels import launch
from kernels.bench import tune


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="needs a GPU"):
        tune.main([])


def test_every_trial_names_an_entry_of_the_block_table_and_a_kernel():
    names = {one.function.fn.__name__ for one in specialisations()}
    for trial in tune.TRIALS.values():
        assert (trial.table, "sm_90") in launch.BLOCKS
        assert trial.function in names
        assert trial.operation in tune.OPERATIONS


def specialisations():
    from kernels.bench.compiled import kernel_modules

    return [one for module in kernel_modules() for one in module.specialisations("sm_90", torch.bfloat16, 512)]


@pytest.mark.parametrize("text", ["128,128,64,4", "128,128,64,4,x", "0,128,64,4,3", ""])
def test_a_candidate_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="five positive numbers"):
        tune.parse_tile(text)


def test_the_table_is_as_before_also_when_a_candidate_fails(monkeypatch):
    monkeypatch.setattr(tune, "chip_of", lambda _: "sm_90")
    key = ("add_products", "sm_90")
    before = launch.BLOCKS[key]

    def fail():
        with tune.blocks_in_place("add_products", tune.parse_tile("32,64,16,2,1")):
            assert launch.blocks_for(*key, torch.bfloat16, 512) == launch.Blocks(32, 64, 16, 2, 1)
            raise RuntimeError("out of resource")

    with pytest.raises(RuntimeError, match="out of resource"):
        fail()
    assert launch.BLOCKS[key] is before


def test_flop_are_those_of_the_products_that_a_kernel_executes():
    # Weights as two numbers, rows of both towers: four products; the search: one for each tower.
    assert tune.flop_of(tune.TRIALS["products"], 1000) == 4 * 2 * 1000**2 * 512
    assert tune.flop_of(tune.TRIALS["topk"], 50_000) == 2 * 2048 * 50_000 * 1024
