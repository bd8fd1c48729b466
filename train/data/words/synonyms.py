"""Synonyms of English words, from the part of WordNet 3.0 that comes with the repository (synonyms.txt.xz, written by build.py).

The text stays one block of bytes that is searched in place: 2 MB, which worker processes share, where a dict of strings takes
fourteen times as much and every worker a copy of its own.
"""

import functools
import lzma
import re
from pathlib import Path

SYNONYMS_FILE = Path(__file__).parent / "synonyms.txt.xz"
# WordNet's rules of detachment (its manual page morphy): an inflected ending of a part of speech and what the base form has there.
ENDINGS = {
    "n": (
        ("s", ""),
        ("ses", "s"),
        ("xes", "x"),
        ("zes", "z"),
        ("ches", "ch"),
        ("shes", "sh"),
        ("men", "man"),
        ("ies", "y"),
    ),
    "v": (("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", "")),
    "a": (("er", ""), ("est", ""), ("er", "e"), ("est", "e")),
    "r": (),
}
WORD = re.compile(r"[a-z][a-z'-]*")


class Synonyms:
    """Looks words up in the lines of a synonym list, which are sorted by word:

    word TAB fields; a field is `n:dog,hound`, the synonyms of the word as a noun, or `n=mouse`, the base form of an irregular
    noun; v, a, r: verb, adjective, adverb.
    """

    def __init__(self, lines: bytes) -> None:
        self.lines = lines
        # Captions repeat their words; the limit keeps a long run from holding every word that it met.
        self.of = functools.lru_cache(maxsize=2**14)(self._of)

    def _of(self, word: str) -> tuple[str, ...]:
        """Every synonym of `word` in any of its senses, and of its base forms, in alphabetical order, without the word itself."""
        if not WORD.fullmatch(word):
            return ()
        fields = self._fields(word)
        found: set[str] = set()
        for kind, endings in ENDINGS.items():
            irregular = fields.get(kind + "=")
            found.update(fields.get(kind + ":", ()))
            bases = irregular or {word[: -len(end)] + base for end, base in endings if word.endswith(end)}
            for base in bases:
                found.update(self._fields(base).get(kind + ":", ()))
        return tuple(sorted(found - {word}))

    def _fields(self, word: str) -> dict[str, list[str]]:
        """The fields of a word's line: kind and sign ("n:") -> words. Empty for a word that has no line."""
        key, low, high = word.encode(), 0, len(self.lines)
        while low < high:
            start = self.lines.rfind(b"\n", low, (low + high) // 2) + 1 or low
            end = self.lines.find(b"\n", start)
            found, _, rest = self.lines[start:end].partition(b"\t")
            if found == key:
                return {field[:2]: field[2:].split(",") for field in rest.decode().split("\t")}
            low, high = (end + 1, high) if found < key else (low, start)
        return {}


@functools.cache
def english_synonyms() -> Synonyms:
    """The list that comes with the repository, read at the first call. Raises ValueError when the file is missing or damaged."""
    try:
        return Synonyms(lzma.decompress(SYNONYMS_FILE.read_bytes()))
    except (OSError, lzma.LZMAError) as error:
        raise ValueError(
            f"the synonym list {SYNONYMS_FILE} can't be read ({error}); restore it, or run `python -m train.data.words.build`"
        ) from error
