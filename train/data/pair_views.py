"""All views of one pair: the weak one that every objective has, and the strong ones of objectives that compare views.

A picture is decoded once and cut once for each view. The seed of the weak view names run, step and pair, that of a strong view its
number as well: without strong views the pictures and words are what they are in a run that knows no views.

Shape letters: B rows of this rank, L text tokens, C H W image.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image

from train.config import AugmentConfig, DataConfig
from train.data.augment import augment_picture, draw_seed, sample_phrases
from train.data.text_augment import augment_text, captions_of, clean_caption
from train.data.words.synonyms import english_synonyms
from train.views import Views

# The last name of seeds that draw something else than a picture's augmentation and a caption's phrases.
CAPTION, WORDS = 1, 2


@dataclass(frozen=True)
class PairViews:
    """Makes the views; `views` says how many."""

    config: DataConfig
    weak: AugmentConfig
    strong: AugmentConfig
    views: Views
    image_size: tuple[int, int]
    """height, width of the model"""
    seed: int

    def __post_init__(self) -> None:
        if self.weak.synonym_weight or (self.views.strong_texts and self.strong.synonym_weight):
            # Read before worker processes are forked, which share it then.
            english_synonyms()

    def images(self, picture: Image.Image, step: int, pair_id: int) -> list[torch.Tensor]:
        """Every view of a decoded RGB picture, the weak one first: uint8 [3, H, W]."""
        return [
            augment_picture(picture, self._augment(view), self.image_size, self._seed(step, pair_id, view))
            for view in range(self.views.num_images)
        ]

    def texts(self, caption: str, step: int, pair_id: int) -> list[str]:
        """Every view of a sample's text, the weak one first."""
        return [self._text(caption, step, pair_id, view) for view in range(self.views.num_texts)]

    def _text(self, caption: str, step: int, pair_id: int, view: int) -> str:
        if self.config.caption_sampling != "whole":
            shared = self.config.caption_sampling == "single"
            captions = captions_of(caption)
            caption = captions[draw_seed(self.seed, step, pair_id, 0 if shared else view, CAPTION) % len(captions)]
        if self.config.clean_captions:
            caption = clean_caption(caption)
        augment = self._augment(view)
        caption = sample_phrases(caption, augment, self._seed(step, pair_id, view))
        return augment_text(caption, augment, draw_seed(self.seed, step, pair_id, view, WORDS))

    def _augment(self, view: int) -> AugmentConfig:
        return self.strong if view else self.weak

    def _seed(self, step: int, pair_id: int, view: int) -> int:
        return draw_seed(self.seed, step, pair_id, view) if view else draw_seed(self.seed, step, pair_id)


@dataclass
class Rows:
    """The rows of a batch as they come, one list for each view."""

    views: Views
    images: list[list[torch.Tensor]] = field(init=False)
    texts: list[list[str]] = field(init=False)

    def __post_init__(self) -> None:
        self.images = [[] for _ in range(self.views.num_images)]
        self.texts = [[] for _ in range(self.views.num_texts)]

    def append(self, images: Sequence[torch.Tensor], texts: Sequence[str]) -> None:
        """images: uint8 [3, H, W] each, one a view; texts: the same."""
        for rows, image in zip(self.images, images, strict=True):
            rows.append(image)
        for rows, text in zip(self.texts, texts, strict=True):
            rows.append(text)

    def stacked_images(self) -> tuple[torch.Tensor, ...]:
        """uint8 [B, 3, H, W] of every view; the rows are given up."""
        # View by view, so that no more than one is held twice.
        return tuple(stack_images(self.images.pop(0)) for _ in range(self.views.num_images))

    def tokens(self, tokenizer: Callable[[list[str]], torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """int64 [B, L] of every view."""
        return tuple(tokenizer(rows) for rows in self.texts)


def stack_images(images: list[torch.Tensor]) -> torch.Tensor:
    """uint8 [3, H, W] each -> [B, 3, H, W], in memory with the colours innermost, as Pillow and channels_last have them."""
    # Sorting the bytes by colour would take longer than all the rest of putting a batch together.
    return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)
