"""What a run says about itself: figures of a step, MFU, goodput over restarts, and trackers."""

import json
import sys
import time
from types import ModuleType

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train.records.metrics
from train.models.clip_library import PreprocessCfg, open_clip
from train.models.model import TwoTowers, architecture
from train.planning.flops import StepCost, flop_of_a_pair, peak_tflops, training_dtype
from train.records.metrics import Goodput, MetricsLog, StepClock, in_short, keep_steps_before
from train.records.trackers import build_trackers, check_trackers
from train.supervision.phases import CHECKPOINT, DATA, FORWARD, Phases

ROW = {"loss": 1.5, "pairs_per_s": 100.0, "logit_scale": 14.0, "step_ms": 50.0, "mfu": None}


def towers(name: str) -> TwoTowers:
    with torch.device("meta"):
        return TwoTowers(open_clip.CLIP(**architecture(name)), PreprocessCfg())


def counted(model: TwoTowers, side: int) -> float | None:
    return flop_of_a_pair(model, (side, side), model.clip.context_length)


@pytest.mark.parametrize(("name", "gflop"), [("ViT-B-32", 14.78), ("RN50", 18.18)])
def test_counted_flop_of_a_pair_are_three_times_open_clips_published_forward(name, gflop):
    # open_clip's docs/model_profile.csv counts one forward pass of both towers.
    assert counted(towers(name), 224) == pytest.approx(3 * gflop * 1e9, rel=0.01)


def test_a_frozen_tower_and_recomputed_activations_cost_what_the_mathematics_needs():
    model = towers("pocket-rn")
    whole = counted(model, 64)
    assert whole > 1e6
    model.clip.set_grad_checkpointing()
    assert counted(model, 64) == whole
    assert model.clip.transformer.grad_checkpointing, "the count must leave the model as it is"
    model.clip.visual.requires_grad_(False)
    assert counted(model, 64) < 0.7 * whole


def test_counting_draws_no_random_number_of_the_run(monkeypatch):
    model, encode_text, calls = towers("pocket-rn"), open_clip.CLIP.encode_text, []

    def drawing(self, text_BL):
        calls.append(torch.randn(1))
        return encode_text(self, text_BL)

    monkeypatch.setattr(open_clip.CLIP, "encode_text", drawing)
    before = torch.get_rng_state()
    assert counted(model, 64) > 1e6
    assert calls
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_that_looks_at_values_has_no_count():
    model = towers("pocket-rn")
    model.clip.encode_text = lambda text_BL: text_BL.float() * text_BL.sum().item()
    assert counted(model, 64) is None


def test_utilisation_by_hand():
    # 1 GFLOP a pair and 3 * 2 * 100 * 1000 of the loss, 500 pairs a second, on a device of 2 TFLOP/s.
    cost = StepCost(1e9, 1000, 2.0, "")
    found = cost.utilisation(500.0, 100)
    assert found["tflops_per_rank"] == pytest.approx(500 * (1e9 + 6e5) / 1e12)
    assert found["mfu"] == pytest.approx(found["tflops_per_rank"] / 2)
    assert StepCost(1e9, 1000, None, "").utilisation(500.0, 100)["mfu"] is None
    assert StepCost(None, None, 2.0, "").utilisation(500.0, 100) == {"tflops_per_rank": None, "mfu": None}


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.4),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756.0),
        ("NVIDIA A100-SXM4-40GB", torch.float32, 156.0),
        ("NVIDIA L40S", torch.float16, 362.0),
        ("Unheard-of 9000", torch.bfloat16, None),
    ],
)
def test_peak_rates_follow_the_devices_name(monkeypatch, name, dtype, expected):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_tflops(torch.device("cuda", 0), dtype)[0] == expected


def test_a_processors_rate_is_measured():
    rate, source = peak_tflops(torch.device("cpu"), torch.float32)
    assert 1e-4 < rate < 1e3
    assert "measured" in source


@pytest.mark.parametrize(
    ("ds_config", "dtype"),
    [
        ({}, torch.float32),
        ({"bf16": {"enabled": True}}, torch.bfloat16),
        ({"fp16": {"enabled": True}}, torch.float16),
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, torch.bfloat16),
        ({"torch_autocast": {"enabled": True, "dtype": "torch.float16"}}, torch.float16),
        ({"torch_autocast": {"enabled": False, "dtype": "bfloat16"}}, torch.float32),
    ],
)
def test_precision_is_what_the_json_says(ds_config, dtype):
    assert training_dtype(ds_config) is dtype


def test_a_checkpoints_time_is_no_steps_time(monkeypatch):
    monkeypatch.setattr(train.records.metrics, "max_over_ranks", lambda value: value)
    phases = Phases()
    clock = StepClock(phases, 2, torch.device("cpu"), StepCost(1e9, 8, 1.0, ""))
    for step in (1, 2):
        phases.begin_step(step)
        with phases(DATA):
            time.sleep(0.01)
        with phases(FORWARD):
            time.sleep(0.03)
        clock.step_done(20)
        with phases(CHECKPOINT):
            time.sleep(0.2)
    figures = clock.take()
    assert 40 <= figures["step_ms"] < 120
    parts = [
        value
        for name, value in figures.items()
        if name.endswith("_ms") and name not in ("step_ms", "slowest_data_wait_ms")
    ]
    assert sum(parts) == pytest.approx(figures["step_ms"])
    assert figures["data_wait_share"] == pytest.approx(figures["data_wait_ms"] / figures["step_ms"])
    assert figures["pairs_per_s"] == pytest.approx(20 * 1000 / figures["step_ms"])
    assert figures["pairs_per_s_per_rank"] == pytest.approx(figures["pairs_per_s"] / 2)
    assert figures["mfu"] == pytest.approx(figures["pairs_per_s_per_rank"] * (1e9 + 6 * 20 * 8) / 1e12)


def test_goodput_counts_each_step_once_over_restarts(tmp_path, monkeypatch):
    starts = [{"time_s": 1000.0, "step": 0}, {"time_s": 1050.0, "step": 12}]
    (tmp_path / "starts.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts), encoding="utf-8")
    rows = [{"step": 5, "step_ms": 1000.0}, {"step": 10, "step_ms": 2000.0}]
    monkeypatch.setattr(train.records.metrics.time, "time", lambda: 1100.0)
    # 5 x 1 s, 5 x 2 s, two more to the checkpoint at the last rate, then 8 x 0.5 s: 23 s of the 100 s since the first start.
    found = Goodput(tmp_path, 12, rows).take(20, 500.0)
    assert found == {"restarts": 1, "goodput": pytest.approx(0.23)}


def test_rows_of_steps_that_run_again_are_dropped_and_the_others_returned(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 4}\n{"step": 8}\n{"step": 12}\n{"step": 1', encoding="utf-8")
    assert keep_steps_before(path, 8) == [{"step": 4}, {"step": 8}]
    assert path.read_text(encoding="utf-8") == '{"step": 4}\n{"step": 8}\n'


def test_tensorboard_has_every_known_figure(tmp_path):
    log = MetricsLog(tmp_path, is_main=True, name="run", first_step=0, num_steps=2)
    log.write({"step": 1, **ROW})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"step", "restarts", "goodput", *ROW} - {"mfu"}
    assert events.Scalars("loss")[0].value == 1.5
    assert json.loads((tmp_path / "metrics.jsonl").read_text(encoding="utf-8"))["mfu"] is None


def test_the_bar_says_what_is_wrong_only_when_it_is():
    assert in_short(ROW) == "loss 1.500, 100 pairs/s, scale 14.0"
    row = {**ROW, "mfu": 0.412, "data_wait_share": 0.3, "skipped_steps": 2}
    assert in_short(row) == "loss 1.500, 100 pairs/s, scale 14.0, MFU 41 %, waits for data 30 %, 2 skipped"


def test_a_tracker_of_the_users_own_is_started_told_every_step_and_finished(tmp_path, monkeypatch):
    calls = []

    class Mine:
        def start(self, run, config, first_step):
            calls.append(("start", run, config["seed"], first_step))

        def log(self, step, values):
            calls.append(("log", step, values["loss"], "mfu" in values))

        def finish(self):
            calls.append("finish")

    module = ModuleType("my_tracking")
    module.Mine, module.Broken = Mine, object
    module.__spec__ = sys.__spec__
    monkeypatch.setitem(sys.modules, "my_tracking", module)
    log = MetricsLog(
        tmp_path, is_main=True, name="r", first_step=3, num_steps=9, trackers=["my_tracking:Mine"], config={"seed": 7}
    )
    log.write({"step": 4, **ROW})
    log.close()
    assert calls == [("start", tmp_path, 7, 3), ("log", 4, 1.5, False), "finish"]
    assert not (tmp_path / "tensorboard").exists()
    with pytest.raises(ValueError, match="Broken has no start, log, finish"):
        build_trackers(["my_tracking:Broken"])


class FakeMlflow(ModuleType):
    """What of MLflow the tracker calls."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.calls: list = []
        self.__spec__ = sys.__spec__

    def start_run(self, **keywords):
        self.calls.append(keywords)
        started = ModuleType("started")
        started.info = ModuleType("info")
        started.info.run_id = "id-1"
        return started

    def log_params(self, values):
        assert len(values) <= 100
        self.calls.append(values)

    def log_metrics(self, values, step):
        self.calls.append((step, values))

    def end_run(self):
        self.calls.append("end")


def test_an_mlflow_run_goes_on_under_its_id(tmp_path, monkeypatch):
    fake = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    for _ in range(2):
        (tracker,) = build_trackers(["mlflow"])
        tracker.start(tmp_path, {"optim": {"lr": 0.5}}, 0)
        tracker.log(1, {"loss": 2.0})
        tracker.finish()
    whole = [{"run_name": tmp_path.name}, {"optim.lr": "0.5"}, (1, {"loss": 2.0}), "end"]
    assert fake.calls == [*whole, {"run_id": "id-1"}, (1, {"loss": 2.0}), "end"]


def test_a_wandb_run_goes_on_under_its_id(tmp_path, monkeypatch):
    fake, seen = ModuleType("wandb"), []
    fake.__spec__ = sys.__spec__

    def init(**keywords):
        seen.append(keywords)
        run = ModuleType("run")
        run.log = lambda values, step: seen.append((step, values))
        run.finish = lambda: None
        return run

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for _ in range(2):
        (tracker,) = build_trackers(["wandb"])
        tracker.start(tmp_path, {"seed": 1}, 0)
        tracker.log(5, {"loss": 2.0})
        tracker.finish()
    assert seen[0]["id"] == seen[2]["id"]
    assert (seen[0]["dir"], seen[0]["resume"], seen[0]["config"]) == (str(tmp_path), "allow", {"seed": 1})
    assert seen[1] == (5, {"loss": 2.0})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wandbb", "none of tensorboard, wandb, mlflow"),
        ("no_such_module:Class", "there is no module no_such_module"),
    ],
)
def test_unknown_trackers_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        check_trackers([name])


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setattr(train.records.trackers, "find_spec", lambda module: None)
    with pytest.raises(ValueError, match="--trackers mlflow needs the package mlflow: pip install mlflow"):
        check_trackers(["mlflow"])
