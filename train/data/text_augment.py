"""Augmentation of captions: which of several, cleaning, dropping function words, and one of EDA's changes (Wei and Zou 2019, as
CLIP-rocket takes it: one change a caption).

A word is what stands between white space; the punctuation around it stays with it. A caption that had a word never loses the last
one. Every draw comes from the seed that the caller names.
"""

import html
import random
import re

import ftfy

from train.config import AugmentConfig
from train.data.words.stop_words import STOP_WORDS
from train.data.words.synonyms import english_synonyms

# What stands before the letters of a word, they themselves, and what follows: '("Cats!' -> '("', 'Cats', '!'.
PARTS = re.compile(r"(\W*)(.*?)(\W*)", re.DOTALL)


def captions_of(text: str) -> list[str]:
    """The captions of a sample that has several: its lines, without blank ones; the text itself when all are."""
    return [line.strip() for line in text.splitlines() if line.strip()] or [text]


def clean_caption(text: str) -> str:
    """What CLIP's tokenizer does to a text before anything else: encodings mended, HTML entities resolved (also twice escaped ones),
    white space collapsed, lower case."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()


def augment_text(text: str, config: AugmentConfig, seed: int) -> str:
    """Drop the function words with `stop_words_prob`, then make one change that the weights of the config decide."""
    if not config.stop_words_prob and not any(config.edit_weights):
        return text
    rng = random.Random(seed)
    if rng.random() < config.stop_words_prob:
        text = remove_stop_words(text)
    if not any(config.edit_weights):
        return text
    change = rng.choices(("synonym", "swap", "delete", "identity"), config.edit_weights)[0]
    if change == "synonym":
        return replace_by_synonym(text, rng)
    if change == "swap":
        return swap_words(text, rng)
    if change == "delete":
        return delete_words(text, config.delete_word_prob, rng)
    return text


def remove_stop_words(text: str) -> str:
    """The text without function words; as it is when there is nothing else in it."""
    return " ".join(word for word in text.split() if not is_stop_word(word)) or text


def is_stop_word(word: str) -> bool:
    return letters_of(word) in STOP_WORDS


def letters_of(word: str) -> str:
    """The word as the lists have it: lower case, straight apostrophes, without the punctuation around it."""
    return PARTS.fullmatch(word)[2].lower().replace("\u2019", "'")


def replace_by_synonym(text: str, rng: random.Random) -> str:
    """One word, drawn among the different words that have a synonym and are no function words, becomes one of its synonyms wherever
    it stands; the text as it is when there is none."""
    words = text.split()
    candidates = list(dict.fromkeys(letters_of(word) for word in words if not is_stop_word(word)))
    rng.shuffle(candidates)
    for candidate in candidates:
        if synonyms := english_synonyms().of(candidate):
            synonym = rng.choice(synonyms)
            return " ".join(put_in(word, synonym) if letters_of(word) == candidate else word for word in words)
    return text


def put_in(word: str, synonym: str) -> str:
    """The synonym between the word's own punctuation."""
    before, _, after = PARTS.fullmatch(word).groups()
    return before + synonym + after


def swap_words(text: str, rng: random.Random) -> str:
    """Two words at different places, drawn uniformly, change places."""
    words = text.split()
    if len(words) < 2:
        return text
    first, second = rng.sample(range(len(words)), 2)
    words[first], words[second] = words[second], words[first]
    return " ".join(words)


def delete_words(text: str, probability: float, rng: random.Random) -> str:
    """Every word is dropped with the probability; of a text that would lose all of them, one that is drawn stays."""
    words = text.split()
    if len(words) < 2:
        return text
    kept = [word for word in words if rng.random() >= probability]
    return " ".join(kept or [rng.choice(words)])
