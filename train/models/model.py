"""Models: built by name from open_clip's configs or ours, loaded from a run, written so that plain open_clip loads them.

A checkpoint folder holds `open_clip_config.json` and `open_clip_model.safetensors` (what open_clip calls a local-dir), and
`bpe.txt.gz` when the model's vocabulary is a prefix of CLIP's.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from mining.manifest import fingerprint, write_json_atomically
from train.checkpoints.tensor_files import write_tensors
from train.config import ModelConfig
from train.models.architecture import (
    CONFIG_FILE,
    MERGES_FILE,
    Tokenizer,
    architecture,
    build_tokenizer,
    first_merges,
    has_own_merges,
    prepare_libraries,
    quiet_libraries,
    tokenizer_of,
)
from train.models.clip_library import PreprocessCfg, open_clip
from train.models.folder import MODEL_FILES, WEIGHTS_FILE, checkpoint_folder
from train.models.lora import merged
from train.models.start import DEFAULT_NAME, folder_or_file, load_start, resolve
from train.models.towers import prepare_towers

SIGLIP_LOG_SCALE, SIGLIP_BIAS = math.log(10), -10.0
# What a model learns beside its towers, one number each.
SCALARS = ("logit_scale", "logit_bias")

__all__ = [
    "MODEL_FILES",
    "architecture",
    "attention_for",
    "build_model",
    "build_tokenizer",
    "load_model",
    "resolve",
    "save_model",
]


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for inference."""

    model: torch.nn.Module
    """eval mode, fp32: encode_image(images, normalize=True), encode_text(tokens, normalize=True), logit_scale"""
    preprocess: Callable[..., torch.Tensor]
    """PIL image -> float [3, H, W]"""
    tokenizer: Tokenizer
    """str or list of str -> int64 [B, L]"""
    name: str
    checkpoint_hash: str
    """of the weights; of a published file, whose name decides on an activation, of the architecture and the preprocessing, too"""
    source: Path
    """the folder that holds the weights, or the published file"""


def no_words(text: str) -> None:
    """For callers that have nobody to tell."""


def build_model(
    config: ModelConfig,
    loss_kind: str = "contrastive",
    device: str = "cpu",
    say: Callable[[str], None] = no_words,
) -> tuple[torch.nn.Module, PreprocessCfg]:
    """A trainable fp32 open_clip model (logit_scale of shape [1], as DeepSpeed needs) and its preprocessing.

    loss_kind "sigmoid" gives it a logit_bias of shape [1]. device "meta" gives a model without memory and without values. say: hears what
    of `pretrained` was loaded, left and new.
    Raises ValueError for an unknown name, or weights that are missing, unsafe to read, of no known family or of another architecture.
    """
    config = resolve(config)
    model, preprocess = load_start(config, device, say)
    prepare_towers(model, config)
    fit_scalars(model, loss_kind)
    return model.train(), preprocess


def fit_scalars(model: torch.nn.Module, loss_kind: str) -> None:
    """Give `model` the scalars that a loss learns: SigLIP's bias, or no bias that nothing would train.

    Source of the initial values, scale 10 and bias -10: Zhai et al. 2023 (arXiv:2303.15343), section 3.2. Weights that were trained with a
    bias keep theirs.
    """
    bias = getattr(model, "logit_bias", None)
    if loss_kind != "sigmoid":
        if bias is not None:
            bias.requires_grad_(False)
        return
    if bias is None:
        model.logit_bias = torch.nn.Parameter(torch.full_like(model.logit_scale, SIGLIP_BIAS))
        with torch.no_grad():
            model.logit_scale.fill_(SIGLIP_LOG_SCALE)


def save_model(
    folder: Path, name: str, state_dict: Mapping[str, torch.Tensor], preprocess: PreprocessCfg
) -> dict[str, Any]:
    """Write what plain `open_clip.create_model_and_transforms("local-dir:FOLDER")` loads: fp32 weights and the config, returned."""
    config, state_dict = architecture(name), merged(state_dict)
    if "logit_bias" in state_dict:
        # Without it open_clip would build a model that has no bias.
        config.setdefault("init_logit_bias", SIGLIP_BIAS)
    write_tensors(folder / WEIGHTS_FILE, ExportedTensors(state_dict), {"format": "pt"})
    write_json_atomically(
        folder / CONFIG_FILE, {"model_cfg": config, "preprocess_cfg": asdict(preprocess), "hardpair_name": name}
    )
    if has_own_merges(config):
        (folder / MERGES_FILE).write_bytes(first_merges(config["text_cfg"]["vocab_size"]))
    return config


class ExportedTensors(Mapping[str, torch.Tensor]):
    """Weights as plain open_clip has them: fp32 on the CPU, the temperature a scalar. Made one at a time, when asked for."""

    def __init__(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        self.state_dict = state_dict

    def __getitem__(self, key: str) -> torch.Tensor:
        tensor = self.state_dict[key].detach().float().cpu()
        return tensor.reshape(()) if key in ("logit_scale", "logit_bias") else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.state_dict)

    def __len__(self) -> int:
        return len(self.state_dict)


def load_model(checkpoint: str | Path, device: str | torch.device = "cpu", *, name: str = "") -> LoadedModel:
    """Load a model for inference from a run folder (its newest checkpoint), a checkpoint folder, an export folder, or a published file.

    name: the architecture of a published file, where its weights don't say.
    Raises ValueError naming the folder when it holds no complete checkpoint, and for a file that `read_pretrained` refuses.
    """
    path = folder_or_file(str(checkpoint))
    if path is not None and path.is_file():
        return _load_published(path, device, name)
    folder = checkpoint_folder(checkpoint)
    if name:
        raise ValueError(
            f"model_name={name} is for a file of published weights; {checkpoint} says what it is, leave it out"
        )
    model, preprocess = _read_model(folder)
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    merges = folder / MERGES_FILE
    return LoadedModel(
        model.eval().requires_grad_(False).to(device),
        open_clip.transform.image_transform_v2(preprocess, is_train=False),
        tokenizer_of(config["model_cfg"], config["hardpair_name"], merges if merges.is_file() else None),
        config["hardpair_name"],
        fingerprint((folder / WEIGHTS_FILE).read_bytes()),
        folder,
    )


def _load_published(path: Path, device: str | torch.device, name: str) -> LoadedModel:
    config = resolve(ModelConfig(name=name or DEFAULT_NAME, pretrained=str(path)))
    model, preprocess = load_start(config, "cpu", no_words)
    model_config = architecture(config.name)
    return LoadedModel(
        model.eval().requires_grad_(False).to(device),
        open_clip.transform.image_transform_v2(preprocess, is_train=False),
        tokenizer_of(model_config, config.name),
        config.name,
        fingerprint(path.read_bytes(), model_config, asdict(preprocess)),
        path,
    )


def _read_model(folder: Path) -> tuple[torch.nn.Module, PreprocessCfg]:
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    prepare_libraries(config["model_cfg"])
    with quiet_libraries():
        model = open_clip.create_model(f"local-dir:{folder}", load_weights=False, nonscalar_logit_scale=True)
    state_dict = load_file(folder / WEIGHTS_FILE)
    for scalar in SCALARS:
        if scalar in state_dict:
            state_dict[scalar] = state_dict[scalar].reshape(1)
    model.load_state_dict(state_dict)
    return model, PreprocessCfg(**config["preprocess_cfg"])


@contextlib.contextmanager
def attention_for(device: torch.device) -> Iterator[None]:
    """On CPU, attention by plain products: the flash kernel's backward is 20 times slower at CLIP's short sequences there."""
    if device.type != "cpu":
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield


class TwoTowers(torch.nn.Module):
    """The module under the engine: normalised fp32 features of both towers and what scales them, in one forward."""

    def __init__(self, clip: torch.nn.Module, preprocess: PreprocessCfg) -> None:
        super().__init__()
        self.clip = clip
        self.mean, self.std = preprocess.mean, preprocess.std
        # A frozen bias is that of weights which another loss trained; this one has none.
        bias = getattr(clip, "logit_bias", None)
        self.has_bias = bias is not None and bias.requires_grad
        self.exact_scalars: dict[str, torch.Tensor] = {}
        """name -> float32 [1]: what a scalar stands for where its parameter is a copy rounded to 16 bit; set by the engine"""

    def forward(self, image_BCHW: torch.Tensor, text_BL: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """uint8 images [B, 3, H, W] and tokens int64 [B, L] -> image and text features float32 [B, D], scale float32 [1], and the bias
        float32 [1] of a model that learns one.
        """
        with attention_for(image_BCHW.device):
            image_features = self.clip.encode_image(self._normalised(image_BCHW))
            text_features = self.clip.encode_text(text_BL)
        features = (
            torch.nn.functional.normalize(image_features.float(), dim=-1),
            torch.nn.functional.normalize(text_features.float(), dim=-1),
            self._exact("logit_scale").exp(),
        )
        return (*features, self._exact("logit_bias")) if self.has_bias else features

    def _exact(self, name: str) -> torch.Tensor:
        # A tensor of its own: ZeRO-3 empties the parameter after the forward, and the loss still needs the value.
        copy = getattr(self.clip, name).float().clone()
        exact = self.exact_scalars.get(name)
        # The exact value, with the gradient of the copy.
        return copy if exact is None else copy + (exact - copy).detach()

    def _normalised(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        # Filled where they are used: a tensor made of Python's numbers is copied there, and the host waits for a GPU.
        mean, std = (
            torch.stack([torch.full((1, 1), value, device=image_BCHW.device) for value in values]) * 255
            for values in (self.mean, self.std)
        )
        image_BCHW = (image_BCHW.float() - mean) / std
        return image_BCHW.contiguous(memory_format=torch.channels_last).to(self.clip.logit_scale.dtype)
