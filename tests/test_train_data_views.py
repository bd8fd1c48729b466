"""Views of each pair: CLIP's batches stay what they were, and the strong ones depend on step, pair and number alone."""

import hashlib
import io
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional

from tests.tiny_world import tiny_store
from train.config import STRONG_AUGMENT, AugmentConfig, DataConfig
from train.data import loader, tar_stream
from train.data.augment import rgb
from train.data.loader import StepDataset, step_loader
from train.data.pair_store import PairStore
from train.data.shard_index import build_index, local_tars
from train.data.tar_stream import TarStream
from train.models.model import build_tokenizer
from train.views import WEAK_ONLY, Views

SIZE, SEED, BATCH_SIZE = (48, 64), 3, 16
WEAK = AugmentConfig(
    scale=(0.3, 0.9),
    horizontal_flip_prob=0.5,
    color_jitter=(0.4, 0.4, 0.4, 0.1),
    color_jitter_prob=0.8,
    gray_scale_prob=0.2,
    phrase_separator=" ",
)
THREE = Views(strong_images=2, strong_texts=2)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer("pocket-rn")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return folder, tiny_store(folder)


@pytest.fixture(scope="module")
def index(world, tmp_path_factory):
    return build_index(local_tars([str(world[0] / "shards" / "*.tar")]), tmp_path_factory.mktemp("index"), workers=0)


@pytest.fixture(scope="module")
def make(world, index, tokenizer):
    """A data set of either kind, over the same pairs."""

    def make(kind: str, views: Views = WEAK_ONLY, *, weak=WEAK, strong=STRONG_AUGMENT, rank=0, world_size=1, **data):
        settings = dict(batch_size=BATCH_SIZE, seed=SEED, rank=rank, world_size=world_size, image_size=SIZE)
        settings |= dict(tokenizer=tokenizer, views=views, strong_augment=strong)
        if kind == "tars":
            return TarStream(index, DataConfig(shard_lanes=4, shuffle_block=8, **data), weak, **settings)
        return StepDataset(DataConfig(store=str(world[0] / "store"), **data), weak, **settings)

    return make


@pytest.mark.parametrize("kind", ["store", "tars"])
def test_batches_without_strong_views_are_byte_for_byte_what_they_were(make, world, index, tokenizer, kind):
    dataset = make(kind)
    for step in (0, dataset.steps_per_epoch + 1):
        batch = dataset[step]
        pairs = [pair_of(kind, world[1], dataset, pair_id) for pair_id in batch.pair_ids_B.tolist()]
        drawn = [
            former_view(*pair, former_seed(SEED, step, pair_id))
            for pair, pair_id in zip(pairs, batch.pair_ids_B.tolist(), strict=True)
        ]
        assert batch.image_BCHW.numpy().tobytes() == np.stack([image for image, _ in drawn]).tobytes()
        assert torch.equal(batch.text_BL, tokenizer([text for _, text in drawn]))
        assert batch.strong_images == batch.strong_texts == ()


def pair_of(kind: str, store, dataset, pair_id: int) -> tuple[bytes, str]:
    if kind == "tars":
        return dataset.files.read(pair_id)
    return store[pair_id].image, store[pair_id].caption


def former_seed(*names: int) -> int:
    return int.from_bytes(hashlib.blake2b(str(names).encode(), digest_size=8).digest(), "little") // 2


def former_view(data: bytes, caption: str, seed: int) -> tuple[np.ndarray, str]:
    """What a pair became before there were views, written anew from the description of it: [3, H, W] and the caption."""
    rng, image = random.Random(seed), Image.open(io.BytesIO(data)).convert("RGB")
    while True:
        area, aspect = (
            image.width * image.height * rng.uniform(0.3, 0.9),
            math.exp(rng.uniform(*map(math.log, WEAK.ratio))),
        )
        width, height = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if width <= image.width and height <= image.height:
            break
    left, upper = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
    image = image.resize(SIZE[::-1], Image.Resampling.BICUBIC, box=(left, upper, left + width, upper + height))
    if rng.random() < 0.5:
        image = functional.hflip(image)
    if rng.random() < 0.8:
        changes = [(name, rng.uniform(0.6, 1.4)) for name in ("brightness", "contrast", "saturation")]
        changes.append(("hue", rng.uniform(-0.1, 0.1)))
        rng.shuffle(changes)
        for name, factor in changes:
            image = getattr(functional, f"adjust_{name}")(image, factor)
    if rng.random() < 0.2:
        image = functional.rgb_to_grayscale(image, num_output_channels=3)
    rng, (lead, *others) = random.Random(seed), caption.split(" ")
    num_extra = min(rng.choice([0, 0, 0, 0, 1, 1, 1, 2, 2, 2]), len(others))
    if rng.random() < WEAK.lead_phrase_drop_prob:
        phrases = rng.sample(others, min(num_extra + 2, len(others)))
    else:
        phrases = [lead, *rng.sample(others, num_extra)]
        if rng.random() < 0.25:
            rng.shuffle(phrases)
    return np.asarray(image).transpose(2, 0, 1), ", ".join(phrases)


@pytest.mark.parametrize("kind", ["store", "tars"])
def test_strong_views_join_a_weak_view_that_stays_the_same(make, kind):
    strong = replace(STRONG_AUGMENT, size=32)
    alone, batch = make(kind)[2], make(kind, THREE, strong=strong)[2]
    assert torch.equal(batch.image_BCHW, alone.image_BCHW)
    assert torch.equal(batch.text_BL, alone.text_BL)
    assert [tuple(view.shape) for view in batch.strong_images] == [(16, 3, 32, 32)] * 2
    assert [view.dtype for view in batch.strong_images] == [torch.uint8] * 2
    assert [view.shape for view in batch.strong_texts] == [batch.text_BL.shape] * 2
    first, second = batch.strong_images
    assert all(not torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert not torch.equal(*batch.strong_texts)


@pytest.mark.parametrize("kind", ["store", "tars"])
def test_strong_views_depend_on_neither_ranks_nor_workers(make, kind):
    whole = make(kind, THREE)[3]
    shares = [make(kind, THREE, rank=rank, world_size=3) for rank in range(3)]
    (worked,) = step_loader(shares[1], start_step=3, stop_step=4, workers=2, pin_memory=False)
    batches = [shares[0][3], worked, shares[2][3]]
    for view in range(2):
        assert torch.equal(torch.cat([batch.strong_images[view] for batch in batches]), whole.strong_images[view])
        assert torch.equal(torch.cat([batch.strong_texts[view] for batch in batches]), whole.strong_texts[view])
    # A view is that of its pair and step, whatever stands beside it.
    fewer = make(kind, Views(strong_images=1))[3]
    assert torch.equal(fewer.strong_images[0], whole.strong_images[0])
    assert fewer.strong_texts == ()


@pytest.mark.parametrize("kind", ["store", "tars"])
def test_a_picture_is_decoded_once_for_all_its_views(make, kind, monkeypatch):
    module = {"store": loader, "tars": tar_stream}[kind]
    decoded = []
    monkeypatch.setattr(module, "rgb", lambda image: decoded.append(image) or rgb(image))
    make(kind, THREE)[1]
    assert len(decoded) == BATCH_SIZE


def test_several_captions_of_a_sample_are_drawn_one_for_all_views_or_each(make, monkeypatch, tokenizer):
    captions = [f"title\n{shape} of it" for shape in "abc"]
    found = PairStore.__getitem__
    monkeypatch.setattr(
        PairStore, "__getitem__", lambda store, pair_id: found(store, pair_id)._replace(caption=captions[pair_id % 3])
    )
    plain = AugmentConfig()
    single, multi = (
        make("store", Views(strong_texts=2), weak=plain, strong=plain, caption_sampling=sampling)[0]
        for sampling in ("single", "multi")
    )
    assert all(torch.equal(view, single.text_BL) for view in single.strong_texts)
    assert all(not torch.equal(view, multi.text_BL) for view in multi.strong_texts)
    allowed = {tuple(row) for row in tokenizer(["title", "a of it", "b of it", "c of it"]).tolist()}
    for batch in (single, multi):
        assert {tuple(row) for view in (batch.text_BL, *batch.strong_texts) for row in view.tolist()} == allowed


def test_every_view_goes_to_pinned_memory(make, monkeypatch):
    batch = make("store", THREE)[0]
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    assert batch.pin_memory() == batch
    wanted = [batch.image_BCHW, batch.text_BL, batch.pair_ids_B, *batch.strong_images, *batch.strong_texts]
    assert {id(tensor) for tensor in pinned} == {id(tensor) for tensor in wanted}
