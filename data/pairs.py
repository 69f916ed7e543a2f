"""Pairs for supervised contrastive training: a query, what answers it, and what does not."""

import functools
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from llm2vec_data.disk import JSON, TABLES, kind_of, reading, records_of, value_of
from llm2vec_data.processes import RANK

PAIRS = Path(__file__).parent / "pairs" / "wikipedia.jsonl"

# What the fields of a pair are called: here and by sentence-transformers, FlagEmbedding, Tevatron
# and SimCSE. A grade says whether a pair is one.
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
    .tsv), each perhaps compressed (.gz); of a folder all such files are taken. A row has `query`,
    `positive`, and optionally `negative` (each of the two a string or a list of them) and
    `instruction`: the layout of the public E5 data as the Echo embeddings' authors released it
    (Springer et al. 2024), or under the other names of NAMES. Symmetric data (paraphrases,
    entailment) has an `answer_instruction` too, for positive and negatives. A pair without an
    instruction has that of its file: one of `instructions` for each path, or one for all.

    Each of several positives makes a pair, with all the negatives. A pair without text on either
    side is left out, and so is a blank negative. Standard error says of each file how many pairs,
    negatives and instructions it holds, what was left out, and which fields are not read. Raises
    FileNotFoundError, or ValueError naming file and line.
    """
    if len(instructions) not in (1, len(paths)):
        what = f"{len(instructions)} instructions for {len(paths)} paths of pairs"
        raise ValueError(f"{what}: give one for each, or one for all")
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
    """The pairs of a file; standard error says what it holds."""
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
    led = sum(pair["instruction"] != "" for pair in pairs)
    said = [f"{len(pairs)} pairs, {number} negatives, {led} with an instruction"]
    if unread:
        said.append(f"fields that are not read: {', '.join(unread)}")
    for what, places in left_out.items():
        if places:
            said.append(f"left out {len(places)} {what}, the first of them {places[0]}")
    if RANK == 0:
        print(*(f"{file}: {what}" for what in said), sep="\n", file=sys.stderr)
    if len(pairs) < 2:
        raise ValueError(f"{file}: fewer than two pairs, there is nothing to contrast")
    return pairs


@functools.cache
def role_of(field: str) -> str | None:
    return next((role for role, names in NAMES.items() if re.fullmatch(names, field)), None)


def fields_of(row: object, unread: dict[str, None]) -> dict:
    """The fields of a row under the names of NAMES; `unread` takes the names of all others."""
    if not isinstance(row, dict):
        raise ValueError("expected a JSON object with a query and a positive")
    found: dict = {}
    for field, value in row.items():
        role = role_of(field)
        if role is None:
            unread[field] = None
        elif role == "grade" and str(value).lower() not in ("none", "1", "1.0", "true"):
            what = "leave such rows out, or give their text as the negative of a pair"
            raise ValueError(f"`{field}` is {value!r:.40}, and each row is taken as right: {what}")
        elif role != "grade" and value is not None:
            if role in found and role != "negatives":
                raise ValueError(f"`{field}` is a second {role}: leave one of the two")
            if role in ("positive", "negatives"):
                values = value if isinstance(value, list) else [value]
                found[role] = found.get(role, []) + [text_of(field, v) for v in values]
            else:
                found[role] = text_of(field, value)
    for role in ("query", "positive"):
        if role not in found:
            what = f"expected a {role}, named {NAMES[role].replace('|', ', ')}"
            raise ValueError(f"{what}; it has {', '.join(row):.200}")
    return found


def text_of(field: str, value: object) -> str:
    """A string, or the text of one of Tevatron's passages behind its title, as Tevatron has it."""
    if isinstance(value, dict) and isinstance(value.get("text"), str):
        value = f"{value.get('title') or ''} {value['text']}".strip()
    if not isinstance(value, str):
        raise ValueError(f"`{field}`: expected a string, or of positives and negatives a list")
    value.encode()  # half a surrogate pair is no text
    return value
