"""DeepSpeed JSONs: every shipped one is accepted, every bad edit is refused with its name."""

import json
from pathlib import Path

import pytest

from train.ds_config import read_ds_config
from train.engine import check_zero_section

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
