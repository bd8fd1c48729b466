"""Vision transformers that timm has no name for, registered under names that say what they are.

SLIP's ViT-S has 12 heads where timm's vit_small_patch16_224 has 6, with weights of the same shapes: loaded into the latter it computes
garbage. timm builds any ViT from numbers, but open_clip's configs hold a timm name alone.
"""

import re
from dataclasses import dataclass

import timm
from timm.models import is_model, register_model

# Everything else is that of this one: no norm before the blocks, exact GELU, LayerNorm with eps 1e-6.
TEMPLATE = "vit_base_patch16_224"
PREFIX = "hardpair_vit"
PATTERN = re.compile(PREFIX + r"_w(\d+)_d(\d+)_h(\d+)_m(\d+)_p(\d+)_i(\d+)")
TIMM_SIZES = {
    (192, 12, 3, 768): "tiny",
    (384, 12, 6, 1536): "small",
    (768, 12, 12, 3072): "base",
    (1024, 24, 16, 4096): "large",
}


@dataclass(frozen=True)
class VitGeometry:
    """What the sizes of a plain vision transformer are."""

    width: int
    depth: int
    heads: int
    mlp_width: int
    patch_size: int
    image_size: int

    def timm_name(self) -> str:
        """timm's own name where it has one, ours where it has not."""
        size = TIMM_SIZES.get((self.width, self.depth, self.heads, self.mlp_width))
        name = f"vit_{size}_patch{self.patch_size}_{self.image_size}"
        if size and is_model(name):
            return name
        return f"{PREFIX}_w{self.width}_d{self.depth}_h{self.heads}_m{self.mlp_width}_p{self.patch_size}_i{self.image_size}"

    def timm_arguments(self) -> dict[str, float]:
        """What `timm.create_model(TEMPLATE, ...)` takes to build it."""
        return {
            "embed_dim": self.width,
            "depth": self.depth,
            "num_heads": self.heads,
            "mlp_ratio": self.mlp_width / self.width,
            "patch_size": self.patch_size,
            "img_size": self.image_size,
        }


def geometry_of(timm_name: str) -> VitGeometry | None:
    """The sizes in one of our names; None for a name of timm's."""
    found = PATTERN.fullmatch(timm_name)
    return VitGeometry(*map(int, found.groups())) if found else None


def register_vit(timm_name: str) -> None:
    """Make timm know `timm_name` when it is one of ours."""
    geometry = geometry_of(timm_name)
    if geometry is None or is_model(timm_name):
        return

    def build(pretrained: bool = False, **keywords: object) -> object:
        return timm.create_model(TEMPLATE, **{**geometry.timm_arguments(), **keywords})

    build.__name__ = timm_name
    build.__module__ = __name__
    register_model(build)


def registration_source(timm_name: str) -> str:
    """A Python module of a few lines that makes timm know one of our names, for those who have not got this package."""
    geometry = geometry_of(timm_name)
    assert geometry is not None, "only for names of ours"
    return (
        '"""Import this before open_clip.create_model: timm has no name for this vision transformer."""\n\n'
        "import timm\nfrom timm.models import register_model\n\n\n"
        "@register_model\n"
        f"def {timm_name}(pretrained=False, **keywords):\n"
        f"    return timm.create_model({TEMPLATE!r}, **{{**{geometry.timm_arguments()!r}, **keywords}})\n"
    )
