"""The training state inside an engine: what an optimizer finds in a state that was made for it."""

from types import SimpleNamespace

import pytest
import torch

from train.checkpoints.training_state import Moments, TrainingState

MOMENTS = Moments(("exp_avg", "exp_avg_sq"), {"weight": 7})


@pytest.mark.parametrize(("is_fused", "place"), [(True, "meta"), (False, "cpu")])
def test_a_fused_optimizer_finds_its_step_count_beside_the_weights_and_any_other_on_the_host(is_fused, place):
    module = torch.nn.Linear(3, 2, bias=False, device="meta")
    optimizer = torch.optim.AdamW(module.parameters(), fused=is_fused)
    engine = SimpleNamespace(optimizer=optimizer, module=module, zero_optimization_stage=lambda: 0)
    held = list(TrainingState(engine, rank=0, world_size=1).held(MOMENTS))
    assert [tensor.kind for tensor in held] == ["weight", "exp_avg", "exp_avg_sq"]
    assert optimizer.state[module.weight]["step"].device.type == place


def test_a_fused_optimizer_goes_on_from_a_made_state_as_if_it_had_taken_the_steps():
    torch.manual_seed(0)
    start, gradients = torch.randn(40, 5), torch.randn(4, 40, 5)
    whole, cut = (torch.nn.Parameter(start.clone()) for _ in range(2))

    def steps(weight, optimizer, some):
        for gradient in some:
            weight.grad = gradient.clone()
            optimizer.step()

    first = torch.optim.AdamW([whole], fused=True)
    steps(whole, first, gradients[:2])
    module = torch.nn.Module()
    module.weight = cut
    second = torch.optim.AdamW([cut], fused=True)
    engine = SimpleNamespace(optimizer=second, module=module, zero_optimization_stage=lambda: 0)
    with torch.no_grad():
        for held in TrainingState(engine, rank=0, world_size=1).held(Moments(MOMENTS.kinds, {"weight": 2})):
            held.tensor.copy_(whole if held.kind == "weight" else first.state[whole][held.kind])
    steps(whole, first, gradients[2:])
    steps(cut, second, gradients[2:])
    assert torch.equal(cut, whole)
