"""Checkpoints and adapters as people have them: folders of other tools, names on the hub."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import GOLDEN, INTEROP, refused, spoil
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken

import llm2vec
from llm2vec import POOLING, Config, Decoder, LLM2Vec, prompt_prefix, rotary_table, tokenize
from llm2vec_data.checkpoints import find_checkpoint
from lora import add_lora, load_adapter, merge_lora, save_adapter

load = LLM2Vec.from_pretrained
TEXTS = ["find the thing", "the quick query and his thing, and the things again"]


def rename(file: Path, new_name, **more: torch.Tensor) -> None:
    """Write the tensors of a file under other names."""
    save_file({new_name(name): w for name, w in load_file(file).items()} | more, file)


# --- A folder is taken at its word -------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "weighted_mean", "last", "first"])
def test_a_saved_encoder_is_what_it_was(folder, tmp_path, pooling, is_causal):
    how = {"pooling": pooling, "max_length": 9, "is_causal": is_causal, "separator": " "}
    model = load(folder, **how)
    model.save(tmp_path / "out")
    for instruction in (None, "find:"):
        expected = model.encode(TEXTS, instruction)
        np.testing.assert_array_equal(load(tmp_path / "out").encode(TEXTS, instruction), expected)
    other = load(tmp_path / "out", pooling="last", max_length=30)
    assert (other.pooling, other.max_length) == ("last", 30), "unless the caller says otherwise"


def test_what_sentence_transformers_has_no_file_for_is_remembered(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(POOLING, "mine", lambda own: own**2)
    load(folder, pooling="mine", max_length=7).save(tmp_path / "out")
    assert not (tmp_path / "out" / "modules.json").exists()
    again = load(tmp_path / "out")
    assert (again.pooling, again.max_length, again.decoder.config.is_causal) == ("mine", 7, False)


def elsewhere(folder: Path, modules: list[str], **pooling) -> Path:
    """The files that sentence-transformers 6 puts beside a model."""
    kind = "sentence_transformers.sentence_transformer.modules."
    rows = [{"idx": i, "path": f"{i}_{m}", "type": kind + m} for i, m in enumerate(modules)]
    (folder / "modules.json").write_text(json.dumps(rows))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


def test_a_folder_of_sentence_transformers_is_causal_and_pools_as_it_says(folder, capsys):
    elsewhere(folder, ["Transformer", "Pooling", "Normalize"], pooling_mode="lasttoken")
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 33}')
    model = load(folder)
    assert (model.pooling, model.max_length, model.decoder.config.is_causal) == ("last", 33, True)
    expected = load(INTEROP / "base", pooling="last", is_causal=True)
    np.testing.assert_array_equal(model.encode(TEXTS), expected.encode(TEXTS))
    prompts = {"prompts": {"query": "Q: ", "document": ""}, "default_prompt_name": "query"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    assert load(folder).prompts == {"query": "Q: "}
    assert "its default prompt 'Q: ' is not read" in capsys.readouterr().err
    spoil(folder / "config.json", is_causal=False)
    assert load(folder).decoder.config.is_causal is False


def test_a_folder_of_sentence_transformers_that_averages_bos_does_so_here(folder):
    elsewhere(folder, ["Transformer", "Pooling"], pooling_mode_mean_tokens=True)
    model = load(folder)
    [(ids, own)] = model.rows(["find"], "the:")
    assert all(own)
    hidden = model.decoder(torch.tensor([ids]))[0]
    expected = hidden.mean(0).detach().numpy()
    np.testing.assert_allclose(model.encode(["find"], "the:")[0], expected, atol=1e-5)


@pytest.mark.parametrize(
    "module, pooling, said",
    [
        ("Dense", {"pooling_mode": "mean"}, "Dense"),
        ("Normalize", {"pooling_mode": "max"}, "'max'"),
        ("Normalize", {"pooling_mode_max_tokens": True}, "'max'"),
    ],
)
def test_what_would_give_other_vectors_is_refused(folder, module, pooling, said):
    refused(said, load, elsewhere(folder, ["Transformer", "Pooling", module], **pooling))


@pytest.mark.parametrize(
    "file, fields",
    [
        ("sentence_bert_config.json", {"do_lower_case": True}),
        ("sentence_bert_config.json", {"processing_kwargs": {"x": 1}}),
        ("tokenizer_config.json", {"truncation_side": "left"}),
        ("config_sentence_transformers.json", {"truncate_dim": 64}),
    ],
)
def test_a_setting_that_is_not_supported_is_refused_by_name(file, fields, folder, tmp_path):
    load(folder).save(tmp_path / "out")
    spoil(tmp_path / "out" / file, **fields)
    refused(f"{next(iter(fields))} is .*not supported", load, tmp_path / "out")


def test_an_eos_that_the_tokenizer_does_not_append_is_said(folder, capsys):
    (folder / "tokenizer_config.json").write_text('{"add_eos_token": true}')
    load(folder)
    assert "add_eos_token" in capsys.readouterr().err


# --- Between an instruction and a text ---------------------------------------------------------


def test_the_separator_is_a_setting_and_a_space_for_the_authors_checkpoints(folder, tmp_path):
    model = load(folder, separator=" ")
    [(ids, own)] = model.rows(["the thing"], "find his query: ")
    assert ids == model.tokenizer.encode("find his query: the thing").ids
    alone = model.tokenizer.encode("the thing", add_special_tokens=False).ids
    assert [i for i, o in zip(ids, own, strict=True) if o] == alone, "with its space in front"
    [(ids, _)] = tokenize(model.tokenizer, ["the"], 512, "find:", separator="")
    assert ids == model.tokenizer.encode("find:the").ids
    assert load(folder).separator == load(folder, [INTEROP / "inner-list"]).separator == "\n"
    assert load(folder, [INTEROP / "published"]).separator == " "
    load(folder).save(tmp_path / "LLM2Vec-mine")
    mine = load(tmp_path / "LLM2Vec-mine", [INTEROP / "published"])
    assert mine.separator == "\n", "as it was saved, whatever its name"
    spoil(tmp_path / "LLM2Vec-mine" / "config.json", lambda raw: raw.pop("llm2vec"))
    assert load(tmp_path / "LLM2Vec-mine").separator == "", "as in sentence-transformers"
    spoil(folder / "config.json", architectures=["MistralEncoderModel"])
    assert load(folder).separator == " "
    assert prompt_prefix("find: \n", "\n") == "find:\n"
    assert prompt_prefix(None) == prompt_prefix("") == ""


# --- What an encoder has no use for ------------------------------------------------------------


def test_heads_and_prefixes_of_a_checkpoint_come_off(folder, capsys):
    expected = load(folder).encode(TEXTS)
    names = ("score.weight", "v_head.summary.weight", "classifier.bias")
    heads = {name: torch.ones(2, 32) for name in names}
    rename(folder / "model.safetensors", lambda name: f"module._orig_mod.{name}", **heads)
    assert np.array_equal(load(folder).encode(TEXTS), expected)
    [line] = capsys.readouterr().err.splitlines()
    assert "and 2 more left out" in line and str(folder) in line


@pytest.fixture
def adapter(tmp_path) -> Path:
    return shutil.copytree(INTEROP / "inner-list", tmp_path / "adapter")


def test_heads_and_infixes_of_an_adapter_come_off(folder, adapter, capsys):
    decoder, expected = Decoder.from_pretrained(folder), Decoder.from_pretrained(folder)
    load_adapter(expected, adapter)
    names = ("base_model.model.lm_head.weight", "base_model.model.score.weight")
    heads = {name: torch.ones(2, 32) for name in names}
    file = adapter / "adapter_model.safetensors"
    rename(file, lambda name: name.replace(".weight", ".default.weight"), **heads)
    spoil(adapter / "adapter_config.json", modules_to_save=["lm_head", "score"])
    load_adapter(decoder, adapter)
    assert "and 1 more left out" in capsys.readouterr().err
    ids = torch.arange(3, 12)[None]
    assert torch.equal(decoder(ids), expected(ids))


def test_an_adapter_with_embeddings_is_refused(folder, adapter):
    decoder = Decoder.from_pretrained(folder)
    spoil(adapter / "adapter_config.json", modules_to_save=["embed_tokens"])
    refused(r"modules_to_save is \['embed_tokens'\]", load_adapter, decoder, adapter)
    spoil(adapter / "adapter_config.json", modules_to_save=None)
    whole = {"base_model.model.model.embed_tokens.weight": torch.ones(385, 32)}
    spoil(adapter / "adapter_model.safetensors", **whole)
    refused("embed_tokens.* merge it with PEFT", load_adapter, decoder, adapter)


@pytest.mark.parametrize("special", [True, False])
def test_a_token_behind_the_embedding_never_comes_of_a_text(folder, special):
    model = load(folder)
    tokenizer, V = model.tokenizer, model.decoder.config.vocab_size
    tokenizer.add_tokens([f"<extra{i}>" for i in range(V - tokenizer.get_vocab_size())])
    add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
    add([AddedToken("<pad>")])
    assert tokenizer.token_to_id("<pad>") == V
    tokenizer.save(str(folder / "tokenizer.json"))
    expected = load(INTEROP / "base").encode(["a <pad>"])
    assert np.array_equal(load(folder).encode(["a <pad>"]), expected)


# --- config.json -------------------------------------------------------------------------------


def test_llama3_scaling_without_its_original_length_takes_the_longest(tmp_path):
    folder = shutil.copytree(GOLDEN / "llama-llama3-sharded", tmp_path / "model")
    original = "original_max_position_embeddings"
    spoil(folder / "config.json", lambda raw: raw["rope_parameters"].pop(original))
    scaling = Config.from_pretrained(folder).rope_scaling
    assert scaling["original_max_position_embeddings"] == 64  # as transformers takes it


def test_dynamic_scaling_is_idle_in_short_texts_and_refused_in_long_ones():
    how = Config.from_pretrained(GOLDEN / "llama-biased-dynamic"), torch.device("cpu")
    assert len(rotary_table(how[0], 64, how[1], torch.float32)[0]) == 64
    refused("dynamic: .* 65 tokens", rotary_table, how[0], 65, how[1], torch.float32)


def test_a_window_that_no_layer_has_is_none(folder):
    spoil(folder / "config.json", model_type="qwen2", use_sliding_window=True, sliding_window=4)
    assert set(Config.from_pretrained(folder).layer_types) == {"full_attention"}  # of 28 and above
    spoil(folder / "config.json", use_sliding_window=False, sliding_window=None)
    assert Config.from_pretrained(folder).sliding_window is None


# --- What is there instead ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "files, said",
    [
        (["pytorch_model.bin"], ".bin weights.*AutoModelForCausalLM"),
        (["pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"], ".bin weights"),
        (["model-Q4.gguf"], "GGUF"),
        (["params.json", "consolidated.00.pth"], "Meta or Mistral"),
        (["adapter_model.safetensors"], "is an adapter: .* my/base"),
        ([], "no such file: model.safetensors"),
    ],
)
def test_a_folder_without_weights_says_what_it_holds(folder, files, said):
    (folder / "model.safetensors").unlink()
    for name in files:
        (folder / name).touch()
    if "adapter_model.safetensors" in files:
        (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "my/base"}')
    refused(said, load, folder)


def test_other_missing_files_say_what_to_do(folder, adapter):
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    refused("tokenizer.json: .*AutoTokenizer", load, folder)
    decoder = Decoder.from_pretrained(folder)  # which needs none
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    refused(".bin weights.*AutoPeftModel", load_adapter, decoder, adapter)
    refused("is a whole checkpoint", load_adapter, decoder, folder)


def test_quantised_weights_are_named_by_their_method(folder):
    spoil(folder / "config.json", quantization_config={"quant_method": "awq"})
    load(folder)  # a key that plain weights were left with

    def quantise(state: dict) -> None:
        del state["model.layers.0.mlp.down_proj.weight"]
        state["model.layers.0.mlp.down_proj.qweight"] = torch.ones(4, 4, dtype=torch.int32)

    spoil(folder / "model.safetensors", quantise)
    refused(r"quantised \(awq\)", load, folder)


# --- The hub -----------------------------------------------------------------------------------


def files_in(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


@pytest.fixture
def models(hub):
    """The hub has a model, an adapter, and files that are not needed."""
    more = {"README.md": b"#", "consolidated.safetensors": b"0", "pytorch_model.bin": b"0"}
    hub.repositories |= {
        "some/model": files_in(INTEROP / "base") | more,
        "some/adapter": files_in(INTEROP / "inner-list") | {"training_args.bin": b"0"},
        "some/weights-in-bin": {"config.json": b"{}", "pytorch_model.bin": b"0"},
    }


def test_a_name_on_the_hub_is_as_good_as_a_folder(hub, models):
    model = load("some/model", ["some/adapter"])
    expected = load(INTEROP / "base", [INTEROP / "inner-list"])
    assert np.array_equal(model.encode(TEXTS), expected.encode(TEXTS))
    asked = {Path(path).name for path in hub.asked if "/resolve/" in path}
    needed = {"config.json", "tokenizer.json", "model.safetensors"}
    assert asked == needed | {"adapter_config.json", "adapter_model.safetensors"}
    assert Decoder.from_pretrained("some/model").name_or_path == "some/model"


def test_a_name_that_the_hub_does_not_give_is_one_line(hub, models, tmp_path):
    refused("some/other: .* check the name", load, "some/other")
    refused(r"some/weights-in-bin: .*\('weights-in-bin'\)", load, "some/weights-in-bin")
    hub.gated = True
    refused("some/gated: .* accept its terms", load, "some/gated")
    hub.offline(True)
    refused("some/model: .* HF_HUB_OFFLINE", load, "some/model")
    before = list(hub.asked)
    hub.offline(False)
    for path in (tmp_path / "missing", f"{tmp_path}/a/b", "three/part/name", "name"):
        refused("no such folder", find_checkpoint, path)
    assert hub.asked == before, "a path is not looked for on the hub"


# --- An adapter and its base -------------------------------------------------------------------


def test_an_adapter_names_its_base_unless_another_was_merged(folder, tmp_path):
    decoder = Decoder.from_pretrained(folder)
    for base in (str(folder.resolve()), None):
        add_lora(decoder, rank=2)
        save_adapter(decoder, tmp_path / "adapter")
        merge_lora(decoder)
        config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == base
    LLM2Vec(decoder, llm2vec.load_tokenizer(folder)).save(tmp_path / "out")
    assert decoder.name_or_path == str((tmp_path / "out").resolve()), "which now has these weights"


# --- Words -------------------------------------------------------------------------------------


def test_a_word_is_the_mean_of_its_tokens_states(encoder):
    found = encoder.encode_words(["Naturalists", "describe"])
    ids, first = (encoder.tokenizer.encode(t).ids for t in ("Naturalists describe", "Naturalists"))
    n = len(first)
    states = encoder.decoder(torch.tensor([ids]))[0].detach().numpy()
    np.testing.assert_allclose(found, [states[:n].mean(0), states[n:].mean(0)], atol=1e-5)
    assert n > 1
