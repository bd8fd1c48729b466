"""SLIP, LaCLIP and CLIP-rocket: a timm image tower beside OpenAI's text tower.

What their weights don't say and their code does: the text tower has QuickGELU and LayerNorms with eps 1e-5, the vision transformer exact
GELU and 1e-6, no norm before its blocks, and 12 heads at width 384 (MoCo-v3's ViT-S, not timm's); pictures are normalised with ImageNet's
mean and std. open_clip's `quick_gelu` leaves timm's towers alone, so one config says it all.
"""

from collections.abc import Mapping

import torch

from train.models.pretrained.reading import Tensors
from train.models.pretrained.translated import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Translated,
    as_floats,
    grouped,
    name_for,
    num_blocks,
    num_heads,
    preprocessing,
    square_side,
    text_config,
)
from train.models.timm_vit import VitGeometry, geometry_of

MOCO_V3_HEADS = {384: 12}
RESNET_IMAGE_SIZE = 224
# Numbers of blocks in the four stages, and whether a block has three convolutions.
RESNETS = {
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
}
RESNET_WIDTH = 64
TEXT_NAMES = ("positional_embedding", "token_embedding.", "transformer.", "ln_final.")
# In CLIP-rocket's files and not in SLIP's.
ROCKET_HEADS = "image_projector.weight"


def translate(file: Tensors) -> Translated:
    """Weights of SLIP, LaCLIP or CLIP-rocket. Raises ValueError with the reason for a tower that can't be told from them."""
    tensors, rocket = file.tensors, ROCKET_HEADS in file.tensors
    visual = {name.removeprefix("visual."): tensor for name, tensor in tensors.items() if name.startswith("visual.")}
    if not visual or "ln_final.weight" not in tensors:
        raise ValueError(f"{file.path} lacks a tower: it holds {grouped(tensors)}")
    trunk, pool, size = (vit if "patch_embed.proj.weight" in visual else resnet)(visual)
    state_dict = {f"visual.trunk.{name}": tensor for name, tensor in visual.items()}
    state_dict |= {name: tensors[name] for name in tensors if name.startswith(TEXT_NAMES)}
    # SLIP multiplies rows by a matrix [width, D]; CLIP-rocket has linear layers [D, width].
    image_head = tensors[ROCKET_HEADS] if rocket else tensors["image_projection"].T
    state_dict["visual.head.proj.weight"] = image_head
    state_dict["text_projection"] = tensors["text_projector.weight"].T if rocket else tensors["text_projection"]
    state_dict["logit_scale"] = tensors["logit_scale"]
    used = {"image_projection", "text_projection", ROCKET_HEADS, "text_projector.weight", "logit_scale"}
    left = {n: t for n, t in tensors.items() if n not in used and not n.startswith(("visual.", *TEXT_NAMES))}
    family = "CLIP-rocket" if rocket else "SLIP / LaCLIP"
    config = {
        "embed_dim": image_head.shape[0],
        "quick_gelu": True,
        "vision_cfg": {"image_size": size, "timm_model_name": trunk, "timm_pool": pool, "timm_proj": "linear"},
        "text_cfg": text_config(tensors),
    }
    notes = ["text tower with QuickGELU, image tower as timm has it; pictures normalised with ImageNet's mean and std"]
    geometry = geometry_of(trunk)
    if geometry:
        notes.append(
            f"timm has no name for a ViT of width {geometry.width} with {geometry.heads} heads and patches of {geometry.patch_size}: plain "
            "open_clip has to be told first what it is, by the Python file that train.export writes beside the weights"
        )
    return Translated(
        family,
        name_for(f"{'rocket' if rocket else 'slip'}-{trunk}", config),
        config,
        preprocessing(size, IMAGENET_MEAN, IMAGENET_STD, "bilinear"),
        as_floats(state_dict),
        left,
        tuple(notes),
    )


def vit(visual: Mapping[str, torch.Tensor]) -> tuple[str, str, int]:
    """timm name, pooling and picture side of a plain vision transformer."""
    width, patch = visual["patch_embed.proj.weight"].shape[0], visual["patch_embed.proj.weight"].shape[-1]
    size = square_side(visual["pos_embed"].shape[1] - 1) * patch
    heads = MOCO_V3_HEADS.get(width) or num_heads(width, "image")
    depth, mlp_width = num_blocks(visual, "blocks"), visual["blocks.0.mlp.fc1.weight"].shape[0]
    return VitGeometry(width, depth, heads, mlp_width, patch, size).timm_name(), "token", size


def resnet(visual: Mapping[str, torch.Tensor]) -> tuple[str, str, int]:
    """The same of a ResNet, whose picture side its weights don't say. Raises ValueError for one that is not torchvision's."""
    blocks = tuple(num_blocks(visual, f"layer{stage}") for stage in (1, 2, 3, 4))
    name = RESNETS.get((blocks, "layer1.0.conv3.weight" in visual))
    if name is None or visual["conv1.weight"].shape[0] != RESNET_WIDTH:
        raise ValueError(
            f"the image tower ({grouped(visual)}; blocks {blocks}) is neither a plain ViT nor one of {', '.join(RESNETS.values())}"
        )
    return name, "avg", RESNET_IMAGE_SIZE
