"""Whatever a checkpoint's or adapter's files hold: a good load, or an error that names the file.

2,000 seeded cases. Nothing but ValueError and FileNotFoundError may come out, nothing may hang, no
vector may be less than finite, and memory may not follow what a file claims.
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

from llm2vec import Decoder, LLM2Vec
from lora import load_adapter

GOLDEN = Path(__file__).parent / "golden"
HUGE = 10**12
JUNK = [None, True, -1, 0, 1, 3, 7.5, HUGE, 10**30, 1e308, float("nan"), "", "12", "../x", [], [1]]
JUNK += [{}, {"a": 1}, [[]], "\u0000", {"rope_type": []}, {"rope_type": "llama3", "factor": "x"}]
JUNK += [{"rope_type": "linear", "factor": float("inf")}, {"type": "linear", "factor": -2}, "/etc"]


def mutate_json(file: Path, rng: random.Random) -> None:
    """Change a value, drop a key, add one, or break the text."""
    text = file.read_text()
    kind = rng.randrange(10)
    if kind == 0:
        cut = rng.randrange(len(text))
        file.write_text(text[:cut])
    elif kind == 1:
        place = rng.randrange(len(text))
        file.write_text(text[:place] + rng.choice('{}[]",:0x\x00é') + text[place + 1 :])
    elif kind == 2:
        bombs = ["[" * 100_000, '{"a":' * 50_000]
        file.write_text(rng.choice(["", "[]", "null", "7", "\ufeff{}", *bombs]))
    else:
        value = json.loads(text)
        inner = value
        while rng.random() < 0.3:  # go into an object, if there is one
            values = [x for v in inner.values() for x in (v if isinstance(v, list) else [v])]
            objects = [v for v in values if isinstance(v, dict) and v]
            if not objects:
                break
            inner = rng.choice(objects)
        key = rng.choice([*inner, "sliding_window", "rope_scaling", "no_rope_layers", "model_type"])
        if kind == 3:
            inner.pop(key, None)
        else:
            inner[key] = rng.choice(JUNK)
        file.write_text(json.dumps(value))


def mutate_safetensors(file: Path, rng: random.Random) -> None:
    """Flip bytes of the header, lie about its length, cut or lengthen the file, rename a tensor."""
    data = bytearray(file.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    kind = rng.randrange(6)
    if kind == 0:
        data = data[: rng.randrange(len(data))]
    elif kind == 1:
        data[:8] = struct.pack("<Q", rng.choice([0, 1, length - 1, length + 8, 2**40, 2**64 - 1]))
    elif kind == 2:
        data += bytes(rng.randrange(1, 100))
    elif kind == 3:
        for _ in range(rng.randrange(1, 4)):
            data[8 + rng.randrange(length)] = rng.randrange(256)
    else:
        header = json.loads(data[8 : 8 + length])
        name = rng.choice([key for key in header if key != "__metadata__"])
        if kind == 4:
            field = rng.choice(["dtype", "shape", "data_offsets"])
            header[name][field] = rng.choice([*JUNK, "F64", "I8", [HUGE, HUGE], [0, 2**63]])
        else:
            header[rng.choice([name + "x", name[1:], "lm_head.weight"])] = header.pop(name)
        text = json.dumps(header).encode()
        data[: 8 + length] = struct.pack("<Q", len(text)) + text
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
SEEDS = {}


def peak() -> int:
    """The most memory that this process has held since `forget_peak`, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def forget_peak() -> None:
    """Else an earlier test's peak would hide a later one's (Linux)."""
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


@pytest.mark.parametrize("load, source, name, mutate, count", CASES)
def test_any_file_loads_or_is_refused_by_name(load, source, name, mutate, count, tmp_path):
    good = loaded = 0
    forget_peak()
    before = peak()
    for seed in [*range(count), *SEEDS.get(name, ())]:
        folder = tmp_path / source
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(GOLDEN / source, folder)
        mutate(folder / name, random.Random(f"{source} {name} {seed}"))
        try:
            load(folder)
            loaded += 1
        except (ValueError, FileNotFoundError) as error:
            assert str(tmp_path) in str(error) or name in str(error), (seed, error)
            assert "\n" not in str(error), (seed, error)
            good += 1
        except Exception as error:
            raise AssertionError(f"case {seed}: {type(error).__name__}: {error}") from error
    assert good > count / 4, "the cases must be hard enough for most to be refused"
    assert peak() - before < 200 * 1024
