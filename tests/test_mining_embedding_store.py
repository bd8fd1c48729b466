"""The EmbeddingStore: what is stored, what is refused, and that an interrupted or shared write ends in the same store."""

import json
import multiprocessing

import numpy as np
import pytest
import torch

from mining import EmbeddingStore
from tests.embeddings import array_bytes, random_rows


def small_store(path, **keywords):
    return EmbeddingStore.write(path, random_rows(10, 6, 0), random_rows(10, 4, 1), **keywords)


def test_store_returns_what_was_written(tmp_path):
    image, text = random_rows(10, 6, 0), random_rows(10, 4, 1)
    group = np.arange(10) // 2
    alignment = np.linspace(-0.2, 0.7, 10)
    EmbeddingStore.write(
        tmp_path / "store",
        image,
        text,
        alignment_N=alignment,
        image_group_N=np.arange(10),
        caption_group_N=group,
        encoder="ViT-B-16",
        checkpoint_hash="c0ffee",
        store_fingerprint="abc",
    )
    store = EmbeddingStore.open(tmp_path / "store")
    assert len(store) == 10
    assert store.image_ND.dtype == store.text_ND.dtype == np.float16
    np.testing.assert_array_equal(store.image_ND, image.astype(np.float16))
    np.testing.assert_array_equal(store.text_ND, text.astype(np.float16))
    np.testing.assert_allclose(store.alignment_N, alignment, rtol=1e-6)
    assert store.caption_group_N.tolist() == group.tolist()
    assert store.valid_N.all()
    assert [store.manifest[key] for key in ("encoder", "checkpoint_hash", "store_fingerprint")] == [
        "ViT-B-16",
        "c0ffee",
        "abc",
    ]


def test_alignment_and_groups_may_be_absent(tmp_path):
    store = small_store(tmp_path / "store")
    assert store.alignment_N is None
    assert store.image_group_N is None
    assert store.caption_group_N is None


def test_fingerprint_follows_content_not_block_size_or_place(tmp_path):
    image, text = random_rows(10, 6, 0), random_rows(10, 4, 1)
    whole = EmbeddingStore.write(tmp_path / "whole", image, text, encoder="x")
    writer = EmbeddingStore.writer(tmp_path / "blocks", 10, 6, 4, has_alignment=False, encoder="x")
    for start in (6, 0, 3, 9):
        writer.write_rows(start, image[start : start + 3], text[start : start + 3])
    assert writer.finish().fingerprint == whole.fingerprint
    assert array_bytes(tmp_path / "blocks") == array_bytes(tmp_path / "whole")
    image[4] = -image[4]
    assert EmbeddingStore.write(tmp_path / "other", image, text, encoder="x").fingerprint != whole.fingerprint


def test_torch_rows_in_bfloat16_are_accepted(tmp_path):
    rows = torch.nn.functional.normalize(torch.randn(5, 64, generator=torch.Generator().manual_seed(0)), dim=1)
    store = EmbeddingStore.write(tmp_path / "store", rows.bfloat16(), rows)
    np.testing.assert_array_equal(store.image_ND, rows.bfloat16().float().numpy().astype(np.float16))


def test_interrupted_write_knows_its_rows_and_goes_on(tmp_path):
    image, text = random_rows(10, 6, 0), random_rows(10, 4, 1)
    first = EmbeddingStore.writer(tmp_path / "store", 10, 6, 4, has_alignment=False, checkpoint_hash="a")
    first.write_rows(4, image[4:7], text[4:7])
    with pytest.raises(ValueError, match=r"7 of 10 rows are missing, the first is row 0"):
        first.finish()
    with pytest.raises(ValueError, match="is not a folder"):
        EmbeddingStore.open(tmp_path / "store")
    second = EmbeddingStore.writer(tmp_path / "store", 10, 6, 4, has_alignment=False, checkpoint_hash="a")
    assert np.flatnonzero(second.rows_done).tolist() == [4, 5, 6]
    second.write_rows(0, image[:4], text[:4])
    second.write_rows(7, image[7:], text[7:])
    np.testing.assert_array_equal(second.finish().image_ND, image.astype(np.float16))


def test_kill_between_the_manifest_and_the_rename_is_finished_by_the_next_run(tmp_path, monkeypatch):
    image, text = random_rows(10, 6, 0), random_rows(10, 4, 1)
    writer = EmbeddingStore.writer(tmp_path / "store", 10, 6, 4, has_alignment=False)
    writer.write_rows(0, image, text)
    # What a kill while a file is written leaves behind.
    (writer._folder.partial / ".text.npy.123.tmp").write_bytes(b"torn")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mining.array_folder.commit_folder", killed)
        with pytest.raises(KeyboardInterrupt):
            writer.finish()
    again = EmbeddingStore.writer(tmp_path / "store", 10, 6, 4, has_alignment=False)
    assert again.rows_done.all()
    np.testing.assert_array_equal(again.finish().text_ND, text.astype(np.float16))
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == [
        "image.npy",
        "manifest.json",
        "text.npy",
        "valid.npy",
    ]


def test_rows_of_another_checkpoint_are_not_taken_over(tmp_path):
    rows = random_rows(4, 6, 0)
    EmbeddingStore.writer(tmp_path / "store", 4, 6, 6, has_alignment=False, checkpoint_hash="a").write_rows(
        0, rows, rows
    )
    other = EmbeddingStore.writer(tmp_path / "store", 4, 6, 6, has_alignment=False, checkpoint_hash="b")
    assert not other.rows_done.any()


def write_every_other_block(path, rank):
    image, text = random_rows(40, 6, 0), random_rows(40, 4, 1)
    writer = EmbeddingStore.writer(path, 40, 6, 4, has_alignment=False, encoder="x")
    for start in range(rank * 5, 40, 10):
        writer.write_rows(start, image[start : start + 5], text[start : start + 5])


@pytest.mark.slow
def test_two_processes_fill_one_store(tmp_path):
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=write_every_other_block, args=(tmp_path / "store", rank)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    store = EmbeddingStore.writer(tmp_path / "store", 40, 6, 4, has_alignment=False, encoder="x").finish()
    alone = EmbeddingStore.write(tmp_path / "alone", random_rows(40, 6, 0), random_rows(40, 4, 1), encoder="x")
    assert store.fingerprint == alone.fingerprint


def test_row_that_is_not_of_unit_length_is_named(tmp_path):
    image = random_rows(10, 6, 0)
    image[7] *= 1.1
    with pytest.raises(ValueError, match=r"image embedding of pair 7 has length 1\.1"):
        EmbeddingStore.write(tmp_path / "store", image, random_rows(10, 4, 1))
    assert not (tmp_path / "store").exists()


def test_zero_row_is_not_of_unit_length(tmp_path):
    text = random_rows(10, 4, 1)
    text[3] = 0
    with pytest.raises(ValueError, match="text embedding of pair 3 has length 0"):
        EmbeddingStore.write(tmp_path / "store", random_rows(10, 6, 0), text)


def test_rows_that_are_not_finite_become_invalid_zeros(tmp_path):
    image, text = random_rows(10, 6, 0), random_rows(10, 4, 1)
    image[2, 1], text[5] = np.nan, np.inf
    store = EmbeddingStore.write(tmp_path / "store", image, text, alignment_N=np.where(np.arange(10) == 2, np.nan, 0.5))
    assert np.flatnonzero(~store.valid_N).tolist() == [2, 5]
    for pair_id in (2, 5):
        assert not store.image_ND[pair_id].any()
        assert not store.text_ND[pair_id].any()
    assert np.isfinite(store.alignment_N).all()


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"caption_group_N": np.arange(9)}, r"caption_group is int64 \(9,\)"),
        ({"image_group_N": np.arange(10) - 1}, "image_group has numbers outside"),
        ({"alignment_N": np.full(10, np.nan)}, "alignment of pair 0 is not finite"),
        ({"alignment_N": np.zeros(9)}, "alignment at row 0"),
        ({"arrays": 1}, "'arrays' is written by the EmbeddingStore itself"),
    ],
    ids=["group-length", "negative-group", "alignment-nan", "alignment-length", "reserved-key"],
)
def test_bad_arguments_are_named(tmp_path, keywords, message):
    with pytest.raises(ValueError, match=message):
        small_store(tmp_path / "store", **keywords)


def test_shapes_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match="10 image rows but 9 text rows"):
        EmbeddingStore.write(tmp_path / "a", random_rows(10, 6, 0), random_rows(9, 4, 1))
    with pytest.raises(ValueError, match=r"must be \[N, D\]"):
        EmbeddingStore.write(tmp_path / "a", np.zeros(10), random_rows(10, 4, 1))
    with pytest.raises(ValueError, match="at least 1 pair"):
        EmbeddingStore.write(tmp_path / "a", np.zeros((0, 3)), np.zeros((0, 3)))
    with pytest.raises(ValueError, match="floating point"):
        EmbeddingStore.write(tmp_path / "a", np.ones((2, 1), int), np.ones((2, 1)))
    writer = EmbeddingStore.writer(tmp_path / "b", 5, 6, 4, has_alignment=True)
    with pytest.raises(ValueError, match="started with alignment"):
        writer.write_rows(0, random_rows(5, 6, 0), random_rows(5, 4, 0))
    with pytest.raises(ValueError, match=r"rows 3\.\.8 do not lie in"):
        writer.write_rows(3, random_rows(5, 6, 0), random_rows(5, 4, 0), np.zeros(5))
    with pytest.raises(ValueError, match=r"rows of image have shape \(7,\)"):
        writer.write_rows(0, random_rows(5, 7, 0), random_rows(5, 4, 0), np.zeros(5))


def damage_manifest(path, **changes):
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, **changes}))


def test_damaged_folders_are_refused_with_the_file_and_the_remedy(tmp_path):
    path = tmp_path / "store"
    small_store(path)
    whole = (path / "image.npy").read_bytes()
    (path / "image.npy").write_bytes(whole[:-5])
    with pytest.raises(ValueError, match=r"image\.npy is damaged or cut short.*train\.embed"):
        EmbeddingStore.open(path)
    (path / "image.npy").write_bytes(whole[:20])
    with pytest.raises(ValueError, match=r"image\.npy is damaged or cut short"):
        EmbeddingStore.open(path)
    (path / "image.npy").unlink()
    with pytest.raises(ValueError, match=r"image\.npy is missing"):
        EmbeddingStore.open(path)
    np.save(path / "image.npy", np.zeros((10, 7), np.float16))
    with pytest.raises(ValueError, match=r"its manifest says float16 \[10, 6\]"):
        EmbeddingStore.open(path)
    damage_manifest(path, arrays={})
    with pytest.raises(ValueError, match="does not list the array 'image'"):
        EmbeddingStore.open(path)
    damage_manifest(path, format_version=99)
    with pytest.raises(ValueError, match="format version 99"):
        EmbeddingStore.open(path)
    damage_manifest(path, kind="PairTable")
    with pytest.raises(ValueError, match="holds a 'PairTable'"):
        EmbeddingStore.open(path)


def test_changed_bytes_are_found_by_verify_contents(tmp_path):
    store = small_store(tmp_path / "store")
    store.verify_contents()
    data = bytearray((tmp_path / "store" / "text.npy").read_bytes())
    data[-1] ^= 1
    (tmp_path / "store" / "text.npy").write_bytes(data)
    with pytest.raises(ValueError, match=r"text\.npy does not have the bytes"):
        EmbeddingStore.open(tmp_path / "store").verify_contents()


def test_folder_of_something_else_is_never_replaced(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match="will not be replaced"):
        small_store(tmp_path / "photos")
    (tmp_path / "photos" / "manifest.json").write_text('{"kind": "PairStore"}')
    with pytest.raises(ValueError, match="something other than an EmbeddingStore"):
        small_store(tmp_path / "photos")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        small_store(tmp_path / "file")
    assert (tmp_path / "photos" / "holiday.jpg").exists()
