"""The module under the engine for objectives with several views: both towers and the objective's heads, in one forward or in two parts.

One forward (`WHOLE`) encodes every view and runs the heads. For feature caching the parts are separate: `ENCODE` for a chunk of rows, then
`HEADS` for all of them at once. The engine passes tensors in tuples and dictionaries alone, since ZeRO-3 looks for tensors in those.
"""

from typing import Any

import torch

from train.config import ObjectiveConfig, TrainConfig
from train.models.clip_library import PreprocessCfg
from train.models.model import TwoTowers, attention_for
from train.models.trunk_features import dropping, encode_image, encode_text, text_blocks, tower_widths
from train.objectives import build_objective
from train.objectives.hidden_words import HiddenWords, encode_and_guess, hide_words
from train.objectives.objective import Encoded, Objective
from train.views import Views

ENCODE, HEADS, WHOLE = "encode", "heads", "whole"
# What names of the towers' and of the objective's parameters begin with.
TOWERS_PREFIX, OBJECTIVE_PREFIX = "clip.", "objective."
Tensors = tuple[torch.Tensor, ...]


class TowersAndHeads(TwoTowers):
    """A CLIP and an objective. `forward`'s first argument names what to do with the others."""

    def __init__(
        self, clip: torch.nn.Module, preprocess: PreprocessCfg, objective: Objective, config: ObjectiveConfig
    ) -> None:
        super().__init__(clip, preprocess)
        self.objective, self.text_dropout, self.text_drop_path = objective, config.text_dropout, config.text_drop_path
        norm = torch.nn.modules.batchnorm._BatchNorm
        # A view is a batch for BatchNorm, as in the published methods; towers without it take all views in one pass.
        self.images_at_once = not any(isinstance(layer, norm) for layer in clip.visual.modules())
        if config.text_dropout or config.text_drop_path:
            text_blocks(clip)
            # What is recomputed in the backward pass would lack the dropout.
            getattr(clip, "text", clip).transformer.grad_checkpointing = False

    @property
    def views(self) -> Views:
        return self.objective.views

    def forward(self, task: str, *inputs: Any) -> Any:
        """ENCODE images, texts, hidden -> the fields of `Encoded` as tuples. HEADS those fields without scalars, teacher's outputs ->
        outputs, scalars, own scales by name. WHOLE images, texts, teacher's outputs, hidden -> the same and the weak image and text
        features.

        images: uint8 [B, 3, H, W] and texts: int64 [B, L], the weak view and the strong ones. hidden: `HiddenWords.tensors` of the weak
        texts; without them an objective that hides words draws them here, and the device is waited for.
        """
        if task == ENCODE:
            return self.encode(*inputs)
        if task == WHOLE:
            images, texts, teacher, *hidden = inputs
            *encoded, words, _ = self.encode(images, texts, *hidden)
        else:
            *encoded, words, teacher = inputs
        scalars = self.scalars()
        # Not by a call: ZeRO-3's hooks would look for tensors in what is no tuple. Its parameters are gathered as the towers' own are.
        outputs = self.objective.forward(Encoded(*encoded, scalars, words), teacher)
        with torch.no_grad():
            scales = {name: self.objective.scale(name) for name in self.objective.temperatures}
        return (outputs, scalars, scales, *((encoded[0][0], encoded[1][0]) if task == WHOLE else ()))

    def encode(self, images: Tensors, texts: Tensors, hidden: Tensors = ()) -> tuple[Tensors, ...]:
        """Image and text features, their trunks, guessed words, scalars."""
        with attention_for(images[0].device):
            image_pairs = self._encode_images(images)
            text_pairs, words = self._encode_texts(texts, hidden)
        (image, image_trunk), (text, text_trunk) = (
            tuple(zip(*pairs, strict=True)) for pairs in (image_pairs, text_pairs)
        )
        return _unit(image), _unit(text), _float(image_trunk), _float(text_trunk), words, self.scalars()

    def scalars(self) -> Tensors:
        scale = self._exact("logit_scale").exp()
        return (scale, self._exact("logit_bias")) if self.has_bias else (scale,)

    def _encode_images(self, images: Tensors) -> list[tuple[torch.Tensor, torch.Tensor]]:
        together = self.images_at_once and len({image.shape[1:] for image in images}) == 1
        return _views_of(lambda rows: encode_image(self.clip, self._normalised(rows)), images, together=together)

    def _encode_texts(self, texts: Tensors, hidden: Tensors) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], Tensors]:
        """Each view's features and trunk, and what was guessed of the weak view's hidden words."""

        def encoded(rows_BL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return encode_text(self.clip, rows_BL)

        words: Tensors = ()
        probability = self.objective.hidden_word_probability
        if probability and self.objective.training:
            chosen = HiddenWords(*hidden) if hidden else hide_words(texts[0], probability)
            weak, words = encode_and_guess(self.clip, self.objective, texts[0], chosen)
        elif (self.text_dropout or self.text_drop_path) and len(texts) > 1:
            weak = encoded(texts[0])
        else:
            return _views_of(encoded, texts, together=True), words
        with dropping(self.clip, self.text_dropout, self.text_drop_path):
            return [weak, *_views_of(encoded, texts[1:], together=True)], words


def _views_of(encode: Any, views: Tensors, *, together: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """`encode` of each view, (features, trunk); in one pass over the rows of all of them, or view by view."""
    if not together or len(views) == 1:
        return [encode(view) for view in views]
    features, trunk = encode(torch.cat(views))
    sizes = [len(view) for view in views]
    return list(zip(features.split(sizes), trunk.split(sizes), strict=True))


def _unit(views: Tensors) -> Tensors:
    return tuple(torch.nn.functional.normalize(rows.float(), dim=-1) for rows in views)


def _float(views: Tensors) -> Tensors:
    return tuple(rows.float() for rows in views)


def build_towers(clip: torch.nn.Module, preprocess: PreprocessCfg, config: TrainConfig) -> TwoTowers:
    """The module to train: the towers alone for CLIP, with heads for every other objective. Draws the heads from torch's generator.

    Raises ValueError for a tower that heads can't sit on.
    """
    if config.objective.towers_alone:
        return TwoTowers(clip, preprocess)
    return TowersAndHeads(clip, preprocess, build_objective(config, tower_widths(clip)), config.objective)


def example_inputs(towers: TwoTowers, image_BCHW: torch.Tensor, text_BL: torch.Tensor) -> tuple[Any, ...]:
    """What the module takes in a step, made of one view; the heads are set to need no other rank. For counting on a copy."""
    if not isinstance(towers, TowersAndHeads):
        return image_BCHW, text_BL
    # In train mode their BatchNorms would wait for ranks that do not count.
    towers.objective.eval()
    # Targets of a teacher are the loss's matter; that there are some is all that `forward` asks.
    return WHOLE, (image_BCHW,) * towers.views.num_images, (text_BL,) * towers.views.num_texts, {}


def has_teacher(towers: TwoTowers) -> bool:
    return isinstance(towers, TowersAndHeads) and towers.objective.teacher_momentum is not None


def forward_passes(towers: TwoTowers) -> tuple[int, int]:
    """How often a step passes each picture and each text through its tower."""
    views = getattr(towers, "views", Views())
    times = 2 if has_teacher(towers) else 1
    return views.num_images * times, views.num_texts * times
