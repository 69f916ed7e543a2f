"""Checkpoints and adapters as people have them: folders of other tools, names on the hub."""

import argparse
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import GOLDEN, INTEROP, refused, spoil
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing

import llm2vec
from llm2vec import POOLING, Config, Decoder, LLM2Vec, prompt_prefix, rotary_table, tokenize
from llm2vec_data.checkpoints import find_checkpoint, load_tokenizer
from llm2vec_data.disk import read_json
from lora import adapted, add_lora, load_adapter, merge_lora, save_adapter

load = LLM2Vec.from_pretrained
TEXTS = ["find the thing", "the quick query and his thing, and the things again"]
CONFIG, WEIGHTS, WORDS = "config.json", "model.safetensors", "tokenizer.json"
SETTINGS, LORA = "adapter/adapter_config.json", "adapter/adapter_model.safetensors"
POOLED, PROMPTS = "1_Pooling/config.json", "config_sentence_transformers.json"


@pytest.fixture
def adapter(folder) -> Path:
    return Path(shutil.copytree(INTEROP / "inner-list", folder / "adapter"))


def rename(file: Path, new_name: Callable[[str], str], *heads: str) -> None:
    """Write the tensors of a file under other names, in 64 bits, and heads of a classifier."""
    state = {new_name(name): weight.double() for name, weight in load_file(file).items()}
    save_file(state | {name: torch.ones(2, 32) for name in heads}, file)


# --- A folder is taken at its word -------------------------------------------------------------


def test_what_sentence_transformers_has_no_file_for_is_remembered(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(POOLING, "mine", lambda own: own**2)
    load(folder, pooling="mine", max_length=7, is_causal=True).save(tmp_path / "out")
    assert not (tmp_path / "out" / "modules.json").exists()
    other = {"pooling": "last", "max_length": 30, "is_causal": False}
    for given, expected in (({}, ("mine", 7, True)), (other, tuple(other.values()))):
        model = load(tmp_path / "out", **given)
        assert (model.pooling, model.max_length, model.decoder.config.is_causal) == expected


def made_elsewhere(folder: Path, *modules: str, **pooling) -> Path:
    """The files that sentence-transformers 6 puts beside a model."""
    rows = [{"path": f"{i}_{m}", "type": f"modules.{m}"} for i, m in enumerate(modules)]
    (folder / "1_Pooling").mkdir()
    for name, content in (("modules.json", rows), (POOLED, pooling)):
        (folder / name).write_text(json.dumps(content))
    return folder


def test_a_folder_of_sentence_transformers_is_causal_and_pools_as_it_says(folder, capsys):
    made_elsewhere(folder, "Transformer", "Pooling", "Normalize", pooling_mode="lasttoken")
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 33}')
    prompts = {"prompts": {"query": "Q: ", "document": ""}, "default_prompt_name": "query"}
    (folder / PROMPTS).write_text(json.dumps(prompts))
    model = load(folder)
    assert (model.pooling, model.max_length, model.decoder.config.is_causal) == ("last", 33, True)
    assert model.prompts == {"query": "Q: "}
    assert "its default prompt 'Q: ' is not read" in capsys.readouterr().err
    spoil(folder / CONFIG, is_causal=False)
    assert load(folder).decoder.config.is_causal is False


def test_a_folder_of_sentence_transformers_that_averages_bos_does_so_here(folder):
    model = load(made_elsewhere(folder, "Transformer", "Pooling", pooling_mode_mean_tokens=True))
    [(ids, _)] = model.rows(["find"], "the:")
    expected = model.decoder(torch.tensor([ids]))[0].mean(0).detach().numpy()
    np.testing.assert_allclose(model.encode(["find"], "the:")[0], expected, atol=1e-5)


def test_an_eos_that_the_tokenizer_does_not_append_is_said(folder, capsys):
    (folder / "tokenizer_config.json").write_text('{"add_eos_token": true}')
    load_tokenizer(folder)
    assert "add_eos_token" in capsys.readouterr().err


def test_between_an_instruction_and_a_text_stands_the_separator(folder):
    model = load(folder, separator=" ")
    [(ids, own)] = model.rows(["the thing"], "find his query: ")
    assert ids == model.tokenizer.encode("find his query: the thing").ids
    alone = model.tokenizer.encode("the thing", add_special_tokens=False).ids
    assert [i for i, o in zip(ids, own, strict=True) if o] == alone, "with its space in front"
    [(ids, _)] = tokenize(model.tokenizer, ["the"], 512, "find:", separator="")
    assert ids == model.tokenizer.encode("find:the").ids
    assert prompt_prefix("find: \n", "\n") == "find:\n"
    assert prompt_prefix(None) == prompt_prefix("") == ""


def test_the_separator_is_a_space_for_the_authors_checkpoints_and_else_as_saved(folder, tmp_path):
    saved = tmp_path / "LLM2Vec-mine"
    load(folder).save(saved)
    assert load(folder).separator == load(folder, [INTEROP / "inner-list"]).separator == "\n"
    assert load(folder, [INTEROP / "published"]).separator == " "
    assert load(saved, [INTEROP / "published"]).separator == "\n"
    spoil(saved / CONFIG, lambda raw: raw.pop("llm2vec"))
    assert load(saved).separator == "", "as in sentence-transformers"
    spoil(folder / CONFIG, architectures=["MistralEncoderModel"])
    assert load(folder).separator == " "


def test_heads_prefixes_and_infixes_come_off_and_64_bits_are_read(folder, adapter, capsys):
    heads = ("score.weight", "v_head.summary.weight", "classifier.bias")
    rename(folder / WEIGHTS, lambda name: f"module._orig_mod.{name}", *heads)
    heads = ("base_model.model.lm_head.weight", "base_model.model.score.weight")
    rename(folder / LORA, lambda name: name.replace(".weight", ".default.weight"), *heads)
    spoil(folder / SETTINGS, modules_to_save=["lm_head", "score"])
    expected = load(INTEROP / "base", [INTEROP / "inner-list"])
    assert np.array_equal(load(folder, [adapter]).encode(TEXTS), expected.encode(TEXTS))
    model, lora = capsys.readouterr().err.splitlines()
    assert f"{folder}: " in model and "and 2 more left out" in model
    assert LORA in lora and "and 1 more left out" in lora


@pytest.mark.parametrize("special", [True, False])
def test_a_token_behind_the_embedding_never_comes_of_a_text(folder, special):
    tokenizer, V = load_tokenizer(folder), Config.from_pretrained(folder).vocab_size
    tokenizer.add_tokens([f"<extra{i}>" for i in range(V - tokenizer.get_vocab_size())])
    tokenizer.add_tokens([AddedToken("<pad>", special=special)])
    assert tokenizer.token_to_id("<pad>") == V
    tokenizer.save(str(folder / WORDS))
    expected = load(INTEROP / "base").encode(["a <pad>"])
    assert np.array_equal(load(folder).encode(["a <pad>"]), expected)


def test_llama3_scaling_without_its_original_length_takes_the_longest(folder):
    shutil.copy(GOLDEN / "llama-llama3-sharded" / CONFIG, folder)
    original = "original_max_position_embeddings"
    spoil(folder / CONFIG, lambda raw: raw["rope_parameters"].pop(original))
    assert Config.from_pretrained(folder).rope_scaling[original] == 64  # as transformers takes it


def test_dynamic_scaling_is_idle_in_short_texts_and_refused_in_long_ones():
    config, how = Config.from_pretrained(GOLDEN / "llama-biased-dynamic"), ("cpu", torch.float32)
    assert len(rotary_table(config, 64, *how)[0]) == 64
    refused("dynamic: .* 65 tokens", rotary_table, config, 65, *how)


# --- What is refused by name -------------------------------------------------------------------

NORM, DOWN = "model.norm.weight", "model.layers.0.mlp.down_proj"
UP, KEY = "layers.0.mlp.up_proj", "model.layers.1.self_attn.k_proj.weight"
A = f"base_model.model.{UP}.lora_A.weight"
TYPES = (torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2)
BAD = {CONFIG: {"model_type": "gpt2", "hidden_act": "gelu", "partial_rotary_factor": 0.5}}
BAD[CONFIG] |= {"vocab_size": "384", "num_hidden_layers": 0, "head_dim": 5}
BAD[CONFIG] |= {"tie_word_embeddings": "no", "layer_types": ["full_attention"]}
BAD[SETTINGS] = {"lora_alpha": float("inf"), "modules_to_save": ["embed_tokens"]}
BAD[SETTINGS] |= dict.fromkeys(("use_dora", "use_qalora", "use_bdlora", "lora_bias"), True)
BAD[SETTINGS] |= dict.fromkeys(("fan_in_fan_out", "layer_replication"), True)
BAD[SETTINGS] |= dict.fromkeys(("alora_invocation_tokens", "trainable_token_indices"), True)
BAD["sentence_bert_config.json"] = {"do_lower_case": True, "processing_kwargs": {"x": 1}}
BAD |= {"tokenizer_config.json": {"truncation_side": "left"}, PROMPTS: {"truncate_dim": 64}}


def bos(change: Callable[[dict], object]) -> Callable[[dict], object]:
    """Change the special tokens of the template that puts a BOS in front."""
    return lambda raw: change(raw["post_processor"]["processors"][0]["special_tokens"])


def quantise(state: dict) -> None:
    state[f"{DOWN}.qweight"] = state.pop(f"{DOWN}.weight").int()


def renamed(old: str, new: str) -> Callable[[dict], object]:
    """Some tensors once more, under other names."""
    return lambda s: s.update({k.replace(old, new): w + 1 for k, w in s.items() if old in k})


SPOILED = [  # a file, its new fields or how it changes, and what is named beside the file
    *((WEIGHTS, lambda s, t=t: s.update({NORM: s[NORM].to(t)}), f"{NORM}.*{t}") for t in TYPES),
    *((WEIGHTS, lambda s, x=x: s[NORM][3:4].fill_(float(x)), NORM) for x in ("nan", "inf")),
    (WEIGHTS, lambda s: s.update({NORM: s[NORM].double() * 1e300}), NORM),
    (WEIGHTS, {KEY: torch.zeros(15, 32)}, rf"{KEY} is \[15, 32\]"),
    (WEIGHTS, quantise, r"quantised \(awq\)"),
    (CONFIG, {"rope_parameters": {"full_attention": {}}}, "differ by layer"),
    (CONFIG, {"rope_parameters": {"rope_theta": "big"}}, "'big'"),
    (CONFIG, {"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "yarn"),
    (CONFIG, {"rope_scaling": {"type": "linear"}}, "factor"),
    (CONFIG, {"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0"),
    (CONFIG, {"rope_scaling": {"type": "linear", "factor": -1}}, "factor is -1"),
    (CONFIG, {"num_key_value_heads": 3}, "num_attention_heads"),
    (CONFIG, {"vocab_size": 2**23, "hidden_size": 2**40}, ""),
    (CONFIG, {"layer_types": ["chunked_attention"] * 2}, "layer_types is .*chunked"),
    (CONFIG, {"model_type": "llama", "layer_types": ["sliding_attention"] * 2}, "layer_types"),
    (WORDS, bos(lambda tokens: tokens["<s>"].update(ids=[10**6])), ""),
    (WORDS, bos(lambda tokens: tokens["<s>"].update(ids=[-1])), ""),
    (WORDS, bos(dict.clear), ""),  # where the library panics, which is no Exception
    (LORA, lambda s: s[A].fill_(float("nan")), "up_proj.lora_A"),
    (LORA, lambda s: s.update({A: s[A].int()}), "up_proj.lora_A"),
    (LORA, lambda s: s.update({A: s[A][:, 1:].contiguous()}), r"up_proj.lora_A is \[2, 31\]"),
    (LORA, lambda s: s.pop(A), f"{UP} has lora_B, not lora_A"),
    (LORA, renamed("layers.1", "layers.9"), r"layers\.9\."),
    (LORA, renamed("up_proj", "x"), "layers.0.mlp.x is not"),
    (LORA, renamed("model.l", "model.model.l"), "twice, once as model.layers.0"),
    (LORA, dict.clear, "no adapter"),
    (LORA, {"base_model.model.model.embed_tokens.weight": torch.ones(385, 32)}, "embed_tokens"),
    (SETTINGS, {"alpha_pattern": {"q_proj": 1e308}}, "alpha_pattern.*q_proj"),
    (SETTINGS, {"rank_pattern": {"((q_proj)": 8}}, ""),
    (SETTINGS, {"alpha_pattern": {"(?i)q_proj": 8}}, ""),  # of which Python 3.10 only warns
    (SETTINGS, {"rank_pattern": {"(" * 5000 + ")" * 5000: 8}}, ""),
    # PEFT subtracts what such an adapter starts from from the base weights.
    *((SETTINGS, {"init_lora_weights": s}, s) for s in ("pissa", "pissa_niter_4", "olora")),
]
SPOILED = [(name, change, f"{Path(name).name}.*{said}") for name, change, said in SPOILED]
SPOILED += [  # where the folder is named: two files that do not fit, or a setting of its use
    (WEIGHTS, lambda s: s.pop(KEY), f"{KEY.removeprefix('model.')} is missing"),
    (CONFIG, {"num_hidden_layers": 300}, "is missing"),
    (POOLED, {"pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": True}, "'max'"),
    (POOLED, lambda raw: (raw.clear(), raw.update(pooling_mode="max")), "'max'"),
]
for name, fields in BAD.items():
    SPOILED += [(name, {k: x}, re.escape(f"{k} is {x!r}")) for k, x in fields.items()]


@pytest.mark.parametrize("name, change, said", SPOILED)
def test_what_can_not_be_honoured_is_refused_and_changes_no_model(name, change, said, tmp_path):
    folder = tmp_path / "model"
    load(INTEROP / "base").save(folder)
    adapter = Path(shutil.copytree(INTEROP / "inner-list", folder / "adapter"))
    spoil(folder / CONFIG, quantization_config={"quant_method": "awq"})  # as plain weights may have
    decoder = load(folder, [adapter]).decoder.requires_grad_()
    fields = change if isinstance(change, dict) else {}
    spoil(folder / name, change if callable(change) else None, **fields)
    refused(said, lambda: load_adapter(load(folder) and decoder, adapter))
    assert not adapted(decoder) and all(p.requires_grad for p in decoder.parameters())


@pytest.mark.parametrize("path", ["../x", "/etc/x"])
def test_an_index_names_only_files_of_its_folder(folder, path):
    (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {NORM: path}}))
    refused(f"{WEIGHTS}.index.json.*{path}", load, folder)


def test_a_module_that_would_change_vectors_is_refused_by_name(folder):
    modules = ("Transformer", "Pooling", "Dense")
    refused("Dense", load, made_elsewhere(folder, *modules, pooling_mode="mean"))


def test_a_token_that_the_tokenizer_has_no_word_for_is_one_clear_error(folder):
    words = {"type": "WordLevel", "vocab": {"a": 3}, "unk_token": "[UNK]"}
    spoil(folder / WORDS, model=words, normalizer=None)
    refused("tokenizer.json: .*UNK", load(folder).encode, ["b"])


@pytest.mark.parametrize(
    "gone, instead, said",
    [
        (WEIGHTS, ["pytorch_model.bin"], ".bin weights.*AutoModelForCausalLM"),
        (WEIGHTS, ["pytorch_model.bin.index.json"], ".bin weights"),
        (WEIGHTS, ["model-Q4.gguf"], "GGUF"),
        (WEIGHTS, ["params.json", "consolidated.00.pth"], "Meta or Mistral"),
        (WEIGHTS, ["adapter_config.json"], "is an adapter: .* my/base"),
        (WEIGHTS, [], "no such file: model.safetensors"),
        (CONFIG, [], "config.json: no such file"),
        (WORDS, ["tokenizer.model"], "tokenizer.json: .*AutoTokenizer"),
        (LORA, ["adapter/adapter_model.bin"], ".bin weights.*AutoPeftModel"),
        (LORA, [], "adapter_model.safetensors: no such file"),
        (SETTINGS, ["adapter/model.safetensors"], "is a whole checkpoint"),
    ],
)
def test_what_is_there_instead_is_named_with_the_way_out(folder, adapter, gone, instead, said):
    (folder / gone).unlink()
    for name in instead:
        (folder / name).write_text('{"base_model_name_or_path": "my/base"}')
    refused(said, load, folder, [adapter])


# --- The hub -----------------------------------------------------------------------------------


def test_a_name_on_the_hub_is_as_good_as_a_folder(hub):
    """Nothing is downloaded that is not needed."""
    for name, folder in (("some/model", "base"), ("some/adapter", "inner-list")):
        files = {file.name: file.read_bytes() for file in (INTEROP / folder).iterdir()}
        hub.repositories[name] = files | {"README.md": b"#", "pytorch_model.bin": b"0"}
    model = load("some/model", ["some/adapter"])
    expected = load(INTEROP / "base", [INTEROP / "inner-list"])
    assert np.array_equal(model.encode(TEXTS), expected.encode(TEXTS))
    asked = {Path(path).name for path in hub.asked if "/resolve/" in path}
    assert asked == {CONFIG, WORDS, WEIGHTS, "adapter_config.json", "adapter_model.safetensors"}
    assert Decoder.from_pretrained("some/model").name_or_path == "some/model"


def test_a_name_that_the_hub_does_not_give_is_one_line(hub, tmp_path):
    hub.repositories["some/weights-in-bin"] = {CONFIG: b"{}", "pytorch_model.bin": b"0"}
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


def test_an_adapter_names_its_base_unless_another_was_merged(folder, tmp_path):
    decoder = Decoder.from_pretrained(folder)
    for base in (str(folder.resolve()), None):
        add_lora(decoder, rank=2)
        save_adapter(decoder, tmp_path / "adapter")
        merge_lora(decoder)
        config = read_json(tmp_path / "adapter" / "adapter_config.json")
        assert config["base_model_name_or_path"] == base
    LLM2Vec(decoder, load_tokenizer(folder)).save(tmp_path / "out")
    assert decoder.name_or_path == str((tmp_path / "out").resolve()), "which now has these weights"


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
        spoil(tmp_path / "config.json", use_sliding_window=True)
        config = Config.from_pretrained(tmp_path)
        assert config.sliding_window == 4096
        assert config.layer_types == ["full_attention"] * 28 + ["sliding_attention"] * 2
        spoil(tmp_path / "config.json", sliding_window=None)
        assert Config.from_pretrained(tmp_path).sliding_window is None


# --- Encoding ----------------------------------------------------------------------------------


def test_an_encoder_in_training_encodes_without_dropout(folder):
    model = load(folder)
    model.decoder.config.attention_dropout = 0.9
    assert np.array_equal(model.train().encode(TEXTS), load(folder).encode(TEXTS))


def test_a_loaded_model_is_frozen_and_new_modules_beside_it_are_the_same_each_time(folder):
    class Pooled(LLM2Vec):
        def __init__(self, *args, **how):
            super().__init__(*args, **how)
            self.query = torch.nn.Linear(8, 1)

    def loaded(seed: int) -> tuple[LLM2Vec, torch.Tensor]:
        torch.manual_seed(seed)
        return Pooled.from_pretrained(folder), torch.rand(3)

    (first, _), (second, after) = loaded(1), loaded(2)
    assert torch.equal(first.query.weight, second.query.weight)
    torch.manual_seed(2)
    assert torch.equal(torch.rand(3), after), "nothing is drawn of the caller's numbers"
    assert not any(p.requires_grad for p in first.decoder.parameters())


def test_how_far_encoding_has_come_is_said_if_asked(folder, capsys):
    for progress, said in ((False, ""), (True, "\r1 of 2 texts\r2 of 2 texts\n")):
        load(folder).encode(TEXTS, progress=progress, max_tokens=1)
        assert capsys.readouterr().err == said


def test_the_flags_of_a_model_leave_to_its_folder_what_is_not_given():
    parser = argparse.ArgumentParser()
    llm2vec.add_model_flags(parser)
    for flags, how in (
        ("", {"is_causal": None, "adapters": [], "separator": None, "compile": False}),
        ("--causal --separator :", {"is_causal": True, "separator": ":"}),
        ("--bidirectional --adapters a b", {"is_causal": False, "adapters": ["a", "b"]}),
    ):
        assert how.items() <= vars(parser.parse_args(flags.split())).items()


def test_a_word_in_front_of_every_text_weighs_in_a_text_what_others_do(folder, tmp_path):
    """Only a token that no text can hold has the weight 0 in an export."""
    model, out = load(folder), tmp_path / "out"
    model.save(out)
    assert (out / "1_WordWeights").exists(), "of BOS"
    word = model.tokenizer.encode("the").tokens[-1]
    special = [(word, model.tokenizer.token_to_id(word))]
    model.tokenizer.post_processor = TemplateProcessing(f"{word} $A", special_tokens=special)
    model.save(out)
    assert not (out / "1_WordWeights").exists()
    assert np.array_equal(load(out).encode(TEXTS), model.encode(TEXTS))


WINDOWED = ["mistral-window", "qwen2-window", "smollm3-window"]


@pytest.mark.parametrize("name", [*WINDOWED, "qwen3", "llama-linear-older", "llama-biased-dynamic"])
def test_an_export_of_each_family_has_the_config_that_was_read(name, tmp_path):
    decoder = Decoder.from_pretrained(GOLDEN / name)
    LLM2Vec(decoder, Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))).save(tmp_path / "out")
    assert Config.from_pretrained(tmp_path / "out") == decoder.config
    raw = read_json(tmp_path / "out" / CONFIG)
    # A Mistral with this key is a Ministral in transformers; with null, others are not read there.
    assert ("layer_types" in raw) is (decoder.config.layer_types is not None)
    assert ("use_sliding_window" in raw) is ("mistral" not in name)


def test_a_word_behind_a_prompt_is_cut_as_the_first_of_a_text(folder, tmp_path):
    """Where a space is put in front of the first word alone, and a prompt before that."""
    shutil.copy(INTEROP / "metaspace" / WORDS, folder)
    spoil(folder / WORDS, lambda raw: raw["pre_tokenizer"].update(prepend_scheme="first"))
    model, out = load(folder, pooling="first"), tmp_path / "out"
    model.save(out)
    prompts = read_json(out / PROMPTS)["prompts"]
    # sentence-transformers would take a BOS that it knows, and that ends a prompt, for text.
    assert "bos_token" not in read_json(out / "tokenizer_config.json")
    exported = Tokenizer.from_file(str(out / WORDS))
    for text, (ids, _) in zip(TEXTS, model.rows(TEXTS), strict=True):
        assert prompts["query"] and exported.encode(prompts["query"] + text).ids == ids
