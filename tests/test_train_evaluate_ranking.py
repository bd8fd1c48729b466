"""Ranks, hit rates, chance and standard errors against hand-made cases, naive loops, scikit-learn and open_clip."""

import math

import numpy as np
import pytest
import torch
from open_clip_train.train import get_clip_metrics
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from train.evaluate import ranking
from train.evaluate.ranking import Measurement, class_means, hit_rate, ranks_in_blocks
from train.evaluate.retrieval import recalls
from train.evaluate.zeroshot import allowed_classes, top_k_of


def unit_rows(num_rows: int, dim: int, seed: int) -> torch.Tensor:
    rows = torch.randn(num_rows, dim, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=1)


def scores_as_features(score_QN: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Features whose product is exactly the given score matrix."""
    score = torch.tensor(score_QN)
    return score, torch.eye(score.shape[1])


def right_at(columns: list[int], num_candidates: int):
    column_Q = torch.tensor(columns)
    return lambda start, stop: torch.arange(num_candidates)[None] == column_Q[start:stop, None]


def test_rank_counts_the_wrong_candidates_that_score_higher():
    query, candidate = scores_as_features([[0.9, 0.5, 0.1], [0.9, 0.5, 0.1], [0.9, 0.5, 0.1]])
    assert ranks_in_blocks(query, candidate, right_at([0, 1, 2], 3)).tolist() == [0, 1, 2]


def test_a_tie_with_a_wrong_candidate_is_lost():
    query, candidate = scores_as_features([[0.5, 0.5, 0.5, 0.1]])
    assert ranks_in_blocks(query, candidate, right_at([1], 4)).tolist() == [2]


def test_a_model_that_scores_everything_alike_gets_nothing_right():
    same = torch.ones(20, 4) / 2
    pairs = torch.arange(20)[:, None].expand(-1, 2)
    assert all(measurement.value == 0.0 for measurement in recalls(same, same, pairs).values())


def test_several_right_candidates_count_by_the_best_and_do_not_compete_with_each_other():
    query, candidate = scores_as_features([[0.9, 0.8, 0.7, 0.95]])
    mask = torch.tensor([[True, True, True, False]])
    assert ranks_in_blocks(query, candidate, lambda start, stop: mask[start:stop]).tolist() == [1]


def test_ranks_do_not_depend_on_the_block_size(monkeypatch):
    query, candidate = unit_rows(57, 8, 0), unit_rows(57, 8, 1)
    whole = ranks_in_blocks(query, candidate, right_at(list(range(57)), 57))
    # 0.001 MiB of scores: four rows a block.
    monkeypatch.setattr(ranking, "SCORE_BLOCK_MIB", 0.001)
    assert ranks_in_blocks(query, candidate, right_at(list(range(57)), 57)).tolist() == whole.tolist()


def test_zero_shot_equals_scikit_learns_top_k_accuracy():
    image, classes = unit_rows(200, 6, 2), unit_rows(12, 6, 3)
    label_N = torch.arange(200) % 12
    found = top_k_of(image, classes, label_N, [str(int(label)) for label in label_N], None)
    score = (image @ classes.T).numpy()
    for k in (1, 5):
        expected = top_k_accuracy_score(label_N.numpy(), score, k=k, labels=np.arange(12))
        assert found[f"top{k}"].value == pytest.approx(expected, abs=1e-12)
        assert found[f"top{k}"].chance == pytest.approx(k / 12)


def test_mean_per_class_equals_scikit_learns_balanced_accuracy():
    image, classes = unit_rows(100, 6, 4), unit_rows(7, 6, 5)
    label_N = torch.tensor([index % 7 if index % 3 else 0 for index in range(100)])
    found = top_k_of(image, classes, label_N, [str(int(label)) for label in label_N], None)
    expected = balanced_accuracy_score(label_N.numpy(), (image @ classes.T).argmax(dim=1).numpy())
    assert found["mean_per_class"].value == pytest.approx(expected, abs=1e-12)


def test_within_restricts_candidates_to_the_classes_seen_with_the_pictures_group():
    image, classes = unit_rows(90, 5, 6), unit_rows(9, 5, 7)
    label_N = torch.arange(90) % 9
    groups = [f"group {int(label) // 3}" for label in label_N]
    found = top_k_of(image, classes, label_N, groups, allowed_classes(label_N, groups, 9))
    hits = 0
    for row, label in enumerate(label_N.tolist()):
        candidates = [other for other in range(9) if other // 3 == label // 3]
        scores = {other: float(image[row] @ classes[other]) for other in candidates}
        hits += max(scores, key=scores.get) == label
    assert found["top1"].value == pytest.approx(hits / 90)
    assert found["top1"].chance == pytest.approx(1 / 3)
    # Three candidates are always among the first five.
    assert found["top5"].value == found["top5"].chance == 1.0


def test_retrieval_of_distinct_pairs_equals_open_clips_metrics():
    image = unit_rows(150, 8, 8)
    text = torch.nn.functional.normalize(image + 1.0 * unit_rows(150, 8, 9), dim=1)
    theirs = get_clip_metrics(image, text, torch.tensor(1.0))
    ours = recalls(image, text, torch.arange(150)[:, None].expand(-1, 2))
    for direction in ("image_to_text", "text_to_image"):
        for k in (1, 5, 10):
            assert ours[f"{direction}_r{k}"].value == pytest.approx(float(theirs[f"{direction}_R@{k}"]))
    assert 0.05 < ours["image_to_text_r1"].value < 0.95, "the case must be neither trivial nor hopeless"


def test_retrieval_with_shared_captions_and_several_captions_equals_a_naive_loop():
    image, text = unit_rows(40, 4, 10), unit_rows(30, 4, 11)
    # Every picture has two captions and every caption two to four pictures.
    pairs = sorted({(row, (row + shift) % 30) for row in range(40) for shift in (0, 7)})
    ours = recalls(image, text, torch.tensor(pairs))
    for direction, num_queries, score, right in (
        ("image_to_text", 40, image @ text.T, pairs),
        ("text_to_image", 30, (image @ text.T).T, [(column, row) for row, column in pairs]),
    ):
        for k in (1, 5, 10):
            hits = 0
            for query in range(num_queries):
                order = sorted(range(score.shape[1]), key=lambda other, query=query: -float(score[query, other]))
                best = max(float(score[query, other]) for other in order if (query, other) in right)
                wrong_above = [o for o in order if (query, o) not in right and float(score[query, o]) >= best]
                hits += len(wrong_above) < k
            assert ours[f"{direction}_r{k}"].value == pytest.approx(hits / num_queries), (direction, k)


def test_chance_is_the_probability_of_drawing_a_right_candidate():
    ranks = np.zeros(2, dtype=np.int64)
    for num_candidates, num_right, k in ((10, 1, 1), (10, 3, 5), (12, 2, 10), (4, 3, 2), (3, 1, 5)):
        draws = math.comb(num_candidates, min(k, num_candidates))
        expected = 1 - math.comb(num_candidates - num_right, min(k, num_candidates)) / draws
        found = hit_rate(ranks, k, num_candidates=num_candidates, num_right=num_right, unit="image")
        assert found.chance == pytest.approx(expected, abs=1e-12)


def test_standard_error_of_a_share_is_binomial():
    measurement = Measurement(np.array([1.0, 0.0, 0.0, 0.0]), None, "image")
    assert measurement.value == 0.25
    assert measurement.standard_error == pytest.approx(math.sqrt(0.25 * 0.75 / 4))


def test_standard_error_over_classes_is_that_of_their_mean():
    measurement = class_means(np.array([1.0, 0.0, 1.0, 1.0, 0.0, 0.0]), ["a", "a", "b", "b", "c", "c"])
    assert measurement.values_U.tolist() == [0.5, 1.0, 0.0]
    assert measurement.standard_error == pytest.approx(0.5 / math.sqrt(3))
