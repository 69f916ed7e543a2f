"""Files from anywhere, and text with every kind of dirt.

Whatever a checkpoint's or adapter's files hold, they load well or are refused by an error that
names the file; and memory does not follow what a file claims.
"""

import json
import random
import re
import resource
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import GOLDEN, ROOT, refused

from llm2vec import Decoder, LLM2Vec
from llm2vec_data.corpus import read_documents, sentences
from llm2vec_data.encode import encode_file, read_records
from lora import load_adapter

# --- Spoiled files -----------------------------------------------------------------------------

HUGE = 10**12
JUNK = [None, True, -1, 0, 1, 3, 7.5, HUGE, 1e308, float("nan"), "", "12", "../x", [], [1], {}]
JUNK += [{"a": 1}, [[]], "\u0000", {"rope_type": []}, {"rope_type": "llama3", "factor": "x"}]
JUNK += [{"rope_type": "linear", "factor": float("inf")}, {"type": "linear", "factor": -2}, "/etc"]
BOMBS = ["", "[]", "null", "7", "\ufeff{}", "[" * 100_000, '{"a":' * 50_000]


def spoil_json(text: str, rng: random.Random) -> str:
    """Break the text; or change a value, drop a key, add one."""
    place = rng.randrange(len(text))
    if rng.random() < 0.3:
        typo = text[:place] + rng.choice('{}[]",:0x\x00é') + text[place + 1 :]
        return rng.choice([text[:place], typo, rng.choice(BOMBS)])
    inner = value = json.loads(text)
    while rng.random() < 0.3:  # go into an object, if there is one
        values = [x for v in inner.values() for x in (v if isinstance(v, list) else [v])]
        inner = rng.choice([v for v in values if isinstance(v, dict) and v] or [inner])
    key = rng.choice([*inner, "sliding_window", "rope_scaling", "no_rope_layers", "model_type"])
    inner[key] = rng.choice(JUNK)
    if rng.random() < 0.15:
        del inner[key]
    if inner.get("num_hidden_layers") == HUGE:  # which nobody has the time to build
        inner["num_hidden_layers"] = 50
    return json.dumps(value)


def spoil(file: Path, rng: random.Random) -> None:
    """Spoil JSON; of safetensors the header, which is JSON, its length, or the end of the file."""
    if file.suffix == ".json":
        file.write_text(spoil_json(file.read_text(), rng))
        return
    data = file.read_bytes()
    (n,) = struct.unpack("<Q", data[:8])
    header = spoil_json(data[8 : 8 + n].decode(), rng).encode()
    length = rng.choice([len(header)] * 9 + [0, n + 8, 2**40, 2**64 - 1])
    end = rng.choice([len(data)] * 9 + [rng.randrange(8 + n, len(data))])
    file.write_bytes(struct.pack("<Q", length) + header + data[8 + n : end])


def load_model(folder: Path) -> None:
    Decoder.from_pretrained(folder)(torch.tensor([[1, 2, 3]]))


def load_adapted(folder: Path) -> None:
    decoder = Decoder.from_pretrained(GOLDEN / "llama-grouped")
    load_adapter(decoder, folder)
    assert decoder(torch.tensor([[1, 2, 3]])).isfinite().all()


def load_encoder(folder: Path) -> None:
    assert np.isfinite(LLM2Vec.from_pretrained(folder).encode(["", "A text: é 😀.", "<s> a"])).all()


CASES = [  # what to load, the folder that it starts from, the file that is spoiled, how often
    (load_model, "llama-grouped", "config.json", 400),
    (load_model, "smollm3", "config.json", 200),
    (load_model, "llama-llama3-sharded", "config.json", 200),
    (load_model, "llama-llama3-sharded", "model.safetensors.index.json", 200),
    (load_model, "mistral-window", "model.safetensors", 300),
    (load_adapted, "llama-grouped-adapter", "adapter_config.json", 300),
    (load_adapted, "llama-grouped-adapter", "adapter_model.safetensors", 200),
    (load_encoder, "interop/base", "tokenizer.json", 200),
]


@pytest.mark.parametrize("share", [0.05, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("load, source, name, count", CASES)
def test_any_file_loads_or_is_refused_by_name(load, source, name, count, share, tmp_path):
    cases, refused = int(count * share), 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(cases):
        folder = shutil.copytree(GOLDEN / source, tmp_path / str(seed))
        spoil(folder / name, random.Random(f"{source} {name} {seed}"))
        try:
            load(folder)
        except Exception as error:
            case = seed, type(error).__name__, str(error)
            assert isinstance(error, (ValueError, FileNotFoundError)), case
            assert str(tmp_path) in str(error) or name in str(error), case
            assert "\n" not in str(error), case
            refused += 1
    assert refused > cases / 4, "the cases must be hard enough for most to be refused"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


def test_nothing_here_can_execute_what_it_reads():
    """No call of eval or exec, and nothing unpickled."""
    runs = re.compile(r"(?<![\w.])(eval|exec)\(|torch\.load\(|^\s*(import|from) .*pickle", re.M)
    for file in [*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("tests/**/*.py")]:
        assert not runs.search(file.read_text(encoding="utf-8")), file


# --- Dirty text --------------------------------------------------------------------------------

DIRT = {
    "nul": "before\0after",
    "right to left": "שלום עולם, مرحبا بالعالم",
    "combining": "e\u0301 a\u0308\u0323 " + "o" + "\u0301" * 500,
    "special tokens": "<|endoftext|> <|im_start|>user [INST] <s> </s>",
    "long": "All work and no play makes a dull text. " * 2_600,
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈",
    "controls": "\x01\x02\x7f\u200b\u2028 x",
}


@pytest.mark.parametrize("kind", DIRT)
def test_dirt_goes_from_a_corpus_to_finite_vectors(kind, encoder, tmp_path):
    file, text = tmp_path / "a.txt", DIRT[kind]
    file.write_bytes(f"\ufeffone\r\n{text}\r\n\r\nlast".encode())
    assert read_documents(file) == ["one", text.strip(), "last"]
    assert next(read_records(str(file)))["text"] == "one", "without its mark"
    vectors = encoder.encode([*sentences(text)[:14], text])
    assert np.isfinite(vectors).all()
    alone = encoder.encode([text[:10_000]])[0]  # 512 tokens are read of either
    np.testing.assert_allclose(vectors[-1], alone, atol=1e-5)


BAD = [b"\xff\xfe", b"{", b"[]", b'{"title": "x"}', b'{"text": 5}', b'{"text": "\\ud800"}']


@pytest.mark.parametrize("bad", [*BAD, b"[" * 9999])
def test_a_line_without_text_is_named_or_skipped_and_counted(bad, tmp_path, capsys):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "good"}\r\n' + bad + b'\n{"text": "too"}\n' + bad)
    refused("a.jsonl, line 2: ", read_documents, file)
    assert read_documents(file, errors="skip") == ["good", "too"]
    assert f"{file}: skipped 2 lines, the first of them line 2" in capsys.readouterr().err
    file.write_bytes(bad)
    refused("empty corpus", read_documents, file, errors="skip")


def test_half_a_surrogate_pair_in_another_field_is_passed_through(encoder, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "good", "id": "\\ud800"}\n')
    encode_file(encoder, str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"))
    [again] = (tmp_path / "b.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(again)["id"] == "\ud800"
