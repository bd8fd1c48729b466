"""What a run reads, and how views of pictures and captions are made."""

import math
from dataclasses import dataclass, fields
from typing import Literal

Partners = Literal["mined", "random"]


@dataclass(frozen=True)
class DataConfig:
    """Where the pairs come from and how batches are put together."""

    store: str = ""
    """PairStore that `python -m train.ingest` wrote: a folder, or a URL of remote storage (s3://, gs://, sftp://, ...; needs cache)"""
    cache: str = ""
    """with a remote store: local folder for what is fetched of it, shared by all processes of a node; kept for the next run"""
    store_shuffle_block: int = 0
    """shuffle blocks of so many consecutive anchors of the store, then the anchors within a block, so that a batch reads few shards; for
    stores that `train.reorder` wrote, and several global batches long; 0: shuffle all anchors together"""
    shards: tuple[str, ...] = ()
    """train straight from these WebDataset tars instead, without ingest: paths, brace ranges, globs, all local and uncompressed; no hard
    pairs, and equal captions or pictures are not kept apart"""
    shard_index: str = ""
    """with shards: folder for the index of the tars, which several runs may share; empty: inside the run folder"""
    shard_lanes: int = 64
    """with shards: how many places of the data are read side by side, over all ranks; every global batch mixes them"""
    shuffle_block: int = 2048
    """with shards: samples that are shuffled together within a lane"""
    pairs: str = ""
    """PairTable folder, as `mining.main search` writes it; needed for hard pairs"""
    hard_per_anchor: int = 0
    """hard pairs that join each anchor in a batch (p); 0 trains without hard pairs"""
    partners: Partners = "mined"
    """where partners come from: the pair table, or random pairs for a compute-matched control"""
    num_candidates: int = 0
    """draw partners from the first so many neighbours of the pair table; 0: from all of them"""
    weigh_by_score: bool = False
    """draw partners in proportion to their score instead of uniformly"""
    keep_duplicates_apart: bool = True
    """never put two pairs with the same caption or the same picture into one global batch"""
    caption_sampling: Literal["whole", "single", "multi"] = "whole"
    """whole: a sample's text is one caption. Otherwise its lines are captions of their own (YFCC: a title and a description), and every
    step draws one of them: single: one for all views of a pair; multi: one for each view"""
    clean_captions: bool = False
    """mend broken encodings (ftfy), resolve HTML entities and lower-case before captions are augmented; CLIP's tokenizer does it afterwards
    in any case, so this matters where words are dropped or replaced"""
    workers: int = 4
    """data loading processes of each rank"""

    def check(self) -> None:
        """Raises ValueError unless there is exactly one source of pairs that can give what is asked of it."""
        if not self.store and not self.shards:
            raise ValueError(
                "--data.store is missing: the PairStore folder that `python -m train.ingest` wrote "
                "(or --data.shards: tars to train from without ingest)"
            )
        if self.store_shuffle_block < 0:
            raise ValueError(f"data.store_shuffle_block={self.store_shuffle_block} must be 0 or more anchors")
        if not self.shards:
            return
        if self.store:
            raise ValueError(
                f"--data.store {self.store} and --data.shards {' '.join(self.shards)} are two sources; give one"
            )
        if self.pairs or self.hard_per_anchor:
            raise ValueError(
                f"--data.pairs {self.pairs or '(missing)'} and data.hard_per_anchor={self.hard_per_anchor} need --data.store: mined "
                "pairs are named by the pair ids that ingest gives, which tars alone do not have; ingest the tars first"
            )
        for name in ("shard_lanes", "shuffle_block"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name}={getattr(self, name)} must be at least 1")


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation of pictures and captions during training."""

    scale: tuple[float, float] = (0.9, 1.0)
    """range of the area that a random crop keeps (open_clip: aug_cfg.scale)"""
    ratio: tuple[float, float] = (0.75, 1.3333)
    """range of the crop's aspect ratio"""
    horizontal_flip_prob: float = 0.0
    """probability of mirroring a picture; keep 0 where captions speak of left and right"""
    color_jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """strength of brightness, contrast, saturation and hue jitter"""
    color_jitter_prob: float = 0.0
    """probability of the color jitter"""
    gray_scale_prob: float = 0.0
    """probability of dropping the colours"""
    gaussian_blur_prob: float = 0.0
    """probability of blurring a picture"""
    gaussian_blur_sigma: tuple[float, float] = (0.1, 2.0)
    """range of the blur's standard deviation, in pixels of the cut picture"""
    solarize_prob: float = 0.0
    """probability of inverting every channel's upper half (values of 128 and more)"""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """how a crop is scaled (CLIP and CLIP-rocket: bicubic; SLIP: bilinear)"""
    size: int = 0
    """height and width of a strong view, for models that take pictures of several sizes (CLIP-rocket on 29M pairs: 192); 0: as the model
    says; only for --strong_augment"""
    phrase_separator: str = ""
    """captions are lists of phrases joined by this (for example "; "): train on a random selection; empty: captions as they are"""
    lead_phrase_drop_prob: float = 0.1
    """with phrase_separator: how often the first phrase is left out in favour of the others"""
    stop_words_prob: float = 0.0
    """probability of dropping the function words of a caption ("the", "of", ...; those of train/data/words/stop_words.py). Prompts of an
    evaluation keep theirs"""
    synonym_weight: float = 0.0
    """after that, each caption is changed in one way, drawn by these weights (EDA; all 0: none): one word becomes a synonym (WordNet)"""
    swap_weight: float = 0.0
    """... two words change places"""
    delete_weight: float = 0.0
    """... every word is dropped with probability delete_word_prob"""
    identity_weight: float = 0.0
    """... nothing is changed"""
    delete_word_prob: float = 0.1
    """probability of each word's being dropped, where words are dropped"""

    @property
    def edit_weights(self) -> tuple[float, float, float, float]:
        """Weights of the synonym, the swap, the deletion and the identity."""
        return self.synonym_weight, self.swap_weight, self.delete_weight, self.identity_weight

    def check(self, flag: str) -> None:
        """Raises ValueError for a value that is no probability, weight or range; flag: the name of this group, "augment"."""
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name.endswith("_prob") and not 0 <= value <= 1:
                raise ValueError(f"{flag}.{item.name}={value} is a probability: between 0 and 1")
            if item.name.endswith("_weight") and not 0 <= value < math.inf:
                raise ValueError(f"{flag}.{item.name}={value} is a weight: 0 or more")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(
                f"{flag}.scale={self.scale} must be two shares of the area, above 0 and at most 1, the smaller first"
            )
        for name in ("ratio", "gaussian_blur_sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high < math.inf:
                raise ValueError(f"{flag}.{name}={(low, high)} must be two positive numbers, the smaller first")
        if min(self.color_jitter) < 0 or self.color_jitter[3] > 0.5:
            raise ValueError(
                f"{flag}.color_jitter={self.color_jitter} must be 0 or more, and the hue's (the last) at most 0.5"
            )
        if self.size < 0:
            raise ValueError(f"{flag}.size={self.size} must be 0 (as the model says) or pixels")


# CLIP-rocket's strong views, pictures and captions; the pictures are SLIP's, MoCo v2's list, as well.
STRONG_AUGMENT = AugmentConfig(
    scale=(0.08, 1.0),
    horizontal_flip_prob=0.5,
    color_jitter=(0.4, 0.4, 0.4, 0.1),
    color_jitter_prob=0.8,
    gray_scale_prob=0.2,
    gaussian_blur_prob=0.5,
    stop_words_prob=0.8,
    synonym_weight=0.4,
    swap_weight=0.4,
    delete_weight=0.2,
)
