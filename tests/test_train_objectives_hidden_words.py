"""DeCLIP's masked language model: what is hidden, what is guessed, and the loss of all ranks' guesses."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.ranks import run_on_ranks
from train.config import ObjectiveConfig, TrainConfig
from train.distributed import RowLayout, world_group
from train.models.clip_library import PreprocessCfg, open_clip
from train.objectives import Encoded, TowerWidths, build_objective
from train.objectives.declip import mean_over_words
from train.objectives.hidden_words import hide_words
from train.objectives.towers_and_heads import ENCODE, HEADS, build_towers

START, END, LENGTH, WIDTH = 60, 61, 12, 16
SETTINGS = ObjectiveConfig(
    name="declip", num_strong_views=1, declip_dim=8, declip_width=4, queue_length=8, mlm_probability=0.6
)


def texts(num_rows: int, generator: torch.Generator) -> torch.Tensor:
    """Start, 1 to 9 words, end, padding."""
    rows = torch.zeros(num_rows, LENGTH, dtype=torch.int64)
    for row in rows:
        number = int(torch.randint(1, 10, (), generator=generator))
        row[: number + 2] = torch.tensor([START, *torch.randint(1, START, (number,), generator=generator), END])
    return rows


def is_word(text_BL: torch.Tensor) -> torch.Tensor:
    return (text_BL > 0) & (text_BL != START) & (text_BL != END)


def test_words_alone_are_chosen_and_their_fates_are_berts():
    """15 % chosen; of these 80 % hidden, 10 % another word, 10 % as they are (Devlin et al. 2018, section 3.1); to five standard errors."""
    torch.manual_seed(0)
    text_BL = texts(20000, torch.Generator().manual_seed(1))
    hidden = hide_words(text_BL, 0.15)
    words, chosen = int(is_word(text_BL).sum()), int(hidden.is_chosen_BL.sum())
    assert not (hidden.is_chosen_BL & ~is_word(text_BL)).any()
    assert not (hidden.is_hidden_BL & ~hidden.is_chosen_BL).any()
    changed_BL = hidden.text_BL != text_BL
    assert not (changed_BL & (hidden.is_hidden_BL | ~hidden.is_chosen_BL)).any()
    assert is_word(hidden.text_BL)[changed_BL].all()
    # Another word is the same one in 1 of 59 draws.
    for found, of, share in (
        (chosen, words, 0.15),
        (int(hidden.is_hidden_BL.sum()), chosen, 0.8),
        (int(changed_BL.sum()), chosen, 0.1 * 58 / 59),
    ):
        assert abs(found / of - share) < 5 * (share * (1 - share) / of) ** 0.5


def test_without_a_chance_nothing_is_hidden_and_a_text_without_words_has_none():
    text_BL = torch.tensor([[START, 5, 6, END, 0], [START, END, 0, 0, 0]])
    hidden = hide_words(text_BL, 0.0)
    assert not hidden.is_chosen_BL.any()
    assert torch.equal(hidden.text_BL, text_BL)
    assert hide_words(text_BL, 0.999999).is_chosen_BL.tolist() == [[False, True, True, False, False], [False] * 5]


def tiny_towers(config: TrainConfig):
    torch.manual_seed(3)
    clip = open_clip.CLIP(
        embed_dim=8,
        vision_cfg={"image_size": 16, "patch_size": 8, "width": WIDTH, "layers": 1, "head_width": 8},
        text_cfg={"context_length": LENGTH, "vocab_size": END + 1, "width": WIDTH, "heads": 2, "layers": 2},
        nonscalar_logit_scale=True,
    )
    return build_towers(clip, PreprocessCfg(), config).train()


def test_the_guesses_are_those_of_a_tower_that_sees_the_masks_vector_and_features_are_of_the_same_pass():
    """Beside it by hand: embeddings with the mask's vector put in, then open_clip's own blocks, norm, pooling and projection."""
    towers = tiny_towers(TrainConfig(objective=SETTINGS))
    clip, objective = towers.clip, towers.objective
    text_BL = texts(7, torch.Generator().manual_seed(2))
    images = (torch.randint(0, 256, (7, 3, 16, 16), dtype=torch.uint8),) * 2
    torch.manual_seed(5)
    _, text, _, _, (loss_B, number_B), _ = towers(ENCODE, images, (text_BL, text_BL))

    torch.manual_seed(5)
    hidden = hide_words(text_BL, SETTINGS.mlm_probability)
    assert hidden.is_hidden_BL.any()
    assert (hidden.text_BL != text_BL).any()
    seen_BLW = clip.token_embedding(hidden.text_BL)
    seen_BLW[hidden.is_hidden_BL] = objective.word_mask.weight[0]
    seen_BLW = clip.ln_final(clip.transformer(seen_BLW + clip.positional_embedding, attn_mask=clip.attn_mask))
    ends_B = (text_BL == END).int().argmax(1)
    features_BD = F.normalize(seen_BLW[torch.arange(7), ends_B] @ clip.text_projection, dim=1)
    torch.testing.assert_close(text[0], features_BD, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(text[1], F.normalize(clip.encode_text(text_BL), dim=1), rtol=1e-5, atol=1e-6)
    for row in range(7):
        places = [place for place in range(LENGTH) if hidden.is_chosen_BL[row, place]]
        losses = [
            -torch.log_softmax(objective.text_label_predictor(seen_BLW[row, place]), 0)[text_BL[row, place]]
            for place in places
        ]
        assert float(number_B[row]) == len(places)
        assert float(loss_B[row]) == pytest.approx(float(sum(losses)), rel=1e-5)


def test_the_guesses_take_their_part_in_the_loss_and_reach_every_weight_of_theirs():
    towers = tiny_towers(TrainConfig(objective=SETTINGS))
    images = tuple(torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8) for _ in range(2))
    views = tuple(texts(6, torch.Generator().manual_seed(seed)) for seed in (6, 7))
    *encoded, scalars = towers(ENCODE, images, views)
    outputs, *_ = towers(HEADS, *encoded, None)
    terms = towers.objective.loss(outputs, scalars, None, RowLayout(None, (6,)))
    plain = build_objective(TrainConfig(objective=replace(SETTINGS, mlm_weight=0.0)), towers.objective.widths)
    plain.load_state_dict(towers.objective.state_dict(), strict=False)
    # The queue has moved on since: the same one again.
    plain.text_queue.copy_(tiny_towers(TrainConfig(objective=SETTINGS)).objective.text_queue)
    without = plain.loss(plain(Encoded(*encoded[:4], scalars), None), scalars, None, RowLayout(None, (6,)))
    loss_B, number_B = encoded[4]
    mlm = float(loss_B.sum() / number_B.sum())
    assert float(terms.values["mlm"]) == pytest.approx(mlm, rel=1e-6)
    assert float(terms.loss) == pytest.approx(float(without.loss) + 0.2 * mlm, rel=1e-5)
    terms.loss.backward()
    for name in ("word_mask.weight", "text_label_predictor.weight", "text_label_predictor.bias"):
        assert towers.objective.get_parameter(name).grad.abs().sum() > 0, name


def mean_of_part(rank: int, world_size: int) -> tuple[float, torch.Tensor]:
    loss_B = torch.tensor([3.0, 0.0, 5.0, 4.0, 1.0])[rank::world_size].clone().requires_grad_()
    mean = mean_over_words(loss_B, torch.tensor([2.0, 0.0, 1.0, 4.0, 1.0])[rank::world_size], world_group())
    mean.backward()
    return float(mean), loss_B.grad


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_word_counts_alike_on_every_rank(world_size):
    """13 nats of 8 words; the gradient of each rank's sum is 1 / 8, times the number of ranks since the engine takes the mean."""
    for mean, gradient_B in run_on_ranks(mean_of_part, world_size):
        assert mean == pytest.approx(13 / 8)
        assert gradient_B.tolist() == pytest.approx([world_size / 8] * len(gradient_B))


def test_no_hidden_word_at_all_is_no_loss():
    assert float(mean_over_words(torch.zeros(2), torch.zeros(2), None)) == 0


def test_a_text_tower_without_words_of_its_own_is_refused():
    with pytest.raises(ValueError, match=r"objective.mlm_weight=0.2 needs a text tower of open_clip's own"):
        build_objective(TrainConfig(objective=SETTINGS), TowerWidths(8, 8, 8))
