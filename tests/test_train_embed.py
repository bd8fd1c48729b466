"""Embedding a store: the rows of the model, whoever computes them."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from mining import EmbeddingStore
from mining.manifest import write_manifest
from tests.tar_shards import ingest
from tests.tiny_world import deepspeed, program, python, tiny_store, write_shards
from train.distributed import connected
from train.embed import EmbedConfig
from train.embedding import embed
from train.models.folder import FORMAT_VERSION, KIND
from train.models.model import ModelConfig, build_model, load_model, save_model


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A store of 96 pairs and a run folder with a random model."""
    folder = tmp_path_factory.mktemp("world")
    store = tiny_store(folder)
    step = folder / "run" / "checkpoints" / "step_1"
    step.mkdir(parents=True)
    torch.manual_seed(0)
    model, preprocess = build_model(ModelConfig(name="pocket-rn"))
    save_model(step, "pocket-rn", model.state_dict(), preprocess)
    write_manifest(step, KIND, FORMAT_VERSION, files={})
    return folder, store


def flags(world, out, **more) -> list[str]:
    settings = {
        "checkpoint": world[0] / "run",
        "store": world[0] / "store",
        "out": out,
        "device": "cpu",
        "threads": 1,
        "batch_size": 20,
    }
    return [text for name, value in {**settings, **more}.items() for text in (f"--{name}", str(value))]


@pytest.mark.slow
def test_one_and_two_ranks_write_the_rows_of_the_model(world, tmp_path):
    program(*python("-m", "train.embed", *flags(world, tmp_path / "one")))
    program(*deepspeed(2, "--module", "train.embed", *flags(world, tmp_path / "two")))
    one, two = EmbeddingStore.open(tmp_path / "one"), EmbeddingStore.open(tmp_path / "two")
    for name in ("image_ND", "text_ND", "alignment_N", "image_group_N", "caption_group_N"):
        assert np.array_equal(getattr(one, name), getattr(two, name)), name
    loaded, store = load_model(world[0] / "run"), world[1]
    samples = [store[pair] for pair in range(len(store))]
    with torch.inference_mode():
        images = torch.stack(
            [loaded.preprocess(Image.open(io.BytesIO(sample.image)).convert("RGB")) for sample in samples]
        )
        image_ND = loaded.model.encode_image(images, normalize=True).numpy()
        text_ND = loaded.model.encode_text(
            loaded.tokenizer([sample.caption for sample in samples]), normalize=True
        ).numpy()
    assert np.abs(one.image_ND - image_ND).max() < 1e-3
    assert np.abs(one.text_ND - text_ND).max() < 1e-3
    assert np.abs(one.alignment_N - (image_ND * text_ND).sum(1)).max() < 1e-3
    assert np.array_equal(one.caption_group_N, store.caption_group_N)
    assert one.manifest["store_fingerprint"] == store.fingerprint
    # Run again, a finished store is left alone; for another model it is refused.
    done = program(*python("-m", "train.embed", *flags(world, tmp_path / "one")))
    assert "is complete already" in done.stdout
    other = tmp_path / "other"
    other.mkdir()
    model, preprocess = build_model(ModelConfig(name="pocket-rn"))
    save_model(other, "pocket-rn", model.state_dict(), preprocess)
    done = program(*python("-m", "train.embed", *flags(world, tmp_path / "one", checkpoint=other)), check=False)
    assert done.returncode == 2
    assert "holds the embeddings of another checkpoint" in done.stderr


def test_a_store_that_grew_takes_the_old_rows_over_byte_for_byte(tmp_path, world):
    """24 hues are the 12 of before and 12 more; their shards come after the old ones."""
    write_shards(tmp_path / "shards", num_hues=12)
    before = ingest(f"{tmp_path}/shards/*.tar", tmp_path / "before")
    write_shards(tmp_path / "more", num_hues=6)
    for number, shard in enumerate(sorted((tmp_path / "more").glob("*.tar"))):
        shard.rename(tmp_path / "shards" / f"{10 + number:05d}.tar")
    after = ingest(f"{tmp_path}/shards/*.tar", tmp_path / "after")
    run = str(world[0] / "run")

    def embed_here(store, out, **more):
        config = EmbedConfig(run, str(store.path), str(tmp_path / out), device="cpu", batch_size=20, **more)
        with connected("cpu") as ranks:
            embed(config, store, ranks)
        return EmbeddingStore.open(tmp_path / out)

    old = embed_here(before, "old")
    # Rows that no model would give, to tell taken over from embedded anew; they are still the same pairs to within rounding.
    nudged = np.array(old.image_ND)
    nudged[:, 0] = np.nextafter(nudged[:, 0], np.float16(2))
    keep = {name: old.manifest[name] for name in ("encoder", "checkpoint_hash", "store_fingerprint")}
    groups = {"image_group_N": old.image_group_N, "caption_group_N": old.caption_group_N}
    text, alignment = np.array(old.text_ND), np.array(old.alignment_N)
    EmbeddingStore.write(tmp_path / "nudged", nudged, text, alignment_N=alignment, **groups, **keep)
    grown = embed_here(after, "grown", extend=str(tmp_path / "nudged"))
    assert len(old) == 48 < len(grown) == 72
    assert np.array_equal(grown.image_ND[:48], nudged)
    assert np.array_equal(grown.text_ND[:48], text)
    assert np.array_equal(grown.alignment_N[:48], alignment)
    whole = embed_here(after, "whole")
    assert np.abs(grown.image_ND[48:] - whole.image_ND[48:]).max() < 1e-3
    assert grown.manifest["store_fingerprint"] == after.fingerprint
    shuffled = EmbeddingStore.write(tmp_path / "shuffled", nudged[::-1], text, alignment_N=alignment, **groups, **keep)
    with pytest.raises(ValueError, match=r"pair 0 of .*after is not the one that"):
        embed_here(after, "refused", extend=str(shuffled.path))
    with pytest.raises(ValueError, match=r"has 72 pairs, .* only 48: the store did not grow"):
        embed_here(before, "shrunk", extend=str(tmp_path / "grown"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": "nowhere"}, "nowhere"),
        ({"store": "nowhere"}, "nowhere"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_mistakes_get_one_line(world, tmp_path, changes, message):
    done = program(*python("-m", "train.embed", *flags(world, tmp_path / "out", **changes)), check=False)
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
