"""Made-up embeddings and the definition of a hard pair as a double loop, for the tests of mining."""

from pathlib import Path

import numpy as np

from mining import EmbeddingStore
from mining.problem import SearchLimits


def unit(rows_ND: np.ndarray) -> np.ndarray:
    return rows_ND / np.linalg.norm(rows_ND, axis=1, keepdims=True)


def random_rows(num_pairs: int, width: int, seed: int, *, offset: float = 0.0) -> np.ndarray:
    """Unit rows [N, width]; `offset` > 0 makes a cone of positive cosines, as CLIP's are."""
    return unit(np.random.default_rng(seed).standard_normal((num_pairs, width)) + offset)


def lattice_rows(num_pairs: int, seed: int) -> np.ndarray:
    """Rows of four entries +-1/2: cosines are multiples of 1/2 without rounding, so that nearly all scores tie."""
    return np.random.default_rng(seed).choice([-0.5, 0.5], (num_pairs, 4))


def random_store(
    path: Path, num_pairs: int, *, image_dim: int = 24, text_dim: int = 16, seed: int = 0
) -> EmbeddingStore:
    """A store with groups of equal captions and equal images, alignment, and different widths."""
    rng = np.random.default_rng(seed)
    return EmbeddingStore.write(
        path,
        random_rows(num_pairs, image_dim, seed, offset=0.2),
        random_rows(num_pairs, text_dim, seed + 1, offset=0.1),
        alignment_N=rng.random(num_pairs),
        image_group_N=rng.integers(0, 3 * num_pairs, num_pairs),
        caption_group_N=rng.integers(0, max(1, num_pairs // 3), num_pairs),
        encoder="made up",
        store_fingerprint="store",
    )


def hard_pairs_by_definition(store: EmbeddingStore, limits: SearchLimits) -> tuple[list[list[int]], list[int]]:
    """Ids and number of excluded pairs of every row: a Python double loop over float64 dot products."""
    image, text = np.asarray(store.image_ND, np.float64), np.asarray(store.text_ND, np.float64)
    ids, counts = [], []
    for i in range(len(store)):
        scores, excluded = [], 0
        for j in range(len(store)):
            if i == j or not store.valid_N[i] or not store.valid_N[j]:
                continue
            a, b = float(image[i] @ image[j]), float(text[i] @ text[j])
            same = any(
                group is not None and group[i] == group[j] for group in (store.image_group_N, store.caption_group_N)
            )
            near_image = limits.image_ceiling < 1 and a > limits.image_ceiling
            near_text = limits.text_ceiling < 1 and b > limits.text_ceiling
            if same or near_image or near_text:
                excluded += 1
            elif max(a, 0.0) * max(b, 0.0) > limits.floor:
                scores.append((-max(a, 0.0) * max(b, 0.0), j))
        row = [j for _, j in sorted(scores)[: limits.k]]
        ids.append(row + [-1] * (limits.k - len(row)))
        counts.append(excluded)
    return ids, counts


def array_bytes(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(Path(path).glob("*.npy"))}
