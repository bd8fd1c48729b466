"""Captions: what is dropped, replaced and drawn, with the probabilities that were asked for, and never nothing at all."""

import random
from collections import Counter

import numpy as np
import pytest

from train.config import STRONG_AUGMENT, AugmentConfig, DataConfig
from train.data.pair_views import PairViews
from train.data.text_augment import (
    augment_text,
    captions_of,
    clean_caption,
    delete_words,
    remove_stop_words,
    replace_by_synonym,
    swap_words,
)
from train.views import Views

AWKWARD = (
    "",
    " ",
    "\n\t ",
    "the",
    "of the and",
    "dog",
    "!!!",
    "\u2014",
    "\U0001f600 \U0001f600",
    "\u732b\u306e\u5199\u771f",
    "' - '' --",
    "a\u0301 \u00bd x\u00b2",
    "\ud7ff\u00a0\u200b",
)


def within(count: int, num: int, probability: float) -> bool:
    """Whether a count is within four standard deviations of a binomial's mean."""
    return abs(count - num * probability) <= 4 * np.sqrt(num * probability * (1 - probability)) + 1e-9


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("A photo of the dog, and it's running.", "photo dog, running."),
        ("Not (the) \u201cWHO\u201d but bands", "bands"),
        ("I don\u2019t know", "know"),
        ("cats", "cats"),
        ("of the  and", "of the  and"),
        ("", ""),
        (" \n", " \n"),
    ],
)
def test_function_words_go_and_nothing_else_unless_nothing_else_is_there(text, left):
    assert remove_stop_words(text) == left


def test_function_words_go_with_the_probability_that_was_asked_for():
    config = AugmentConfig(stop_words_prob=0.8)
    texts = Counter(augment_text("the dog", config, seed) for seed in range(2000))
    assert set(texts) == {"the dog", "dog"}
    assert within(texts["dog"], 2000, 0.8)


def test_each_caption_is_changed_in_one_way_drawn_by_the_weights():
    # CLIP-rocket's weights, and an identity; a deletion that drops every word leaves one of the two.
    config = AugmentConfig(
        synonym_weight=2.0, swap_weight=2.0, delete_weight=1.0, identity_weight=5.0, delete_word_prob=1.0
    )
    texts = Counter(augment_text("automobile xyzzy", config, seed) for seed in range(3000))
    counts = {
        "swap": texts.pop("xyzzy automobile"),
        "delete": texts.pop("xyzzy") + texts.pop("automobile"),
        "identity": texts.pop("automobile xyzzy"),
        "synonym": sum(texts.values()),
    }
    # WordNet 3.0 has {car, auto, automobile, machine, motorcar}, and the verb automobile by itself.
    assert set(texts) == {f"{synonym} xyzzy" for synonym in ("car", "auto", "machine", "motorcar")}
    assert all(within(count, counts["synonym"], 0.25) for count in texts.values())
    for name, probability in {"synonym": 0.2, "swap": 0.2, "delete": 0.1, "identity": 0.5}.items():
        assert within(counts[name], 3000, probability), name


def test_a_synonym_stands_wherever_its_word_stood_in_its_punctuation():
    # "sofa" has the synonyms couch and lounge in WordNet 3.0; the other words have none or are function words.
    found = {replace_by_synonym('the "Sofa", a sofa... and sofas', random.Random(seed)) for seed in range(20)}
    couch, lounge = (f'the "{word}", a {word}... and sofas' for word in ("couch", "lounge"))
    plural = {f'the "Sofa", a sofa... and {word}' for word in ("couch", "lounge", "sofa")}
    assert {couch, lounge} < found <= {couch, lounge} | plural


def test_swaps_are_uniform_over_the_pairs_of_places():
    texts = Counter(swap_words("a b c", random.Random(seed)) for seed in range(3000))
    assert set(texts) == {"b a c", "c b a", "a c b"}
    assert all(within(count, 3000, 1 / 3) for count in texts.values())


def test_every_word_is_dropped_with_its_probability_and_one_stays():
    kept = Counter(delete_words("w x y z", 0.1, random.Random(seed)) for seed in range(3000))
    assert within(kept["w x y z"], 3000, 0.9**4)
    assert within(sum(count for text, count in kept.items() if "x" not in text), 3000, 0.1)
    last = Counter(delete_words("w x", 1.0, random.Random(seed)) for seed in range(1000))
    assert set(last) == {"w", "x"}
    assert within(last["w"], 1000, 0.5)


@pytest.mark.parametrize("change", ["synonym_weight", "swap_weight", "delete_weight", "identity_weight"])
def test_awkward_captions_never_raise_and_never_become_empty(change):
    config = AugmentConfig(stop_words_prob=1.0, delete_word_prob=1.0, **{change: 1.0})
    for text in AWKWARD:
        for seed in range(5):
            changed = augment_text(text, config, seed)
            assert bool(changed.strip()) == bool(text.strip()), (text, changed)


def test_captions_come_back_as_they_are_without_augmentation():
    for text in AWKWARD:
        assert augment_text(text, AugmentConfig(), 3) == text


def test_python_s_own_random_state_is_left_alone():
    before = random.getstate()
    assert augment_text("a small car on a road", STRONG_AUGMENT, 1)
    assert random.getstate() == before


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("Caf\u00c3\u00a9  &amp;amp;\n TEA", "caf\u00e9 & tea"),
        ("don&#39;t", "don't"),
        ("  ", ""),
    ],
)
def test_cleaning_is_that_of_clips_tokenizer(text, clean):
    from open_clip.tokenizer import _clean_lower

    assert clean_caption(text) == clean == _clean_lower(text)


def test_the_lines_of_a_text_are_its_captions():
    assert captions_of("A title\n\n  a description \r\n") == ["A title", "a description"]
    assert captions_of("one") == ["one"]
    assert captions_of(" \n ") == [" \n "]


def pair_views(sampling: str, num_texts: int = 2, strong: AugmentConfig | None = None, **data) -> PairViews:
    config = DataConfig(caption_sampling=sampling, **data)
    return PairViews(config, AugmentConfig(), strong or AugmentConfig(), Views(0, num_texts), (8, 8), 7)


def test_one_caption_is_drawn_for_all_views_or_one_for_each():
    whole, single, multi = (
        [tuple(pair_views(sampling).texts("t\nd", step, 4)) for step in range(2000)]
        for sampling in ("whole", "single", "multi")
    )
    assert set(whole) == {("t\nd",) * 3}
    assert set(single) == {("t",) * 3, ("d",) * 3}
    assert within(single.count(("t",) * 3), 2000, 0.5)
    combinations = Counter(multi)
    assert len(combinations) == 8
    assert all(within(count, 2000, 1 / 8) for count in combinations.values())


def test_cleaning_comes_before_words_are_dropped():
    strong = AugmentConfig(stop_words_prob=1.0)
    # "&amp;" hides nothing from the list, "don&#39;t" would be no function word as it stands.
    weak, first, second = pair_views("whole", strong=strong, clean_captions=True).texts("Don&#39;t WALK", 0, 0)
    assert weak == "don't walk"
    assert first == second == "walk"


def test_views_of_a_caption_differ_and_a_seed_fixes_them():
    views = pair_views("whole", strong=STRONG_AUGMENT)
    drawn = [views.texts("a small car on the old road", step, 1) for step in range(40)]
    assert drawn == [views.texts("a small car on the old road", step, 1) for step in range(40)]
    assert all(weak == "a small car on the old road" for weak, _, _ in drawn)
    assert sum(first != second for _, first, second in drawn) > 30
    assert len({first for _, first, _ in drawn}) > 20


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("stop_words_prob", 1.5, r"augment.stop_words_prob=1.5 is a probability"),
        ("gaussian_blur_prob", -0.1, r"augment.gaussian_blur_prob=-0.1 is a probability"),
        ("delete_weight", -1.0, r"augment.delete_weight=-1.0 is a weight"),
        ("scale", (0.5, 1.5), r"augment.scale=\(0.5, 1.5\) must be two shares"),
        ("gaussian_blur_sigma", (2.0, 0.1), r"augment.gaussian_blur_sigma=\(2.0, 0.1\) must be two positive"),
        ("color_jitter", (0.4, 0.4, 0.4, 0.6), r"the hue's \(the last\) at most 0.5"),
        ("size", -1, r"augment.size=-1 must be 0"),
    ],
)
def test_senseless_values_are_refused_by_name(field, value, message):
    with pytest.raises(ValueError, match=message):
        AugmentConfig(**{field: value}).check("augment")
