"""Pictures with their labels and captions, from WebDataset shards, an ImageFolder or a torchvision data set.

Flows out: `Sample`s in a fixed order. A sample's `fields` hold the .json member's fields, "txt" and "cls" (the label
that the data set itself assigns, as a name). A damaged sample is an error that names its shard and key, never skipped:
the number of pictures is part of what a metric means.
"""

import glob
import inspect
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import braceexpand
import torchvision
import webdataset
from PIL import Image

from train.evaluate.suite import DATASET_LABEL, is_remote

IMAGE_EXTENSIONS = ("webp", "jpg", "jpeg", "png", "bmp", "gif", "tif", "tiff", "ppm")
CLASS_NAMES_FILE = "classnames.txt"


class Sample(NamedTuple):
    """One picture as found: encoded bytes, a path, or a picture that torchvision has already decoded."""

    key: str
    shard: str
    image: bytes | Path | Image.Image
    fields: dict[str, Any]


@dataclass(frozen=True)
class Source:
    """One split of a data set. `class_names` name integer labels; None: whatever the data set says."""

    format: str
    locations: tuple[str, ...]
    class_names: tuple[str, ...] | None = None
    train_split: bool = False

    def class_list(self) -> tuple[str, ...] | None:
        """All classes in label order, also those without a picture here; None if the data set does not say."""
        if self.class_names is not None:
            return self.class_names
        if self.format == "imagefolder":
            return tuple(label_from_folder(name) for name in open_image_folder(self.locations[0]).classes)
        if self.format.startswith("torchvision:"):
            return torchvision_classes(open_torchvision(self))
        return class_names_beside(self.locations[0])

    def samples(self) -> Iterator[Sample]:
        """Every sample, in order. Raises FileNotFoundError or ValueError naming the path, the shard and the key."""
        if self.format == "webdataset":
            names = self.class_list()
            for shard in expand_shards(self.locations):
                yield from shard_samples(shard, names)
        elif self.format == "imagefolder":
            yield from folder_samples(self.locations)
        else:
            yield from torchvision_samples(self)

    def count(self) -> int | None:
        """How many samples there will be, for the time left; None when only reading a remote shard would tell."""
        if self.format == "imagefolder":
            return sum(len(open_image_folder(location)) for location in self.locations)
        if self.format.startswith("torchvision:"):
            return len(open_torchvision(self))
        shards = expand_shards(self.locations)
        return None if any(is_remote(shard) for shard in shards) else sum(count_images(shard) for shard in shards)

    def identity(self) -> list[Any]:
        """What a cache of this source's features depends on: local files with size and time of change."""
        paths = expand_shards(self.locations) if self.format == "webdataset" else self.locations
        stamps = [(str(path), file_stamp(path)) for path in paths]
        return [self.format, self.train_split, self.class_names, stamps]


def file_stamp(path: str) -> list[int] | None:
    file = Path(path)
    if is_remote(path) or not file.exists():
        return None
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]


def expand_shards(locations: tuple[str, ...]) -> list[str]:
    """Shard paths from folders (every .tar below), brace ranges, wildcards and URLs.

    Raises FileNotFoundError when a location matches nothing or a shard of a range is missing.
    """
    shards: list[str] = []
    for location in locations:
        if is_remote(location):
            shards.extend([location] if location.startswith("pipe:") else braceexpand.braceexpand(location))
            continue
        found = sorted(str(path) for path in Path(location).rglob("*.tar")) if Path(location).is_dir() else []
        if not Path(location).is_dir():
            for pattern in braceexpand.braceexpand(location):
                found.extend(sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern])
        if not found:
            raise FileNotFoundError(
                f"no shards match {location}; expected .tar files (a folder, a/{{000..012}}.tar, a/*.tar)"
            )
        shards.extend(found)
    for shard in shards:
        if not is_remote(shard) and not Path(shard).is_file():
            raise FileNotFoundError(f"shard {shard} does not exist; check the path and the range's ends")
    return shards


def count_images(shard: str) -> int:
    try:
        with tarfile.open(shard, "r:*") as tar:
            names = [member.name for member in tar if member.isreg()]
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"shard {shard} is not a readable tar ({error}); build or fetch it again") from error
    return sum(name.rsplit(".", 1)[-1].lower() in IMAGE_EXTENSIONS for name in names)


def shard_samples(shard: str, class_names: tuple[str, ...] | None) -> Iterator[Sample]:
    check_tar_end(shard)
    pipeline = webdataset.WebDataset([shard], shardshuffle=False, empty_check=False)
    last_key = "none"
    stream = iter(pipeline)
    while True:
        try:
            raw = next(stream, None)
        # webdataset passes on whatever tarfile, the decompressor or the transport raised.
        except Exception as error:
            reason = error.args[0] if error.args else type(error).__name__
            raise ValueError(f"shard {shard} cannot be read after sample {last_key} ({reason})") from error
        if raw is None:
            return
        last_key = raw["__key__"]
        yield sample_from_members(raw, shard, class_names)


def check_tar_end(shard: str) -> None:
    """A tar cut between two members reads as a shorter one without an error, except that its closing zeros are gone."""
    if is_remote(shard) or not shard.endswith(".tar"):
        return
    with open(shard, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 1024))
        tail = file.read()
    if len(tail) < 1024 or any(tail):
        raise ValueError(f"shard {shard} is cut off (no end-of-archive block); build or fetch it again")


def sample_from_members(raw: dict[str, Any], shard: str, class_names: tuple[str, ...] | None) -> Sample:
    key = raw["__key__"]
    image = next((raw[extension] for extension in IMAGE_EXTENSIONS if extension in raw), None)
    if image is None:
        members = ", ".join(sorted(name for name in raw if not name.startswith("__")))
        raise ValueError(f"{shard}: sample {key} has no picture (members: {members})")
    fields: dict[str, Any] = {}
    try:
        if "json" in raw:
            fields.update(json.loads(raw["json"]))
        if "txt" in raw:
            fields["txt"] = raw["txt"].decode("utf-8")
        if "cls" in raw:
            fields[DATASET_LABEL] = class_name(int(raw["cls"]), class_names)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{shard}: sample {key} has a damaged member ({error})") from error
    return Sample(key, shard, image, fields)


def class_name(label: int, class_names: tuple[str, ...] | None) -> str | int:
    """The class's name, or its number when nothing names it: enough for a linear probe."""
    if class_names is None:
        return label
    if not 0 <= label < len(class_names):
        raise ValueError(f"class {label} is outside the {len(class_names)} class names")
    return class_names[label]


def class_names_beside(location: str) -> tuple[str, ...] | None:
    """`classnames.txt` in the data's folder or the one above it, a name a line, line i naming class i."""
    if is_remote(location):
        return None
    folder = Path(location) if Path(location).is_dir() else Path(location).parent
    for path in (folder / CLASS_NAMES_FILE, folder.parent / CLASS_NAMES_FILE):
        if path.is_file():
            return read_class_names(path)
    return None


def read_class_names(path: Path) -> tuple[str, ...]:
    """Class names, one a line. Raises FileNotFoundError, or ValueError when there are none."""
    if not path.is_file():
        raise FileNotFoundError(f"class names file {path} does not exist; it holds one name a line")
    names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    if not names:
        raise ValueError(f"class names file {path} is empty; it holds one name a line")
    return names


def label_from_folder(name: str) -> str:
    return name.replace("_", " ")


def open_image_folder(location: str) -> torchvision.datasets.ImageFolder:
    if not Path(location).is_dir():
        raise FileNotFoundError(f"{location} is not a folder; an ImageFolder has one folder of pictures per class")
    try:
        return torchvision.datasets.ImageFolder(location)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{location} is no ImageFolder (one folder of pictures per class): {error}") from error


def folder_samples(locations: tuple[str, ...]) -> Iterator[Sample]:
    for location in locations:
        folder = open_image_folder(location)
        for path, label in folder.samples:
            key = str(Path(path).relative_to(location))
            yield Sample(key, location, Path(path), {DATASET_LABEL: label_from_folder(folder.classes[label])})


def open_torchvision(source: Source) -> Any:
    """The named torchvision data set, its test (or training) split, never downloaded.

    Raises ValueError for a name torchvision does not have, FileNotFoundError when the files are not there.
    """
    name = source.format.removeprefix("torchvision:")
    constructor = getattr(torchvision.datasets, name, None)
    if not inspect.isclass(constructor):
        raise ValueError(f"torchvision has no data set {name!r}; see torchvision.datasets for the names, e.g. CIFAR10")
    parameters = inspect.signature(constructor).parameters
    arguments: dict[str, Any] = {}
    if "root" in parameters:
        arguments["root"] = source.locations[0]
    if "split" in parameters:
        arguments["split"] = "train" if source.train_split else "test"
    elif "train" in parameters:
        arguments["train"] = source.train_split
    if "download" in parameters:
        arguments["download"] = False
    try:
        return constructor(**arguments)
    except (RuntimeError, OSError) as error:
        raise FileNotFoundError(f"torchvision:{name} is not complete in {source.locations[0]}: {error}") from error


def torchvision_classes(dataset: Any) -> tuple[str, ...] | None:
    # ImageNet's classes are tuples of synonyms; the first is the customary name.
    names = getattr(dataset, "classes", None)
    return None if names is None else tuple(name if isinstance(name, str) else name[0] for name in names)


def torchvision_samples(source: Source) -> Iterator[Sample]:
    dataset = open_torchvision(source)
    names = source.class_names or torchvision_classes(dataset)
    for index in range(len(dataset)):
        image, target = dataset[index]
        fields = {"txt": list(target)} if isinstance(target, list | tuple) else {}
        if not fields:
            fields[DATASET_LABEL] = class_name(int(target), names)
        yield Sample(str(index), source.format, image, fields)
