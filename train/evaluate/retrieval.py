"""Retrieval in both directions, with several captions per picture and several pictures per caption.

Captions are compared by their words: equal ones (Unicode, case and spacing aside) are one candidate and one query, and
every picture that has the caption is right for it. Legend: N pictures, M distinct captions.
"""

import unicodedata
from typing import Any

import numpy as np
import torch
from torch import Tensor

from train.evaluate.features import EncodedSet, Encoder, encode_texts
from train.evaluate.ranking import Measurement, hit_rate, ranks_in_blocks
from train.evaluate.strong_views import by_weight, interpolated, strong_texts
from train.evaluate.suite import Retrieval

RECALL_AT = (1, 5, 10)


def measure(encoder: Encoder, task: Retrieval, encoded: EncodedSet) -> dict[str, Measurement]:
    """image_to_text_r1/r5/r10 over pictures and text_to_image_r1/r5/r10 over distinct captions.

    Raises ValueError naming the sample when the caption field is missing, empty, or not a string or list of strings.
    """
    captions, pairs_X2 = captions_and_pairs(task, encoded)
    caption_MD = encode_texts(encoder, captions, title=f"captions of {task.name}")
    return recalls(encoded.image_ND, caption_MD, pairs_X2)


def measure_interpolated(encoder: Encoder, task: Retrieval, encoded: EncodedSet) -> dict[str, Any]:
    """The same with weak and strong similarities mixed, by their weights (strong_views.py)."""
    captions, pairs_X2 = captions_and_pairs(task, encoded)
    weak_MD, strong_ME = (
        encode_texts(each, captions, title=f"captions of {task.name}") for each in (encoder, strong_texts(encoder))
    )
    mixed = zip(interpolated(encoded.image_ND, encoded.strong_NE), interpolated(weak_MD, strong_ME), strict=True)
    return by_weight(recalls(images, captions, pairs_X2) for images, captions in mixed)


def captions_and_pairs(task: Retrieval, encoded: EncodedSet) -> tuple[list[str], Tensor]:
    """The distinct captions, and the (picture, caption) numbers that belong together."""
    captions: list[str] = []
    position: dict[str, int] = {}
    pairs: list[tuple[int, int]] = []
    for row, value in enumerate(encoded.values(task.caption_key)):
        found = captions_of(value, task.split_lines)
        if not found:
            where = f"{encoded.shards[row]}: sample {encoded.keys[row]}"
            raise ValueError(f"{where} has no caption in {task.caption_key!r}; it must be a text or a list of texts")
        for caption in found:
            index = position.setdefault(normalised(caption), len(captions))
            if index == len(captions):
                captions.append(caption)
            pairs.append((row, index))
    return captions, torch.tensor(sorted(set(pairs)))


def captions_of(value: Any, split_lines: bool) -> list[str]:
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str) for item in values):
        return []
    if split_lines:
        values = [line for item in values for line in item.splitlines()]
    return [item.strip() for item in values if item.strip()]


def normalised(caption: str) -> str:
    return " ".join(unicodedata.normalize("NFC", caption).casefold().split())


def recalls(image_ND: Tensor, caption_MD: Tensor, pairs_X2: Tensor) -> dict[str, Measurement]:
    """Recall at 1, 5 and 10 in both directions.

    `pairs_X2`: int64 [X, 2], the distinct (picture, caption) numbers that belong together; every picture and every
    caption must occur.
    """
    results = {}
    directions = (
        ("image_to_text", image_ND, caption_MD, pairs_X2, "image"),
        ("text_to_image", caption_MD, image_ND, pairs_X2.flip(1), "caption"),
    )
    for direction, query, candidate, pairs, unit in directions:
        ranks = ranks_in_blocks(query, candidate, right_mask(pairs, len(query), len(candidate)))
        num_right = np.bincount(pairs[:, 0].numpy(), minlength=len(query))
        for k in RECALL_AT:
            if k < len(candidate):
                results[f"{direction}_r{k}"] = hit_rate(
                    ranks, k, num_candidates=len(candidate), num_right=num_right, unit=unit
                )
    return results


def right_mask(pairs_X2: Tensor, num_queries: int, num_candidates: int):
    """A function from a range of queries to their mask of right candidates, built from the sorted pair list."""
    query_X, candidate_X = pairs_X2[torch.argsort(pairs_X2[:, 0], stable=True)].T.contiguous()
    first_Q = torch.searchsorted(query_X, torch.arange(num_queries + 1))

    def right_of(start: int, stop: int) -> Tensor:
        chosen = slice(int(first_Q[start]), int(first_Q[stop]))
        mask = torch.zeros(stop - start, num_candidates, dtype=torch.bool)
        mask[query_X[chosen] - start, candidate_X[chosen]] = True
        return mask

    return right_of
