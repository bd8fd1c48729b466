"""LoRA: low-rank adapters in the towers' linear layers, through `peft`; everything else of the towers stays as it is.

In: an open_clip model. Out: the same with adapters, alone trainable beside temperature and bias; and, for whoever saves it, its weights by
open_clip's names with the adapters merged.

torch's MultiheadAttention has no linear layer that an adapter could sit on. peft's own way there takes the base weight out of the module
and puts a rounded copy back in every forward, which neither ZeRO nor an exact resume survives; so the same attention is computed by linear
layers first. Source: Hu et al. 2021 (arXiv:2106.09685).
"""

import re
from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch.nn import functional

from train.config import ModelConfig

# Linear layers of blocks, as open_clip, timm and Hugging Face's BERTs call them.
ATTENTION = ("in_proj", "out_proj", "qkv", "proj", "query", "key", "value", "dense")
MLP = ("c_fc", "c_proj", "fc1", "fc2")
IN_A_BLOCK = re.compile(r"(^|\.)(resblocks|blocks|layers?)\.\d+\.")
SCALE, SCALE_UNITS = "lora_scale", 1_000_000


class AttentionOfLinears(nn.Module):
    """Self-attention as nn.MultiheadAttention(batch_first=True) computes it, with its own parameters in linear layers."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads = attention.num_heads
        # On meta: the weights come from the attention.
        self.in_proj = nn.Linear(attention.embed_dim, 3 * attention.embed_dim, device="meta")
        self.in_proj.weight, self.in_proj.bias = attention.in_proj_weight, attention.in_proj_bias
        self.out_proj = nn.Linear(attention.embed_dim, attention.embed_dim, device="meta")
        self.out_proj.weight, self.out_proj.bias = attention.out_proj.weight, attention.out_proj.bias

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        need_weights: bool = False,
        attn_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, None]:
        """[B, L, W] -> [B, L, W], None; attn_mask: added to the scores, [L, L]. key and value are taken to equal the query, as they do in
        open_clip's blocks; ZeRO-3's hooks make three tensors of the one.
        """
        heads = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.in_proj(query).chunk(3, -1))
        mixed = functional.scaled_dot_product_attention(*heads, attn_mask=attn_mask)
        return self.out_proj(mixed.transpose(1, 2).flatten(2)), None


def add_adapters(model: nn.Module, config: ModelConfig) -> None:
    """Freeze the towers of an open_clip model and put adapters in those that are not locked, in place.

    Raises ValueError without peft, and for a tower that has no layer to put them in.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError(
            f"model.lora_rank={config.lora_rank} needs peft: pip install peft==0.21.2 ({error})"
        ) from error
    locked = {"image": config.lock_image, "text": config.lock_text}
    own = {"visual": "image"}
    names = ATTENTION if config.lora_layers == "attention" else ATTENTION + MLP
    model.requires_grad_(False)
    _give_linear_attention(model)
    targets = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and IN_A_BLOCK.search(name) and name.rpartition(".")[2] in names
        if not locked[own.get(name.partition(".")[0], "text")]
    ]
    for tower, is_locked in locked.items():
        if not is_locked and not any(own.get(name.partition(".")[0], "text") == tower for name in targets):
            raise ValueError(
                f"model.lora_rank={config.lora_rank}: the {tower} tower has no transformer blocks to put adapters in; give "
                f"--model.lock_{tower}"
            )
    alpha = config.lora_alpha or 2.0 * config.lora_rank
    adapters = LoraConfig(
        r=config.lora_rank, lora_alpha=alpha, lora_dropout=config.lora_dropout, target_modules=targets
    )
    inject_adapter_in_model(adapters, model)
    # With the weights, so that whoever has them can merge them; whole, as 16-bit training rounds what is not.
    model.register_buffer(SCALE, torch.tensor([round(SCALE_UNITS * alpha / config.lora_rank)]))
    for scalar in ("logit_scale", "logit_bias"):
        if getattr(model, scalar, None) is not None:
            getattr(model, scalar).requires_grad_(True)


def _give_linear_attention(model: nn.Module) -> None:
    for block in list(model.modules()):
        attention = getattr(block, "attn", None)
        if isinstance(attention, nn.MultiheadAttention) and hasattr(block, "ln_2") and not hasattr(block, "ln_1_kv"):
            block.attn = AttentionOfLinears(attention)


class Merged(Mapping[str, torch.Tensor]):
    """The weights of a model with adapters by open_clip's names, adapters merged in fp32; one at a time, when asked for."""

    def __init__(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        self.state_dict = state_dict
        self.scale = int(state_dict[SCALE]) / SCALE_UNITS
        self.sources = {_open_clip_name(name): name for name in state_dict if ".lora_" not in name and name != SCALE}

    def __getitem__(self, key: str) -> torch.Tensor:
        source = self.sources[key]
        layer = source.removesuffix(".base_layer.weight")
        if layer == source:
            return self.state_dict[source]
        down, up = (self.state_dict[f"{layer}.lora_{half}.default.weight"].float().cpu() for half in "AB")
        return self.state_dict[source].float().cpu() + self.scale * (up @ down)

    def __iter__(self) -> Iterator[str]:
        return iter(self.sources)

    def __len__(self) -> int:
        return len(self.sources)


def merged(state_dict: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """The same weights without adapters, where there are some."""
    return Merged(state_dict) if SCALE in state_dict else state_dict


def _open_clip_name(name: str) -> str:
    name = name.replace(".base_layer.", ".")
    return re.sub(r"\.attn\.in_proj\.(weight|bias)$", r".attn.in_proj_\1", name)
