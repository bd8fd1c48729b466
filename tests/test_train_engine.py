"""DeepSpeed JSONs: every shipped one trains, every bad edit is refused with its name."""

import json
import os
from pathlib import Path

import pytest
import torch

from tests.ranks import run_on_ranks
from tests.same_gradient import NUM_ROWS, Cell, global_batches, tiny_model
from train.config import OptimConfig
from train.ds_config import read_ds_config
from train.engine import check_offload, check_zero_section

SHIPPED = sorted((Path(__file__).resolve().parent.parent / "ds_configs").glob("*.json"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configurations_are_accepted_and_documented(path):
    assert read_ds_config(path)["zero_optimization"]["stage"] in (0, 1, 2, 3)
    check_zero_section(path, read_ds_config(path))
    assert f"`{path.name}`" in (path.parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"zero_optimisation": {"stage": 2}}, "unknown key zero_optimisation, did you mean zero_optimization"),
        ({"train_batch_size": 64}, "train_batch_size is a learning number; say it with --batch_size"),
        ({"optimizer": {"type": "Adam"}}, "optimizer is a learning number; say it with --optim.lr"),
        ({"gradient_clipping": 1.0}, "say it with --optim.grad_clip_norm"),
        (
            {"zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"}},
            'zero_optimization.reduce_bucket_size is "auto"',
        ),
        ({"zero_optimization": {"stages": 1}}, "stages"),
        ({"zero_optimization": {"stage": 7}}, "stage"),
        ({"zero_optimization": {"stage": "2"}}, "stage='2' must be 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": -1}}, "stage=-1 must be 0, 1, 2 or 3"),
        ({"lr": 1e-3}, "lr is a learning number; say it with --optim.lr"),
        ({"batch_size": 64}, "batch_size is a learning number; say it with --batch_size"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler is a learning number; say it with --optim.warmup"),
        ({"bf16": {"enabeld": True}}, "unknown key bf16.enabeld, did you mean enabled"),
        (
            {"torch_autocast": {"enabled": True, "dtpye": "bfloat16"}},
            "unknown key torch_autocast.dtpye, did you mean dtype",
        ),
        ({"aio": {"queue_dept": 8}}, "unknown key aio.queue_dept, did you mean queue_depth"),
        (
            {"bf16": {"enabled": True}, "torch_autocast": {"enabled": True}},
            "bf16 and torch_autocast are enabled together",
        ),
        ({"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}}, "use stage 1, or torch_autocast"),
        (
            {"torch_autocast": {"enabled": True, "dtype": "float16"}},
            "float16 needs a loss scale .*; use stage 1, or bfloat16",
        ),
        (
            {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
            "offload_optimizer needs sharded optimizer states, and ZeRO stage 0 has none; use stage 1 or higher",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            "offload_param needs sharded weights, and ZeRO stage 2 has none; use stage 3",
        ),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "disk"}}}, "device='disk' must be one of"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}},
            "device=nvme needs ZeRO stage 3, not 2",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            "offload_optimizer.nvme_path is missing",
        ),
        ({"zero_optimization": {"stage": 2, "offload_optimiser": {"device": "cpu"}}}, "offload_optimiser"),
        ({"frobnicate": 1}, "unknown key frobnicate"),
        ({"bf16": {"enabled": True, "check_grad_overflow": False}}, "check_grad_overflow=false would let gradients"),
    ],
)
def test_bad_edits_are_named(tmp_path, content, message):
    path = tmp_path / "edited.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        check_zero_section(path, read_ds_config(path))
    assert "edited.json" in str(caught.value)


def test_a_missing_file_and_broken_json_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.json is no file"):
        read_ds_config(tmp_path / "nowhere.json")
    (tmp_path / "torn.json").write_text('{"zero_optimization": ', encoding="utf-8")
    with pytest.raises(ValueError, match=r"torn\.json is not valid JSON"):
        read_ds_config(tmp_path / "torn.json")


REGIMES = (
    "zero0_bf16",
    "cpu",
    "zero1_bf16",
    "zero2_bf16",
    "zero2_offload",
    "zero3_bf16",
    "zero3_offload",
    "zero3_nvme",
)
NUM_STEPS = 20
CELL = Cell(1, "autocast", "none", 1, 1, "contrastive")


def test_there_is_a_configuration_for_each_regime():
    assert {path.stem for path in SHIPPED} == set(REGIMES)
    devices = {
        path.stem: path.read_text().count('"device": "cpu"') + 10 * path.read_text().count('"device": "nvme"')
        for path in SHIPPED
    }
    assert {name: count for name, count in devices.items() if count} == {
        "zero2_offload": 1,
        "zero3_offload": 2,
        "zero3_nvme": 20,
    }


def losses_of_steps(rank: int, world_size: int, stems: list[str], torch_adam: bool) -> dict[str, list[float]]:
    """The losses of 20 steps on one batch under each JSON; torch_adam: without the AdamW that DeepSpeed compiles for offload."""
    from train.data.loader import RankBatch
    from train.distributed import Ranks
    from train.engine import Engine
    from train.loop import train_step
    from train.models.clip_library import PreprocessCfg
    from train.models.model import TwoTowers

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), DS_ACCELERATOR="cpu")
    ranks, optim = Ranks(rank, world_size, rank, torch.device("cpu")), OptimConfig(lr=1e-3, warmup=0)
    image_GCHW, text_GL = next(global_batches(1))
    batch, found = RankBatch(image_GCHW, text_GL, torch.arange(NUM_ROWS), NUM_ROWS, 0), {}
    for stem in stems:
        ds_config = read_ds_config(SHIPPED[0].parent / f"{stem}.json")
        if not torch_adam:
            ds_config["zero_force_ds_cpu_optimizer"] = True
        engine = Engine(
            TwoTowers(tiny_model(CELL), PreprocessCfg()), ds_config, optim, batch_size=NUM_ROWS, ranks=ranks
        )
        steps = [train_step(engine, CELL.train_config(), batch, optim.lr) for _ in range(NUM_STEPS)]
        assert not any(step.not_finite for step in steps)
        found[stem] = [step.terms.loss.item() for step in steps]
        engine.close()
    return found


@pytest.mark.slow
def test_every_regime_trains_and_all_take_the_same_steps():
    stems = [stem for stem in REGIMES if stem != "zero3_nvme"]
    found = run_on_ranks(losses_of_steps, 1, stems, True)[0]
    assert found.keys() == set(stems)
    for stem, losses in found.items():
        assert len(losses) == NUM_STEPS
        assert losses[-1] < 0.5 * losses[0], stem
        # bfloat16 rounds the 20 steps differently only where ZeRO-3 keeps weights apart.
        assert losses == pytest.approx(found["cpu"], rel=0.02), stem


@pytest.mark.full
def test_the_offloading_regimes_train_as_shipped_with_deepspeeds_compiled_adamw():
    stems = ["zero2_offload", "zero3_offload"]
    compiled, plain = (run_on_ranks(losses_of_steps, 1, stems, own, timeout_s=1800)[0] for own in (False, True))
    for stem in stems:
        assert compiled[stem] == pytest.approx(plain[stem], rel=0.02), stem


def test_offload_without_a_compiler_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(
        ValueError, match=r"offload_optimizer needs g\+\+ and ninja on PATH .*zero_force_ds_cpu_optimizer"
    ):
        check_offload(read_ds_config(SHIPPED[0].parent / "zero2_offload.json"))


def test_nvme_offload_says_what_is_missing(tmp_path, monkeypatch):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr("shutil.which", lambda tool: f"/usr/bin/{tool}")
    ds_config = read_ds_config(SHIPPED[0].parent / "zero3_nvme.json")
    zero = ds_config["zero_optimization"]
    for section in ("offload_optimizer", "offload_param"):
        zero[section]["nvme_path"] = str(tmp_path / "no_drive")
    with pytest.raises(ValueError, match=r"nvme_path=.*no_drive is no folder that can be written to"):
        check_offload(ds_config)
    for section in ("offload_optimizer", "offload_param"):
        zero[section]["nvme_path"] = str(tmp_path)
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: False)
    with pytest.raises(ValueError, match=r"nvme needs libaio .* apt install libaio-dev"):
        check_offload(ds_config)
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: True)
    check_offload(ds_config)
