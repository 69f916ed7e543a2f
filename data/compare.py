"""What a result is held against: untrained baselines, controls, other seeds; and the table of it.

baselines    the encoders that a causal model is without training
CONTROLS     what SimCSE makes of a model that MNTP did not train, or that looks back only
over_seeds   scores of several seeds as their mean and range
table        rows of scores in Markdown
"""

from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

from llm2vec import LLM2Vec, pad, pool
from llm2vec_data.checkpoints import find_checkpoint, load_tokenizer

# --- Without training --------------------------------------------------------------------------


class Echo(LLM2Vec):
    """Each text twice, pooled over the second copy: a causal model has then read all of it.

    Springer et al. 2024, arXiv 2402.15449.
    """

    def embed(self, rows: Sequence[tuple[list[int], list[bool]]]) -> Tensor:
        twice = []
        for ids, own in rows:
            again = ids[own.index(True) :]
            twice.append((ids + again, [False] * len(ids) + [True] * len(again)))
        return super().embed(twice)


class InputEmbeddings(LLM2Vec):
    """The mean of the tokens' input embeddings: what is known without reading."""

    def embed(self, rows: Sequence[tuple[list[int], list[bool]]]) -> Tensor:
        ids, own = (pad(side, self.decoder.device) for side in zip(*rows, strict=True))
        return pool(self.decoder.embed_tokens(ids), "mean", own)


def baselines(model: LLM2Vec) -> Iterator[tuple[str, LLM2Vec]]:
    """The encoders that a causal model is without training, by name."""
    for name, kind, pooling in (
        ("input embeddings", InputEmbeddings, "mean"),
        ("causal, mean", LLM2Vec, "mean"),
        ("causal, weighted mean", LLM2Vec, "weighted_mean"),
        ("causal, last token", LLM2Vec, "last"),
        ("causal, echo", Echo, "mean"),
    ):
        yield name, kind(model.decoder, model.tokenizer, pooling, model.max_length)
    for template in ("one-word", "one-word-example"):
        try:
            tokenizer = load_tokenizer(find_checkpoint(model.made_of[0]), template)
        except ValueError:  # it has a template already, or no token to start with
            continue
        yield f"causal, {template}", LLM2Vec(model.decoder, tokenizer, "last", model.max_length)


# --- Controls and seeds ------------------------------------------------------------------------

CONTROLS = [  # name, run folder, is_causal, pooling
    ("simcse alone", "simcse-alone", False, "mean"),
    ("causal + simcse", "simcse-causal", True, "mean"),
    ("causal + simcse, weighted mean", "simcse-causal-weighted", True, "weighted_mean"),
]


def over_seeds(rows: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Scores of one seed as they are; of several their mean, and the range in two more rows."""
    kinds = {"": np.mean, ", lowest": np.min, ", highest": np.max}
    return {
        name + kind: {key: float(of([run[key] for run in runs])) for key in runs[0]}
        for name, runs in rows.items()
        for kind, of in kinds.items()
        if len(runs) > 1 or not kind
    }


def table(rows: dict[str, dict[str, float]]) -> str:
    """Rows of scores as a Markdown table, which is as readable in a terminal."""
    columns = list(dict.fromkeys(key for scores in rows.values() for key in scores))
    columns.sort(key="seconds".__eq__)  # last
    widths = [max(map(len, rows)), *(max(6, len(column)) for column in columns)]
    lines = [["", *columns], ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]]
    for name, scores in rows.items():
        digits = {column: 0 if column == "seconds" else 3 for column in columns}
        cells = (f"{scores[c]:.{digits[c]}f}" if c in scores else "" for c in columns)
        lines.append([name.ljust(widths[0]), *cells])
    cells = ([f"{cell:>{w}}" for cell, w in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
