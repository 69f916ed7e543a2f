"""Text to train on: reading it, splitting it, and cutting it into sentences and blocks."""

import hashlib
import json
import re
import sys
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from llm2vec import reading

WIKIPEDIA = Path(__file__).parent / "wikipedia.jsonl"


def read_documents(path: str | Path, errors: str = "strict") -> list[str]:
    """The documents of a file: JSON lines with a `text` field (.jsonl), else one a line.

    Blank documents are left out. A line that is not UTF-8, or has no text, is a ValueError that
    names file and line; with errors="skip" it is left out, and standard error says how many were.
    Raises FileNotFoundError, and ValueError for a corpus without a single document.
    """
    path = Path(path)
    documents, bad = [], []
    with reading(path), path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                with reading(f"line {number}"):
                    documents.append(document_of(line, path.suffix == ".jsonl"))
            except ValueError:
                if errors != "skip":
                    raise
                bad.append(number)
    documents = [document for document in documents if document]
    if bad:
        what = f"skipped {len(bad)} lines, the first of them line {bad[0]}"
        print(f"{path}: {what}", file=sys.stderr)
    if not documents:
        raise ValueError(f"{path}: an empty corpus, there is no text in it")
    return documents


def document_of(line: bytes, is_json: bool) -> str:
    text = line.decode("utf-8").removeprefix("\ufeff").strip()
    if is_json and text:
        record = json.loads(text)
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise ValueError("expected a JSON object with a string `text`")
        text = record["text"].strip()
        text.encode()  # half a surrogate pair is no text
    return text


def split_documents(documents: Sequence[str], one_in: int = 50) -> tuple[list[str], list[str]]:
    """Training and held-out documents, the latter about one in `one_in` of all.

    The side is drawn by a hash of the words alone, so a document stays on its side whatever else
    the corpus holds, in every order and run, and no copy of it can be on the other.
    """
    sides: tuple[list[str], list[str]] = ([], [])
    for document in documents:
        words = " ".join(document.lower().split())
        draw = int(hashlib.sha256(words.encode("utf-8", "replace")).hexdigest()[:8], 16)
        sides[draw % one_in == 0].append(document)
    return sides


# A sentence ends at . ! or ? (and closing quotes or brackets) before a space and a capital, digit
# or opening mark; but not after an initial, a known abbreviation, or a group like U.S.
_END = re.compile(r"""(?<=[.!?])["'”’)\]]*\s+(?=["'“‘(\[]?[A-Z0-9À-Þ])""")
_NO_END = re.compile(
    r"(?:^|[\s(\[\"'“‘])(?:[A-Za-z]|(?:[A-Za-z]\.)+[A-Za-z]|Mr|Mrs|Ms|Dr|Prof|St|Sr|Jr|Mt|Gen|Col|Lt|Capt|"
    r"Rev|Hon|Gov|Sen|Rep|vs|cf|ca|approx|No|Vol|Fig|pp?|ed|eds|etc|Inc|Ltd|Co|Corp|lit|b|d|r|c|fl)\.$"
)


def sentences(text: str) -> list[str]:
    """The sentences of an English text, in order. Line ends always end a sentence."""
    found = []
    for line in text.splitlines():
        start = 0
        for end in _END.finditer(line):
            head = line[start : end.end()].strip()
            if head and not _NO_END.search(head):
                found.append(head)
                start = end.end()
        if line[start:].strip():
            found.append(line[start:].strip())
    return found


def cut_into_blocks(rows: Iterable[Sequence[int]], length: int, limit: int | None = None) -> Tensor:
    """Rows of token ids, end to end, cut into blocks: (number, length); what is left is dropped.

    Rows are read only until `limit` blocks are full. Raises ValueError if not one is.
    """
    ids = array("q")
    for row in rows:
        ids.extend(row)
        if limit is not None and len(ids) >= limit * length:
            break
    count = len(ids) // length if limit is None else min(limit, len(ids) // length)
    if not count:
        raise ValueError(f"the corpus has {len(ids)} tokens, too few for one block of {length}")
    return torch.tensor(ids[: count * length], dtype=torch.long).view(count, length)
