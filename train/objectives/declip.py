"""DeCLIP's parts on two views of each picture and each text: all four contrastive pairs (MVS), nearest texts of a queue in place of the own
one (NNS), SimSiam between the pictures, and a masked language model on the weak texts (MLM, train/objectives/hidden_words.py).

The queue holds the texts of all ranks, the same on every rank; it is state, so a resumed run goes on with it. Source: Li et al. 2021
(arXiv:2110.05208). Published: a queue for each rank, random again after a resume.

Shape letters: B rows of this rank, D embedding, Q texts in the queue.
"""

from typing import Any

import torch
import torch.nn.functional as F

import kernels
from train.config import TrainConfig
from train.distributed import RowLayout, mean_over_rows, rows_of_all_ranks, summed_over_ranks
from train.objectives.contrastive import over_ranks, softplus, view_loss, weak_loss
from train.objectives.heads import Head
from train.objectives.objective import Encoded, Objective, Outputs, Terms, TowerWidths
from train.views import Views

# Columns of the queue that are compared with at a time.
QUEUE_TILE = 8192


class DeclipObjective(Objective):
    """Loss: mvs_weight * MVS + nns_weight * NNS + ssl_weight * SimSiam + mlm_weight * MLM; all but MLM on the model's own embedding."""

    views = Views(1, 1)

    def __init__(self, config: TrainConfig, widths: TowerWidths) -> None:
        super().__init__(config, widths)
        settings = config.objective
        dim = settings.declip_dim
        self.projector = Head([widths.embedding, dim, dim, dim], last_norm=True)
        self.predictor = Head([dim, settings.declip_width, dim])
        if settings.mlm_weight:
            if not widths.vocabulary:
                raise ValueError(
                    f"objective.mlm_weight={settings.mlm_weight} needs a text tower of open_clip's own to hide words; make it 0"
                )
            self.hidden_word_probability = settings.mlm_probability
            self.word_mask = torch.nn.Embedding(1, widths.text_trunk)
            torch.nn.init.normal_(self.word_mask.weight, std=0.02)
            self.text_label_predictor = torch.nn.Linear(widths.text_trunk, widths.vocabulary)
        self.register_buffer("text_queue", F.normalize(torch.randn(settings.queue_length, widths.embedding), dim=1))
        self.register_buffer("queue_place", torch.zeros((), dtype=torch.int64))

    def forward(self, encoded: Encoded, teacher: Outputs | None) -> Outputs:
        outputs = {"image": encoded.image[0], "text": encoded.text[0]}
        outputs |= {"strong_image": encoded.image[1], "strong_text": encoded.text[1]}
        for number, rows_BD in enumerate(encoded.image):
            outputs[f"projection_{number}"] = self.projector(rows_BD)
            outputs[f"prediction_{number}"] = self.predictor(outputs[f"projection_{number}"])
        if encoded.guessed_words:
            outputs["words_loss"], outputs["words_number"] = encoded.guessed_words
        return outputs

    def loss(
        self,
        outputs: Outputs,
        encoded_scalars: tuple[torch.Tensor, ...],
        teacher_outputs: Outputs | None,
        layout: RowLayout,
    ) -> Terms:
        settings, scale = self.config.objective, encoded_scalars[0]
        images, texts = ((outputs[name], outputs[f"strong_{name}"]) for name in ("image", "text"))
        share = settings.mvs_weight / 4
        weak = weak_loss(self.config, outputs, encoded_scalars, layout, share)
        others = [
            view_loss(self.config, images[a], texts[b], scale, self.config.loss.label_smoothing, layout).loss
            for a, b in ((0, 1), (1, 0), (1, 1))
        ]
        nns = self._nearest_texts_loss(images, texts, scale, layout)
        siam = self._simsiam(outputs, layout)
        loss = weak.loss + share * sum(others) + settings.nns_weight * nns + settings.ssl_weight * siam
        values = {"mvs_other_pairs": sum(others).detach() / 3, "nns": nns.detach(), "simsiam": siam.detach()}
        if settings.mlm_weight:
            mlm = mean_over_words(outputs["words_loss"], outputs["words_number"], layout.group)
            loss, values["mlm"] = loss + settings.mlm_weight * mlm, mlm.detach()
        self._enqueue(texts, layout)
        return Terms(loss, {**weak.values, **values, "loss": loss.detach()})

    def _nearest_texts_loss(
        self, images: tuple[torch.Tensor, ...], texts: tuple[torch.Tensor, ...], scale: torch.Tensor, layout: RowLayout
    ) -> torch.Tensor:
        """Cross entropy of each image among the texts nearest to all pairs' texts; images alone have a gradient. Collective."""
        losses, options = [], over_ranks(layout, self.config.loss.backend)
        for text_BD in texts:
            near_BD = nearest_rows(text_BD.detach(), self.text_queue)
            for image_BD in images:
                off_B = kernels.off_diagonal_log_sum_exp(image_BD, near_BD, scale, **options).rows_B
                losses.append(softplus(off_B - scale * (image_BD * near_BD).sum(1)))
        return mean_over_rows(sum(losses) / len(losses), layout)

    def _simsiam(self, outputs: Outputs, layout: RowLayout) -> torch.Tensor:
        """Minus the mean cosine of each view's prediction and the other's projection without gradient. Collective."""
        cosines = [
            F.cosine_similarity(outputs[f"prediction_{own}"], outputs[f"projection_{1 - own}"].detach(), dim=1)
            for own in (0, 1)
        ]
        return -mean_over_rows(sum(cosines) / 2, layout)

    @torch.no_grad()
    def _enqueue(self, texts: tuple[torch.Tensor, ...], layout: RowLayout) -> None:
        """Put both views' texts of all ranks in place of the oldest. Collective: every rank calls."""
        length = len(self.text_queue)
        rows_ND = torch.cat([rows_of_all_ranks(text_BD.detach(), layout) for text_BD in texts])[-length:]
        places_N = (self.queue_place + torch.arange(len(rows_ND), device=rows_ND.device)) % length
        # A step that is not finite changes nothing: its rows stay out.
        finite_N1 = rows_ND.isfinite().all(1, keepdim=True)
        rows_ND = torch.where(finite_N1, rows_ND.to(self.text_queue.dtype), self.text_queue[places_N])
        self.text_queue[places_N] = rows_ND
        self.queue_place.copy_((self.queue_place + len(rows_ND)) % length)


def mean_over_words(loss_B: torch.Tensor, number_B: torch.Tensor, group: Any) -> torch.Tensor:
    """Cross entropy of a hidden word of all ranks' texts, in nats, 0-d; 0 when none is hidden. Collective: every rank calls."""
    own = torch.stack([loss_B.sum(), number_B.sum()])
    total, number = summed_over_ranks(own, group, used_alike=True).unbind()
    return total / number.detach().clamp(min=1)


def nearest_rows(rows_BD: torch.Tensor, queue_QD: torch.Tensor) -> torch.Tensor:
    """Of each row the queue's most similar one, [B, D] in the dtype of the rows; the first of equals."""
    best_B = rows_BD.new_full((len(rows_BD),), -torch.inf)
    place_B = torch.zeros(len(rows_BD), dtype=torch.int64, device=rows_BD.device)
    for first in range(0, len(queue_QD), QUEUE_TILE):
        value_B, index_B = (rows_BD @ queue_QD[first : first + QUEUE_TILE].to(rows_BD.dtype).T).max(1)
        is_nearer_B = value_B > best_B
        best_B, place_B = torch.where(is_nearer_B, value_B, best_B), torch.where(is_nearer_B, index_B + first, place_B)
    return queue_QD[place_B].to(rows_BD.dtype)
