"""Comparisons of a result: untrained baselines, controls, other seeds; and a table of them.

baselines    encoders made from a causal model without training
CONTROLS     SimCSE on a model without MNTP, or with causal attention
over_seeds   scores of several seeds as their mean and range
table        rows of scores in Markdown
describe     a command and its settings; add_results and read_results: the file of results

A row has the same name in code, in results files and in print. A results file holds the scores of
one command or more, all on the same weights:

    {"runs": [{
        "command": "python train.py --seeds 0 1", "date": "2026-01-31",
        "processor": "AMD EPYC", "threads": 2, "torch": "2.11.0", "dtype": "float32",
        "code": "0f3a...",  # the fingerprint of CODE
        "weights": {"model.safetensors": "5af5..."},  # SHA-256 of the base model's files
        "settings": {"mntp": {"length": 64, ...}},  # settings.json, by the run folder's name
        "rows": {"causal, mean": [{"stsb-test": 0.25}],  # the scores of each seed
                 "+ mntp": [{"seed": 0, "stsb-test": 0.45}, {"seed": 1, "stsb-test": 0.46}]}
    }]}
"""

import datetime
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import llm2vec
from llm2vec import LLM2Vec, pad, pool
from llm2vec_data.checkpoints import find_checkpoint, load_tokenizer, weight_files
from llm2vec_data.disk import read_json, reading, sha256_of, write_json
from llm2vec_data.processes import processor
from llm2vec_data.runs import code_of, digest

CODE = [Path(llm2vec.__file__).with_name(f"{name}.py") for name in ("llm2vec", "lora", "train")]
Rows = dict[str, list[dict[str, float]]]  # by name: the scores of each seed

# --- Without training --------------------------------------------------------------------------


class Echo(LLM2Vec):
    """Each text twice, pooled over the second copy: a causal model has then read all of it.

    Springer et al. 2024, arXiv 2402.15449.
    """

    def embed(self, rows: Sequence[tuple[list[int], list[bool]]]) -> Tensor:
        twice = []
        for ids, pooled in rows:
            again = ids[pooled.index(True) :]
            twice.append((ids + again, [False] * len(ids) + [True] * len(again)))
        return super().embed(twice)


class InputEmbeddings(LLM2Vec):
    """The mean of the tokens' input embeddings, before any layer."""

    def embed(self, rows: Sequence[tuple[list[int], list[bool]]]) -> Tensor:
        ids, pooled = (pad(side, self.decoder.device) for side in zip(*rows, strict=True))
        return pool(self.decoder.embed_tokens(ids), "mean", pooled)


POOLED = {"mean": "mean", "weighted_mean": "weighted mean", "last": "last token"}
POOLED |= {"first": "first token"}  # in the names of rows
UNTRAINED = "both ways, untrained"


def causal_row(model: LLM2Vec) -> str:
    """The name of the row of a causal model without training, such as "causal, mean"."""
    return f"causal, {POOLED[model.pooling]}"


def baselines(model: LLM2Vec) -> Iterator[tuple[str, LLM2Vec]]:
    """Encoders made from a causal model without training, by name."""
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

CONTROLS = [  # name, is_causal, pooling
    ("simcse without mntp", False, "mean"),
    ("simcse on the causal model", True, "mean"),
    ("simcse on the causal model, weighted mean", True, "weighted_mean"),
]


def folder_name(row: str) -> str:
    """The name of the run folder of a control, such as "simcse-without-mntp"."""
    return row.replace(",", "").replace(" ", "-")


def scores_of(seeds: list[dict[str, float]]) -> list[str]:
    """The names of the scores that every seed of a row has."""
    return [key for key in seeds[0] if key != "seed" and all(key in one for one in seeds)]


def spread(seeds: list[dict[str, float]], score: str) -> tuple[float, float, float]:
    """Mean, lowest and highest of a score over the seeds of a row."""
    values = [float(one[score]) for one in seeds]
    return float(np.mean(values)), min(values), max(values)


def row_of(files: dict[str, Rows], name: str) -> list[dict[str, float]]:
    """The scores of each seed of a row: "FILE | ROW", or the first row of that name."""
    file, _, row = name.rpartition(" | ")
    found = [rows[row] for key, rows in files.items() if file in ("", key) and row in rows]
    if not found:
        names = ", ".join(f"{row!r}" for rows in files.values() for row in rows)
        raise ValueError(f"{', '.join(files)}: no row {name!r}; there are {names}")
    return found[0]


def over_seeds(rows: Rows) -> dict[str, dict[str, float]]:
    """The scores of one seed; for several seeds the mean, and the range in two more rows."""
    return {
        name + kind: {score: spread(seeds, score)[i] for score in scores_of(seeds)}
        for name, seeds in rows.items()
        for i, kind in enumerate(("", ", lowest", ", highest"))
        if len(seeds) > 1 or not kind
    }


def table(rows: dict[str, dict[str, float]]) -> str:
    """Rows of scores as a Markdown table that is also readable in a terminal."""
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


# --- Results files -----------------------------------------------------------------------------


def describe(program: str, model: LLM2Vec) -> dict:
    """Describe the command that is measuring: one of the `runs` in a results file, without rows.

    program: such as "python train.py"; the flags of the command are added.
    """
    files = weight_files(find_checkpoint(model.made_of[0]))
    return {
        "command": " ".join([program, shlex.join(sys.argv[1:])]).strip(),
        "date": datetime.date.today().isoformat(),
        "processor": processor(model.decoder.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(next(model.decoder.parameters()).dtype).removeprefix("torch."),
        "code": digest(map(code_of, CODE)),
        "weights": {file.name: sha256_of(file) for file in files},
        "settings": {},
        "rows": {},
    }


def settings_in(folder: str | Path) -> dict:
    """The settings of a run folder; empty for another folder, or a name on the hub."""
    file = Path(folder) / "settings.json"
    return read_json(file) if file.exists() else {}


def read_runs(file: str | Path) -> list[dict]:
    """The `runs` of a results file. Raises ValueError for any other file."""
    content = read_json(Path(file))
    with reading(file, "; it is no results file of train.py or data.benchmarks"):
        runs = [dict(run) for run in content["runs"]]
        for run in runs:
            _ = run["command"], run["weights"], run["rows"].values()
    return runs


def read_results(file: str | Path) -> Rows:
    """The rows of all `runs` of a results file, in the order of measurement."""
    rows = {}
    for name, scores in (row for run in read_runs(file) for row in run["rows"].items()):
        rows.setdefault(name, []).extend(scores)
    return rows


def check_weights(file: str | Path, run: dict) -> list[dict]:
    """The `runs` of a results file; none if the file does not exist.

    Raises ValueError if they were measured on other weights than `run`.
    """
    runs = read_runs(file) if Path(file).exists() else []
    others = [old["command"] for old in runs if old["weights"] != run["weights"]]
    if others:
        message = f"has the scores of other weights, from `{others[0]}`"
        raise ValueError(f"{file}: {message}; choose another --output")
    return runs


def add_results(file: str | Path, run: dict) -> None:
    """Add `run` to a results file, or start one. Its rows replace rows of the same name and seed.

    A row without a seed replaces all rows of its name. Raises ValueError as `check_weights` does.
    """
    runs = check_weights(file, run)
    for old in runs:
        for name, scores in run["rows"].items():
            seeds = [one.get("seed") for one in scores]
            before = old["rows"].pop(name, [])
            left = [one for one in before if one.get("seed", seeds[0]) not in seeds]
            old["rows"] |= {name: left} if left and None not in seeds else {}
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    write_json(Path(file), {"runs": [old for old in runs if old["rows"]] + [run]})
