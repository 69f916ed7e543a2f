"""Whatever a checkpoint's or adapter's files hold: a good load, or an error that names the file.

Seeded cases, 2,000 with the slow ones. Nothing but ValueError and FileNotFoundError may come out,
nothing may hang, no vector may be less than finite, and memory may not follow what a file claims.
"""

import json
import random
import resource
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import GOLDEN

from llm2vec import Decoder, LLM2Vec
from lora import load_adapter

HUGE = 10**12
JUNK = [None, True, -1, 0, 1, 3, 7.5, HUGE, 1e308, float("nan"), "", "12", "../x", [], [1], {}]
JUNK += [{"a": 1}, [[]], "\u0000", {"rope_type": []}, {"rope_type": "llama3", "factor": "x"}]
JUNK += [{"rope_type": "linear", "factor": float("inf")}, {"type": "linear", "factor": -2}, "/etc"]
BOMBS = ["", "[]", "null", "7", "\ufeff{}", "[" * 100_000, '{"a":' * 50_000]


def mutate_json(file: Path, rng: random.Random) -> None:
    """Break the text; or change a value, drop a key, add one."""
    text = file.read_text()
    place = rng.randrange(len(text))
    if rng.random() < 0.3:
        typo = text[:place] + rng.choice('{}[]",:0x\x00é') + text[place + 1 :]
        file.write_text(rng.choice([text[:place], typo, rng.choice(BOMBS)]))
        return
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
    file.write_text(json.dumps(value))


def mutate_safetensors(file: Path, rng: random.Random) -> None:
    """Cut or lengthen the file, lie about the header's length, spoil it, or change a tensor's."""
    data = bytearray(file.read_bytes())
    (n,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + n])
    name = rng.choice([key for key in header if key != "__metadata__"])
    kind = rng.randrange(6)
    if kind == 0:
        data = data[: rng.randrange(len(data))]
    elif kind == 1:
        data += bytes(rng.randrange(1, 100))
    elif kind == 2:
        data[:8] = struct.pack("<Q", rng.choice([0, 1, n - 1, n + 8, 2**40, 2**64 - 1]))
    elif kind == 3:
        for _ in range(rng.randrange(1, 4)):
            data[8 + rng.randrange(n)] = rng.randrange(256)
    elif kind == 4:
        field = rng.choice(["dtype", "shape", "data_offsets"])
        header[name][field] = rng.choice([*JUNK, "F64", "I8", [HUGE, HUGE], [0, 2**63]])
    else:
        header[rng.choice([name + "x", name[1:], "lm_head.weight"])] = header.pop(name)
    if kind > 3:
        text = json.dumps(header).encode()
        data[: 8 + n] = struct.pack("<Q", len(text)) + text
    file.write_bytes(data)


def load_model(folder: Path) -> None:
    Decoder.from_pretrained(folder)(torch.tensor([[1, 2, 3]]))


def load_adapted(folder: Path) -> None:
    decoder = Decoder.from_pretrained(GOLDEN / "llama-grouped")
    load_adapter(decoder, folder)
    assert decoder(torch.tensor([[1, 2, 3]])).isfinite().all()


def load_encoder(folder: Path) -> None:
    vectors = LLM2Vec.from_pretrained(folder).encode(["", "A text: é, \U0001f600.", "<s> a"])
    assert np.isfinite(vectors).all()


CASES = [  # what to load, the folder that it starts from, the file that is spoiled, how, how often
    (load_model, "llama-grouped", "config.json", mutate_json, 400),
    (load_model, "smollm3", "config.json", mutate_json, 200),
    (load_model, "llama-llama3-sharded", "config.json", mutate_json, 200),
    (load_model, "llama-llama3-sharded", "model.safetensors.index.json", mutate_json, 200),
    (load_model, "mistral-window", "model.safetensors", mutate_safetensors, 300),
    (load_adapted, "llama-grouped-adapter", "adapter_config.json", mutate_json, 300),
    (load_adapted, "llama-grouped-adapter", "adapter_model.safetensors", mutate_safetensors, 200),
    (load_encoder, "interop/base", "tokenizer.json", mutate_json, 200),
]


def peak_memory() -> int:
    """The most memory, in KiB, that this process has held (Linux: since this was last asked)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")
    return peak


@pytest.mark.parametrize("tenths", [1, pytest.param(10, marks=pytest.mark.slow)])
@pytest.mark.parametrize("load, source, name, mutate, count", CASES)
def test_any_file_loads_or_is_refused_by_name(load, source, name, mutate, count, tenths, tmp_path):
    cases, refused = count * tenths // 10, 0
    peak_memory()
    before = peak_memory()
    for seed in range(cases):
        folder = tmp_path / source
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(GOLDEN / source, folder)
        mutate(folder / name, random.Random(f"{source} {name} {seed}"))
        try:
            load(folder)
        except (ValueError, FileNotFoundError) as error:
            assert str(tmp_path) in str(error) or name in str(error), (seed, error)
            assert "\n" not in str(error), (seed, error)
            refused += 1
        except Exception as error:
            raise AssertionError(f"case {seed}: {type(error).__name__}: {error}") from error
    assert refused > cases / 4, "the cases must be hard enough for most to be refused"
    assert peak_memory() - before < 200 * 1024
