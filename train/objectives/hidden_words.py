"""DeCLIP's masked language model: some words of the weak texts are hidden, and the text tower's features at their places guess them.

The features of these texts are the contrastive ones of the weak view, too, as published. A vector that the objective learns stands in the
place of a hidden word, so no vocabulary needs a token for it. Source: Li et al. 2021 (arXiv:2110.05208), section 3.2; BERT, Devlin et al.
2018 (arXiv:1810.04805), section 3.1, which says what becomes of the words that are chosen.

Shape letters: B rows, L text tokens, W trunk width, M chosen words of all rows, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from train.models.trunk_features import encode_text, recorded
from train.objectives.objective import Objective

# Of the words that are chosen so many become the mask and so many any other word; the rest stay.
HIDDEN, REPLACED = 0.8, 0.1


@dataclass(frozen=True)
class HiddenWords:
    """Texts with words to guess."""

    text_BL: torch.Tensor
    """what the tower reads: some of the chosen words are others"""
    is_hidden_BL: torch.Tensor
    """bool: where the mask stands"""
    is_chosen_BL: torch.Tensor
    """bool: the words to guess"""
    row_M: torch.Tensor
    """int64: the row of each of them"""
    place_M: torch.Tensor
    """int64: its place in the row"""

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The fields in order."""
        return self.text_BL, self.is_hidden_BL, self.is_chosen_BL, self.row_M, self.place_M


def hide_words(text_BL: torch.Tensor, probability: float) -> HiddenWords:
    """Choose each word with `probability`, from torch's generator of the device of the texts.

    text_BL: int64 tokens in CLIP's order: the start, words, and the end, whose token is the largest; then padding. The host waits
    for the number of chosen words, so a step gives texts that are in the host's memory.
    """
    place_L = torch.arange(text_BL.shape[1], device=text_BL.device)
    is_word_BL = (place_L > 0) & (place_L < text_BL.argmax(1, keepdim=True))
    chance_BL, fate_BL, word_BL = torch.rand(3, *text_BL.shape, device=text_BL.device)
    is_chosen_BL = is_word_BL & (chance_BL < probability)
    is_replaced_BL = is_chosen_BL & (fate_BL >= HIDDEN) & (fate_BL < HIDDEN + REPLACED)
    # Ordinary tokens are below the start's; 0 is padding.
    other_BL = 1 + (word_BL * (text_BL[:, :1] - 1)).long()
    seen_BL, is_hidden_BL = torch.where(is_replaced_BL, other_BL, text_BL), is_chosen_BL & (fate_BL < HIDDEN)
    return HiddenWords(seen_BL, is_hidden_BL, is_chosen_BL, *is_chosen_BL.nonzero(as_tuple=True))


def encode_and_guess(
    clip: torch.nn.Module, objective: Objective, text_BL: torch.Tensor, hidden: HiddenWords
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """((features, trunk) of the texts with hidden words, (cross entropy of the guesses in nats [B], their number [B])), sums over each row.

    objective: has `word_mask` and `text_label_predictor`. hidden: what `hide_words` made of the texts.
    """
    tower = getattr(clip, "text", clip)
    # Looked up here, whether or not a word is hidden: ZeRO-3 wants the same modules in the same order on every rank.
    mask_W = objective.word_mask(torch.zeros((), dtype=torch.int64, device=text_BL.device))

    def put_mask(_module: torch.nn.Module, _given: object, vector_BLW: torch.Tensor) -> torch.Tensor:
        return torch.where(hidden.is_hidden_BL[:, :, None], mask_W.to(vector_BLW.dtype), vector_BLW)

    handle = tower.token_embedding.register_forward_hook(put_mask)
    try:
        with recorded(tower.ln_final) as seen:
            pair = encode_text(clip, hidden.text_BL)
    finally:
        handle.remove()
    row_M, place_M = hidden.row_M, hidden.place_M
    guess_MV = objective.text_label_predictor(objective.to_weights(seen[-1][row_M, place_M]))
    loss_M = F.cross_entropy(guess_MV.float(), text_BL[row_M, place_M], reduction="none")
    loss_B = loss_M.new_zeros(len(text_BL)).index_add(0, row_M, loss_M)
    return pair, (loss_B, hidden.is_chosen_BL.sum(1).to(loss_B.dtype))
