"""Read and write files so that nothing is lost and every error names the file."""

import contextlib
import csv
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

JSON, TABLES = (".jsonl", ".ndjson", ".json"), {".csv": ",", ".tsv": "\t"}
CONVERTERS = {".parquet": "pandas.read_parquet", ".arrow": "datasets.Dataset.from_file"}
ARRAY = re.compile(rb'(\xef\xbb\xbf)?\s*\[\s*[{"\]]')  # the start of one of objects or strings
OBJECT = re.compile(rb'(\xef\xbb\xbf)?\s*(\[\s*)?\{\s*"[^"\n]*"\s*:')  # or an array of objects
csv.field_size_limit(2**31 - 1)  # a document may be longer than 131,072 characters

# --- Reading -----------------------------------------------------------------------------------


@contextlib.contextmanager
def reading(file: str | Path, hint: str = "") -> Iterator[None]:
    """Turn any error while a file is read into one ValueError that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such file") from None
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:  # the tokenizers library panics outside of Exception
        message = " ".join(str(error).split())
        message = f"{message} is missing" if isinstance(error, KeyError) else message
        raise ValueError(f"{file}: {message or type(error).__name__}{hint}") from None


def read_json(file: Path) -> dict:
    """The object in a JSON file."""
    with reading(file):
        raw = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError(f"expected a JSON object, got {type(raw).__name__}")
        return raw


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file of any size, in hexadecimal digits."""
    digest = hashlib.sha256()
    with file.open("rb") as chunks:
        while chunk := chunks.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def kind_of(file: str | Path) -> str:
    """The suffix of a file, before .gz, in small letters."""
    return Path(str(file).lower().removesuffix(".gz")).suffix


def lines_of(file: str | Path) -> Iterator[bytes]:
    """The lines of a file; a .gz file is decompressed. `-` is standard input.

    Raises ValueError, which names the file, for any error while it is read, and for UTF-16.
    """
    opener = gzip.open if str(file).lower().endswith(".gz") else open
    with reading(file), sys.stdin.buffer if str(file) == "-" else opener(file, "rb") as lines:
        start = lines.peek(2)
        if start[:2] in (b"\xff\xfe", b"\xfe\xff") and b"\0" in start:
            raise ValueError("is UTF-16, as PowerShell and Notepad write it: save it as UTF-8")
        yield from lines


def records_of(file: str | Path) -> Iterator[tuple[str, object]]:
    """Each record of a file, with its place, such as "line 3".

    A record is a line, in bytes. For JSON lines (.jsonl, .ndjson, .json) it is a line that is not
    blank, for `value_of` to parse; if such a file holds one array, it is an item. For a table with
    a header (.csv, .tsv) it is a dict. Each file may be compressed (.gz); `-` is standard input,
    read as lines. Raises ValueError for any other kind of file, and says what to do.
    """
    kind, lines = kind_of(file), lines_of(file)
    if str(file) != "-":
        head = list(itertools.islice(lines, 9))
        start, lines = b"".join(head), itertools.chain(head, lines)
        refuse_other_kinds(file, start)
        if kind in TABLES:
            yield from rows_of(file, lines)
            return
        if kind in JSON and ARRAY.match(start):
            whole = b"".join(lines)
            with reading(file):
                items = value_of(whole)
            yield from ((f"item {i}", item) for i, item in enumerate(items, start=1))
            return
    for i, line in enumerate(lines, start=1):
        if kind not in JSON or line.strip():
            yield f"line {i}", line


def refuse_other_kinds(file: str | Path, start: bytes) -> None:
    """Raise ValueError for a file that is not lines of text, judged by its start."""
    kind = kind_of(file)
    if kind in CONVERTERS:
        call, target = CONVERTERS[kind], Path(file).with_suffix(".jsonl")
        code = f"{call}('{file}').to_json('{target}', lines=True, orient='records')"
        line = f'python -c "import {call.partition(".")[0]}; {code}"'
        raise ValueError(f"{file}: convert it to JSON lines: {line}")
    # A few NULs in a .txt file are only dirt; UTF-16 without its mark has one for every letter.
    if start.count(0) > (len(start) // 4 if kind == ".txt" else 0) or start[:4] == b"%PDF":
        raise ValueError(f"{file}: is not text: convert it to .txt or .jsonl, in UTF-8")
    if kind not in (*JSON, *TABLES) and OBJECT.match(start):
        raise ValueError(f"{file}: looks like JSON lines: rename it to .jsonl")


def rows_of(file: str | Path, lines: Iterable[bytes]) -> Iterator[tuple[str, dict]]:
    """Each row of a table as a dict, with its last line; the first row names the columns.

    Bytes that are not UTF-8 become halves of surrogate pairs, for which every reader raises. Raises
    ValueError for an open quotation mark and for a row of another length, because the rows after it
    would be wrong.
    """
    text = (line.decode("utf-8-sig", "surrogateescape") for line in lines)
    table, header = csv.reader(text, delimiter=TABLES[kind_of(file)], strict=True), []
    try:
        for row in filter(None, table):
            header = header or row
            if len(row) != len({*header}):
                message = f"{len(row)} columns, where the header names {len({*header})}"
                raise csv.Error(f"{message}; text with commas, tabs or line ends needs quotes")
            if row is not header:
                yield f"line {table.line_num}", dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise ValueError(f"{file}, line {table.line_num}: {error}") from None


def value_of(record: object) -> object:
    """The value of a record of `records_of`: a line is parsed as JSON."""
    if not isinstance(record, bytes):
        return record
    try:
        return json.loads(record.decode("utf-8-sig"))
    except (json.JSONDecodeError, RecursionError) as error:
        message = "expected a JSON object on each line, or one array of them"
        raise ValueError(f"{message}: {error}") from None


# --- Writing -----------------------------------------------------------------------------------


@contextlib.contextmanager
def complete_file(target: str | Path) -> Iterator[BinaryIO]:
    """A file to write, which is renamed into place once it is complete and on the disk.

    `-` is standard output.
    """
    if str(target) == "-":
        if hasattr(sys.stdout, "buffer"):
            yield sys.stdout.buffer
        else:  # in a notebook
            out = io.BytesIO()
            yield out
            sys.stdout.write(out.getvalue().decode("utf-8"))
        return
    part = Path(f"{target}.part")
    try:
        with part.open("wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def write_whole(file: Path, content: bytes) -> None:
    """Write a file under another name, and rename it once it is complete and on the disk."""
    with complete_file(file) as out:
        out.write(content)


def write_json(file: Path, content: object) -> None:
    write_whole(file, (json.dumps(content, indent=2) + "\n").encode())


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which is renamed to `folder` at the end, unless there was an error.

    It replaces a whole checkpoint of that name. Raises ValueError for a folder of other files.
    """
    is_checkpoint = (folder / "config.json").is_file() and any(folder.glob("model*.safetensors"))
    if folder.exists() and not is_checkpoint and any(folder.iterdir()):
        raise ValueError(f"{folder}: exists and is not a checkpoint; remove it or choose another")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".new-") as scratch:
        new, old = Path(scratch) / "new", Path(scratch) / "old"
        new.mkdir()
        yield new
        if folder.exists():
            os.replace(folder, old)
        try:
            os.replace(new, folder)
        except OSError:
            if old.exists():
                os.replace(old, folder)
            raise
