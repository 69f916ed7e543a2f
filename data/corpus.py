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

WIKIPEDIA = Path(__file__).parent / "wikipedia.jsonl"


def read_documents(path: str | Path, errors: str = "strict") -> list[str]:
    """The documents of a file: JSON lines with a `text` field (.jsonl), else one a line.

    Blank documents are left out. A line that is not UTF-8, or has no text, is a ValueError that
    names file and line; with errors="skip" it is left out, and standard error says how many were.
    Raises FileNotFoundError, and ValueError for a corpus without a single document.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such corpus file")
    documents, bad = [], []
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                text = document_of(raw, path.suffix == ".jsonl")
            except ValueError as error:
                if errors != "skip":
                    raise ValueError(f"{path}, line {number}: {error}") from None
                bad.append(number)
                continue
            if text:
                documents.append(text)
    if bad:
        what = f"skipped {len(bad)} lines, the first of them line {bad[0]}"
        print(f"{path}: {what}", file=sys.stderr)
    if not documents:
        raise ValueError(f"{path}: an empty corpus, there is no text in it")
    return documents


def document_of(raw: bytes, is_json: bool) -> str:
    try:
        line = raw.decode("utf-8").removeprefix("\ufeff").strip()
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    if not is_json or not line:
        return line
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError("expected a JSON object with a text field") from None
    if not isinstance(text, str):
        raise ValueError(f"text is {type(text).__name__}, not a string")
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError("text holds half a surrogate pair")
    return text.strip()


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
