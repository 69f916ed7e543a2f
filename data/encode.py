"""The output of an encoder: a file of vectors for a file of texts, and the states of words."""

import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from llm2vec_data.batches import batches_by_length, pad
from llm2vec_data.corpus import read_record
from llm2vec_data.disk import complete_file, records_of
from llm2vec_data.processes import RANK, WORLD_SIZE


def encode_file(
    model,
    source: str,
    target: str,
    instruction: str | None = None,
    normalize: bool = False,
) -> int:
    """Write the vectors of the texts in a file; returns their number.

    4,096 texts at a time are in memory, but a JSON array is read whole. Standard error says how
    many texts are longer than the model's max_length, and are cut.

    Under torchrun each process encodes one contiguous part of the texts and writes its own file:
    `vectors.npy` becomes `vectors-00000-of-00004.npy` and so on, in the order of the texts. A file
    is renamed into place once it is complete.

    Args:
        source: one text a line, or another kind of file by its suffix, see `read_documents`; it may
            be compressed (.gz). `-` is standard input, one text a line.
        target: NumPy's format, float32 (N, d); or JSON lines (.jsonl, or `-` for standard output)
            with the fields of the input and `vector`.
    """
    if WORLD_SIZE > 1:
        if "-" in (source, target):
            raise ValueError("- is for one process: name files that several can read and write")
        path = Path(target)
        target = str(path.with_stem(f"{path.stem}-{RANK:05d}-of-{WORLD_SIZE:05d}"))
    as_json, start = target == "-" or target.endswith(".jsonl"), time.monotonic()
    with complete_file(target) as out:
        if not as_json:
            write_header(out, model, 0)
        records, done, cut = read_records(source), 0, 0
        while chunk := list(itertools.islice(records, 4096)):
            texts = [record["text"] for record in chunk]
            vectors = model.encode(texts, instruction)
            if normalize:
                vectors /= np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)
            if as_json:
                for record, vector in zip(chunk, vectors, strict=True):
                    record["vector"] = [round(float(x), 6) for x in vector]
                    line = json.dumps(record, ensure_ascii=False)
                    out.write(line.encode("utf-8", "backslashreplace") + b"\n")
            else:
                out.write(vectors.tobytes())
            cut += count_cut(model, texts, instruction)
            done += len(chunk)
            pace = done / (time.monotonic() - start)
            if RANK == 0:
                print(f"\r{done} texts, {pace:.0f} a second", end="", file=sys.stderr, flush=True)
        if RANK == 0:
            print(file=sys.stderr)
        report_cut(model, cut, done)
        if not as_json:
            out.seek(0)
            write_header(out, model, done)
    return done


def write_header(out: BinaryIO, model, number: int) -> None:
    """Write the header of a .npy file of vectors; numpy leaves room in it for a larger number."""
    shape = (number, model.width)
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(out, header)


def count_cut(model, texts: list[str], instruction: str | None) -> int:
    """The number of texts with more than max_length tokens."""
    rows = model.rows(texts, instruction, max_length=2**31)
    return sum(len(ids) > model.max_length for ids, _ in rows)


def report_cut(model, cut: int, number: int) -> None:
    """Print on standard error how many of `number` texts are cut."""
    if cut:
        message = f"{cut} of {number} texts are cut at {model.max_length} tokens"
        print(f"{message}, which --max-length sets", file=sys.stderr)


def read_records(source: str) -> Iterator[dict]:
    """This process's records of a file, as {"text": ...} with all other fields."""
    first, last = 0, None
    if WORLD_SIZE > 1:
        n = sum(1 for _ in records_of(source))
        first, last = n * RANK // WORLD_SIZE, n * (RANK + 1) // WORLD_SIZE
    for place, record in itertools.islice(records_of(source), first, last):
        yield read_record(record, source, place)


# --- Words ------------------------------------------------------------------------------------


@torch.no_grad()
def word_states(encoder, sentences: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
    """States of all words, (words, d) float32: at a word's tokens, and one token before each.

    Both average over the tokens of a word. The model predicts a token from the state before it. The
    first token of a row has no state before it, so its own state is used.
    """
    decoder = encoder.decoder.eval()
    encodings = encoder.tokenizer.encode_batch([" ".join(words) for words in sentences])
    firsts = np.cumsum([0] + [len(words) for words in sentences])
    total = torch.zeros(firsts[-1], 2, decoder.config.hidden_size)
    count = torch.zeros(firsts[-1], 1, 1)
    for batch in batches_by_length([len(e.ids) for e in encodings], 8192):
        ids = pad([encodings[i].ids for i in batch], decoder.device)
        segments = pad([[1] * len(encodings[i].ids) for i in batch], decoder.device)
        for row, i in zip(decoder(ids, segments).float().cpu(), batch, strict=True):
            # A token is in the word where it ends: it may start with the space before the word.
            inside = np.repeat(np.arange(len(sentences[i])), [len(w) + 1 for w in sentences[i]])
            # Special tokens are not in the text: they end where they start.
            ends = {t: end for t, (start, end) in enumerate(encodings[i].offsets) if end > start}
            word = torch.from_numpy(firsts[i] + inside[list(ends.values())])
            t = torch.tensor(list(ends))
            total.index_add_(0, word, torch.stack([row[t], row[(t - 1).clamp_min(0)]], dim=1))
            count.index_add_(0, word, torch.ones(len(t), 1, 1))
    return (total / count.clamp_min(1)).unbind(1)
