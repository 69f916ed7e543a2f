"""Text to train on: read it, split it, and cut it into sentences and blocks."""

import hashlib
import re
import sys
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from llm2vec_data.disk import JSON, TABLES, kind_of, reading, records_of, value_of

WIKIPEDIA = Path(__file__).parent / "wikipedia.jsonl"


def read_documents(path: str | Path, errors: str = "strict") -> list[str]:
    """The documents of a file, by its suffix. With any other suffix, each line is a document.

    - .jsonl, .ndjson, .json: one a line, or one array: objects with `text`, or strings
    - .csv, .tsv: a table with `text` in its header

    Of a folder, the .txt files and these kinds are read; each may be compressed (.gz). Blank
    documents are left out. A record that is not UTF-8, or has no text, raises ValueError with file
    and line; with errors="skip" it is left out, and standard error says how many were. Raises
    FileNotFoundError, and ValueError for a corpus without documents, for a table with rows that do
    not fit its header, and for a file that is not text.
    """
    path, files, documents = Path(path), [Path(path)], []
    kinds = (".txt", *JSON, *TABLES)
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if kind_of(f) in kinds)
    for file in files:
        bad = []
        for place, record in records_of(file):
            try:
                documents.append(read_record(record, file, place)["text"].strip())
            except ValueError:
                if errors != "skip":
                    raise
                bad.append(place)
        if bad:
            message = f"skipped {len(bad)} lines, the first of them {bad[0]}"
            print(f"{file}: {message}", file=sys.stderr)
    documents = [document for document in documents if document]
    if not documents:
        where = f"its {', '.join(kinds)} files" if path.is_dir() else "it"
        raise ValueError(f"{path}: an empty corpus, no text in {where}")
    return documents


def read_record(record: object, file: str | Path, place: str) -> dict:
    """A record of a file as {"text": ...}, with all other fields of an object or a row."""
    with reading(f"{file}, {place}"):
        if isinstance(record, bytes) and kind_of(file) not in JSON:
            return {"text": record.decode("utf-8-sig").rstrip("\r\n")}
        value = value_of(record)
        value = {"text": value} if isinstance(value, str) else value
        if not isinstance(value, dict) or not isinstance(value.get("text"), str):
            has = f"; it has {', '.join(value):.200}" if isinstance(value, dict) else ""
            raise ValueError(f"expected an object with a string `text`{has}")
        value["text"].encode()  # raises for half a surrogate pair
        return value


def split_documents(documents: Sequence[str], one_in: int = 50) -> tuple[list[str], list[str]]:
    """Training and held-out documents; about one in `one_in` is held out.

    A hash of the words alone chooses the side. So a document stays on its side in every corpus,
    order and command, and all its copies are on the same side.
    """
    sides: tuple[list[str], list[str]] = ([], [])
    for document in documents:
        words = " ".join(document.lower().split())
        draw = int(hashlib.sha256(words.encode("utf-8", "replace")).hexdigest()[:8], 16)
        sides[draw % one_in == 0].append(document)
    return sides


def training_documents(path: str | Path, errors: str = "strict") -> list[str]:
    """The documents of a corpus that are not held out."""
    return split_documents(read_documents(path, errors))[0]


# The end of a sentence: Unicode's property Sentence_Terminal, the ellipsis, the shad of Tibetan.
# Marks like . ! ? need white space after them, and then a letter that may begin a sentence, a digit
# or an opening mark. Marks of other scripts need nothing. A closing mark may come between.
_SPACED = ".!?…‼‽⁇⁈⁉։"
_ALONE = "。！？．｡؟۔؞।॥།༎။၊።፧፨។៕᠃᠉᙮᱾᱿꓿꘎꘏꛳꛷꡶꡷꣎꣏܀܁܂߹᪨᪩᪪᪫᭚᭛᭞᭟᰻᰼⸮"
_CLOSING = r"""["'”’»«›‹)\]」』】》〉）］｣]*"""
_OPENING = "\"'“‘„‚«»‹›([¿¡「『【《〈（［"
_GREEK = "(?<=[\u0370-\u03ff\u1f00-\u1fff])[;\u037e]"  # its question mark
# Several marks in a row are tried only at the first, or a line of dots would take quadratic time.
# The group is the character after the opening marks.
_END = re.compile(
    rf"(?:[{_ALONE}]+{_CLOSING}\s*|"
    rf"(?<![{_SPACED}])(?<!{_GREEK})(?:[{_SPACED}]|{_GREEK})+[“{_CLOSING[1:]}\s+)"
    rf"(?=[{_OPENING}]*(.?))"
)
# But no sentence ends after an initial, a known abbreviation, or a group like U.S.
_NO_END = re.compile(
    r"(?:^|[\s(\[\"'“‘„«])(?:[A-Za-zÀ-ԯ]|(?:[A-Za-zÀ-ԯ]\.)+[A-Za-zÀ-ԯ]|Mr|Mrs|Ms|Dr|Prof|St|Sr|Jr|Mt|Gen|Col|Lt|Capt|"
    r"Rev|Hon|Gov|Sen|Rep|vs|cf|ca|approx|No|Vol|Fig|pp?|ed|eds|etc|Inc|Ltd|Co|Corp|lit|fl|"
    r"bzw|Nr|Hr|Fr|Bd|usw|Mme|Mlle|Sra?|Ud|им|ул|гг?|тыс|млн|руб|см|др)\.$"
)


def sentences(text: str) -> list[str]:
    """The sentences of a text in any language, in order. Line ends always end a sentence."""
    found = []
    for line in text.splitlines():
        start = before = 0  # the start of the sentence, and the last end that was tried
        for end in _END.finditer(line):
            # A small letter begins no sentence, except in Georgian.
            small = end[1].islower() and not "ა" <= end[1] <= "ჿ"
            begins = end[0][0] in _ALONE or end[1].isalnum() and not small
            # Abbreviations hold no white space, so the search starts at the last end.
            if begins and not _NO_END.search(line[before : end.end()].strip()):
                found.append(line[start : end.end()].strip())
                start = end.end()
            before = end.end()
        if line[start:].strip():
            found.append(line[start:].strip())
    return found


def cut_into_blocks(rows: Iterable[Sequence[int]], length: int, limit: int | None = None) -> Tensor:
    """Rows of token ids, end to end, cut into blocks: (number, length). The rest is dropped.

    Reading stops when `limit` blocks are full. Raises ValueError if not even one is full.
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
