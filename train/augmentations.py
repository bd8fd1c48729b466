"""The augmentations of the published recipes, for train/recipes.py: weak views (CLIP's) and strong ones.

SLIP (Mu et al. 2022) augments pictures alone; CLIP-rocket (Fini et al. 2023) captions as well, also the weak view's, where CLIP as
a baseline has none of it. MoCo v2's list is DeCLIP's for its two image views.
"""

from dataclasses import replace

from train.config import STRONG_AUGMENT, AugmentConfig

NO_TEXT = {"stop_words_prob": 0.0, "synonym_weight": 0.0, "swap_weight": 0.0, "delete_weight": 0.0}

SLIP_WEAK = AugmentConfig(scale=(0.5, 1.0), interpolation="bilinear")
SLIP_STRONG = replace(STRONG_AUGMENT, **NO_TEXT, interpolation="bilinear")
ROCKET_WEAK = AugmentConfig(scale=(0.5, 1.0), stop_words_prob=0.8)
ROCKET_STRONG = STRONG_AUGMENT
MOCO_V2_STRONG = replace(SLIP_STRONG, scale=(0.2, 1.0))
