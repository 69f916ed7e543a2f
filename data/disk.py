"""Reading and writing files so that nothing is lost and every error names the file."""

import contextlib
import gzip
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

# --- Reading -----------------------------------------------------------------------------------


@contextlib.contextmanager
def reading(file: str | Path, hint: str = "") -> Iterator[None]:
    """Turn whatever goes wrong while a file is read into one ValueError that names the file."""
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


def kind_of(file: str | Path) -> str:
    """The suffix of a file, before .gz."""
    return Path(str(file).removesuffix(".gz")).suffix


def lines_of(file: str | Path) -> Iterator[bytes]:
    """The lines of a file; of a .gz file, of what it holds. `-` is standard input.

    What goes wrong while it is read is a ValueError that names the file, UTF-16 for one.
    """
    opener = gzip.open if str(file).endswith(".gz") else open
    with reading(file), sys.stdin.buffer if str(file) == "-" else opener(file, "rb") as lines:
        start = lines.peek(2)
        if start[:2] in (b"\xff\xfe", b"\xfe\xff") and b"\0" in start:
            raise ValueError("is UTF-16, as PowerShell and Notepad write it: save it as UTF-8")
        yield from lines


# --- Writing -----------------------------------------------------------------------------------


@contextlib.contextmanager
def complete_file(target: str | Path) -> Iterator[BinaryIO]:
    """A file to write, which is renamed into place once it is complete and on the disk.

    `-` is standard output.
    """
    if str(target) == "-":
        yield sys.stdout.buffer
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
    """Write a file under another name and rename it once it is complete and on the disk."""
    with complete_file(file) as out:
        out.write(content)


def write_json(file: Path, content: object) -> None:
    write_whole(file, (json.dumps(content, indent=2) + "\n").encode())


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which is renamed to `folder` at the end, if all went well.

    A checkpoint of that name is replaced, whole; a folder of anything else is refused.
    """
    known = (folder / "config.json").is_file() and any(folder.glob("model*.safetensors"))
    if folder.exists() and not known and any(folder.iterdir()):
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
