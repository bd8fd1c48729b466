"""Where a step's gradients are reduced and judged under a JSON, and what DeepSpeed is told of it."""

import pytest

from train.ds_config import decides_on_device, reduces_whole, without_host_reads

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize(
    ("zero", "other", "on_device", "whole"),
    [
        ({"stage": 0}, {}, True, True),
        ({"stage": 1}, {}, True, True),
        ({"stage": 1}, {"bf16": {"enabled": True}}, True, True),
        ({"stage": 1}, {"fp16": {"enabled": False}, "communication_data_type": None}, True, True),
        ({"stage": 1, "overlap_comm": True}, {}, True, False),
        ({"stage": 1}, {"communication_data_type": "bfp16"}, True, False),
        ({"stage": 1}, {"prescale_gradients": True}, True, False),
        ({"stage": 2}, {}, True, False),
        ({"stage": 3}, {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, True, False),
        ({"stage": 1}, {"fp16": {"enabled": True}}, False, False),
        ({"stage": 1}, {"torch_autocast": {"enabled": True, "dtype": "float16"}}, False, False),
        ({"stage": 1}, {"data_types": {"grad_accum_dtype": "fp32"}}, False, False),
        ({"stage": 1, **OFFLOAD}, {}, False, False),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, {}, False, False),
    ],
)
def test_gradients_are_judged_and_reduced_here_unless_the_json_asks_for_what_only_deepspeed_does(
    zero, other, on_device, whole
):
    config = {"zero_optimization": zero, **other}
    assert decides_on_device(config) == on_device
    assert reduces_whole(config) == whole


def test_deepspeed_is_told_to_leave_out_what_is_done_here_and_the_rest_stays_as_it_is():
    told = without_host_reads({"zero_optimization": {"stage": 2, "overlap_comm": True}, "bf16": {"enabled": True}})
    assert told == {
        "zero_optimization": {"stage": 2, "overlap_comm": True, "compute_grad_norm": False},
        "bf16": {"enabled": True, "check_grad_overflow": False},
    }
    reduced = without_host_reads({"zero_optimization": {"stage": 1}})["zero_optimization"]
    assert reduced == {"stage": 1, "compute_grad_norm": False, "overlap_comm": False, "contiguous_gradients": False}
    for untouched in ({"stage": 0}, {"stage": 3}, {"stage": 2, **OFFLOAD}):
        assert without_host_reads({"zero_optimization": untouched}) == {"zero_optimization": untouched}
