"""Pairs for supervised contrastive training: a query, a right answer, and wrong ones."""

import functools
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from llm2vec_data.disk import JSON, TABLES, kind_of, reading, records_of, value_of
from llm2vec_data.processes import RANK

PAIRS = Path(__file__).parent / "pairs" / "wikipedia.jsonl"

# The names of the fields of a pair: here, and in sentence-transformers, FlagEmbedding, Tevatron and
# SimCSE. A grade says whether the row is a right pair.
NAMES = {
    "query": "query|anchor|sent0|sentence1",
    "positive": "positive|pos|positive_passages|sent1|sentence2",
    "negatives": r"(hard_)?neg(ative)?s?(_passages)?(_?\d+)?",
    "instruction": "instruction|prompt",
    "answer_instruction": "answer_instruction",
    "grade": "labels?|scores?|similarity",
}


def read_pairs(
    paths: Sequence[str | Path], instructions: Sequence[str | None] = (None,)
) -> list[list[dict]]:
    """Datasets, one a file, of pairs: dicts with query, positive, negatives (a list), instruction.

    A file holds JSON lines or an array (.jsonl, .ndjson, .json), or a table with a header (.csv,
    .tsv), and may be compressed (.gz); of a folder, all such files are read. A row has `query`,
    `positive`, and optionally `negative` and `instruction`; positive and negative are a string or a
    list of strings. This is the layout of the public E5 data from the authors of Echo embeddings
    (Springer et al. 2024); NAMES has other names. Symmetric data (paraphrases, entailment) also has
    an `answer_instruction`, for positive and negatives. A pair without an instruction gets the one
    of its file: `instructions` has one for each path, or one for all.

    Each of several positives makes a pair, with all the negatives. A pair without text on either
    side is left out, and so is a blank negative. For each file, standard error says how many pairs,
    negatives and instructions it holds, how many were left out, and which fields are not read.
    Raises FileNotFoundError, or ValueError that names file and line.
    """
    if len(instructions) not in (1, len(paths)):
        message = f"{len(instructions)} instructions for {len(paths)} paths of pairs"
        raise ValueError(f"{message}: give one for each, or one for all")
    datasets, kinds = [], (*JSON, *TABLES)
    for i, path in enumerate(map(Path, paths)):
        files = [path]
        if path.is_dir():
            files = sorted(f for f in path.iterdir() if kind_of(f) in kinds)
        if not files:
            raise FileNotFoundError(f"{path}: no {', '.join(kinds)} file in it")
        datasets += [read_file(file, instructions[i % len(instructions)] or "") for file in files]
    return datasets


def read_file(file: Path, instruction: str) -> list[dict]:
    """The pairs of a file; a summary goes to standard error."""
    pairs, unread = [], {}
    left_out = {"pairs without a query or a positive": [], "blank negatives": []}
    blank_pairs, blank_negatives = left_out.values()
    for place, record in records_of(file):
        with reading(f"{file}, {place}"):
            row = fields_of(value_of(record), unread)
            positives, negatives = row.pop("positive"), row.pop("negatives", [])
            lists = [text for text in positives + negatives if text.startswith(("['", '["'))]
            if lists and kind_of(file) in TABLES:
                raise ValueError("a field looks like a list: write such pairs as JSON lines")
        blank_negatives += [place for text in negatives if not text.strip()]
        row["negatives"] = [text for text in negatives if text.strip()]
        row["instruction"] = row.get("instruction") or instruction
        for positive in positives or [""]:
            if row["query"].strip() and positive.strip():
                pairs.append(row | {"positive": positive})
            else:
                blank_pairs.append(place)
    number = sum(len(pair["negatives"]) for pair in pairs)
    instructed = sum(pair["instruction"] != "" for pair in pairs)
    summary = [f"{len(pairs)} pairs, {number} negatives, {instructed} with an instruction"]
    if unread:
        summary.append(f"fields that are not read: {', '.join(unread)}")
    for kind, places in left_out.items():
        if places:
            summary.append(f"left out {len(places)} {kind}, the first of them {places[0]}")
    if RANK == 0:
        print(*(f"{file}: {line}" for line in summary), sep="\n", file=sys.stderr)
    if len(pairs) < 2:
        raise ValueError(f"{file}: fewer than two pairs, nothing to contrast")
    return pairs


@functools.cache
def role_of(field: str) -> str | None:
    return next((role for role, names in NAMES.items() if re.fullmatch(names, field)), None)


def fields_of(row: object, unread: dict[str, None]) -> dict:
    """The fields of a row, by the keys of NAMES; the names of all others are added to `unread`."""
    if not isinstance(row, dict):
        raise ValueError("expected a JSON object with a query and a positive")
    found: dict = {}
    for field, value in row.items():
        role = role_of(field)
        if role is None:
            unread[field] = None
        elif role == "grade" and str(value).lower() not in ("none", "1", "1.0", "true"):
            advice = "leave such rows out, or give their text as the negative of a pair"
            raise ValueError(f"`{field}` is {value!r:.40}, but every row must be right: {advice}")
        elif role != "grade" and value is not None:
            if role in found and role != "negatives":
                raise ValueError(f"`{field}` is a second {role}: keep one of the two")
            if role in ("positive", "negatives"):
                values = value if isinstance(value, list) else [value]
                found[role] = found.get(role, []) + [text_of(field, v) for v in values]
            else:
                found[role] = text_of(field, value)
    for role in ("query", "positive"):
        if role not in found:
            message = f"expected a {role}, named {NAMES[role].replace('|', ', ')}"
            raise ValueError(f"{message}; it has {', '.join(row):.200}")
    return found


def text_of(field: str, value: object) -> str:
    """A string; for a passage of Tevatron, its title and then its text, as in Tevatron."""
    if isinstance(value, dict) and isinstance(value.get("text"), str):
        value = f"{value.get('title') or ''} {value['text']}".strip()
    if not isinstance(value, str):
        raise ValueError(f"`{field}`: expected a string, or a list for positives and negatives")
    value.encode()  # raises for half a surrogate pair
    return value
