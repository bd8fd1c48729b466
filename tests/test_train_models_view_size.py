"""Strong views of another size: models that take them do, the others say so before a run starts."""

import pytest
import torch

from train.config import ModelConfig
from train.models.model import TwoTowers, build_model
from train.models.view_size import check_view_size


def towers_of(name: str) -> TwoTowers:
    return TwoTowers(*build_model(ModelConfig(name=name), device="meta"))


def test_a_vision_transformer_refuses_another_size_by_name():
    with pytest.raises(
        ValueError, match=r"strong_augment.size=192: the image tower of ViT-S-32 takes pictures of 224 x 224 alone"
    ):
        check_view_size(towers_of("ViT-S-32"), "ViT-S-32", (224, 224), 192)


def test_an_attention_pool_refuses_another_size_by_name():
    with pytest.raises(
        ValueError, match=r"strong_augment.size=48: the image tower of pocket-rn takes .* of 64 x 64 alone"
    ):
        check_view_size(towers_of("pocket-rn"), "pocket-rn", (64, 64), 48)


def test_a_globally_pooled_tower_takes_another_size_and_stays_as_it_is():
    class Pooled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)

        def encode_image(self, image_BCHW: torch.Tensor) -> torch.Tensor:
            return self.norm(self.conv(image_BCHW)).mean((2, 3))

    towers = torch.nn.Module()
    towers.clip = Pooled()
    before = {name: tensor.clone() for name, tensor in towers.state_dict().items()}
    check_view_size(towers, "pooled", (64, 64), 48)
    assert all(torch.equal(tensor, before[name]) for name, tensor in towers.state_dict().items())


@pytest.mark.parametrize("size", [0, 224])
def test_the_models_own_size_needs_no_trial(size):
    check_view_size(None, "ViT-B-16", (224, 224), size)
