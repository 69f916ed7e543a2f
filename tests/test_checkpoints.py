"""Checkpoints and adapters as people have them: folders of other tools, names on the hub."""

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing

import llm2vec
from llm2vec import POOLING, Config, Decoder, LLM2Vec, prompt_prefix, rotary_table, tokenize
from llm2vec_data.checkpoints import find_checkpoint
from llm2vec_data.encode import count_cut
from lora import add_lora, load_adapter, merge_lora, save_adapter

pytest_plugins = ["local_hub"]
GOLDEN = Path(__file__).parent / "golden"
INTEROP = GOLDEN / "interop"
TINY = Path(__file__).parent.parent / "data" / "tiny-llama"
TEXTS = ["find the thing", "the quick query and his thing, and the things again"]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A small Mistral with BOS."""
    return shutil.copytree(INTEROP / "base", tmp_path / "model")


def change(file: Path, **fields) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def rename(file: Path, new_name, **more: torch.Tensor) -> None:
    """Write the tensors of a file under other names."""
    save_file({new_name(name): w for name, w in load_file(file).items()} | more, file)


# --- A folder is taken at its word -------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "weighted_mean", "last", "first"])
def test_a_saved_encoder_is_what_it_was(folder, tmp_path, pooling, is_causal):
    how = {"pooling": pooling, "max_length": 9, "is_causal": is_causal, "separator": " "}
    model = LLM2Vec.from_pretrained(folder, **how)
    model.save(tmp_path / "out")
    again = LLM2Vec.from_pretrained(tmp_path / "out")
    for instruction in (None, "find:"):
        expected = model.encode(TEXTS, instruction)
        np.testing.assert_array_equal(again.encode(TEXTS, instruction), expected)
    other = LLM2Vec.from_pretrained(tmp_path / "out", pooling="last", max_length=30)
    assert (other.pooling, other.max_length) == ("last", 30), "unless the caller says otherwise"


def test_what_sentence_transformers_has_no_file_for_is_remembered_too(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setitem(POOLING, "mine", lambda own: own**2)
    LLM2Vec.from_pretrained(folder, pooling="mine", max_length=7).save(tmp_path / "out")
    assert not (tmp_path / "out" / "modules.json").exists()
    again = LLM2Vec.from_pretrained(tmp_path / "out")
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
    model = LLM2Vec.from_pretrained(folder)
    assert (model.pooling, model.max_length, model.decoder.config.is_causal) == ("last", 33, True)
    expected = LLM2Vec.from_pretrained(INTEROP / "base", pooling="last", is_causal=True)
    np.testing.assert_array_equal(model.encode(TEXTS), expected.encode(TEXTS))
    prompts = {"prompts": {"query": "Q: ", "document": ""}, "default_prompt_name": "query"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    assert LLM2Vec.from_pretrained(folder).prompts == {"query": "Q: "}
    assert "its default prompt 'Q: ' is not read" in capsys.readouterr().err
    change(folder / "config.json", is_causal=False)
    assert LLM2Vec.from_pretrained(folder).decoder.config.is_causal is False


def test_a_folder_of_sentence_transformers_that_averages_bos_does_so_here(folder):
    elsewhere(folder, ["Transformer", "Pooling"], pooling_mode_mean_tokens=True)
    model = LLM2Vec.from_pretrained(folder)
    [(ids, own)] = model.rows(["find"], "the:")
    assert all(own)
    hidden = model.decoder(torch.tensor([ids]))[0]
    expected = hidden.mean(0).detach().numpy()
    np.testing.assert_allclose(model.encode(["find"], "the:")[0], expected, atol=1e-5)


@pytest.mark.parametrize(
    "modules, pooling, said",
    [
        (["Transformer", "Pooling", "Dense"], {"pooling_mode": "mean"}, "a module Dense"),
        (["Transformer", "Pooling"], {"pooling_mode": "max"}, "pooling 'max': expected mean"),
        (["Transformer", "Pooling"], {"pooling_mode_max_tokens": True}, "pooling 'max'"),
    ],
)
def test_what_would_give_other_vectors_is_refused(folder, modules, pooling, said):
    elsewhere(folder, modules, **pooling)
    with pytest.raises(ValueError, match=said):
        LLM2Vec.from_pretrained(folder)


# --- Between an instruction and a text ---------------------------------------------------------


def test_the_separator_is_a_setting_and_a_space_for_the_authors_checkpoints(folder, tmp_path):
    model = LLM2Vec.from_pretrained(folder, separator=" ")
    [(ids, own)] = model.rows(["the thing"], "find his query: ")
    assert ids == model.tokenizer.encode("find his query: the thing").ids
    alone = model.tokenizer.encode("the thing", add_special_tokens=False).ids
    assert [i for i, o in zip(ids, own, strict=True) if o] == alone, "with its space in front"
    [(ids, _)] = tokenize(model.tokenizer, ["the"], 512, "find:", separator="")
    assert ids == model.tokenizer.encode("find:the").ids
    assert LLM2Vec.from_pretrained(folder).separator == "\n"
    assert LLM2Vec.from_pretrained(folder, [INTEROP / "inner-list"]).separator == "\n"
    assert LLM2Vec.from_pretrained(folder, [INTEROP / "published"]).separator == " "
    LLM2Vec.from_pretrained(folder).save(tmp_path / "LLM2Vec-mine")
    mine = LLM2Vec.from_pretrained(tmp_path / "LLM2Vec-mine", [INTEROP / "published"])
    assert mine.separator == "\n", "as it was saved, whatever its name"
    change(folder / "config.json", architectures=["MistralEncoderModel"])
    assert LLM2Vec.from_pretrained(folder).separator == " "
    assert prompt_prefix("find: \n", "\n") == "find:\n"
    assert prompt_prefix(None) == prompt_prefix("") == ""


# --- What an encoder has no use for ------------------------------------------------------------


def test_heads_and_prefixes_of_a_checkpoint_come_off(folder, capsys):
    expected = LLM2Vec.from_pretrained(folder).encode(TEXTS)
    names = ("score.weight", "v_head.summary.weight", "classifier.bias")
    heads = {name: torch.ones(2, 32) for name in names}
    rename(folder / "model.safetensors", lambda name: f"module._orig_mod.{name}", **heads)
    assert np.array_equal(LLM2Vec.from_pretrained(folder).encode(TEXTS), expected)
    [line] = capsys.readouterr().err.splitlines()
    assert "and 2 more left out" in line and str(folder) in line


def test_heads_and_infixes_of_an_adapter_come_off(folder, tmp_path, capsys):
    adapter = shutil.copytree(INTEROP / "inner-list", tmp_path / "adapter")
    decoder, expected = Decoder.from_pretrained(folder), Decoder.from_pretrained(folder)
    load_adapter(expected, adapter)
    names = ("base_model.model.lm_head.weight", "base_model.model.score.weight")
    heads = {name: torch.ones(2, 32) for name in names}
    file = adapter / "adapter_model.safetensors"
    rename(file, lambda name: name.replace(".weight", ".default.weight"), **heads)
    change(adapter / "adapter_config.json", modules_to_save=["lm_head", "score"])
    load_adapter(decoder, adapter)
    assert "and 1 more left out" in capsys.readouterr().err
    ids = torch.arange(3, 12)[None]
    assert torch.equal(decoder(ids), expected(ids))


def test_an_adapter_with_embeddings_is_refused(folder, tmp_path):
    adapter = shutil.copytree(INTEROP / "inner-list", tmp_path / "adapter")
    change(adapter / "adapter_config.json", modules_to_save=["embed_tokens"])
    with pytest.raises(ValueError, match=r"modules_to_save is \['embed_tokens'\]"):
        load_adapter(Decoder.from_pretrained(folder), adapter)
    change(adapter / "adapter_config.json", modules_to_save=None)
    whole = {"base_model.model.model.embed_tokens.weight": torch.ones(385, 32)}
    rename(adapter / "adapter_model.safetensors", str, **whole)
    with pytest.raises(ValueError, match="embed_tokens.* merge it with PEFT"):
        load_adapter(Decoder.from_pretrained(folder), adapter)


@pytest.mark.parametrize("special", [True, False])
def test_a_token_behind_the_embedding_never_comes_of_a_text(folder, special):
    model = LLM2Vec.from_pretrained(folder)
    tokenizer, V = model.tokenizer, model.decoder.config.vocab_size
    tokenizer.add_tokens([f"<extra{i}>" for i in range(V - tokenizer.get_vocab_size())])
    add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
    add([AddedToken("<pad>")])
    assert tokenizer.token_to_id("<pad>") == V
    tokenizer.save(str(folder / "tokenizer.json"))
    expected = LLM2Vec.from_pretrained(INTEROP / "base").encode(["a <pad>"])
    assert np.array_equal(LLM2Vec.from_pretrained(folder).encode(["a <pad>"]), expected)


# --- config.json -------------------------------------------------------------------------------


def test_llama3_scaling_without_its_original_length_takes_the_longest(tmp_path):
    folder = shutil.copytree(GOLDEN / "llama-llama3-sharded", tmp_path / "model")
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    del rope["original_max_position_embeddings"]
    change(folder / "config.json", rope_parameters=rope)
    scaling = Config.from_pretrained(folder).rope_scaling
    assert scaling["original_max_position_embeddings"] == 64  # as transformers takes it


def test_dynamic_scaling_is_idle_in_short_texts_and_refused_in_long_ones():
    config = Config.from_pretrained(GOLDEN / "llama-biased-dynamic")
    assert len(rotary_table(config, 64, torch.device("cpu"), torch.float32)[0]) == 64
    with pytest.raises(ValueError, match="dynamic: a text of 65 tokens, expected at most 64"):
        rotary_table(config, 65, torch.device("cpu"), torch.float32)


def test_a_window_that_no_layer_has_is_none(folder):
    change(folder / "config.json", model_type="qwen2", use_sliding_window=True, sliding_window=4)
    assert set(Config.from_pretrained(folder).layer_types) == {"full_attention"}  # of 28 and above
    change(folder / "config.json", use_sliding_window=False, sliding_window=None)
    assert Config.from_pretrained(folder).sliding_window is None


# --- What is there instead ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "files, said",
    [
        (["pytorch_model.bin"], "has .bin weights.*AutoModelForCausalLM as A; A.from_pretrained"),
        (["pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"], "has .bin weights"),
        (["model-Q4.gguf"], "has GGUF weights: take the safetensors"),
        (["params.json", "consolidated.00.pth"], "format of Meta or Mistral"),
        (["adapter_model.safetensors"], "is an adapter: give its base as the model, my/base"),
        ([], "no such file: model.safetensors"),
    ],
)
def test_a_folder_without_weights_says_what_it_holds(folder, files, said):
    (folder / "model.safetensors").unlink()
    for name in files:
        (folder / name).touch()
    if "adapter_model.safetensors" in files:
        (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "my/base"}')
    with pytest.raises(FileNotFoundError, match=said):
        LLM2Vec.from_pretrained(folder)


def test_other_missing_files_say_what_to_do(folder, tmp_path):
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    with pytest.raises(FileNotFoundError, match="tokenizer.json: no such file; .*AutoTokenizer"):
        LLM2Vec.from_pretrained(folder)
    Decoder.from_pretrained(folder)  # which needs none
    adapter = shutil.copytree(INTEROP / "inner-list", tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="has .bin weights.*AutoPeftModel"):
        load_adapter(Decoder.from_pretrained(folder), adapter)
    with pytest.raises(FileNotFoundError, match="is a whole checkpoint: give it as the model"):
        load_adapter(Decoder.from_pretrained(folder), folder)


def test_quantised_weights_are_named_by_their_method(folder):
    change(folder / "config.json", quantization_config={"quant_method": "awq"})
    LLM2Vec.from_pretrained(folder)  # a key that plain weights were left with
    name = "model.layers.0.mlp.down_proj."
    tensors = load_file(folder / "model.safetensors")
    tensors[name + "qweight"] = torch.ones(4, 4, dtype=torch.int32)
    del tensors[name + "weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"no place .*the weights are quantised \(awq\)"):
        LLM2Vec.from_pretrained(folder)


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


def test_a_name_on_the_hub_is_as_good_as_a_folder(hub, models, monkeypatch):
    model = LLM2Vec.from_pretrained("some/model", ["some/adapter"])
    expected = LLM2Vec.from_pretrained(INTEROP / "base", [INTEROP / "inner-list"])
    assert np.array_equal(model.encode(TEXTS), expected.encode(TEXTS))
    asked = {Path(path).name for path in hub.asked if "/resolve/" in path}
    needed = {"config.json", "tokenizer.json", "model.safetensors"}
    assert asked == needed | {"adapter_config.json", "adapter_model.safetensors"}
    assert Decoder.from_pretrained("some/model").name_or_path == "some/model"
    hub.offline(True)
    hub.repositories.clear()
    again = LLM2Vec.from_pretrained("some/model", "some/adapter")  # from the cache
    assert np.array_equal(again.encode(TEXTS), expected.encode(TEXTS))


def test_a_name_that_the_hub_does_not_give_is_one_line(hub, models, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="some/other: no such folder, and .* check the name"):
        LLM2Vec.from_pretrained("some/other")
    said = r"some/weights-in-bin: has .bin weights.*save_pretrained\('weights-in-bin'\)"
    with pytest.raises(FileNotFoundError, match=said):
        LLM2Vec.from_pretrained("some/weights-in-bin")
    hub.gated = True
    with pytest.raises(ValueError, match="some/gated: .* accept its terms .*hf auth login"):
        LLM2Vec.from_pretrained("some/gated")
    hub.offline(True)
    with pytest.raises(ValueError, match="some/model: .* HF_HUB_OFFLINE"):
        LLM2Vec.from_pretrained("some/model")
    before = list(hub.asked)
    hub.offline(False)
    for path in (tmp_path / "missing", f"{tmp_path}/a/b", "three/part/name", "name"):
        with pytest.raises(FileNotFoundError, match="no such folder"):
            find_checkpoint(path)
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


def test_a_word_is_the_mean_of_its_tokens_states():
    model = LLM2Vec.from_pretrained(TINY)
    found = model.encode_words(["Naturalists", "describe"])
    ids = model.tokenizer.encode("Naturalists describe").ids
    n = len(model.tokenizer.encode("Naturalists").ids)
    states = model.decoder(torch.tensor([ids]))[0].detach().numpy()
    np.testing.assert_allclose(found, [states[:n].mean(0), states[n:].mean(0)], atol=1e-5)
    assert n > 1


# --- What config.json leaves out, and numbers that nothing can be done with ----------------------


@pytest.mark.parametrize(
    "family, fields",
    [  # of transformers' configuration classes
        ("llama", {"sliding_window": None, "tie_word_embeddings": False, "rope_theta": 1e4}),
        ("llama", {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "attention_bias": False}),
        ("mistral", {"num_key_value_heads": 8, "sliding_window": 4096, "head_dim": 4}),
        ("qwen2", {"num_key_value_heads": 32, "sliding_window": None, "qkv_bias": True}),
        ("qwen3", {"num_key_value_heads": 32, "head_dim": 128, "qk_norm": True}),
        ("smollm3", {"num_key_value_heads": 4, "rope_theta": 2e6, "tie_word_embeddings": True}),
    ],
)
def test_a_silent_config_means_the_defaults_of_its_family(family, fields, tmp_path):
    shape = {"vocab_size": 9, "hidden_size": 256, "intermediate_size": 9, "num_hidden_layers": 30}
    raw = shape | {"model_type": family, "num_attention_heads": 64}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = Config.from_pretrained(tmp_path)
    assert {name: getattr(config, name) for name in fields} == fields
    if family == "smollm3":  # every fourth layer is without rotary positions
        assert config.no_rope_layers == [1, 1, 1, 0] * 7 + [1, 1]
    if family.startswith("qwen"):  # the window, where it is used, is that of the layers from 28
        change(tmp_path / "config.json", use_sliding_window=True)
        config = Config.from_pretrained(tmp_path)
        assert config.sliding_window == 4096
        assert config.layer_types == ["full_attention"] * 28 + ["sliding_attention"] * 2


@pytest.mark.parametrize("factor", [0, -1])
def test_a_scaling_factor_that_nothing_can_be_divided_by_is_named(factor, folder):
    change(folder / "config.json", rope_scaling={"rope_type": "linear", "factor": factor})
    with pytest.raises(ValueError, match=f"config.json: factor is {factor}"):
        Config.from_pretrained(folder)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_number_that_is_not_finite_is_enough_to_refuse_a_tensor(bad, folder):
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"][3] = bad
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError, match="model.norm.weight holds NaN or infinity"):
        Decoder.from_pretrained(folder)


# --- Encoding ----------------------------------------------------------------------------------


def test_an_encoder_in_training_encodes_without_dropout(folder):
    model = LLM2Vec.from_pretrained(folder)
    expected = model.encode(TEXTS)
    model.decoder.config.attention_dropout = 0.9
    assert np.array_equal(model.train().encode(TEXTS), expected)


def test_a_loaded_model_is_frozen_and_new_modules_beside_it_are_the_same_each_time(folder):
    class Pooled(LLM2Vec):
        def __init__(self, *args, **how):
            super().__init__(*args, **how)
            self.query = torch.nn.Linear(8, 1)

    torch.manual_seed(1)
    first = Pooled.from_pretrained(folder)
    torch.manual_seed(2)
    after = torch.rand(3)
    torch.manual_seed(2)
    assert torch.equal(Pooled.from_pretrained(folder).query.weight, first.query.weight)
    assert torch.equal(torch.rand(3), after), "nothing is drawn of the caller's numbers"
    assert not any(p.requires_grad for p in first.decoder.parameters())


def test_how_far_encoding_has_come_is_said_if_asked(folder, capsys):
    model = LLM2Vec.from_pretrained(folder)
    model.encode(TEXTS)
    assert capsys.readouterr().err == ""
    model.encode(3 * TEXTS, progress=True, max_tokens=1)
    lines = capsys.readouterr().err.split("\r")[1:]
    assert lines == [*(f"{n} of 6 texts" for n in range(1, 6)), "6 of 6 texts\n"]


@pytest.mark.parametrize(
    "flags, how",
    [
        ([], {"is_causal": None, "adapters": [], "separator": None, "compile": False}),
        (["--causal"], {"is_causal": True}),
        (["--bidirectional"], {"is_causal": False}),
        (["--adapters", "a", "b", "--separator", " "], {"adapters": ["a", "b"], "separator": " "}),
        (["--template", "mine"], None),
        (["--dtype", "float8"], None),
        (["--device", "tpu"], None),
    ],
)
def test_the_flags_of_a_model(flags, how):
    parser = argparse.ArgumentParser()
    llm2vec.add_model_flags(parser, required=True)
    for args in (flags, ["--model", "m", *flags]):
        if how is None or args is flags:
            with pytest.raises(SystemExit):
                parser.parse_args(args)
        else:
            given = vars(parser.parse_args(args))
            assert {name: given[name] for name in how} == how


@pytest.mark.parametrize(
    "line", ["", "encode --model m --input i", "encode --model m --output o", "similar a b"]
)
def test_a_command_that_lacks_something_is_refused(line, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["llm2vec.py", *line.split()])
    with pytest.raises(SystemExit) as end:
        llm2vec.main()
    assert end.value.code == 2 and "required" in capsys.readouterr().err


def test_a_text_of_exactly_the_most_tokens_is_not_cut(folder):
    model = LLM2Vec.from_pretrained(folder)
    lengths = sorted(len(ids) for ids, _ in model.rows(TEXTS))
    counts = []
    for model.max_length in (lengths[1], lengths[1] - 1, lengths[0], lengths[0] - 1):
        counts.append(count_cut(model, TEXTS, None))
    assert counts == [0, 1, 1, 2]


def test_a_word_in_front_of_every_text_weighs_in_a_text_what_others_do(folder, tmp_path):
    """Only a token that no text can hold has the weight 0 in an export."""
    model, out = LLM2Vec.from_pretrained(folder), tmp_path / "out"
    weights = out / "1_WordWeights" / "config.json"
    model.save(out)
    assert weights.exists(), "of BOS"
    word = model.tokenizer.encode("the").tokens[-1]
    template = {
        "single": f"{word} $A",
        "special_tokens": [(word, model.tokenizer.token_to_id(word))],
    }
    model.tokenizer.post_processor = TemplateProcessing(**template)
    model.save(out)
    assert not weights.exists()
    assert np.array_equal(LLM2Vec.from_pretrained(out).encode(TEXTS), model.encode(TEXTS))


WINDOWED = ["mistral-window", "qwen2-window", "smollm3-window"]


@pytest.mark.parametrize("name", [*WINDOWED, "qwen3", "llama-linear-older", "llama-biased-dynamic"])
def test_an_export_of_each_family_has_the_config_that_was_read(name, tmp_path):
    decoder = Decoder.from_pretrained(GOLDEN / name)
    LLM2Vec(decoder, Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))).save(tmp_path / "out")
    assert Config.from_pretrained(tmp_path / "out") == decoder.config
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    # A Mistral with this key is a Ministral in transformers; with null, others are not read there.
    assert ("layer_types" in raw) is (decoder.config.layer_types is not None)
    assert ("use_sliding_window" in raw) is ("mistral" not in name)


def test_a_word_behind_a_prompt_is_cut_as_the_first_of_a_text(folder, tmp_path):
    """Where a space is put in front of the first word alone, and a prompt before that."""
    raw = json.loads((INTEROP / "metaspace" / "tokenizer.json").read_text())
    raw["pre_tokenizer"]["prepend_scheme"] = "first"
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    model, out = LLM2Vec.from_pretrained(folder, pooling="last"), tmp_path / "out"
    model.save(out)
    prompts = json.loads((out / "config_sentence_transformers.json").read_text())["prompts"]
    # sentence-transformers would take a BOS that it knows, and that ends a prompt, for text.
    assert "bos_token" not in json.loads((out / "tokenizer_config.json").read_text())
    exported = Tokenizer.from_file(str(out / "tokenizer.json"))
    for text, (ids, _) in zip(TEXTS, model.rows(TEXTS), strict=True):
        assert prompts["query"] and exported.encode(prompts["query"] + text).ids == ids
