"""The same numbers as the libraries that read what this project writes, and write what it reads.

tests/interop.py ran each round trip with sentence-transformers, transformers and PEFT, and stored
in golden/interop the files that passed between them and what they computed.
"""

import copy
import json
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import llm2vec
from llm2vec import POOLING, Decoder, LLM2Vec, load_tokenizer
from lora import load_adapter, merge_lora, save_adapter

INTEROP = Path(__file__).parent / "golden" / "interop"
BASE = INTEROP / "base"
CASES = json.loads((INTEROP / "cases.json").read_text(encoding="utf-8"))
KINDS = ["prepend", "metaspace", "bytes", "bytes-bos"]  # of tokenizers; `bytes` alone has no BOS
ADAPTERS = ["inner-list", "inner-pattern", "inner-all-linear", "causal-list", "causal-pattern"]
ADAPTERS += ["causal-all-linear", "causal-one-layer", "published", "ours-uniform", "ours-mixed"]


@pytest.fixture(scope="module")
def vectors() -> dict[str, torch.Tensor]:
    return load_file(INTEROP / "vectors.safetensors")


@pytest.fixture(scope="module")
def states() -> dict[str, torch.Tensor]:
    return load_file(INTEROP / "states.safetensors")


def encoder(kind: str, pooling: str) -> LLM2Vec:
    decoder = Decoder.from_pretrained(BASE)
    decoder.config.is_causal = False
    return LLM2Vec(decoder, load_tokenizer(INTEROP / kind), pooling, CASES["max_length"])


def adapted(*names: str) -> Decoder:
    """The base model, with the last of these adapters on it and the others merged."""
    decoder = Decoder.from_pretrained(BASE)
    decoder.config.is_causal = False
    for name in names:
        merge_lora(decoder)
        load_adapter(decoder, INTEROP / name)
    return decoder


def assert_states(decoder: Decoder, states: dict[str, torch.Tensor], name: str, atol=1e-5) -> None:
    """Equal within atol, or as near as two float32 computations are: each rounds on its own.

    How much PEFT's rounds is known from float64, which has to be within atol or 2e-5 of it.
    """
    ids, segments, found = states["input_ids"], states["segments"], states[name]
    own = (segments > 0)[..., None]
    hidden = decoder(ids, segments) * own
    exact = copy.deepcopy(decoder).double()(ids, segments) * own
    rounding = (found - exact).abs().max().item()
    assert rounding < max(atol, 2e-5)
    torch.testing.assert_close(hidden, found, atol=max(atol, 2 * rounding), rtol=0)


# --- sentence-transformers -----------------------------------------------------------------------


@pytest.mark.parametrize("pooling", POOLING)
@pytest.mark.parametrize("kind", KINDS)
def test_vectors_are_those_of_sentence_transformers(kind, pooling, vectors, tmp_path):
    """With and without an instruction, in front of an export and behind it."""
    model = encoder(kind, pooling)
    model.save(tmp_path / "exported")
    again = LLM2Vec.from_pretrained(
        tmp_path / "exported", pooling=pooling, max_length=CASES["max_length"]
    )
    for instruction, name in ((None, "plain"), (CASES["instruction"], "instructed")):
        expected = vectors[f"{kind}.{pooling}.{name}"].numpy()
        for encode in (model.encode, again.encode):
            got = encode(CASES["texts"], instruction)
            np.testing.assert_allclose(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS[:2] + KINDS[3:])
def test_an_empty_text_is_its_bos_to_sentence_transformers_too(kind, vectors):
    got = encoder(kind, "first").encode([""])
    np.testing.assert_allclose(got, vectors[f"{kind}.empty"].numpy(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("pooling", POOLING)
@pytest.mark.parametrize("kind", KINDS)
def test_an_export_is_what_the_libraries_read(kind, pooling, tmp_path):
    """Word for word, but for new fields of config.json; tests/interop.py tries a change on them."""
    encoder(kind, pooling).save(tmp_path / "exported")
    expected = json.loads((INTEROP / kind / "exported.json").read_text(encoding="utf-8"))[pooling]
    written = {
        file.relative_to(tmp_path / "exported").as_posix(): json.loads(file.read_text())
        for file in (tmp_path / "exported").rglob("*.json")
    }
    assert written["config.json"]["is_causal"] is False
    del written["tokenizer.json"]["model"]
    if pooling == "mean":
        fields = written["config.json"]
        written["config.json"] = {key: fields.get(key) for key in expected["config.json"]}
    else:  # of the others, only the rule is stored
        written = {"1_Pooling/config.json": written["1_Pooling/config.json"]}
    assert written == expected


# --- PEFT ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_gives_the_states_that_peft_gives(name, states):
    decoder = adapted(name)
    assert_states(decoder, states, name)
    merge_lora(decoder)
    assert_states(decoder, states, name, atol=1e-4)


def test_a_published_adapter_loads_without_a_network(states, monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    config = json.loads((INTEROP / "published" / "adapter_config.json").read_text())
    assert not Path(config["base_model_name_or_path"]).exists()
    assert_states(adapted("published"), states, "published")


def test_an_adapter_is_merged_before_the_next_is_read(states):
    names = ["inner-list", "inner-pattern"]
    model = LLM2Vec.from_pretrained(BASE, [INTEROP / name for name in names])
    assert_states(model.decoder, states, "two")


@pytest.mark.parametrize("name", ["ours-uniform", "ours-mixed"])
def test_a_saved_adapter_is_what_peft_read(name, tmp_path):
    """Ranks and scales that differ between projections come back as they were."""
    save_adapter(adapted(name), tmp_path)
    old, new = (folder / "adapter_config.json" for folder in (INTEROP / name, tmp_path))
    assert json.loads(new.read_text()) == json.loads(old.read_text())
    old, new = (load_file(f / "adapter_model.safetensors") for f in (INTEROP / name, tmp_path))
    assert set(old) == set(new) and all(torch.equal(old[key], new[key]) for key in old)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_that_needs_another_base_is_refused(start, tmp_path):
    """PEFT subtracts such an adapter's start from the base weights when it loads one."""
    shutil.copytree(INTEROP / "inner-list", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": start}))
    with pytest.raises(ValueError, match=f"init_lora_weights is '{start}'"):
        load_adapter(Decoder.from_pretrained(BASE), tmp_path / "adapter")


# --- Files of weights ----------------------------------------------------------------------------


def test_shards_hold_every_weight_once_and_load_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(llm2vec, "SHARD", 20_000)
    model = encoder("prepend", "mean")
    model.save(tmp_path / "exported")
    index = json.loads((tmp_path / "exported" / "model.safetensors.index.json").read_text())
    found, total = {}, 0
    for file in (tmp_path / "exported").glob("*.safetensors"):
        state = load_file(file)
        sizes = [weight.nbytes for weight in state.values()]
        assert sum(sizes) <= 20_000 or len(sizes) == 1, "a weight above the limit is alone"
        assert not found.keys() & state.keys()
        found |= dict.fromkeys(state, file.name)
        total += sum(sizes)
    assert found == index["weight_map"] and len(set(found.values())) > 3
    assert total == index["metadata"]["total_size"]
    again = LLM2Vec.from_pretrained(tmp_path / "exported")
    again.max_length = model.max_length
    assert np.array_equal(model.encode(CASES["texts"]), again.encode(CASES["texts"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_keeps_its_type_and_every_bit(dtype, tmp_path):
    model = LLM2Vec.from_pretrained(BASE, dtype=dtype)
    model.save(tmp_path / "exported")
    with safe_open(tmp_path / "exported" / "model.safetensors", framework="pt") as file:
        written = {name.removeprefix("model."): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert f"torch.{config['torch_dtype']}" == str(dtype)
    state = model.decoder.state_dict()
    assert set(written) == set(state) and {w.dtype for w in written.values()} == {dtype}
    assert all(torch.equal(written[name], state[name]) for name in state)
    again = LLM2Vec.from_pretrained(tmp_path / "exported", dtype=dtype)
    assert np.array_equal(model.encode(CASES["texts"]), again.encode(CASES["texts"]))
