"""Training straight from tars: every sample once an epoch in an order that ranks and workers do not change, exact resume after
SIGKILL, and damage named."""

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from mining.command_line import run
from tests.ranks import run_on_ranks
from tests.tar_shards import Member, image_bytes, ingest, rejected, sample, wait_until, write_tar
from tests.tiny_world import ROOT, deepspeed, drawing, program, program_environment, training_flags
from train.config import AugmentConfig, DataConfig
from train.data.augment import augment_image, draw_seed
from train.data.loader import step_loader
from train.data.shard_index import SAMPLES_NAME, ShardIndex, build_index, local_tars
from train.data.stream_order import StreamOrder
from train.data.tar_scan import SAMPLE
from train.data.tar_stream import MAX_UNDECODABLE_IN_A_ROW, TarStream
from train.ingest.samples import reason_category
from train.main import main, parse_config
from train.models.model import build_tokenizer
from train.records.same_run import check_same_data

# Uneven on purpose, one empty, fewer than ranks times workers.
SHARD_SIZES = (23, 0, 41)
NUM_SAMPLES = sum(SHARD_SIZES)
SHAPES = ("square", "circle", "triangle", "cross")


def shape_samples(shard: int, size: int) -> list[Member]:
    members = []
    for number in range(size):
        shape, hue = SHAPES[number % 4], (shard * 17 + number // 4) % 36
        members += sample(f"{shard:05d}{number:04d}", f"{shape} of hue {hue}", drawing(shape, hue), extension="png")
    return members


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tars")
    for shard, size in enumerate(SHARD_SIZES):
        write_tar(folder / f"{shard:05d}.tar", shape_samples(shard, size))
    return folder


@pytest.fixture(scope="module")
def index(tars, tmp_path_factory):
    return index_of(tars, tmp_path_factory.mktemp("index"))


def index_of(folder: Path, out: Path) -> ShardIndex:
    return build_index(local_tars([str(folder / "*.tar")]), out, workers=0)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer("pocket-rn")


def stream_of(index, tokenizer, *, rank=0, world_size=1, batch_size=16, lanes=4) -> TarStream:
    return TarStream(
        index,
        DataConfig(shards=("*.tar",), shard_lanes=lanes, shuffle_block=8),
        AugmentConfig(),
        batch_size=batch_size,
        seed=3,
        rank=rank,
        world_size=world_size,
        image_size=(64, 64),
        tokenizer=tokenizer,
    )


def order_of(sizes, *, epoch=0, seed=0, batch_size=8, lanes=4, block=8) -> StreamOrder:
    return StreamOrder(
        seed=seed, epoch=epoch, shard_sizes=np.array(sizes), batch_size=batch_size, lanes=lanes, block=block
    )


def epoch_ids(order: StreamOrder) -> list[int]:
    return np.concatenate([order.batch(step) for step in range(order.num_steps)]).tolist()


@pytest.mark.parametrize("sizes", [[23, 0, 41], [1, 1, 1, 0, 0, 100], [9], [0, 8, 0]])
@pytest.mark.parametrize(("lanes", "block"), [(1, 1), (3, 5), (64, 2048), (7, 1000)])
def test_every_sample_comes_once_an_epoch(sizes, lanes, block):
    for epoch in range(2):
        order = order_of(sizes, epoch=epoch, lanes=lanes, block=block)
        assert sorted(epoch_ids(order)) == list(range(sum(sizes)))
        batches = [len(order.batch(step)) for step in range(order.num_steps)]
        assert max(batches) <= 8
        assert max(batches) - min(batches) <= 1


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_together_hold_the_batch_of_one_rank(world_size):
    order = order_of([23, 0, 41])
    for step in range(order.num_steps):
        shares = [order.batch(step, rank, world_size) for rank in range(world_size)]
        assert np.concatenate(shares).tolist() == order.batch(step).tolist()
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_the_order_is_one_of_seed_and_epoch_and_can_be_entered_anywhere():
    ids = epoch_ids(order_of([23, 0, 41], seed=5, epoch=2))
    # From the last step to the first: what a step holds does not depend on the steps before it.
    order = order_of([23, 0, 41], seed=5, epoch=2)
    backwards = [order.batch(step).tolist() for step in reversed(range(order.num_steps))]
    assert [sample for batch in reversed(backwards) for sample in batch] == ids
    assert ids != epoch_ids(order_of([23, 0, 41], seed=5, epoch=3))
    assert ids != epoch_ids(order_of([23, 0, 41], seed=6, epoch=2))


def test_a_global_batch_mixes_many_shards_and_a_rank_reads_few():
    order, ranks = order_of([1000] * 128, batch_size=512, lanes=64, block=256), 8
    for steps in (range(0, 8), range(100, 108)):
        shards = {rank: set() for rank in range(ranks)}
        for step in steps:
            assert len(set((order.batch(step) // 1000).tolist())) >= 60
            for rank in range(ranks):
                shards[rank].update((order.batch(step, rank, ranks) // 1000).tolist())
        # 64 lanes for 8 ranks, each lane in one shard or, at a border, two.
        assert max(map(len, shards.values())) <= 2 * 8 + 2


def test_neighbours_in_a_shard_are_spread_over_an_epoch():
    place = np.argsort(epoch_ids(order_of([1000] * 10, batch_size=100, lanes=10, block=250)))
    distances = np.abs(np.diff(place)) % 2500
    # A block of 250 in each of 10 lanes is 2,500 places wide; two random places in it are a third of that apart, on average.
    assert 600 < distances.mean() < 1100


def test_the_order_of_cc12m_takes_no_memory_of_its_size():
    tracemalloc.start()
    order = order_of([10_000] * 1243, batch_size=4096, lanes=64, block=2048)
    rows = [len(order.batch(step, rank=5, world_size=64)) for step in range(0, order.num_steps, 300)]
    peak_mib = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    assert order.num_samples == 12_430_000
    assert set(rows) <= {63, 64}
    # One int64 a sample would be 95 MiB.
    assert peak_mib < 4


def bad_shard() -> list[Member]:
    """Good samples among some of every kind that can be told without decoding."""
    members = shape_samples(7, 6)
    members += [("nocaption.png", drawing("cross", 1)), ("noimage.txt", b"alone")]
    members += sample("empty", " \n") + sample("latin", b"caf\xe9")
    members += [("badjson.jpg", image_bytes(1)), ("badjson.txt", b"words"), ("badjson.json", b"{")]
    members += sample("twice", "one caption", image_bytes(2)) + sample("twice", "another caption", image_bytes(2))
    members += sample("copied", "the same") * 2
    return members


def test_the_samples_are_those_that_ingest_keeps(tmp_path, tokenizer):
    write_tar(tmp_path / "in" / "00007.tar", bad_shard())
    write_tar(tmp_path / "in" / "00008.tar", [])
    store = ingest(tmp_path / "in" / "*.tar", tmp_path / "store")
    stream = stream_of(index_of(tmp_path / "in", tmp_path / "index"), tokenizer, batch_size=4)
    kept = sorted((store[pair].image, store[pair].caption) for pair in range(len(store)))
    assert sorted(stream.files.read(number) for number in range(len(stream.index))) == kept
    reasons = [reason_category(reason) for _, key, reason in rejected(tmp_path / "store") if key != "copied"]
    assert stream.identity()["left_out"] == Counter(reasons)
    assert len(stream.index.left_out) == 6


def test_the_index_is_made_once_and_again_for_a_tar_that_was_written_again(tars, tmp_path):
    shutil.copytree(tars, tmp_path / "tars")
    first = index_of(tmp_path / "tars", tmp_path)
    before = (first.folder / SAMPLES_NAME).stat().st_mtime_ns
    assert index_of(tmp_path / "tars", tmp_path).folder == first.folder
    assert (first.folder / SAMPLES_NAME).stat().st_mtime_ns == before
    # The same content written again is another file, and the same data.
    os.utime(tmp_path / "tars" / "00000.tar", ns=(1, 1))
    touched = index_of(tmp_path / "tars", tmp_path)
    assert touched.folder != first.folder
    assert touched.fingerprint == first.fingerprint
    write_tar(tmp_path / "tars" / "00000.tar", shape_samples(0, 22))
    assert index_of(tmp_path / "tars", tmp_path).fingerprint != first.fingerprint


def test_an_index_goes_to_other_processes_without_its_rows(index):
    pickled = pickle.dumps(index)
    assert len(pickled) < 300 < NUM_SAMPLES * SAMPLE.itemsize
    assert np.array_equal(pickle.loads(pickled).samples_N, index.samples_N)


def test_a_damaged_index_is_refused(index, tmp_path):
    shutil.copytree(index.folder, tmp_path / "index")
    samples = tmp_path / "index" / SAMPLES_NAME
    samples.write_bytes(samples.read_bytes()[:-24])
    with pytest.raises(ValueError, match=r"samples.npy is damaged .*; delete .*index and run the same command again"):
        ShardIndex.open(tmp_path / "index")


def cut(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


def test_torn_and_compressed_tars_are_named_with_what_to_do(tars, tmp_path):
    shutil.copytree(tars, tmp_path / "tars")
    cut(tmp_path / "tars" / "00002.tar", 20_000)
    (tmp_path / "tars" / "00003.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"shard .*00002.tar is torn .*download it again.*2 of 4 tars.*also 00003.tar"):
        index_of(tmp_path / "tars", tmp_path / "index")
    # Mended, it goes on: the tars that were whole are not read again.
    parts = {path: path.stat().st_mtime_ns for path in (tmp_path / "index" / "parts").iterdir()}
    assert len(parts) == 2
    shutil.copy2(tars / "00002.tar", tmp_path / "tars")
    (tmp_path / "tars" / "00003.tar").unlink()
    assert len(index_of(tmp_path / "tars", tmp_path / "index")) == NUM_SAMPLES
    assert {path: path.stat().st_mtime_ns for path in parts} == parts
    assert len(list((tmp_path / "index" / "parts").iterdir())) == 3
    write_tar(tmp_path / "packed" / "00000.tar.gz", shape_samples(0, 2), "w:gz")
    with pytest.raises(ValueError, match=r"00000.tar.gz is compressed.*unpack it, or ingest it"):
        build_index(local_tars([str(tmp_path / "packed" / "*")]), tmp_path / "index", 0)
    write_tar(tmp_path / "empty" / "00000.tar", [("lonely.txt", b"words")])
    with pytest.raises(ValueError, match=r"hold no sample that can be used; left out: \{'missing image': 1\}"):
        index_of(tmp_path / "empty", tmp_path / "index")


@pytest.mark.parametrize("url", ["https://host/00000.tar", "pipe:cat {tar}"])
def test_tars_that_are_not_local_are_refused_with_the_remedy(tars, url):
    url = url.format(tar=tars / "00000.tar")
    with pytest.raises(ValueError, match=r"--data.shards .* is no local file.*ingest them"):
        local_tars([url])
    with pytest.raises(ValueError, match=r"no shards match --data\.shards"):
        local_tars([str(tars / "x*.tar")])


def test_rows_hold_the_sample_that_their_id_names(index, tokenizer):
    batch = stream_of(index, tokenizer)[2]
    for row, sample_id in enumerate(batch.pair_ids_B.tolist()):
        shard, number = (0, sample_id) if sample_id < SHARD_SIZES[0] else (2, sample_id - SHARD_SIZES[0])
        shape, hue = SHAPES[number % 4], (shard * 17 + number // 4) % 36
        seed = draw_seed(3, 2, sample_id)
        assert torch.equal(batch.image_BCHW[row], augment_image(drawing(shape, hue), AugmentConfig(), (64, 64), seed))
        assert torch.equal(batch.text_BL[row], tokenizer([f"{shape} of hue {hue}"])[0])


def test_ranks_and_workers_change_nothing(index, tokenizer):
    whole = stream_of(index, tokenizer)
    # Across the end of an epoch, in the middle of which a run may be taken up.
    start, stop = whole.steps_per_epoch - 2, whole.steps_per_epoch + 3
    alone = list(step_loader(whole, start_step=start, stop_step=stop, workers=0, pin_memory=False))
    shares = [
        list(
            step_loader(
                stream_of(index, tokenizer, rank=rank, world_size=3),
                workers=3 - rank,
                pin_memory=False,
                start_step=start,
                stop_step=stop,
            )
        )
        for rank in range(3)
    ]
    assert len(alone) == 5
    for step, batch in enumerate(alone):
        for name in ("pair_ids_B", "image_BCHW", "text_BL"):
            assert torch.equal(torch.cat([getattr(share[step], name) for share in shares]), getattr(batch, name))
        assert {share[step].global_batch_size for share in shares} == {len(batch.pair_ids_B)}


def test_samples_seen_counts_what_the_batches_hold(index, tokenizer):
    stream = stream_of(index, tokenizer)
    assert stream.samples_seen(2 * stream.steps_per_epoch) == 2 * NUM_SAMPLES
    steps = stream.steps_per_epoch + 3
    assert stream.samples_seen(steps) == sum(len(stream[step].pair_ids_B) for step in range(steps))


def undecodable_world(folder: Path, bad: range, tokenizer) -> list[TarStream]:
    """A tar of 40 samples of which the pictures `bad` are no pictures, as one rank and as two see it."""
    members = shape_samples(0, 40)
    for number in bad:
        members[3 * number] = (members[3 * number][0], b"\x89PNG\r\n\x1a\n" + bytes(500))
    write_tar(folder / "in" / "00000.tar", members)
    index = index_of(folder / "in", folder / "index")
    return [stream_of(index, tokenizer), *(stream_of(index, tokenizer, rank=rank, world_size=2) for rank in range(2))]


def test_a_picture_that_cannot_be_decoded_is_replaced_alike_on_any_rank(tmp_path, tokenizer):
    whole, *shares = undecodable_world(tmp_path, range(10, 12), tokenizer)
    named, counts = [], Counter()
    for step in range(whole.steps_per_epoch):
        batch, parts = whole[step], [share[step] for share in shares]
        assert torch.equal(torch.cat([part.pair_ids_B for part in parts]), batch.pair_ids_B)
        assert torch.equal(torch.cat([part.image_BCHW for part in parts]), batch.image_BCHW)
        assert sum((part.undecodable for part in parts), ()) == batch.undecodable
        named += batch.undecodable
        counts.update(batch.pair_ids_B.tolist())
    # Samples 10 and 11 are both replaced by 12, so that the batches keep their size.
    assert counts == {number: 3 if number == 12 else 1 for number in range(40) if number not in (10, 11)}
    assert sorted(name.split(": ")[:2] for name in named) == [["00000.tar", f"00000{n:04d}.png"] for n in (10, 11)]


def test_too_many_pictures_in_a_row_that_cannot_be_decoded_stop_the_run_by_name(tmp_path, tokenizer):
    stream, *_ = undecodable_world(tmp_path, range(5, 5 + MAX_UNDECODABLE_IN_A_ROW), tokenizer)
    # From a worker the error is the same one line.
    with pytest.raises(ValueError, match=r"^shard .*00000.tar holds 16 pictures in a row .*0000020.png") as caught:
        list(step_loader(stream, start_step=0, stop_step=stream.steps_per_epoch, workers=1, pin_memory=False))
    assert "Traceback" not in str(caught.value)


def test_a_tar_that_changes_under_a_run_stops_it_by_name(tars, tmp_path, tokenizer):
    def read_all(stream: TarStream) -> None:
        for step in range(stream.steps_per_epoch):
            stream[step]

    shutil.copytree(tars, tmp_path / "tars")
    index = index_of(tmp_path / "tars", tmp_path / "index")
    open_already = stream_of(index, tokenizer)
    read_all(open_already)
    cut(tmp_path / "tars" / "00002.tar", 30_000)
    with pytest.raises(ValueError, match=r"shard .*00002.tar (ends before byte|holds another)"):
        read_all(open_already)
    with pytest.raises(ValueError, match=r"shard .*00002.tar was changed since it was indexed .*30000 now"):
        read_all(stream_of(index, tokenizer))
    (tmp_path / "tars" / "00002.tar").unlink()
    with pytest.raises(ValueError, match=r"shard .*00002.tar cannot be read"):
        read_all(stream_of(index, tokenizer))


def test_few_tars_are_open_at_a_time(index, tokenizer, monkeypatch):
    monkeypatch.setattr("train.data.tar_files.MAX_OPEN_TARS", 1)
    files = stream_of(index, tokenizer).files
    expected = [files.read(number) for number in range(NUM_SAMPLES)]
    before = len(os.listdir("/proc/self/fd"))
    # From one tar to the other and back.
    for number in [0, NUM_SAMPLES - 1] * 20:
        assert files.read(number) == expected[number]
    assert len(os.listdir("/proc/self/fd")) == before


def test_batches_too_small_for_the_ranks_or_too_large_for_the_data_are_refused(index, tokenizer):
    with pytest.raises(ValueError, match="batch_size=2 gives 2 samples a step for 3 ranks"):
        stream_of(index, tokenizer, batch_size=2, world_size=3)
    with pytest.raises(ValueError, match="batch_size=65 does not fit the 64 samples"):
        stream_of(index, tokenizer, batch_size=65)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data.store", "a", "--data.shards", "b.tar"], "--data.store a and --data.shards b.tar are two sources"),
        (["--data.shards", "b.tar", "--data.pairs", "c"], "need --data.store: mined pairs are named by the pair ids"),
        (["--data.shards", "b.tar", "--data.hard_per_anchor", "1"], "ingest the tars first"),
        (["--data.shards", "b.tar", "--data.shard_lanes", "0"], "data.shard_lanes=0 must be at least 1"),
        ([], "--data.store is missing"),
    ],
)
def test_there_is_exactly_one_source_of_pairs(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        run(main, ["pocket-pretrain", "--ds_config", "a.json", "--out", "x", *flags])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_other_tars_under_the_same_paths_are_no_resume(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"shards_fingerprint": "a" * 64}), encoding="utf-8")
    check_same_data(tmp_path, {"shards_fingerprint": "a" * 64})
    with pytest.raises(ValueError, match=r"was started with shards_fingerprint=aaaaaaaaaaaa, the data have bbbb"):
        check_same_data(tmp_path, {"shards_fingerprint": "b" * 64})


def flags_of(tars: Path, out: Path) -> list[str]:
    flags = training_flags(
        "", out, batch_size=16, max_steps=MAX_STEPS, save_every_steps=4, data__shards=tars / "{00000..00002}.tar",
        data__workers=2,
    )  # fmt: skip
    return [
        flag for number, flag in enumerate(flags) if not {"--data.store"} & set(flags[max(0, number - 1) : number + 1])
    ]


MAX_STEPS = 24


def train_unkilled(rank: int, world_size: int, flags: list[str]) -> None:
    """The same run in this process of an existing group."""
    from train.distributed import Ranks
    from train.loop import train

    # What the launcher says, and DeepSpeed reads.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), DS_ACCELERATOR="cpu")
    # A child of the fork server would start its data workers by another one, which takes a minute; a program forks them.
    multiprocessing.set_start_method("fork", force=True)
    os.chdir(ROOT)
    train(parse_config("pocket-pretrain", flags), "pocket-pretrain", Ranks(rank, world_size, rank, torch.device("cpu")))


def rows(run_folder: Path) -> list[dict]:
    path = run_folder / "metrics.jsonl"
    # The last line may be half written.
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def ranks_of(launcher: int) -> list[int]:
    """Process ids of every descendant, children last."""
    found = [launcher]
    for pid in found:
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            found += [int(child) for child in task.read_text().split()]
    return found


@pytest.mark.slow
def test_two_ranks_killed_in_the_middle_of_an_epoch_go_on_with_the_same_losses(tars, tmp_path):
    run_on_ranks(train_unkilled, 2, flags_of(tars, tmp_path / "whole"), timeout_s=200)
    command = deepspeed(2, "train/main.py", "pocket-pretrain", *flags_of(tars, tmp_path / "killed"))
    with subprocess.Popen(
        command, cwd=ROOT, env=program_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as launcher:
        # 64 samples are 4 steps an epoch: the checkpoint of step 8 is followed by a killed epoch.
        wait_until(lambda: len(rows(tmp_path / "killed")) >= 10 or launcher.poll() is not None, 120)
        for pid in ranks_of(launcher.pid):
            os.kill(pid, signal.SIGKILL)
    assert 10 <= len(rows(tmp_path / "killed")) < MAX_STEPS
    assert not (tmp_path / "killed" / "export").exists()
    done = program(*deepspeed(2, "train/main.py", "pocket-pretrain", *flags_of(tars, tmp_path / "killed")))
    assert "going on from" in done.stderr
    whole, killed = rows(tmp_path / "whole"), rows(tmp_path / "killed")
    assert [row["step"] for row in killed] == list(range(1, MAX_STEPS + 1))
    assert [row["loss"] for row in killed] == [row["loss"] for row in whole]
    assert {row["samples_seen"] / row["step"] for row in killed} == {16}
    weights = [
        (tmp_path / name / "export" / "open_clip_model.safetensors").read_bytes() for name in ("whole", "killed")
    ]
    assert weights[0] == weights[1]
