"""The same numbers as the libraries that read what this project writes, and write what it reads.

tests/interop.py ran each round trip with sentence-transformers, transformers and PEFT, and stored
in golden/interop the files that passed between them and what they computed.
"""

import copy
import json
import shutil
import socket

import numpy as np
import pytest
import torch
from helpers import INTEROP, refused, spoil
from safetensors.torch import load_file

import llm2vec_data.export
from llm2vec import Decoder, LLM2Vec, load_tokenizer
from lora import load_adapter, merge_lora, save_adapter

BASE = INTEROP / "base"
CASES = json.loads((INTEROP / "cases.json").read_text(encoding="utf-8"))
KINDS = ["prepend", "metaspace", "bytes", "bytes-bos"]  # of tokenizers; `bytes` alone has no BOS
POOLINGS = ["mean", "weighted_mean", "last", "first"]
ADAPTERS = sorted(file.parent.name for file in INTEROP.glob("*/adapter_config.json"))
VECTORS, STATES = (load_file(INTEROP / f"{x}.safetensors") for x in ("vectors", "states"))


def base(dtype: torch.dtype = torch.float32) -> Decoder:
    decoder = Decoder.from_pretrained(BASE, dtype)
    decoder.config.is_causal = False
    return decoder


def encoder(kind: str, pooling: str = "mean", dtype: torch.dtype = torch.float32) -> LLM2Vec:
    return LLM2Vec(base(dtype), load_tokenizer(INTEROP / kind), pooling, CASES["max_length"])


def adapted(name: str) -> Decoder:
    decoder = base()
    load_adapter(decoder, INTEROP / name)
    return decoder


def assert_states(decoder: Decoder, name: str, atol: float = 2e-5) -> None:
    """In float64, within atol of what PEFT computed in float32; in float32, within 1e-4.

    Each processor rounds float32 in its own way, by up to 2e-5 on these weights.
    """
    ids, segments, found = STATES["input_ids"], STATES["segments"], STATES[name]
    own = (segments > 0)[..., None]
    hidden = decoder(ids, segments) * own
    exact = copy.deepcopy(decoder).double()(ids, segments) * own
    torch.testing.assert_close(found.double(), exact, atol=atol, rtol=0)
    torch.testing.assert_close(hidden, found, atol=1e-4, rtol=0)


# --- sentence-transformers -----------------------------------------------------------------------


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_vectors_are_those_of_sentence_transformers(kind, pooling, tmp_path):
    """With and without an instruction, in front of an export and behind it."""
    model = encoder(kind, pooling)
    model.save(tmp_path / "exported")
    again = LLM2Vec.from_pretrained(tmp_path / "exported")
    for instruction, name in ((None, "plain"), (CASES["instruction"], "instructed")):
        expected = VECTORS[f"{kind}.{pooling}.{name}"].numpy()
        # With BOS and a prompt, their mean is too short, and points the same way.
        unit = pooling == "mean" and kind != "bytes" and instruction is not None
        for encode in (model.encode, again.encode):
            got = encode(CASES["texts"], instruction, normalize=unit)
            np.testing.assert_allclose(got, expected, atol=1e-5, rtol=0)
    if pooling == "first" and kind != "bytes":  # to both, an empty text is its BOS
        expected = VECTORS[f"{kind}.empty"].numpy()
        np.testing.assert_allclose(model.encode([""]), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_export_is_what_the_libraries_read(kind, pooling, tmp_path):
    """Word for word, but for new fields of config.json; tests/interop.py tries a change on them."""
    folder = tmp_path / "exported"
    encoder(kind, pooling).save(folder)
    expected = json.loads((INTEROP / kind / "exported.json").read_text(encoding="utf-8"))[pooling]
    written = {name: json.loads((folder / name).read_text()) for name in expected}
    if pooling == "mean":  # of the others, only the rule is stored
        assert len(list(folder.rglob("*.json"))) == len(expected), "no file more"
        assert written["config.json"]["is_causal"] is False
        assert expected["config.json"].items() <= written["config.json"].items()
        del written["config.json"], expected["config.json"], written["tokenizer.json"]["model"]
    assert written == expected


# --- PEFT ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_gives_the_states_that_peft_gives(name, monkeypatch):
    """Whatever its config names as base model, nothing is looked up."""
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a connection was opened"))
    decoder = adapted(name)
    assert_states(decoder, name)
    merge_lora(decoder)
    assert_states(decoder, name, atol=1e-4)


def test_an_adapter_is_merged_before_the_next_is_read():
    model = LLM2Vec.from_pretrained(BASE, [INTEROP / "inner-list", INTEROP / "inner-pattern"])
    assert_states(model.decoder, "two")


@pytest.mark.parametrize("name", ["ours-uniform", "ours-mixed"])
def test_a_saved_adapter_is_what_peft_read(name, tmp_path):
    """Ranks and scales that differ between projections come back as they were."""
    save_adapter(adapted(name), tmp_path)
    old, new = (
        json.loads((folder / "adapter_config.json").read_text())
        for folder in (INTEROP / name, tmp_path)
    )
    assert new == old | {"base_model_name_or_path": str(BASE.resolve())}
    old, new = (load_file(f / "adapter_model.safetensors") for f in (INTEROP / name, tmp_path))
    assert set(old) == set(new) and all(torch.equal(old[key], new[key]) for key in old)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_that_needs_another_base_is_refused(start, tmp_path):
    """PEFT subtracts such an adapter's start from the base weights when it loads one."""
    shutil.copytree(INTEROP / "inner-list", tmp_path, dirs_exist_ok=True)
    file = tmp_path / "adapter_config.json"
    spoil(file, init_lora_weights=start)
    refused(f"init_lora_weights is '{start}'", load_adapter, base(), tmp_path)


# --- Files of weights ----------------------------------------------------------------------------


def test_shards_hold_every_weight_once_and_load_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(llm2vec_data.export, "SHARD", 20_000)
    model, folder = encoder("prepend"), tmp_path / "exported"
    model.save(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    found, total = {}, 0
    for file in folder.glob("*.safetensors"):
        state = load_file(file)
        sizes = [weight.nbytes for weight in state.values()]
        assert sum(sizes) <= 20_000 or len(sizes) == 1, "a weight above the limit is alone"
        assert not found.keys() & state.keys()
        found |= dict.fromkeys(state, file.name)
        total += sum(sizes)
    assert found == index["weight_map"] and len(set(found.values())) > 3
    assert total == index["metadata"]["total_size"]
    again = LLM2Vec.from_pretrained(folder, max_length=CASES["max_length"])
    assert np.array_equal(model.encode(CASES["texts"]), again.encode(CASES["texts"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_keeps_its_type_and_every_bit(dtype, tmp_path):
    model, folder = encoder("prepend", dtype=dtype), tmp_path / "exported"
    model.save(folder)
    config = json.loads((folder / "config.json").read_text())
    assert f"torch.{config['torch_dtype']}" == str(dtype)
    written, state = load_file(folder / "model.safetensors"), model.decoder.state_dict()
    assert set(written) == {f"model.{name}" for name in state}
    for name, weight in state.items():
        assert weight.dtype == written[f"model.{name}"].dtype == dtype
        assert torch.equal(written[f"model.{name}"], weight)
    again = LLM2Vec.from_pretrained(folder, max_length=CASES["max_length"], dtype=dtype)
    assert np.array_equal(model.encode(CASES["texts"]), again.encode(CASES["texts"]))
