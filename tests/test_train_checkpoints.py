"""Checkpoints on disk: what is damaged, missing or foreign is passed over with its name, a full disk keeps the one before, writing goes on
beside training, and old ones go as asked.

One process and torch's own AdamW stand for the engine here; tests/test_train_resume.py has ranks and ZeRO.
"""

import json
import os
import pickle
import shutil
import subprocess
import threading
from types import SimpleNamespace

import pytest
import torch

import train.checkpoints.checkpoint
from mining.manifest import fingerprint
from tests.tiny_world import TINY_VIT
from train.checkpoints.checkpoint import (
    CheckpointSaver,
    find_checkpoint,
    remove_old_checkpoints,
    restore,
    saved_steps,
    step_folder,
)
from train.checkpoints.tensor_files import file_sum
from train.checkpoints.training_state import TrainingState
from train.distributed import connected
from train.engine import Engine
from train.models.clip_library import PreprocessCfg, open_clip
from train.models.model import ModelConfig, TwoTowers, build_model, checkpoint_folder, load_model
from train.supervision.phases import Phases


class PlainEngine(Engine):
    """An Engine at ZeRO stage 0 without DeepSpeed around torch's optimizer."""

    def __init__(self, module: torch.nn.Module, ranks) -> None:
        optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.01)
        counters = {"global_steps": 0, "global_samples": 0, "skipped_steps": 0}
        self.engine = SimpleNamespace(module=module, optimizer=optimizer, zero_optimization_stage=lambda: 0, **counters)
        self.device, self.rank, self.world_size, self.stage = ranks.device, ranks.rank, ranks.world_size, 0
        self.phases, self.rounds_weights = Phases(), False
        self.state = TrainingState(self.engine, rank=0, world_size=1)

    def train_step(self) -> float:
        """A step on noise that the random state decides."""
        image_BCHW = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
        text_BL = torch.randint(1, 8192, (4, 24))
        image_BD, text_BD, scale = self.module(image_BCHW, text_BL)
        loss = (scale * image_BD @ text_BD.T).logsumexp(1).mean()
        self.engine.optimizer.zero_grad()
        loss.backward()
        self.engine.optimizer.step()
        self.engine.global_steps += 1
        return loss.item()


@pytest.fixture(scope="module")
def ranks():
    with connected("cpu") as ranks:
        yield ranks


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    (folder / "tiny-vit.json").write_text(json.dumps(TINY_VIT), encoding="utf-8")
    open_clip.add_model_config(folder)

    def build(seed: int = 0, **changes) -> TwoTowers:
        torch.manual_seed(seed)
        clip, preprocess = build_model(ModelConfig(name="tiny-vit"))
        return TwoTowers(clip, preprocess)

    return build


def saver_of(run, engine, ranks, **more) -> CheckpointSaver:
    settings = {"model_name": "tiny-vit", "preprocess": PreprocessCfg(size=32), "recipe": "test", "keep": 9, **more}
    return CheckpointSaver(run, engine, ranks, **settings)


@pytest.fixture(scope="module")
def two_saved(model, ranks, tmp_path_factory):
    """A run with the checkpoints of steps 1 and 2, and the losses of steps 3 and 4."""
    run = tmp_path_factory.mktemp("runs") / "run"
    engine = PlainEngine(model(), ranks)
    saver = saver_of(run, engine, ranks)
    for step in (1, 2):
        engine.train_step()
        saver.save(step)
    saver.wait()
    return run, [engine.train_step() for _ in range(2)]


@pytest.fixture
def run(two_saved, tmp_path):
    shutil.copytree(two_saved[0], tmp_path / "run")
    return tmp_path / "run"


def test_a_restored_state_goes_on_with_the_same_losses(two_saved, model, ranks):
    run, losses = two_saved
    engine = PlainEngine(model(seed=5), ranks)
    assert restore(find_checkpoint(run, ranks, engine.module), engine, ranks, seed=0) == (
        f"going on from {run}/checkpoints/step_2"
    )
    assert engine.engine.global_steps == 2
    assert [engine.train_step() for _ in range(2)] == losses


def test_plain_torch_reads_weights_and_moments_by_name(two_saved, model, ranks):
    from safetensors.torch import load_file

    engine = PlainEngine(model(), ranks)
    for _ in range(2):
        engine.train_step()
    saved = load_file(step_folder(two_saved[0], 2) / "state_rank00000.safetensors")
    for name, parameter in engine.module.named_parameters():
        assert torch.equal(saved[f"weight/0/{name}"].view(parameter.shape), parameter)
        for kind in ("exp_avg", "exp_avg_sq"):
            expected = engine.engine.optimizer.state[parameter][kind]
            assert torch.equal(saved[f"{kind}/0/{name}"].view(parameter.shape), expected)
    exported = load_model(two_saved[0]).model.state_dict()
    assert all(torch.equal(exported[name], weight) for name, weight in engine.module.clip.state_dict().items())


FILES = ("manifest.json", "state_rank00000.safetensors", "open_clip_model.safetensors", "open_clip_config.json")


@pytest.mark.parametrize("name", [*FILES, "bpe.txt.gz"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_the_checkpoint_before_a_damaged_one_is_in_force(name, damage, run, model, ranks, capsys):
    path = step_folder(run, 2) / name
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        data[len(data) // 2] ^= 4
        path.write_bytes(data if damage == "flipped" else data[: len(data) // 2])
    assert find_checkpoint(run, ranks, model()).step == 1
    said = capsys.readouterr().err
    assert said.startswith(f"passed over {run}/checkpoints/step_2: ")
    assert name in said
    assert said.count("\n") == 1


def test_a_damaged_model_is_not_evaluated(run, capsys):
    path = step_folder(run, 2) / "open_clip_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"abcd")
    assert checkpoint_folder(run) == step_folder(run, 1)
    assert "step_2: open_clip_model.safetensors is damaged" in capsys.readouterr().err


def test_another_models_checkpoint_is_passed_over_with_the_first_difference(run, model, ranks, capsys):
    other = model()
    other.clip.text_projection = torch.nn.Parameter(torch.zeros(32, 48))
    with pytest.raises(ValueError, match=r"none of the 2 checkpoints of .* can be used"):
        find_checkpoint(run, ranks, other)
    said = capsys.readouterr().err
    assert "clip.text_projection has shape [32, 32], the run's has [32, 48]" in said
    del other.clip.text_projection
    with pytest.raises(ValueError, match="none of the 2"):
        find_checkpoint(run, ranks, other)
    assert "it is of another model: with clip.text_projection" in capsys.readouterr().err


def test_a_run_that_has_no_checkpoint_yet_starts_from_nothing(tmp_path, model, ranks):
    (tmp_path / "checkpoints" / ".step_1.123.tmp").mkdir(parents=True)
    assert find_checkpoint(tmp_path, ranks, model()) is None


def test_a_checkpoint_of_the_earlier_format_is_named(run, model, ranks, capsys):
    for step in (1, 2):
        path = step_folder(run, step) / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 1}), encoding="utf-8")
    with pytest.raises(ValueError, match="none of the 2"):
        find_checkpoint(run, ranks, model())
    assert "has format version 1, this program reads version 2" in capsys.readouterr().err


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


def test_a_pickle_in_the_place_of_the_state_is_never_run(run, model, ranks, tmp_path, monkeypatch):
    """Also when whoever put it there wrote a manifest that fits."""
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    folder = step_folder(run, 2)
    torch.save({"weight": Bomb()}, folder / "state_rank00000.safetensors")
    content = json.loads((folder / "manifest.json").read_text())
    content = {name: content[name] for name in content if name not in ("kind", "format_version", "checksum")}
    written = file_sum(folder / "state_rank00000.safetensors")
    content["files"]["state_rank00000.safetensors"] = {"num_bytes": written.num_bytes, "sha256": written.sha256}
    head = {"kind": "checkpoint", "format_version": 2, "checksum": fingerprint(content)}
    (folder / "manifest.json").write_text(json.dumps({**head, **content}), encoding="utf-8")
    engine = PlainEngine(model(), ranks)
    found = find_checkpoint(run, ranks, engine.module)
    assert found.step == 2
    with pytest.raises(ValueError, match=r"state_rank00000\.safetensors can't be read"):
        restore(found, engine, ranks, seed=0)
    assert not (tmp_path / "exploded").exists()
    pickle.loads(pickle.dumps(Bomb()))
    assert (tmp_path / "exploded").exists(), "the bomb works"


def test_training_goes_on_while_a_checkpoint_is_written(model, ranks, tmp_path, monkeypatch):
    engine, may_write, write = (
        PlainEngine(model(), ranks),
        threading.Event(),
        train.checkpoints.checkpoint.write_tensors,
    )
    monkeypatch.setattr(
        train.checkpoints.checkpoint, "write_tensors", lambda *args: may_write.wait(60) and write(*args)
    )
    saver = saver_of(tmp_path, engine, ranks)
    engine.train_step()
    expected = {name: weight.clone() for name, weight in engine.module.clip.state_dict().items()}
    saver.save(1)
    # Had `save` waited for the writer, nobody would have let it write.
    assert saved_steps(tmp_path) == []
    engine.train_step()
    saver.check()
    may_write.set()
    saver.wait()
    saved = load_model(tmp_path).model.state_dict()
    assert all(torch.equal(saved[name], weight) for name, weight in expected.items())
    assert not torch.equal(engine.module.clip.text_projection, expected["text_projection"])
    # The memory of the first copy serves the second.
    saver.save(2)
    saver.wait()
    found = load_model(step_folder(tmp_path, 2)).model.text_projection
    assert torch.equal(found, engine.module.clip.text_projection)


def test_an_error_of_the_writer_is_raised_at_the_next_step_and_before_the_next_save(
    model, ranks, tmp_path, monkeypatch
):
    engine = PlainEngine(model(), ranks)
    saver = saver_of(tmp_path, engine, ranks)

    def fail(*args):
        raise RuntimeError("the disk said no")

    monkeypatch.setattr(train.checkpoints.checkpoint, "write_tensors", fail)
    for call in (saver.check, saver.wait, lambda: saver.save(9)):
        saver.save(len(list(tmp_path.rglob("*"))) + 1 + saver.saved_step)
        saver._thread.join()
        with pytest.raises(RuntimeError, match="the disk said no"):
            call()
        assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no mount here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_keeps_the_checkpoint_before_and_says_what_to_do(small_disk, model, ranks):
    engine = PlainEngine(model(), ranks)
    saver = saver_of(small_disk, engine, ranks)
    engine.train_step()
    saver.save(1)
    saver.wait()
    (small_disk / "filler").write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 2_000_000))
    saver.save(2)
    with pytest.raises(ValueError, match=r"step_2 could not be written: No space left on device \(\d+ MiB free\)"):
        saver.wait()
    assert [path.name for path in (small_disk / "checkpoints").iterdir()] == ["step_1"]
    assert find_checkpoint(small_disk, ranks, engine.module).step == 1
    (small_disk / "filler").unlink()
    saver.save(3)
    saver.wait()
    assert find_checkpoint(small_disk, ranks, engine.module).step == 3


@pytest.mark.parametrize(
    ("keep", "keep_every", "now", "left"),
    [
        (2, 0, 60, [50, 60, 70]),
        (1, 0, 60, [60, 70]),
        (1, 20, 60, [20, 40, 60, 70]),
        (3, 30, 50, [30, 40, 50, 60, 70]),
        (9, 0, 70, [10, 20, 30, 40, 50, 60, 70]),
    ],
)
def test_old_checkpoints_go_as_asked_and_a_later_damaged_one_does_not_count(tmp_path, keep, keep_every, now, left):
    for step in range(10, 80, 10):
        step_folder(tmp_path, step).mkdir(parents=True)
    remove_old_checkpoints(tmp_path, now, keep, keep_every)
    assert saved_steps(tmp_path) == left


def test_what_an_interrupted_save_left_goes_with_the_next_start(tmp_path, model, ranks):
    for name in (".step_4.17.tmp", ".step_2.removed", "step_3"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    saver_of(tmp_path, PlainEngine(model(), ranks), ranks)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_3"]
