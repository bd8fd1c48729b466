"""`python -m train.evaluate` on tiny data of each format, the tasks on features with known answers, and users' mistakes."""

import io
import json
import os
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from mining.command_line import run
from mining.manifest import write_manifest
from train.evaluate import linear_probe, retrieval, zeroshot
from train.evaluate.__main__ import main
from train.evaluate.cache import encode_with_cache
from train.evaluate.data import Sample, Source
from train.evaluate.features import EncodedSet, Encoder, encode_source
from train.evaluate.suite import LinearProbe, Retrieval, Suite, ZeroShot, expand_templates, read_suite
from train.models.folder import FORMAT_VERSION, KIND
from train.models.model import LoadedModel, ModelConfig, build_model, load_model, save_model

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 40, 230), "white": (250, 250, 250)}
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    """A run folder with one checkpoint of the small model, at random weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    checkpoint = folder / "checkpoints" / "step_7"
    checkpoint.mkdir(parents=True)
    model, preprocess = build_model(ModelConfig(name="pocket-rn"))
    save_model(checkpoint, "pocket-rn", model.state_dict(), preprocess)
    write_manifest(checkpoint, KIND, FORMAT_VERSION, files={})
    return folder


@pytest.fixture(scope="session")
def encoder(run_folder):
    return Encoder(load_model(run_folder), batch_size=8)


def picture(name: str, seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(-20, 20, (40, 40, 3))
    return Image.fromarray(np.clip(np.array(COLOURS[name]) + noise, 0, 255).astype(np.uint8))


def encoded_picture(name: str, seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(name, seed).save(buffer, "webp")
    return buffer.getvalue()


def write_shard(path: Path, samples: list[tuple[str, dict[str, bytes]]]) -> None:
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def pocket_like_sample(number: int) -> tuple[str, dict[str, bytes]]:
    name = list(COLOURS)[number % 4]
    fields = {"name": f"{name} square", "group": "warm" if name == "red" else "cold", "captions": [name, f"all {name}"]}
    members = {"webp": encoded_picture(name, number), "txt": name.encode(), "json": json.dumps(fields).encode()}
    return f"{number:09d}", {**members, "cls": str(number % 4).encode()}


@pytest.fixture
def shards(tmp_path):
    """Test split of 12 pictures in two unequal shards, training split of 20, and a suite over them."""
    for folder, sizes in (("test", (5, 7)), ("train", (20,))):
        (tmp_path / folder).mkdir()
        start = 0
        for index, size in enumerate(sizes):
            samples = [pocket_like_sample(number) for number in range(start, start + size)]
            write_shard(tmp_path / folder / f"{index:05d}.tar", samples)
            start += size
    suite = {
        "name": "squares",
        "data": "test/{00000..00001}.tar",
        "format": "webdataset",
        "tasks": [
            {"kind": "zeroshot", "name": "name", "class_key": "name", "templates": ["{}", "a photo of {}"]},
            {"kind": "zeroshot", "name": "in_group", "class_key": "name", "templates": ["{}"], "within": "group"},
            {"kind": "retrieval", "name": "retrieval", "caption_key": "captions"},
            {"kind": "linear_probe", "name": "group", "class_key": "group", "train_data": "train/00000.tar"},
        ],
    }
    (tmp_path / "suite.json").write_text(json.dumps(suite))
    return tmp_path


def evaluate_in_a_process(*arguments: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "train.evaluate", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.slow
def test_suite_on_webdataset_shards_writes_every_metric_and_prints_it(run_folder, shards):
    finished = evaluate_in_a_process("--checkpoint", run_folder, "--suite", shards / "suite.json")
    assert finished.returncode == 0, finished.stderr
    result = json.loads((run_folder / "evaluations" / "squares.json").read_text())
    assert (result["suite"], result["step"], result["num_images"]) == ("squares", 7, 12)
    assert result["checkpoint_hash"] == load_model(run_folder).checkpoint_hash
    retrieval_names = {f"retrieval/retrieval/{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5)}
    zero_shot_names = {"zeroshot/name/top1", "zeroshot/in_group/top1", "linear_probe/group/top1"}
    assert zero_shot_names | retrieval_names <= set(result["metrics"])
    per_unit = np.load(run_folder / "evaluations" / result["per_unit"])
    assert per_unit["keys"].tolist() == [f"{number:09d}" for number in range(12)]
    for name, metric in result["metrics"].items():
        assert len(per_unit[name]) == metric["count"]
        assert per_unit[name].mean() == pytest.approx(metric["value"])
        assert f"{100 * metric['value']:.2f}" in finished.stdout
    # Colour is easy to read off any features, and the training split has it.
    assert result["metrics"]["linear_probe/group/top1"]["value"] > 0.9
    assert result["metrics"]["zeroshot/name/top1"]["chance"] == 0.25
    # Groups: one red, three cold classes; 3 of 12 pictures have one candidate.
    assert result["metrics"]["zeroshot/in_group/top1"]["chance"] == pytest.approx((3 * 1 + 9 / 3) / 12)
    assert "image/s" in finished.stderr


@pytest.mark.slow
def test_image_folder_takes_classes_from_folder_names(run_folder, tmp_path):
    for split in ("val", "train"):
        for name in COLOURS:
            (tmp_path / split / f"{name}_square").mkdir(parents=True)
            for seed in range(3):
                picture(name, seed).save(tmp_path / split / f"{name}_square" / f"{seed}.png")
    arguments = ("--data", tmp_path / "val", "--format", "imagefolder", "--tasks", "zeroshot", "linear_probe")
    out = tmp_path / "out.json"
    finished = evaluate_in_a_process(
        "--checkpoint", run_folder, *arguments, "--train-data", tmp_path / "train", "--out", out
    )
    assert finished.returncode == 0, finished.stderr
    result = json.loads(out.read_text())
    assert result["suite"] == "val"
    assert result["metrics"]["zeroshot/class/top1"]["chance"] == 0.25
    # The training split is the test split here, so the probe must be right.
    assert result["metrics"]["linear_probe/class/top1"]["value"] == 1.0


@pytest.mark.slow
def test_torchvision_set_takes_its_classes_and_training_split_from_itself(run_folder, tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for split, size in (("train", 40), ("t10k", 20)):
        label_N = np.arange(size, dtype=np.uint8) % 10
        image_NHW = np.repeat(label_N * 25, 28 * 28).reshape(size, 28, 28).astype(np.uint8)
        header = struct.pack(">4i", 0x803, size, 28, 28)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(header + image_NHW.tobytes())
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, size) + label_N.tobytes())
    out = tmp_path / "out.json"
    arguments = ("--data", tmp_path, "--format", "torchvision:FashionMNIST", "--tasks", "zeroshot", "linear_probe")
    finished = evaluate_in_a_process("--checkpoint", run_folder, *arguments, "--templates", "openai", "--out", out)
    assert finished.returncode == 0, finished.stderr
    result = json.loads(out.read_text())
    assert result["num_images"] == 20
    assert result["metrics"]["zeroshot/class/top1"]["chance"] == pytest.approx(0.1)
    assert result["details"]["linear_probe/class"]["num_train_images"] == 40


def fields_only(fields: list[dict], image_ND: torch.Tensor) -> EncodedSet:
    return EncodedSet(image_ND, [f"key{row}" for row in range(len(fields))], ["shard"] * len(fields), fields)


def one_hot_texts(words: list[str]) -> LoadedModel:
    """A model whose text feature is the axis of the first known word in the text."""

    class Model(torch.nn.Module):
        def encode_text(self, number_BL: torch.Tensor, normalize: bool = False) -> torch.Tensor:
            return torch.eye(len(words))[number_BL[:, 0]]

    def tokenizer(texts: str | list[str]) -> torch.Tensor:
        listed = [texts] if isinstance(texts, str) else texts
        return torch.tensor([[next(i for i, word in enumerate(words) if word in text)] for text in listed])

    return LoadedModel(Model(), lambda image: image, tokenizer, "one-hot", "0", Path("."))


def test_zero_shot_is_right_exactly_where_features_say_so():
    encoder = Encoder(one_hot_texts(["cat", "dog", "cow"]))
    fields = [{"cls": name} for name in ("cat", "dog", "cow", "cow")]
    image_ND = torch.eye(3)[[0, 1, 2, 0]]
    found = zeroshot.measure(encoder, ZeroShot("animals"), fields_only(fields, image_ND), ("cat", "dog", "cow"))
    assert found["top1"].values_U.tolist() == [1, 1, 1, 0]
    assert found["mean_per_class"].value == pytest.approx((1 + 1 + 0.5) / 3)


def test_templates_are_averaged_like_open_clips_legacy_per_class_loop(encoder):
    from open_clip.zero_shot_classifier import build_zero_shot_classifier_legacy

    names, task = ["cat", "a {brace}"], ZeroShot("x", templates=("openai",))
    templates = expand_templates(task.templates, "here")
    ours_VD = zeroshot.class_features(encoder, task, names, {})
    with torch.no_grad():
        theirs_DV = build_zero_shot_classifier_legacy(
            encoder.loaded.model, encoder.loaded.tokenizer, names, templates, "cpu"
        )
    torch.testing.assert_close(ours_VD, theirs_DV.T, atol=2e-6, rtol=0)


def test_equal_captions_are_one_candidate_and_all_their_pictures_are_right():
    encoder = Encoder(one_hot_texts(["cat", "dog"]))
    captions = [["a cat", "A  Cat"], ["a dog"], ["a cat"]]
    image_ND = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1]])
    task = Retrieval("r", caption_key="captions")
    found = retrieval.measure(encoder, task, fields_only([{"captions": c} for c in captions], image_ND))
    assert found["image_to_text_r1"].values_U.tolist() == [1, 1, 1]
    assert found["text_to_image_r1"].values_U.tolist() == [1, 1]


def test_linear_probe_separates_what_is_separable_and_reports_unseen_classes():
    torch.manual_seed(0)
    centre_VD = torch.randn(3, 8)
    train_labels = [index % 2 for index in range(60)]
    train_ND = torch.nn.functional.normalize(centre_VD[train_labels] + 0.1 * torch.randn(60, 8), dim=1)
    test_labels = [0, 1, 2, 2]
    test_ND = torch.nn.functional.normalize(centre_VD[test_labels], dim=1)
    train = fields_only([{"cls": str(label)} for label in train_labels], train_ND)
    test = fields_only([{"cls": str(label)} for label in test_labels], test_ND)
    result = linear_probe.measure(LinearProbe("x"), train, test)
    assert result.measurements["top1"].values_U.tolist() == [1, 1, 0, 0]
    assert result.details["classes_without_training_images"] == ["2"]


def test_linear_probe_equals_plain_logistic_regression_at_the_picked_penalty():
    generator = torch.Generator().manual_seed(1)
    centre_VD = torch.randn(4, 6, generator=generator)
    labels = [index % 4 for index in range(300)]
    image_ND = torch.nn.functional.normalize(centre_VD[labels] + 1.2 * torch.randn(300, 6, generator=generator), dim=1)
    rows = [{"cls": str(label)} for label in labels]
    train, test = fields_only(rows[:200], image_ND[:200]), fields_only(rows[200:], image_ND[200:])
    result = linear_probe.measure(LinearProbe("x"), train, test)
    assert result.details["converged"]
    scaler = StandardScaler().fit(train.image_ND)
    plain = LogisticRegression(C=result.details["inverse_penalty"], max_iter=2000, tol=1e-8)
    plain.fit(scaler.transform(train.image_ND), labels[:200])
    expected = plain.predict(scaler.transform(test.image_ND)) == np.array(labels[200:])
    assert 0.3 < expected.mean() < 0.98
    assert result.measurements["top1"].values_U.tolist() == expected.tolist()


def test_linear_probe_works_when_a_class_has_a_single_picture():
    image_ND = torch.nn.functional.normalize(torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    rows = [{"cls": str(row)} for row in range(12)]
    result = linear_probe.measure(LinearProbe("x"), fields_only(rows, image_ND), fields_only(rows, image_ND))
    assert result.measurements["top1"].value == 1.0


def test_cached_features_equal_fresh_ones_and_follow_the_checkpoint(encoder, shards):
    source = Source("webdataset", (str(shards / "train"),))
    fields = frozenset({"group"})
    fresh = encode_source(encoder, source, fields, title="x")
    folder = shards / "cache"
    first = encode_with_cache(encoder, source, fields, folder, title="x")
    again = encode_with_cache(encoder, source, fields, folder, title="x")
    assert torch.equal(first.image_ND, fresh.image_ND)
    assert torch.equal(again.image_ND, fresh.image_ND)
    assert again.values("group") == fresh.values("group")
    files = sorted(path.name for path in folder.iterdir())
    other = LoadedModel(
        encoder.loaded.model, lambda image: encoder.loaded.preprocess(image) * 0, encoder.loaded.tokenizer, "x", "1",
        encoder.loaded.source,
    )  # fmt: skip
    changed = encode_with_cache(Encoder(other, batch_size=8), source, fields, folder, title="x")
    assert not torch.equal(changed.image_ND, fresh.image_ND)
    assert sorted(path.name for path in folder.iterdir()) == files, "one cache per data set, replaced"


def test_order_and_features_do_not_depend_on_threads_or_batch_size(encoder, shards):
    source = Source("webdataset", (str(shards / "test"),))
    one = encode_source(Encoder(encoder.loaded, batch_size=12, num_workers=1), source, None, title="x")
    many = encode_source(Encoder(encoder.loaded, batch_size=5, num_workers=4), source, None, title="x")
    assert one.keys == many.keys
    torch.testing.assert_close(one.image_ND, many.image_ND, atol=1e-5, rtol=0)


def test_diverged_checkpoint_is_an_error_not_a_score(shards):
    class Broken(torch.nn.Module):
        def encode_image(self, image_BCHW: torch.Tensor, normalize: bool = False) -> torch.Tensor:
            return torch.full((len(image_BCHW), 4), torch.nan)

    loaded = LoadedModel(Broken(), lambda image: torch.zeros(3, 2, 2), str, "broken", "0", shards)
    with pytest.raises(ValueError, match="not finite"):
        encode_source(Encoder(loaded), Source("webdataset", (str(shards / "test"),)), None, title="x")


def test_damaged_picture_names_its_shard_and_key(encoder, tmp_path):
    write_shard(tmp_path / "0.tar", [pocket_like_sample(0), ("000000001", {"webp": b"not a picture"})])
    with pytest.raises(ValueError, match=r"0\.tar: sample 000000001 cannot be decoded"):
        encode_source(encoder, Source("webdataset", (str(tmp_path),), ("a", "b", "c", "d")), None, title="x")


@pytest.mark.parametrize("lost_bytes", [1024, 5000, 10240])
def test_cut_off_shard_is_an_error_naming_it(tmp_path, lost_bytes):
    write_shard(tmp_path / "0.tar", [pocket_like_sample(number) for number in range(20)])
    content = (tmp_path / "0.tar").read_bytes()
    # Python pads a tar to 10240 bytes; what matters is what is left after that padding.
    (tmp_path / "0.tar").write_bytes(content.rstrip(b"\0")[: -lost_bytes + 1024])
    with pytest.raises(ValueError, match=r"shard .*0\.tar"):
        list(Source("webdataset", (str(tmp_path),), ("a", "b", "c", "d")).samples())


def test_bad_json_member_names_its_shard_and_key(tmp_path):
    write_shard(tmp_path / "0.tar", [("k", {"webp": encoded_picture("red", 0), "json": b"{"})])
    with pytest.raises(ValueError, match=r"0\.tar: sample k has a damaged member"):
        list(Source("webdataset", (str(tmp_path),)).samples())


def test_samples_keep_json_fields_text_and_named_class(tmp_path):
    write_shard(tmp_path / "0.tar", [pocket_like_sample(2)])
    (sample,) = Source("webdataset", (str(tmp_path / "0.tar"),), ("a", "b", "c", "d")).samples()
    assert isinstance(sample, Sample)
    assert (sample.key, sample.fields["cls"], sample.fields["txt"]) == ("000000002", "c", "blue")
    assert sample.fields["name"] == "blue square"


def one_line_error(capsys, *arguments: str | Path) -> str:
    with pytest.raises(SystemExit) as exit_:
        run(main, [str(argument) for argument in arguments])
    assert exit_.value.code == 2
    # The progress bar shares stderr; the message is its last line.
    message = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
    assert message.startswith("error: ")
    return message


def test_missing_checkpoint_is_one_line(capsys, shards):
    message = one_line_error(capsys, "--checkpoint", shards / "nowhere", "--suite", shards / "suite.json")
    assert "nowhere" in message


def test_missing_suite_is_one_line(capsys, run_folder, shards):
    assert "absent.json" in one_line_error(capsys, "--checkpoint", run_folder, "--suite", shards / "absent.json")


def test_no_shards_match_is_one_line(capsys, run_folder, shards):
    message = one_line_error(capsys, "--checkpoint", run_folder, "--data", shards / "test" / "x*.tar")
    assert "no shards match" in message


def test_missing_shard_of_a_range_is_one_line(capsys, run_folder, shards):
    message = one_line_error(capsys, "--checkpoint", run_folder, "--data", shards / "test" / "{00000..00009}.tar")
    assert "00002.tar does not exist" in message


def test_unknown_class_key_names_the_fields_there_are(capsys, run_folder, shards):
    arguments = ("--data", shards / "train", "--class-key", "nam", "--out", shards / "o.json")
    (shards / "classnames.txt").write_text("a\nb\nc\nd\n")
    message = one_line_error(capsys, "--checkpoint", run_folder, *arguments)
    assert "'nam'" in message
    assert "group, name" in message


def test_zero_shot_on_class_numbers_without_names_is_one_line(capsys, run_folder, shards):
    arguments = ("--data", shards / "train", "--out", shards / "o.json")
    assert "cls=0, and prompts need names" in one_line_error(capsys, "--checkpoint", run_folder, *arguments)


def test_unknown_task_is_one_line_with_a_guess(capsys, run_folder, shards):
    message = one_line_error(capsys, "--checkpoint", run_folder, "--data", shards / "test", "--tasks", "zero_shot")
    assert "did you mean zeroshot?" in message


def test_unknown_format_is_one_line(capsys, run_folder, shards):
    message = one_line_error(capsys, "--checkpoint", run_folder, "--data", shards / "test", "--format", "tfrecord")
    assert "webdataset, imagefolder, torchvision:NAME" in message


def test_unknown_torchvision_set_and_missing_files_are_one_line(capsys, run_folder, tmp_path):
    arguments = ("--checkpoint", run_folder, "--data", tmp_path, "--format")
    assert "no data set 'CIFAR9'" in one_line_error(capsys, *arguments, "torchvision:CIFAR9")
    assert "not complete" in one_line_error(capsys, *arguments, "torchvision:CIFAR10")


def test_probe_without_a_training_split_is_one_line(capsys, run_folder, shards):
    message = one_line_error(capsys, "--checkpoint", run_folder, "--data", shards / "test", "--tasks", "linear_probe")
    assert "--train-data" in message


def test_data_and_suite_exclude_each_other(capsys, run_folder):
    assert "--suite FILE or --data PATH" in one_line_error(capsys, "--checkpoint", run_folder)


def test_unknown_flag_is_one_line_with_a_guess(capsys):
    assert "did you mean --batch-size?" in one_line_error(capsys, "--checkpoint", "x", "--batchsize", "4")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"taskss": []}, "unknown field 'taskss'"),
        ({"tasks": [{"kind": "zeroshots"}]}, "did you mean zeroshot"),
        ({"tasks": [{"kind": "zeroshot", "clas_key": "x"}]}, "unknown field 'clas_key'"),
        ({"tasks": [{"kind": "zeroshot", "classes": 3}]}, "list of strings"),
        ({"tasks": [{"kind": "retrieval", "split_lines": "yes"}]}, "wrong type"),
        ({"tasks": [{"kind": "retrieval", "name": "a"}] * 2}, "two tasks retrieval/a"),
        ({"tasks": []}, "no tasks"),
        ({"format": "zip"}, "format='zip'"),
        ({"name": "a/b"}, "file name"),
    ],
)
def test_mistakes_in_a_suite_are_named(tmp_path, change, message):
    suite = {"name": "s", "data": "x", "format": "webdataset", "tasks": [{"kind": "retrieval", "name": "r"}], **change}
    (tmp_path / "s.json").write_text(json.dumps(suite))
    with pytest.raises(ValueError, match=message):
        read_suite(tmp_path / "s.json")


def test_paths_of_a_suite_count_from_its_folder_and_urls_do_not(tmp_path):
    tasks = [{"kind": "linear_probe", "name": "p", "train_data": "train/0.tar"}]
    data = ["test/0.tar", "https://host/1.tar", "pipe:cat 2.tar"]
    content = {"data": data, "format": "webdataset", "tasks": tasks}
    (tmp_path / "s.json").write_text(json.dumps(content))
    suite = read_suite(tmp_path / "s.json")
    assert isinstance(suite, Suite)
    assert suite.data == (str(tmp_path / "test/0.tar"), "https://host/1.tar", "pipe:cat 2.tar")
    assert suite.tasks[0].train_data == (str(tmp_path / "train/0.tar"),)


def test_template_without_a_place_for_the_name_is_an_error():
    with pytest.raises(ValueError, match=r"has no \{\}"):
        expand_templates(("a photo",), "task")
