"""The word lists: what WordNet says, found in the compact form that comes with the repository."""

import io
import lzma
import tarfile

import pytest

from train.data.words import build, synonyms
from train.data.words.stop_words import STOP_WORDS
from train.data.words.synonyms import Synonyms, english_synonyms


def test_synonyms_are_those_of_wordnet():
    # WordNet 3.0, "car": {car, auto, automobile, machine, motorcar}, {car, railcar, railway car, railroad car}, {car, gondola},
    # {car, elevator car}, {cable car, car}.
    expected = [
        "auto",
        "automobile",
        "machine",
        "motorcar",
        "railcar",
        "railway_car",
        "railroad_car",
        "gondola",
        "elevator_car",
        "cable_car",
    ]
    assert english_synonyms().of("car") == tuple(sorted(word.replace("_", " ") for word in expected))
    # No synonym of its own in WordNet, and no word.
    assert english_synonyms().of("xyzzy") == english_synonyms().of("\u732b") == english_synonyms().of("") == ()


def test_every_line_is_found():
    listed = [line.split(b"\t")[0].decode() for line in english_synonyms().lines.splitlines()]
    assert len(listed) == 50_405
    assert all(english_synonyms()._fields(word) for word in [*listed[::97], listed[0], listed[-1]])


SMALL = Synonyms(
    b"batch\tv:group\nbig\ta:large\nbox\tn:case\nfly\tn:housefly\tv:soar\nlie\tv:fib\nmen\tn=man\nmice\tn=mouse\nmouse\tn:rodent\n"
)


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("box", ("case",)),
        ("boxes", ("case",)),
        ("flies", ("housefly", "soar")),
        ("batched", ("group",)),
        ("bigger", ()),
        ("mice", ("rodent",)),
        ("men", ()),
        ("mousing", ()),
        ("zoo", ()),
        ("aa", ()),
    ],
)
def test_inflected_words_are_looked_up_by_their_base_forms(word, found):
    assert SMALL.of(word) == found


def test_a_damaged_list_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(synonyms, "SYNONYMS_FILE", tmp_path / "synonyms.txt.xz")
    (tmp_path / "synonyms.txt.xz").write_bytes(lzma.compress(b"a\tn:b\n" * 100)[:-20])
    english_synonyms.cache_clear()
    try:
        with pytest.raises(ValueError, match=r"synonyms.txt.xz can't be read .*python -m train.data.words.build"):
            english_synonyms()
    finally:
        english_synonyms.cache_clear()


LICENCE = "  1 This software and database is being provided to you  \n"
DATA = {
    "data.noun": LICENCE
    + "02084071 05 n 03 dog 0 domestic_dog 0 Canis_familiaris 0 001 @ 02083346 n 0000 | a member\n"
    + "02330245 05 n 01 mouse 0 001 @ 02329401 n 0000 | small rodent\n"
    + "03793489 06 n 02 mouse 0 computer_mouse 0 001 @ 03277771 n 0000 | a hand-operated device\n",
    "data.verb": LICENCE + "02001858 38 v 02 chase 0 dog 2 000 01 + 08 00 | go after\n",
    "data.adj": LICENCE + "00014358 00 s 02 abundant(ip) 0 galore(ip) 0 001 & 00013887 a 0000 | in great numbers\n",
    "data.adv": LICENCE + "00001740 02 r 01 a_cappella 0 000 | without\n",
}
EXCEPTIONS = {"noun.exc": "mice mouse\nabaci abacus\n", "verb.exc": "", "adj.exc": "", "adv.exc": ""}


def test_the_list_is_written_from_wordnet_s_files(tmp_path):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as database:
        for name, text in DATA.items():
            add(database, f"dict/{name}", text.encode())
    tarball = tmp_path / "package.tgz"
    with tarfile.open(tarball, "w:gz") as package:
        add(package, f"package/{build.DATABASE}", packed.getvalue())
        for name, text in EXCEPTIONS.items():
            add(package, f"package/data/{name}", text.encode())
    assert build.synonym_lines(dict(build.wordnet_files(tarball))) == [
        "abundant\ta:galore\n",
        "chase\tv:dog\n",
        "dog\tn:domestic dog\tv:chase\n",
        "galore\ta:abundant\n",
        "mice\tn=mouse\n",
        "mouse\tn:computer mouse\n",
    ]


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def test_the_function_words_are_nltks_number_of_lower_case_words():
    assert len(STOP_WORDS) == 179
    assert all(word == word.lower() and word.isascii() for word in STOP_WORDS)
    assert not {"dog", "red", "two", "left"} & STOP_WORDS
