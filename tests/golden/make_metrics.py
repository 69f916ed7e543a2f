# /// script
# requires-python = ">=3.10"
# dependencies = ["scipy", "scikit-learn", "seqeval", "numpy"]
# ///
"""Make metrics.json beside this script: random inputs, and what the reference libraries score.

    uv run tests/golden/make_metrics.py        (or: python, with the packages above)

Ties, constants, single classes and labels that break BIO's rules are among them. A score that is
not a number is null.
"""

import json
import math
import random
import warnings
from itertools import product
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr
from seqeval.metrics import f1_score
from sklearn.metrics import ndcg_score

warnings.filterwarnings("ignore")
rng = np.random.default_rng(0)
random.seed(0)


CASES: dict[str, list] = {"spearman": [], "ndcg": [], "entity_f1": []}


def add(measure: str, score: float, **given) -> None:
    CASES[measure].append(given | {"score": None if math.isnan(score) else float(score)})


sides = [(rng.normal(size=n), rng.normal(size=n)) for n in (2, 3, 10, 60)]
sides += [(rng.integers(0, k, 30), rng.integers(0, k, 30)) for k in (2, 3, 8)]  # ties
sides += [(np.arange(9), np.arange(9)[::-1]), (np.ones(5), np.arange(5)), (np.ones(4), np.ones(4))]
sides += [(np.r_[1e300, -1e300, 0, 1], np.r_[1, 2, 3, 4])]
for a, b in sides:
    a, b = (np.round(side, 3).tolist() for side in (a, b))
    add("spearman", spearmanr(a, b).statistic, a=a, b=b)

shapes = (1, 2, 1), (1, 5, 10), (4, 12, 10), (6, 30, 10), (3, 9, 3)
for (queries, candidates, k), ties, graded in product(shapes, (False, True), (False, True)):
    relevance = rng.integers(0, 4 if graded else 2, (queries, candidates))
    scores = rng.normal(size=(queries, candidates)).round(0 if ties else 3)
    if queries > 3:
        relevance[:2] = [[0], [1]]  # nothing to find; nothing but right
        scores[2] = 0.5  # all alike
    given = {"relevance": relevance.tolist(), "scores": scores.tolist(), "k": k}
    add("ndcg", ndcg_score(relevance, scores, k=k), **given)


def labels(n: int) -> list[str]:
    """Any order of marks: I- after O, I- of another type, B- after B-."""
    marks = [f"{m}-{kind}" for m in "BI" for kind in ("PER", "LOC", "creative-work")]
    return random.choices(marks + ["O", "O", "O"], k=n)


def changed(said: list[str], share: float) -> list[str]:
    return [random.choice(labels(1)) if random.random() < share else label for label in said]


pairs = []
for share, sentences in product((0.0, 0.1, 0.3, 1.0), (1, 5, 20)):
    gold = [labels(random.randint(1, 12)) for _ in range(sentences)]
    pairs.append((gold, [changed(said, share) for said in gold]))
pairs += [([["O", "O"]], [["O", "O"]]), ([["B-PER", "O"]], [["O", "O"]])]
pairs += [([["O", "O"]], [["B-PER", "I-PER"]]), ([["I-PER"], ["I-PER"]], [["I-PER"], ["B-PER"]])]
pairs += [([["B-PER", "I-PER", "I-LOC"]], [["B-PER", "I-PER", "B-LOC"]])]
pairs += [([["B-PER", "B-PER"]], [["B-PER", "I-PER"]])]
for gold, guess in pairs:
    add("entity_f1", f1_score(gold, guess, zero_division=0), gold=gold, guess=guess)

file = Path(__file__).parent / "metrics.json"
file.write_text(json.dumps(CASES, separators=(",", ":")) + "\n")
