"""DeCLIP and what was trained with its code (CLIP, SLIP, FILIP, DeFILIP there): OpenAI's towers, with a text tower under `encode_text.`.

Its vocabulary has one token more than CLIP's, and not at the end: mask 49406, start 49407, end 49408. The rows of the embedding are put in
another order (start 49406, end 49407, mask 49408), which makes CLIP's own tokenizer right for them. Texts are pooled where the end token
stands, not at the highest number, since the mask has that now. The text projection has a bias.
"""

import re

import torch

from train.models.architecture import CLIP_VOCABULARY_SIZE
from train.models.pretrained.native import vision_config
from train.models.pretrained.reading import Tensors
from train.models.pretrained.translated import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Translated,
    as_floats,
    grouped,
    name_for,
    preprocessing,
    text_config,
)

FAMILY = "DeCLIP"
TEXT, PREDICTOR = "encode_text.", "text_label_predictor."
VOCABULARY_SIZE = CLIP_VOCABULARY_SIZE + 1
# Where our tokens start, end and mask stand in DeCLIP's vocabulary.
SOURCES = (49407, 49408, 49406)
END_ID, MASK_ID = 49407, 49408


def translate(file: Tensors) -> Translated:
    """Weights of DeCLIP. Raises ValueError for a text tower that is not its transformer."""
    tensors = file.tensors
    text = {name.removeprefix(TEXT): tensor for name, tensor in tensors.items() if name.startswith(TEXT)}
    if "token_embedding.weight" not in text:
        raise ValueError(
            f"{file.path}: its text tower ({grouped(text)}) is another library's, and DeCLIP's own transformer alone is known here"
        )
    if not any(name.startswith("visual.") for name in tensors):
        raise ValueError(f"{file.path} holds no image tower, only {grouped(tensors)}")
    vocabulary_size = text["token_embedding.weight"].shape[0]
    if vocabulary_size != VOCABULARY_SIZE:
        raise ValueError(
            f"{file.path} has {vocabulary_size} tokens; DeCLIP's vocabulary has {VOCABULARY_SIZE}, and what another order means can't "
            "be told"
        )
    # A layer for other picture sizes than the one that the pooling has positions for.
    unused = {name for name in tensors if name.startswith("visual.fc.")}
    visual = {name: tensors[name] for name in tensors if name.startswith("visual.") and name not in unused}
    text["token_embedding.weight"] = reordered(text["token_embedding.weight"])
    state_dict = {**visual, **text, "logit_scale": tensors["logit_scale"]}
    config = {
        "embed_dim": text["text_projection.weight"].shape[0],
        "quick_gelu": True,
        "vision_cfg": vision_config(visual),
        "text_cfg": {
            **text_config(text),
            "proj_bias": "text_projection.bias" in text,
            "pool_type": "eos",
            "eos_id": END_ID,
        },
    }
    left = {n: t for n, t in tensors.items() if n not in visual and not n.startswith(TEXT) and n != "logit_scale"}
    notes = [
        f"DeCLIP's tokens reordered to CLIP's (start {END_ID - 1}, end {END_ID}; mask {MASK_ID}), and rows of text_label_predictor with "
        "them where heads are taken over or exported",
        "pictures normalised with ImageNet's mean and std; DeCLIP evaluates on the middle of a picture resized to 256, here to the "
        "model's size",
    ]
    if "logit_scale_dense" in left:
        notes.append("FILIP's token-wise similarity is left: its global features alone are used")
    size = config["vision_cfg"]["image_size"]
    return Translated(
        FAMILY,
        name_for("declip", config),
        config,
        preprocessing(size, IMAGENET_MEAN, IMAGENET_STD, "bilinear"),
        as_floats(state_dict),
        left,
        tuple(notes),
    )


def reordered(rows: torch.Tensor) -> torch.Tensor:
    """Rows by token [49409, ...] in DeCLIP's order -> in the order of a model that was loaded here (embeddings, and MLM's predictor)."""
    return torch.cat([rows[: min(SOURCES)], rows[list(SOURCES)]])


def heads(weights: Translated) -> dict[str, torch.Tensor]:
    """DeCLIP's heads as its objective here has them: linear layers called as those of other methods, MLM's predictor in the order of the
    loaded model's tokens, and the mask's own embedding where words were guessed.
    """
    found = {re.sub(r"^(projector|predictor)\.linear(\d)", r"\1.layer\2", n): t for n, t in weights.left.items()}
    if f"{PREDICTOR}weight" in found:
        found["word_mask.weight"] = weights.state_dict["token_embedding.weight"][[MASK_ID]]
    return {n: reordered(t) if n.startswith(PREDICTOR) else t for n, t in found.items()}
