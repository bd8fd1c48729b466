"""State dicts as published training code writes them, at tiny size with random values, and what that code computes with them.

The forwards are written from the documented architectures with torch.nn.functional alone, in float64; there is nothing
of open_clip or timm in them.
"""

import itertools
import math

import torch
from torch.nn import functional

Tensors = dict[str, torch.Tensor]


def drawn(generator: torch.Generator, **shapes: tuple[int, ...]) -> Tensors:
    """Values that let activations leave their linear range; gains near 1."""
    values = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator)
        fan_in = math.prod(shape[1:]) if len(shape) > 1 else 1
        values[name.replace("__", ".")] = value / math.sqrt(fan_in) * 1.5 if len(shape) > 1 else value * 0.2
    return values


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def norm_weights(generator: torch.Generator, name: str, width: int) -> Tensors:
    weights = drawn(generator, weight=(width,), bias=(width,))
    return prefixed(f"{name}.", {"weight": 1 + weights["weight"], "bias": weights["bias"]})


def openai_block(generator: torch.Generator, width: int) -> Tensors:
    return {
        **norm_weights(generator, "ln_1", width),
        **norm_weights(generator, "ln_2", width),
        **drawn(
            generator,
            attn__in_proj_weight=(3 * width, width),
            attn__in_proj_bias=(3 * width,),
            attn__out_proj__weight=(width, width),
            attn__out_proj__bias=(width,),
            mlp__c_fc__weight=(4 * width, width),
            mlp__c_fc__bias=(4 * width,),
            mlp__c_proj__weight=(width, 4 * width),
            mlp__c_proj__bias=(width,),
        ),
    }


def text_weights(generator: torch.Generator, width: int, layers: int, length: int, vocabulary_size: int) -> Tensors:
    """A text tower in OpenAI's names, embeddings so small that the norms' epsilon shows."""
    weights = {
        "token_embedding.weight": 0.004 * torch.randn(vocabulary_size, width, generator=generator),
        "positional_embedding": 0.001 * torch.randn(length, width, generator=generator),
        **norm_weights(generator, "ln_final", width),
    }
    for layer in range(layers):
        weights |= prefixed(f"transformer.resblocks.{layer}.", openai_block(generator, width))
    return weights


def openai_vit(generator: torch.Generator, width: int, layers: int, patch: int, size: int, dim: int) -> Tensors:
    weights = {
        **drawn(generator, class_embedding=(width,), conv1__weight=(width, 3, patch, patch), proj=(width, dim)),
        "positional_embedding": 0.3 * torch.randn((size // patch) ** 2 + 1, width, generator=generator),
        **norm_weights(generator, "ln_pre", width),
        **norm_weights(generator, "ln_post", width),
    }
    for layer in range(layers):
        weights |= prefixed(f"transformer.resblocks.{layer}.", openai_block(generator, width))
    return prefixed("visual.", weights)


def timm_vit(generator: torch.Generator, width: int, layers: int, patch: int, size: int) -> Tensors:
    weights = {
        "cls_token": 0.003 * torch.randn(1, 1, width, generator=generator),
        "pos_embed": 0.003 * torch.randn(1, (size // patch) ** 2 + 1, width, generator=generator),
        "patch_embed.proj.weight": 0.0003 * torch.randn(width, 3, patch, patch, generator=generator),
        "patch_embed.proj.bias": 0.001 * torch.randn(width, generator=generator),
        **norm_weights(generator, "norm", width),
    }
    for layer in range(layers):
        block = {
            **norm_weights(generator, "norm1", width),
            **norm_weights(generator, "norm2", width),
            **drawn(
                generator,
                attn__qkv__weight=(3 * width, width),
                attn__qkv__bias=(3 * width,),
                attn__proj__weight=(width, width),
                attn__proj__bias=(width,),
                mlp__fc1__weight=(4 * width, width),
                mlp__fc1__bias=(4 * width,),
                mlp__fc2__weight=(width, 4 * width),
                mlp__fc2__bias=(width,),
            ),
        }
        weights |= prefixed(f"blocks.{layer}.", block)
    return prefixed("visual.", weights)


def batch_norm_weights(generator: torch.Generator, name: str, width: int) -> Tensors:
    weights = norm_weights(generator, name, width)
    weights[f"{name}.running_mean"] = 0.1 * torch.randn(width, generator=generator)
    weights[f"{name}.running_var"] = 0.5 + torch.rand(width, generator=generator)
    weights[f"{name}.num_batches_tracked"] = torch.tensor(7)
    return weights


def bottleneck_stages(generator: torch.Generator, stem: int, blocks: tuple[int, ...]) -> Tensors:
    """layer1 ... layer4 of a ResNet of bottlenecks, torchvision's names."""
    weights, inputs = {}, stem
    for stage, count in enumerate(blocks, start=1):
        width = stem * 2 ** (stage - 1)
        for block in range(count):
            name = f"layer{stage}.{block}."
            weights |= drawn(generator, **{f"{name}conv1.weight": (width, inputs, 1, 1)})
            weights |= drawn(generator, **{f"{name}conv2.weight": (width, width, 3, 3)})
            weights |= drawn(generator, **{f"{name}conv3.weight": (4 * width, width, 1, 1)})
            for number, channels in ((1, width), (2, width), (3, 4 * width)):
                weights |= batch_norm_weights(generator, f"{name}bn{number}", channels)
            if block == 0:
                weights |= drawn(generator, **{f"{name}downsample.0.weight": (4 * width, inputs, 1, 1)})
                weights |= batch_norm_weights(generator, f"{name}downsample.1", 4 * width)
            inputs = 4 * width
    return weights


def timm_resnet(generator: torch.Generator, stem: int, blocks: tuple[int, ...]) -> Tensors:
    weights = drawn(generator, conv1__weight=(stem, 3, 7, 7)) | batch_norm_weights(generator, "bn1", stem)
    return prefixed("visual.", weights | bottleneck_stages(generator, stem, blocks))


def modified_resnet(generator: torch.Generator, stem: int, blocks: tuple[int, ...], grid: int, dim: int) -> Tensors:
    weights = drawn(
        generator,
        conv1__weight=(stem // 2, 3, 3, 3),
        conv2__weight=(stem // 2, stem // 2, 3, 3),
        conv3__weight=(stem, stem // 2, 3, 3),
    )
    for number, width in ((1, stem // 2), (2, stem // 2), (3, stem)):
        weights |= batch_norm_weights(generator, f"bn{number}", width)
    weights |= bottleneck_stages(generator, stem, blocks)
    width = 32 * stem
    pool = {"positional_embedding": 0.1 * torch.randn(grid * grid + 1, width, generator=generator)}
    for name, outputs in (("q_proj", width), ("k_proj", width), ("v_proj", width), ("c_proj", dim)):
        pool |= drawn(generator, **{f"{name}.weight": (outputs, width), f"{name}.bias": (outputs,)})
    return prefixed("visual.", weights | prefixed("attnpool.", pool))


def batch_norm_mlp(generator: torch.Generator, widths: tuple[int, ...]) -> Tensors:
    """layer1, bn1, layer2, bn2, layer3: SLIP's image_mlp, and CLIP-rocket's strong heads."""
    weights = {}
    for number, (inputs, outputs) in enumerate(itertools.pairwise(widths), start=1):
        weights |= drawn(generator, **{f"layer{number}.weight": (outputs, inputs), f"layer{number}.bias": (outputs,)})
        if number < len(widths) - 1:
            weights |= batch_norm_weights(generator, f"bn{number}", outputs)
    return weights


def slip(
    width: int = 128, layers: int = 2, *, text_width: int = 64, dim: int = 32, patch: int = 8, size: int = 32
) -> Tensors:
    """SLIP's state dict: heads are matrices [width, D], beside them the SimCLR head."""
    generator = torch.Generator().manual_seed(width + layers)
    return {
        **timm_vit(generator, width, layers, patch, size),
        **text_weights(generator, text_width, 2, 12, 49408),
        **drawn(generator, image_projection=(width, dim), text_projection=(text_width, dim)),
        "logit_scale": torch.tensor(3.1),
        **prefixed("image_mlp.", batch_norm_mlp(generator, (width, 64, 64, 16))),
    }


def rocket(visual: Tensors, width: int, dim: int = 32) -> Tensors:
    """CLIP-rocket's: heads are linear layers [D, width], and strong ones beside them with a temperature of their own."""
    generator = torch.Generator().manual_seed(width)
    return {
        **visual,
        **text_weights(generator, 64, 2, 12, 49408),
        **drawn(generator, image_projector__weight=(dim, width), text_projector__weight=(dim, 64)),
        "logit_scale": torch.tensor(2.5),
        "l2l_logit_scale": torch.tensor(2.3),
        **prefixed("l2l_image_projector.", batch_norm_mlp(generator, (width, 48, 48, 16))),
        **prefixed("l2l_text_projector.", batch_norm_mlp(generator, (64, 48, 48, 16))),
    }


def declip_projector(generator: torch.Generator, dim: int, width: int) -> Tensors:
    weights = {}
    for number in (1, 2, 3):
        weights |= drawn(generator, weight=(width, dim if number == 1 else width), bias=(width,))
        weights[f"projector.linear{number}.weight"] = weights.pop("weight")
        weights[f"projector.linear{number}.bias"] = weights.pop("bias")
        weights |= batch_norm_weights(generator, f"projector.bn{number}", width)
    return weights


def declip(visual: Tensors, dim: int = 32) -> Tensors:
    """DeCLIP's: the text tower under encode_text, one token more, a bias in its projection, logit_scale of shape [1]."""
    generator = torch.Generator().manual_seed(5)
    text = text_weights(generator, 64, 2, 12, 49409)
    text |= drawn(generator, text_projection__weight=(dim, 64), text_projection__bias=(dim,))
    return {
        **visual,
        **prefixed("encode_text.", text),
        "logit_scale": torch.tensor([2.9]),
        **drawn(generator, predictor__linear1__weight=(24, 32), predictor__linear1__bias=(24,)),
        **drawn(generator, predictor__layer2__weight=(32, 24), predictor__layer2__bias=(32,)),
        **batch_norm_weights(generator, "predictor.bn1", 24),
        **declip_projector(generator, dim, 32),
        **drawn(generator, text_label_predictor__weight=(49409, 64), text_label_predictor__bias=(49409,)),
    }


def openai(visual: Tensors, dim: int = 32) -> Tensors:
    generator = torch.Generator().manual_seed(6)
    return {
        **visual,
        **text_weights(generator, 64, 2, 12, 49408),
        **drawn(generator, text_projection=(64, dim)),
        "logit_scale": torch.tensor(4.0),
    }


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + torch.exp(-1.702 * x))


def norm(weights: Tensors, name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return (
        centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps) * weights[f"{name}.weight"]
        + weights[f"{name}.bias"]
    )


def attention(x_BLW: torch.Tensor, qkv: tuple, out: tuple, heads: int, causal: bool) -> torch.Tensor:
    batch, length, width = x_BLW.shape
    q, k, v = functional.linear(x_BLW, *qkv).view(batch, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-1, -2) / math.sqrt(width // heads)
    if causal:
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
    mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width)
    return functional.linear(mixed, *out)


def openai_blocks(weights: Tensors, x: torch.Tensor, heads: int, causal: bool, activation=quick_gelu) -> torch.Tensor:
    layers = {name.split(".")[2] for name in weights if name.startswith("transformer.resblocks.")}
    for layer in sorted(layers, key=int):
        w = {n.removeprefix(f"transformer.resblocks.{layer}."): t for n, t in weights.items()}
        qkv, out = (
            (w["attn.in_proj_weight"], w["attn.in_proj_bias"]),
            (w["attn.out_proj.weight"], w["attn.out_proj.bias"]),
        )
        x = x + attention(norm(w, "ln_1", x, 1e-5), qkv, out, heads, causal)
        hidden = activation(functional.linear(norm(w, "ln_2", x, 1e-5), w["mlp.c_fc.weight"], w["mlp.c_fc.bias"]))
        x = x + functional.linear(hidden, w["mlp.c_proj.weight"], w["mlp.c_proj.bias"])
    return x


def below(weights: Tensors, prefix: str) -> Tensors:
    return {n.removeprefix(prefix): t.double() for n, t in weights.items() if n.startswith(prefix)}


def text_features(weights: Tensors, tokens_BL: torch.Tensor, end_B: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Texts -> [B, D]; end_B: where their end tokens stand; head: [W, D]."""
    w = below(weights, "")
    x = w["token_embedding.weight"][tokens_BL] + w["positional_embedding"]
    x = norm(w, "ln_final", openai_blocks(w, x, x.shape[-1] // 64, causal=True), 1e-5)
    return x[torch.arange(len(x)), end_B] @ head.double()


def timm_vit_features(weights: Tensors, images: torch.Tensor, heads: int) -> torch.Tensor:
    """The class token of a timm ViT, [B, W]."""
    w = below(weights, "visual.")
    patch = w["patch_embed.proj.weight"].shape[-1]
    x = functional.conv2d(images.double(), w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=patch)
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1) + w["pos_embed"]
    for layer in sorted({int(name.split(".")[1]) for name in w if name.startswith("blocks.")}):
        b = below(w, f"blocks.{layer}.")
        qkv, out = (b["attn.qkv.weight"], b["attn.qkv.bias"]), (b["attn.proj.weight"], b["attn.proj.bias"])
        x = x + attention(norm(b, "norm1", x, 1e-6), qkv, out, heads, causal=False)
        hidden = functional.linear(norm(b, "norm2", x, 1e-6), b["mlp.fc1.weight"], b["mlp.fc1.bias"])
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + functional.linear(hidden, b["mlp.fc2.weight"], b["mlp.fc2.bias"])
    return norm(w, "norm", x, 1e-6)[:, 0]


def openai_vit_features(weights: Tensors, images: torch.Tensor) -> torch.Tensor:
    w = below(weights, "visual.")
    x = (
        functional.conv2d(images.double(), w["conv1.weight"], stride=w["conv1.weight"].shape[-1])
        .flatten(2)
        .transpose(1, 2)
    )
    x = torch.cat([w["class_embedding"].expand(len(x), 1, -1), x], 1) + w["positional_embedding"]
    x = openai_blocks(w, norm(w, "ln_pre", x, 1e-5), x.shape[-1] // 64, causal=False)
    return norm(w, "ln_post", x[:, 0], 1e-5) @ w["proj"]


def batch_norm(weights: Tensors, name: str, x: torch.Tensor) -> torch.Tensor:
    mean, var, gain, bias = (
        weights[f"{name}.{part}"].view(1, -1, 1, 1) for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / torch.sqrt(var + 1e-5) * gain + bias


def bottlenecks(w: Tensors, x: torch.Tensor, *, pools: bool) -> torch.Tensor:
    """pools: OpenAI's, which average where torchvision's blocks have strides."""
    names = sorted(
        {tuple(name.split(".")[:2]) for name in w if name.startswith("layer")}, key=lambda n: (n[0], int(n[1]))
    )
    for stage, block in names:
        b, stride = below(w, f"{stage}.{block}."), 2 if stage != "layer1" and block == "0" else 1
        y = functional.relu(batch_norm(b, "bn1", functional.conv2d(x, b["conv1.weight"])))
        y = functional.conv2d(y, b["conv2.weight"], padding=1, stride=1 if pools else stride)
        y = functional.relu(batch_norm(b, "bn2", y))
        if pools and stride > 1:
            y = functional.avg_pool2d(y, stride)
        y = batch_norm(b, "bn3", functional.conv2d(y, b["conv3.weight"]))
        if "downsample.0.weight" in b:
            if pools and stride > 1:
                x = functional.avg_pool2d(x, stride)
            x = functional.conv2d(x, b["downsample.0.weight"], stride=1 if pools else stride)
            x = batch_norm(b, "downsample.1", x)
        x = functional.relu(x + y)
    return x


def timm_resnet_features(weights: Tensors, images: torch.Tensor) -> torch.Tensor:
    w = below(weights, "visual.")
    x = functional.relu(
        batch_norm(w, "bn1", functional.conv2d(images.double(), w["conv1.weight"], stride=2, padding=3))
    )
    return bottlenecks(w, functional.max_pool2d(x, 3, stride=2, padding=1), pools=False).mean((2, 3))


def modified_resnet_features(weights: Tensors, images: torch.Tensor) -> torch.Tensor:
    w, x = below(weights, "visual."), images.double()
    for number, stride in ((1, 2), (2, 1), (3, 1)):
        x = functional.conv2d(x, w[f"conv{number}.weight"], stride=stride, padding=1)
        x = functional.relu(batch_norm(w, f"bn{number}", x))
    x = bottlenecks(w, functional.avg_pool2d(x, 2), pools=True).flatten(2).transpose(1, 2)
    x = torch.cat([x.mean(1, keepdim=True), x], 1) + w["attnpool.positional_embedding"]
    p = below(w, "attnpool.")
    q, k, v = (functional.linear(x, p[f"{n}_proj.weight"], p[f"{n}_proj.bias"]) for n in "qkv")
    q, k, v = (part.unflatten(-1, (-1, 64)).transpose(1, 2) for part in (q[:, :1], k, v))
    mixed = ((q @ k.transpose(-1, -2) / 8).softmax(-1) @ v).transpose(1, 2).flatten(2)
    return functional.linear(mixed[:, 0], p["c_proj.weight"], p["c_proj.bias"])
