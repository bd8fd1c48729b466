"""The loader: the right pairs in the right rows, whatever the number of ranks and workers."""

import io
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny_world import drawing, tiny_store, tiny_table
from train.data.augment import AugmentConfig
from train.data.loader import DataConfig, StepDataset, step_loader
from train.models.model import build_tokenizer


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    store = tiny_store(folder)
    return folder, store, tiny_table(folder / "pairs", store)


def dataset_of(world, *, rank=0, world_size=1, batch_size=16, augment=None, **data) -> StepDataset:
    folder = world[0]
    config = DataConfig(store=str(folder / "store"), **{"pairs": str(folder / "pairs"), "hard_per_anchor": 1, **data})
    return StepDataset(
        config,
        augment or AugmentConfig(),
        batch_size=batch_size,
        seed=3,
        rank=rank,
        world_size=world_size,
        image_size=(64, 64),
        tokenizer=build_tokenizer("pocket-rn"),
    )


def test_rows_hold_the_pair_that_their_id_names(world):
    store = world[1]
    dataset = dataset_of(world, augment=AugmentConfig(scale=(1.0, 1.0), ratio=(1.0, 1.0)))
    batch = dataset[2]
    tokens = build_tokenizer("pocket-rn")([store[pair].caption for pair in batch.pair_ids_B.tolist()])
    assert torch.equal(batch.text_BL, tokens)
    assert batch.image_BCHW.shape == (16, 3, 64, 64)
    assert batch.image_BCHW.dtype == torch.uint8
    # A shape's own hue is its most frequent colour that is not white.
    for image, pair in zip(batch.image_BCHW, batch.pair_ids_B.tolist(), strict=True):
        caption = store[pair].caption.split()
        expected = np.asarray(_decode(drawing(caption[0], int(caption[3])))).reshape(-1, 3)
        assert most_frequent_color(image.permute(1, 2, 0).reshape(-1, 3).numpy()) == most_frequent_color(expected)


def _decode(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def most_frequent_color(pixels: np.ndarray) -> tuple[int, ...]:
    colors, counts = np.unique(pixels[~(pixels > 240).all(axis=1)], axis=0, return_counts=True)
    return tuple(colors[counts.argmax()].tolist())


def test_hard_pairs_follow_their_anchor(world):
    num_pairs = len(world[1])
    for step in range(3):
        anchors, partners = dataset_of(world)[step].pair_ids_B.view(-1, 2).unbind(1)
        assert all(1 <= distance <= 6 for distance in ((partners - anchors) % num_pairs).tolist())


def test_num_candidates_narrows_the_list(world):
    batch = dataset_of(world, num_candidates=1)[0]
    anchors, partners = batch.pair_ids_B.view(-1, 2).unbind(1)
    distances = ((partners - anchors) % len(world[1])).tolist()
    # The only candidate may be an anchor of the same batch: then a random pair stands in.
    assert distances.count(1) == 8 - batch.num_substitutes
    assert batch.num_substitutes < 4


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_hold_the_batch_of_one_rank(world, world_size):
    whole = dataset_of(world)[5]
    shares = [dataset_of(world, rank=rank, world_size=world_size)[5] for rank in range(world_size)]
    assert torch.equal(torch.cat([share.pair_ids_B for share in shares]), whole.pair_ids_B)
    assert torch.equal(torch.cat([share.image_BCHW for share in shares]), whole.image_BCHW)
    assert torch.equal(torch.cat([share.text_BL for share in shares]), whole.text_BL)
    assert {share.global_batch_size for share in shares} == {16}


@pytest.mark.parametrize("workers", [1, 3])
def test_helip_defect_01_the_number_of_workers_changes_nothing(world, workers):
    dataset = dataset_of(world)
    alone = list(step_loader(dataset, start_step=4, stop_step=9, workers=0, pin_memory=False))
    shared = list(step_loader(dataset, start_step=4, stop_step=9, workers=workers, pin_memory=False))
    assert len(alone) == 5
    for one, other in zip(alone, shared, strict=True):
        assert torch.equal(one.pair_ids_B, other.pair_ids_B)
        assert torch.equal(one.image_BCHW, other.image_BCHW)


def test_helip_defect_08_one_process_trains_on_hard_pairs_too(world):
    batch = dataset_of(world, world_size=1, hard_per_anchor=3)[0]
    anchors, *partners = batch.pair_ids_B.view(-1, 4).unbind(1)
    for partner in partners:
        assert all(1 <= distance <= 6 for distance in ((partner - anchors) % len(world[1])).tolist())


def test_epochs_follow_each_other_without_repeating_an_order(world):
    dataset = dataset_of(world, hard_per_anchor=0)
    per_epoch = dataset.steps_per_epoch
    first, second = (
        torch.cat([dataset[step].pair_ids_B for step in range(start, start + per_epoch)]) for start in (0, per_epoch)
    )
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(len(world[1])))
    assert not torch.equal(first, second)


def test_samples_seen_counts_what_the_batches_hold(world):
    dataset = dataset_of(world, hard_per_anchor=3)
    steps = dataset.steps_per_epoch + 3
    assert dataset.samples_seen(steps) == sum(len(dataset[step].pair_ids_B) for step in range(steps))


def test_a_pair_table_of_another_store_is_refused(world, tmp_path):
    other = tiny_store(tmp_path, num_hues=8)
    tiny_table(tmp_path / "pairs", other)
    with pytest.raises(ValueError, match=r"mined from a store with fingerprint .* embed and mine this store"):
        dataset_of(world, pairs=str(tmp_path / "pairs"))


def test_more_ranks_than_groups_are_refused(world):
    with pytest.raises(ValueError, match=r"batch_size=4 gives \d groups a step for 3 ranks"):
        dataset_of(world, batch_size=4, world_size=3)


def test_helip_defect_05_a_damaged_picture_stops_the_run_by_name(world, tmp_path):
    folder = world[0]
    shutil.copytree(folder / "store", tmp_path / "store")
    shard = next(path for path in sorted((tmp_path / "store").rglob("*.mds")))
    content = bytearray(shard.read_bytes())
    # Overwrite the middle of the shard: some pictures there are no pictures any more.
    content[len(content) // 2 : len(content) // 2 + 2000] = bytes(2000)
    shard.write_bytes(content)
    dataset = dataset_of((tmp_path, None, None), pairs="", hard_per_anchor=0)
    with pytest.raises(ValueError, match=shard.name):
        list(step_loader(dataset, start_step=0, stop_step=dataset.steps_per_epoch, workers=0, pin_memory=False))
