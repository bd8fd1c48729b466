"""What an objective is: heads on the towers, own temperatures, and a loss over all ranks' rows of several views.

In: the towers' features of every view (`Encoded`). Out of `forward`, which runs inside the engine: named tensors (`Outputs`). Out of
`loss`, which runs outside of it in fp32: `Terms`.

Shape letters: B rows of this rank, D embedding, W trunk width (a tower's features before its projection).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from train.config import TrainConfig
from train.distributed import RowLayout
from train.views import Views

Outputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class TowerWidths:
    """Widths of what the towers give: before the projection of each, and behind it."""

    image_trunk: int
    text_trunk: int
    embedding: int
    vocabulary: int = 0
    """tokens that the text tower knows; 0: it has no token embedding of open_clip's"""


@dataclass(frozen=True)
class Encoded:
    """The towers' outputs for this rank's rows, all float32: the weak view, then the strong ones in order."""

    image: tuple[torch.Tensor, ...]
    """unit rows [B, D] through the model's own projection"""
    text: tuple[torch.Tensor, ...]
    """the same of the texts"""
    image_trunk: tuple[torch.Tensor, ...]
    """[B, W]: what heads sit on"""
    text_trunk: tuple[torch.Tensor, ...]
    scalars: tuple[torch.Tensor, ...]
    """the model's scale, exponentiated, [1]; and its bias [1] when it learns one"""
    guessed_words: tuple[torch.Tensor, ...] = ()
    """of an objective that hides words: sums over each row of the weak texts, cross entropy in nats [B] and number of hidden words [B]"""


@dataclass(frozen=True)
class Terms:
    """A step's loss, the same number on every rank, and its parts."""

    loss: torch.Tensor
    """0-d, differentiable: what is minimised"""
    values: dict[str, torch.Tensor]
    """every term by its name in metrics.jsonl, 0-d, detached"""


class Objective(torch.nn.Module, ABC):
    """Base class. Heads and own temperatures are submodules and parameters, so they are in ZeRO, in checkpoints, and in the teacher."""

    views: Views = Views()
    teacher_momentum: float | None = None
    """momentum of a teacher, an exponential average of towers and objective; None: there is none"""
    hidden_word_probability: float = 0.0
    """how many words of the weak texts are hidden and guessed (train/objectives/hidden_words.py)"""
    temperatures: tuple[str, ...] = ()
    """names of own parameters, float [1], that are logarithms of scales: kept between 0 and ln(optim.max_logit_scale) after each step"""

    def __init__(self, config: TrainConfig, widths: TowerWidths) -> None:
        super().__init__()
        self.config, self.widths = config, widths
        self.exact_scalars: dict[str, torch.Tensor] = {}
        """name -> float32 [1]: what a temperature stands for where its parameter is a copy rounded to 16 bit; set by the engine"""

    @abstractmethod
    def forward(self, encoded: Encoded, teacher: Outputs | None) -> Outputs:
        """Heads, on the rows of this rank; runs inside the engine's forward, under its autocast, once for the whole batch.

        What the loss needs of own temperatures belongs into the outputs (`scale`), since ZeRO-3 takes parameters away afterwards. teacher:
        what this method gave for the teacher, without gradients; None in the teacher itself and without one. Collective: every rank calls.
        """

    @abstractmethod
    def loss(
        self,
        outputs: Outputs,
        encoded_scalars: tuple[torch.Tensor, ...],
        teacher_outputs: Outputs | None,
        layout: RowLayout,
    ) -> Terms:
        """The loss over the rows of all ranks, as `layout` counts them; fp32, outside autocast. The host reads nothing from the device.

        Its gradient by what a rank gave is the world size times the gradient of the global mean (train/loss.py), as the engine takes the
        mean over ranks. Collective: every rank calls.
        """

    def scale(self, name: str) -> torch.Tensor:
        """The exponential of the own temperature `name`, float32 [1], exact under 16-bit weights, too. To be called in `forward`."""
        # A tensor of its own: ZeRO-3 empties the parameter after the forward, and the loss still needs the value.
        copy = getattr(self, name).float().clone()
        exact = self.exact_scalars.get(name)
        return (copy if exact is None else copy + (exact - copy).detach()).exp()

    def to_weights(self, rows: torch.Tensor) -> torch.Tensor:
        """`rows` in the precision of the heads' weights: 16 bit where DeepSpeed keeps weights so."""
        weight = next(self.parameters(), None)
        return rows if weight is None else rows.to(weight.dtype)
