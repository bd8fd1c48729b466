"""Which picture shows which concept, and what its caption is."""

from pathlib import Path

import pytest

from tests.pocket_packages import write_fake_packages
from train.pocket.artists import (
    TEST_ARTIST,
    TRAINING_ARTISTS,
    VALIDATION_ARTIST,
    Artist,
    Drawing,
    read_drawings,
    slug,
    strip_variation_selector,
    svg_documents,
)
from train.pocket.concepts import Concept, read_concepts
from train.pocket.render import rasterise


@pytest.fixture(scope="module")
def tarballs(tmp_path_factory) -> dict[str, Path]:
    cache = tmp_path_factory.mktemp("cache")
    return {package.name: cache / package.tarball_name for package in write_fake_packages(cache)}


@pytest.fixture(scope="module")
def concepts(tarballs: dict[str, Path]) -> list[Concept]:
    return read_concepts(tarballs["emojibase-data"])


def drawings_of(artist: Artist, tarballs: dict[str, Path], concepts: list[Concept]) -> dict[str, Drawing]:
    drawings = read_drawings(artist, "npm:x@1", tarballs[artist.package], concepts)
    return {drawing.concept.hexcode: drawing for drawing in drawings}


def test_concepts_are_all_but_letters_and_components_with_skin_tones_after_their_base(concepts) -> None:
    labels = [concept.label for concept in concepts]
    assert labels[:3] == ["grinning face", "smiling face", "waving hand"]
    assert labels[3:5] == ["waving hand: light skin tone", "waving hand: dark skin tone"]
    assert len(labels) == 6 + 16
    assert [concept.base_label for concept in concepts[2:5]] == ["waving hand"] * 3
    assert [concept.has_skin_tone for concept in concepts[1:5]] == [False, False, True, True]


def test_captions_are_label_tags_subgroup_group_each_phrase_once(concepts) -> None:
    captions = {concept.label: concept.caption for concept in concepts}
    assert captions["grinning face"] == "grinning face; cheerful; happy; face smiling; smileys & emotion"
    assert captions["cat"] == "cat; pet; animal mammal; animals & nature"
    expected = "waving hand: dark skin tone; bye; hand fingers open; people & body"
    assert captions["waving hand: dark skin tone"] == expected


def test_slugs_are_those_of_the_icon_sets() -> None:
    # Icon names read from the published sets.
    assert slug("A button (blood type)") == "a-button-blood-type"
    assert slug("flag: C\u00f4te d\u2019Ivoire") == "flag-cote-divoire"
    assert slug("flag: Antigua & Barbuda") == "flag-antigua-and-barbuda"
    assert slug("waving hand: light skin tone") == "waving-hand-light-skin-tone"
    assert slug("mother Christmas: Mrs. Claus") == "mother-christmas-mrs-claus"
    assert strip_variation_selector("1F441-FE0F-200D-1F5E8-FE0F") == "1f441-200d-1f5e8"


@pytest.mark.parametrize("artist", [*TRAINING_ARTISTS, TEST_ARTIST, VALIDATION_ARTIST], ids=lambda artist: artist.name)
def test_every_artist_is_matched_by_code_points_or_slug(artist, tarballs, concepts) -> None:
    drawings = drawings_of(artist, tarballs, concepts)
    assert drawings["263A-FE0F"].concept.label == "smiling face"
    assert drawings["263A-FE0F"].source
    assert drawings["1F44B-1F3FB"].concept.base_label == "waving hand"
    # No set draws the dark tone, and a missing tone is not reported.
    assert "1F44B-1F3FF" not in drawings
    assert ("1F1E8-1F1EE" in drawings) == (artist.name not in ("fluent-3d", "fxemoji"))


def test_a_base_concept_that_an_artist_lacks_is_kept_as_missing_when_code_points_say_so(tarballs, concepts) -> None:
    unknown = Concept("1FAE0", "melting face", "melting face", (), "smileys & emotion", "face smiling")
    assert drawings_of(TEST_ARTIST, tarballs, [*concepts, unknown])["1FAE0"].source is None
    assert "1FAE0" not in drawings_of(VALIDATION_ARTIST, tarballs, [*concepts, unknown])


def test_a_package_without_any_known_concept_is_an_error(tarballs) -> None:
    unknown = Concept("1FAE0", "melting face", "melting face", (), "smileys & emotion", "face smiling")
    with pytest.raises(ValueError, match="no drawing of a known concept"):
        drawings_of(TEST_ARTIST, tarballs, [unknown])


def test_an_alias_is_its_parents_drawing_and_may_be_mirrored() -> None:
    left_half_black = {"body": '<path d="M0 0h4v8h-4z"/>'}
    icon_set = {
        "prefix": "x",
        "width": 8,
        "height": 8,
        "icons": {"left": left_half_black},
        "aliases": {"same": {"parent": "left"}, "right": {"parent": "left", "hFlip": True}},
    }
    pictures = {name: rasterise(document, 8)[0] for name, document in svg_documents(icon_set)}
    assert pictures["left"].tobytes() == pictures["same"].tobytes()
    corners = {name: (picture.getpixel((1, 4)), picture.getpixel((6, 4))) for name, picture in pictures.items()}
    black, white = (0, 0, 0), (255, 255, 255)
    assert corners["left"] == (black, white)
    assert corners["right"] == (white, black)


def test_an_alias_with_an_unknown_change_is_an_error() -> None:
    icon_set = {"prefix": "x", "icons": {"a": {"body": ""}}, "aliases": {"b": {"parent": "a", "rotate": 1}}}
    with pytest.raises(ValueError, match="rotate"):
        dict(svg_documents(icon_set))
