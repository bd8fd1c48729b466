"""How many times a step sees a pair: once weakly augmented, as CLIP does, and as many times strongly augmented as the objective wants."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Views:
    """Strongly augmented views of each pair, beside the weak one that every objective has."""

    strong_images: int = 0
    strong_texts: int = 0

    @property
    def num_images(self) -> int:
        return 1 + self.strong_images

    @property
    def num_texts(self) -> int:
        return 1 + self.strong_texts


# CLIP's, and HELIP's.
WEAK_ONLY = Views()
