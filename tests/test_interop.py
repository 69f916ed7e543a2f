"""The same numbers as the libraries that read what this project writes, and write what it reads.

tests/interop.py ran each round trip with sentence-transformers, transformers and PEFT, and stored
in golden/interop the files that passed between them and what they computed.
"""

import copy
import json
import socket

import numpy as np
import pytest
import torch
from helpers import INTEROP
from safetensors.torch import load_file

import llm2vec_data.export
from llm2vec import Decoder, LLM2Vec, load_tokenizer
from lora import load_adapter, merge_lora, save_adapter

BASE = INTEROP / "base"
CASES = json.loads((INTEROP / "cases.json").read_text(encoding="utf-8"))
ADAPTERS = sorted(file.parent.name for file in INTEROP.glob("*/adapter_config.json"))
VECTORS, STATES = (load_file(INTEROP / f"{x}.safetensors") for x in ("vectors", "states"))


def encoder(kind: str, pooling: str = "mean", dtype: torch.dtype = torch.float32) -> LLM2Vec:
    decoder = Decoder.from_pretrained(BASE, dtype)
    decoder.config.is_causal = False
    return LLM2Vec(decoder, load_tokenizer(INTEROP / kind), pooling, CASES["max_length"])


def assert_states(decoder: Decoder, name: str, atol: float = 2e-5) -> None:
    """In float64, within atol of what PEFT computed in float32; in float32, within 1e-4.

    Each processor rounds float32 in its own way, by up to 2e-5 on these weights.
    """
    ids, segments, found = STATES["input_ids"], STATES["segments"], STATES[name]
    own = (segments > 0)[..., None]
    exact = copy.deepcopy(decoder).double()(ids, segments) * own
    torch.testing.assert_close(found.double(), exact, atol=atol, rtol=0)
    torch.testing.assert_close(decoder(ids, segments) * own, found, atol=1e-4, rtol=0)


# --- sentence-transformers -----------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "weighted_mean", "last", "first"])
@pytest.mark.parametrize("kind", ["prepend", "metaspace", "bytes", "bytes-bos"])
def test_vectors_and_files_are_those_of_sentence_transformers(kind, pooling, tmp_path):
    """With and without an instruction, before an export and read again after it.

    Files are so word for word, but for new fields of config.json; interop.py tries a change.
    """
    model = encoder(kind, pooling)
    model.save(tmp_path)
    for encode in (model.encode, LLM2Vec.from_pretrained(tmp_path).encode):
        for instruction, name in ((None, "plain"), (CASES["instruction"], "instructed")):
            # With BOS (all but `bytes`) and a prompt, their mean points the same way, too short.
            unit = pooling == "mean" and kind != "bytes" and instruction is not None
            got = encode(CASES["texts"], instruction, normalize=unit)
            expected = VECTORS[f"{kind}.{pooling}.{name}"].numpy()
            np.testing.assert_allclose(got, expected, atol=1e-5, rtol=0)
        if pooling == "first" and kind != "bytes":  # to both, an empty text is its BOS
            expected = VECTORS[f"{kind}.empty"].numpy()
            np.testing.assert_allclose(encode([""]), expected, atol=1e-5, rtol=0)
    expected = json.loads((INTEROP / kind / "exported.json").read_text(encoding="utf-8"))[pooling]
    written = {name: json.loads((tmp_path / name).read_text()) for name in expected}
    if pooling == "mean":  # of the others, only the rule is stored
        assert len(list(tmp_path.rglob("*.json"))) == len(expected), "no file more"
        config = written.pop("config.json")
        assert expected.pop("config.json").items() <= config.items() and not config["is_causal"]
        del written["tokenizer.json"]["model"]
    assert written == expected


# --- PEFT ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_gives_the_states_that_peft_gives(name, monkeypatch):
    """Whatever its config names as base model, nothing is looked up."""
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a connection was opened"))
    decoder = encoder("prepend").decoder
    load_adapter(decoder, INTEROP / name)
    assert_states(decoder, name)
    merge_lora(decoder)
    assert_states(decoder, name, atol=1e-4)


def test_an_adapter_is_merged_before_the_next_is_read():
    model = LLM2Vec.from_pretrained(BASE, [INTEROP / "inner-list", INTEROP / "inner-pattern"])
    assert_states(model.decoder, "two")


@pytest.mark.parametrize("name", ["ours-uniform", "ours-mixed"])
def test_a_saved_adapter_is_what_peft_read(name, tmp_path):
    """Ranks and scales that differ between projections come back as they were."""
    decoder = encoder("prepend").decoder
    load_adapter(decoder, INTEROP / name)
    save_adapter(decoder, tmp_path)
    folders = INTEROP / name, tmp_path
    old, new = (json.loads((folder / "adapter_config.json").read_text()) for folder in folders)
    assert new == old | {"base_model_name_or_path": str(BASE.resolve())}
    old, new = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    torch.testing.assert_close(new, old, atol=0, rtol=0)


# --- Files of weights ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_in_shards_keeps_its_type_and_every_bit(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(llm2vec_data.export, "SHARD", 20_000)
    model = encoder("prepend", dtype=dtype)
    model.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert f"torch.{config['torch_dtype']}" == str(dtype)
    shards = [load_file(file) for file in tmp_path.glob("*.safetensors")]
    written = dict(item for shard in shards for item in shard.items())
    assert len(written) == sum(map(len, shards)) and len(shards) > 1, "a weight is there once"
    state = {f"model.{name}": weight for name, weight in model.decoder.state_dict().items()}
    torch.testing.assert_close(written, state, atol=0, rtol=0)
    again = LLM2Vec.from_pretrained(tmp_path, dtype=dtype)
    assert np.array_equal(model.encode(CASES["texts"]), again.encode(CASES["texts"]))
