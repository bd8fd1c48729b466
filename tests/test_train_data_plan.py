"""The batch plan: a partition of the anchors, conflict groups apart, hard pairs from the right rows."""

import itertools

import numpy as np
import pytest

from train.data.plan import EpochPlan, conflict_groups


def ring_of_neighbours(num_pairs: int, k: int) -> np.ndarray:
    """Hard pairs of pair i: i + 1 ... i + k, around the ring."""
    return (np.arange(num_pairs)[:, None] + 1 + np.arange(k)) % num_pairs


def plan_of(num_pairs: int = 103, **changes) -> EpochPlan:
    settings = {
        "seed": 7,
        "epoch": 0,
        "conflict_group_N": np.arange(num_pairs),
        "batch_size": 16,
        "hard_per_anchor": 1,
        "pair_ids_NK": ring_of_neighbours(num_pairs, 5),
    }
    return EpochPlan(**{**settings, **changes})


def batches(plan: EpochPlan) -> list[np.ndarray]:
    return [plan.batch(step).groups_AP for step in range(plan.num_steps)]


@pytest.mark.parametrize("hard_per_anchor", [0, 1, 3])
@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_every_anchor_comes_once_an_epoch(hard_per_anchor, epoch):
    groups = batches(plan_of(hard_per_anchor=hard_per_anchor, epoch=epoch))
    anchors = np.concatenate([batch[:, 0] for batch in groups])
    assert sorted(anchors.tolist()) == list(range(103))


@pytest.mark.parametrize("hard_per_anchor", [0, 1, 3])
def test_batches_are_as_equal_as_whole_groups_allow(hard_per_anchor):
    sizes = [len(batch) for batch in batches(plan_of(hard_per_anchor=hard_per_anchor))]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) * (1 + hard_per_anchor) <= 16


@pytest.mark.parametrize("hard_per_anchor", [1, 3])
def test_no_pair_sits_twice_in_a_global_batch(hard_per_anchor):
    for batch in batches(plan_of(hard_per_anchor=hard_per_anchor)):
        assert len(set(batch.ravel().tolist())) == batch.size


def test_hard_pairs_come_from_the_anchors_own_list():
    plan = plan_of(hard_per_anchor=2, batch_size=9)
    for step in range(plan.num_steps):
        batch = plan.batch(step)
        for (anchor, *partners), substitutes in zip(
            batch.groups_AP.tolist(), batch.is_substitute_AP.tolist(), strict=True
        ):
            for partner, is_substitute in zip(partners, substitutes, strict=True):
                assert is_substitute or (partner - anchor) % 103 in range(1, 6)


def test_no_batch_holds_two_pairs_of_one_conflict_group():
    rng = np.random.default_rng(3)
    caption_group = rng.integers(0, 150, 400)
    plan = plan_of(400, conflict_group_N=caption_group, pair_ids_NK=rng.integers(0, 400, (400, 8)), hard_per_anchor=3)
    for step in range(plan.num_steps):
        batch = plan.batch(step)
        assert len(set(caption_group[batch.groups_AP].ravel().tolist())) == batch.num_pairs
        assert batch.num_conflicts == 0


def test_conflicts_that_no_order_avoids_are_counted():
    # 30 pairs of one caption in 4 steps of 10: at least 26 of them share a batch with another.
    caption_group = np.concatenate([np.zeros(30, int), np.arange(1, 11)])
    plan = plan_of(40, conflict_group_N=caption_group, hard_per_anchor=0, pair_ids_NK=None, batch_size=10)
    assert sum(plan.batch(step).num_conflicts for step in range(plan.num_steps)) == 26
    assert sorted(np.concatenate(batches(plan)).ravel().tolist()) == list(range(40))


def test_the_same_inputs_give_the_same_plan_and_another_epoch_another():
    first, again, other_epoch, other_seed = plan_of(), plan_of(), plan_of(epoch=1), plan_of(seed=8)
    assert all((a == b).all() for a, b in zip(batches(first), batches(again), strict=True))
    assert (first.anchors_A != other_epoch.anchors_A).any()
    assert (first.anchors_A != other_seed.anchors_A).any()


def test_steps_do_not_depend_on_the_order_they_are_asked_in():
    forward, backward = plan_of(), plan_of()
    expected = batches(forward)
    for step in reversed(range(backward.num_steps)):
        assert (backward.batch(step).groups_AP == expected[step]).all()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_share_a_batch_without_gap_or_overlap(world_size):
    batch = plan_of(hard_per_anchor=1).batch(2)
    shares = [batch.rank_slice(rank, world_size) for rank in range(world_size)]
    assert (np.concatenate(shares) == batch.groups_AP).all()
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_without_blocks_the_order_is_the_one_permutation_that_runs_were_started_with():
    plan = plan_of(epoch=3)
    assert (plan.anchors_A == np.random.default_rng([7, 3]).permutation(103)).all()
    assert (plan_of(epoch=3, shuffle_block=0).anchors_A == plan.anchors_A).all()


@pytest.mark.parametrize("shuffle_block", [1, 10, 24, 103, 1000])
def test_blocks_are_shuffled_and_so_are_the_anchors_within_each(shuffle_block):
    anchors = [plan_of(epoch=epoch, shuffle_block=shuffle_block).anchors_A for epoch in (0, 1)]
    for anchors_A in anchors:
        assert sorted(anchors_A.tolist()) == list(range(103))
        blocks = [block for block, _ in itertools.groupby((anchors_A // shuffle_block).tolist())]
        assert sorted(blocks) == list(range(-(-103 // shuffle_block)))
    assert anchors[0].tolist() != anchors[1].tolist()
    if 1 < shuffle_block < 103:
        assert sorted(anchors[0] // shuffle_block) != (anchors[0] // shuffle_block).tolist()
    if shuffle_block > 1:
        assert (np.diff(anchors[0]) < 0).any()


@pytest.mark.parametrize("shuffle_block", [20, 50])
def test_blocks_keep_the_partition_conflicts_apart_and_noise_out(shuffle_block):
    rng = np.random.default_rng(3)
    caption_group, is_anchor = rng.integers(0, 300, 400), np.arange(400) % 5 != 0
    plan = plan_of(
        400,
        conflict_group_N=caption_group,
        is_anchor_N=is_anchor,
        pair_ids_NK=ring_of_neighbours(400, 20),
        shuffle_block=shuffle_block,
    )
    groups = batches(plan)
    assert sorted(np.concatenate([batch[:, 0] for batch in groups]).tolist()) == np.flatnonzero(is_anchor).tolist()
    for batch in groups:
        assert len(set(caption_group[batch].ravel().tolist())) == batch.size


def test_a_block_order_draws_partners_from_the_anchors_block_while_there_are_any():
    # Blocks of 100; the hard pairs of pair i are the 40 after it, around the ring.
    plan = plan_of(1000, pair_ids_NK=ring_of_neighbours(1000, 40), shuffle_block=100)
    num_far = 0
    for batch in batches(plan):
        assert len(set((batch[:, 0] // 100).tolist())) <= 2
        for anchor, partner in batch.tolist():
            assert (partner - anchor) % 1000 in range(1, 41)
            is_far = partner // 100 != anchor // 100
            num_far += is_far
            # Its own block offers 99 - anchor % 100 of them, and a batch takes at most 16 away.
            assert not is_far or anchor % 100 > 99 - 16
    assert num_far >= 10
    steps = np.concatenate([(batch[:, 1] - batch[:, 0])[batch[:, 0] % 100 < 60] for batch in batches(plan)])
    assert len(np.unique(steps)) == 40


def test_a_block_order_draws_by_score_within_the_block():
    # Two near candidates with scores 0.81 and 0.09, so the first is drawn 9 times in 10; a far one of score 1 never.
    lists = np.stack(
        [np.arange(2000) // 4 * 4 + 2, np.arange(2000) // 4 * 4 + 3, (np.arange(2000) + 900) % 2000], axis=1
    )
    similarity = np.tile([0.9, 0.3, 1.0], (2000, 1))
    plan = plan_of(
        2000,
        pair_ids_NK=lists,
        similarities_NK=(similarity, similarity),
        is_anchor_N=np.arange(2000) % 4 == 0,
        batch_size=2,
        shuffle_block=50,
    )
    steps = np.concatenate([batch[:, 1] - batch[:, 0] for batch in batches(plan)])
    assert set(steps.tolist()) == {2, 3}
    assert abs((steps == 2).mean() - 0.9) < 4 * np.sqrt(0.9 * 0.1 / 500)


def test_partners_are_drawn_in_proportion_to_their_score():
    # Every anchor has two candidates with scores 0.9 * 0.5 and 0.3 * 0.5, so the first is drawn 3 times in 4.
    num_pairs = 3000
    candidates = np.stack([np.full(num_pairs, num_pairs), np.full(num_pairs, num_pairs + 1)], axis=1)
    candidates = np.concatenate([candidates, np.full((2, 2), -1)])
    image = np.tile([0.9, 0.3], (num_pairs + 2, 1))
    text = np.full((num_pairs + 2, 2), 0.5)
    is_anchor = np.arange(num_pairs + 2) < num_pairs
    plan = EpochPlan(
        seed=0,
        epoch=0,
        conflict_group_N=np.arange(num_pairs + 2),
        batch_size=2,
        hard_per_anchor=1,
        pair_ids_NK=candidates,
        similarities_NK=(image, text),
        is_anchor_N=is_anchor,
    )
    drawn = np.concatenate([batch[:, 1] for batch in batches(plan)])
    share = (drawn == num_pairs).mean()
    # Four standard errors of a share of 3000 draws.
    assert abs(share - 0.75) < 4 * np.sqrt(0.75 * 0.25 / num_pairs)


def test_uniform_partners_reach_every_candidate():
    plan = plan_of(1000, pair_ids_NK=ring_of_neighbours(1000, 4), batch_size=8)
    steps = np.concatenate([(batch[:, 1] - batch[:, 0]) % 1000 for batch in batches(plan)])
    shares = np.bincount(steps, minlength=5)[1:5] / len(steps)
    assert np.abs(shares - 0.25).max() < 4 * np.sqrt(0.25 * 0.75 / 1000)


def test_random_partners_make_a_control_of_the_same_size():
    mined, control = plan_of(), plan_of(partners="random", pair_ids_NK=None)
    assert (mined.anchors_A == control.anchors_A).all()
    steps = np.concatenate([(batch[:, 1] - batch[:, 0]) % 103 for batch in batches(control)])
    assert (steps > 5).mean() > 0.8
    assert not any(control.batch(step).is_substitute_AP.any() for step in range(control.num_steps))


def test_noise_is_no_anchor_but_may_be_a_partner():
    is_anchor = np.arange(103) % 2 == 0
    groups = batches(plan_of(is_anchor_N=is_anchor))
    assert sorted(np.concatenate([batch[:, 0] for batch in groups]).tolist()) == list(range(0, 103, 2))
    assert any((batch[:, 1] % 2 == 1).any() for batch in groups)


def test_groupings_merge_into_connected_components():
    # 0-1 share a caption, 1-2 a picture, 3-4 a caption, 5 stands alone.
    captions, images = np.array([0, 0, 1, 2, 2, 3]), np.array([0, 1, 1, 2, 3, 4])
    merged = conflict_groups(captions, images)
    assert merged[0] == merged[1] == merged[2]
    assert merged[3] == merged[4]
    assert len(set(merged.tolist())) == 3


@pytest.mark.parametrize("num_groups", [(900, 800), (300, 2000), (1, 5)])
def test_merged_groups_are_the_components_that_scipy_finds(num_groups):
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    rng = np.random.default_rng(0)
    first, second = (rng.permutation(np.concatenate([np.arange(n), rng.integers(0, n, 2000 - n)])) for n in num_groups)
    edges = (np.concatenate([np.arange(2000)] * 2), 2000 + np.concatenate([first, num_groups[0] + second]))
    graph = coo_array((np.ones(4000), edges), shape=(2000 + sum(num_groups),) * 2)
    assert (conflict_groups(first, second) == connected_components(graph, directed=False)[1][:2000]).all()


def test_a_chain_of_shared_captions_and_pictures_is_one_group():
    # 0-1 share a caption, 1-2 a picture, 2-3 a caption, ...
    chain = np.arange(1000)
    assert (conflict_groups(chain // 2, (chain + 1) // 2) == 0).all()
    assert conflict_groups(chain).tolist() == chain.tolist()


def test_helip_defect_06_ranks_partition_the_data_and_no_id_sits_twice_in_a_global_batch():
    plan = plan_of(1000, pair_ids_NK=ring_of_neighbours(1000, 10), batch_size=64)
    seen = []
    for step in range(plan.num_steps):
        shares = [plan.batch(step).rank_slice(rank, 8) for rank in range(8)]
        together = np.concatenate(shares).ravel()
        assert len(set(together.tolist())) == len(together)
        seen.extend(np.concatenate(shares)[:, 0].tolist())
    assert sorted(seen) == list(range(1000))


def test_helip_defect_07_short_lists_are_filled_by_marked_random_pairs():
    candidates = ring_of_neighbours(103, 5)
    candidates[::2, 1:] = -1
    plan = plan_of(hard_per_anchor=3, pair_ids_NK=candidates)
    for step in range(plan.num_steps):
        batch = plan.batch(step)
        for (anchor, *partners), substitutes in zip(
            batch.groups_AP.tolist(), batch.is_substitute_AP.tolist(), strict=True
        ):
            own = candidates[anchor].tolist()
            if anchor % 2 == 0:
                assert sum(substitutes) >= 2
            assert all(
                partner in own for partner, stands_in in zip(partners, substitutes, strict=True) if not stands_in
            )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shuffle_block": -1}, r"shuffle_block=-1 must be 0 .* or a number of anchors"),
        ({"batch_size": 15}, "batch_size=15 must be a multiple of 1 \\+ hard_per_anchor = 2"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 104}, "larger than the data set of 103 pairs"),
        ({"pair_ids_NK": None}, "needs a pair table"),
        ({"pair_ids_NK": ring_of_neighbours(50, 5)}, "mined from another store"),
        ({"is_anchor_N": np.zeros(103, bool)}, "marks every pair as noise"),
        ({"partners": "hardest"}, "partners='hardest'"),
    ],
)
def test_bad_input_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        plan_of(**changes)
