"""Measured recall: Wilson's interval against published values, and a sample against counting by hand."""

import numpy as np
import pytest

from mining.recall import independent_entries, measured_recall, recall_of, recall_text, wilson_interval


@pytest.mark.parametrize(
    ("successes", "trials", "interval"),
    [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0.0, 0.1611)), (1, 29, (0.0061, 0.1718))],
)
def test_wilson_interval_has_newcombes_published_values(successes, trials, interval):
    # R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    assert wilson_interval(successes / trials, trials) == pytest.approx(interval, abs=5e-5)


def test_interval_of_nothing_is_everything():
    assert wilson_interval(1.0, 0) == (0.0, 1.0)


def test_recall_counts_exact_pairs_that_are_listed():
    exact = np.array([[1, 2, 3], [4, 5, -1], [-1, -1, -1], [6, 7, 8]])
    listed = np.array([[3, 1, 9], [4, 5, 6], [1, -1, -1], [-1, -1, -1]])
    recall = recall_of(listed, exact)
    # 2 of 3, 2 of 2, nothing to find, 0 of 3.
    assert recall.num_entries == 8
    assert recall.recall == 4 / 8
    assert recall.complete_rows == 2 / 4
    assert recall.interval[0] < 0.5 < recall.interval[1]


def test_entries_that_are_found_together_count_as_one_trial_a_row():
    # 40 rows of 10 entries: whole rows found or missed vary as 40 independent trials do, less one degree of freedom.
    wanted = np.full(40, 10)
    together = np.where(np.arange(40) < 30, 10, 0)
    assert independent_entries(together, wanted) == pytest.approx(40, abs=1.01)
    # Binomial rows vary as 400 entries.
    rng = np.random.default_rng(0)
    apart = rng.binomial(10, 0.75, 4000)
    assert independent_entries(apart, np.full(4000, 10)) == pytest.approx(40000, rel=0.1)
    # No variation seen at all proves no more than the rows do.
    assert independent_entries(wanted, wanted) == 40


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(300):
        # Rows of different quality: entries depend on each other.
        quality = rng.beta(8, 2, 60)
        found = rng.binomial(20, quality)
        recall = recall_of(np.where(np.arange(20) < found[:, None], np.arange(20), -1), np.tile(np.arange(20), (60, 1)))
        covered += recall.interval[0] <= 0.8 <= recall.interval[1]
    assert 0.90 < covered / 300 < 0.99


class Exact:
    """Ids by definition: a row's hard pairs are the next two numbers."""

    def search(self, query_ids_Q):
        class Answer:
            ids_QK = (query_ids_Q[:, None] + np.array([1, 2])) % 100

        return Answer


def test_rows_are_drawn_from_those_with_an_embedding_and_the_same_for_the_same_seed():
    valid = np.arange(100) % 2 == 0
    pair_ids = np.where(valid[:, None], (np.arange(100)[:, None] + np.array([1, 2])) % 100, -1)
    pair_ids[10, 1] = 50
    recalls = [measured_recall(pair_ids, valid, Exact(), num_rows=500, seed=seed) for seed in (0, 0)]
    assert recalls[0] == recalls[1]
    # All 50 rows with an embedding, one entry of 100 missing.
    assert recalls[0].num_rows == 50
    assert recalls[0].recall == 0.99
    assert "0.9900 of the exact hard pairs are listed (95 % Wilson interval 0.9" in recall_text(recalls[0].json())
