"""The measures for scores: plain functions of numbers and labels.

tests/golden/metrics.json holds the results of the libraries that the docstrings name.
"""

from collections.abc import Sequence

import numpy as np


def ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks from 1; equal values share the mean of their ranks."""
    _, index, count = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[index]


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Pearson's correlation of the ranks; NaN if a side is constant or has a NaN. As scipy's."""
    x, y = (side - side.mean() for side in (ranks(a), ranks(b)))
    norm = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / norm) if norm and not np.isnan([a, b]).any() else float("nan")


def ndcg(relevance: np.ndarray, scores: np.ndarray, k: int = 10) -> float:
    """Normalised discounted cumulative gain of the first k, averaged over queries. As sklearn's.

    relevance and scores: (queries, candidates). A candidate at rank r adds its relevance divided by
    log2(1 + r); equal scores share the mean discount of their ranks. A query without a relevant
    candidate counts 0.
    """
    discount = 1 / np.log2(np.arange(scores.shape[1]) + 2)
    discount[k:] = 0
    total = np.concatenate([[0.0], np.cumsum(discount)])
    found = []
    for gain, score in zip(relevance.astype(np.float64), scores, strict=True):
        _, index, count = np.unique(-score, return_inverse=True, return_counts=True)
        end = np.cumsum(count)
        shared = (total[end] - total[end - count]) / count
        best = np.sort(gain)[::-1] @ discount
        found.append(gain @ shared[index] / best if best > 0 else 0.0)
    return float(np.mean(found))


def recall(relevance: np.ndarray, scores: np.ndarray, k: int) -> float:
    """Share of queries with the relevant candidate among the k best; ties count against it.

    relevance: (queries, candidates) booleans, one True a row; scores of the same shape.
    """
    relevant = scores[relevance][:, None]
    return float(((scores >= relevant).sum(1) <= k).mean())


def entities(labels: Sequence[str]) -> set[tuple[int, int, str]]:
    """The spans (first, end, type) of a sentence's BIO labels, as CoNLL-2000 reads them.

    `end` is the index after the last word. B- starts an entity, and so does an I- that continues
    no entity of its type.
    """
    found, start, kind = set(), 0, None
    for i, label in enumerate([*labels, "O"]):
        mark, _, name = label.partition("-")
        if mark != "I" or name != kind:
            if kind is not None:
                found.add((start, i, kind))
            start, kind = i, name if mark in ("B", "I") else None
    return found


def entity_f1(gold: Sequence[Sequence[str]], guess: Sequence[Sequence[str]]) -> float:
    """F1 of entities, exact in span and type (CoNLL-2003); 0 without any. As seqeval's f1_score."""
    true, guessed = (
        {(i, *span) for i, labels in enumerate(side) for span in entities(labels)}
        for side in (gold, guess)
    )
    return 2 * len(true & guessed) / max(1, len(true) + len(guessed))
