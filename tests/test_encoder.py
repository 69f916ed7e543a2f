"""Texts to vectors, checkpoints in and out, and what is said of bad ones."""

import json
import lzma
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import GOLDEN, TINY, python, spoil, tiny
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

import llm2vec
import llm2vec_data.export
from llm2vec import Decoder, LLM2Vec, load_tokenizer, tokenize
from llm2vec_data.checkpoints import TEMPLATES
from llm2vec_data.corpus import WIKIPEDIA, read_documents
from llm2vec_data.encode import encode_file
from lora import add_lora, merge_lora, save_adapter

UP, KEY, NORM = "layers.1.mlp.up_proj", "layers.0.self_attn.k_proj.weight", "model.norm.weight"


@pytest.fixture
def folder(folder) -> Path:
    """Untied, with an output head of its own."""
    spoil(folder / "config.json", tie_word_embeddings=False)
    spoil(folder / "model.safetensors", **{"lm_head.weight": torch.randn(384, 32)})
    return folder


def own_ids(row: tuple[list[int], list[bool]]) -> list[int]:
    return [i for i, own in zip(*row, strict=True) if own]


# --- Vectors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, N", [(torch.float32, 32), (torch.bfloat16, 8)])
def test_a_vector_does_not_depend_on_its_neighbours(dtype, N):
    encoder = LLM2Vec.from_pretrained(TINY, dtype=dtype)
    texts = [text[: 20 + 9 * i] for i, text in enumerate(read_documents(WIKIPEDIA)[:N])]
    alone = np.concatenate([encoder.encode([text]) for text in texts])
    assert alone.dtype == np.float32 and alone.shape == (N, encoder.decoder.config.hidden_size)
    together = [encoder.encode(texts, max_tokens=n) for n in (1, 300, 100_000)]
    for vectors in (*together, encoder.encode(texts[::-1])[::-1]):
        norms = np.linalg.norm(alone, axis=1) * np.linalg.norm(vectors, axis=1)
        assert ((alone * vectors).sum(1) / norms).min() > 0.9999
        if dtype == torch.float32:
            assert np.abs(vectors - alone).max() < 1e-5 * max(1, np.abs(alone).max())


def test_an_empty_text_has_a_finite_vector(encoder, folder):
    for model in (encoder, LLM2Vec.from_pretrained(folder)):
        vectors = model.encode(["", "  ", "a b", "\n"])
        found = np.abs(vectors).max(1) > 0
        assert np.isfinite(vectors).all() and found[1:].all()
        assert found[0] == bool(model.tokenizer.encode("").ids), "0 where there is no BOS either"
        np.testing.assert_allclose(model.encode([""])[0], model.encode(["", "a"])[0], atol=1e-5)
    assert encoder.encode([]).shape == (0, encoder.decoder.config.hidden_size)


@pytest.mark.parametrize(
    "texts, said",
    [
        (["a", None], "text 1 is NoneType"),
        (["fine", "a \ud800"], "text 1 holds half a surrogate pair"),
    ],
)
def test_what_is_not_a_list_of_texts_is_refused(encoder, texts, said):
    with pytest.raises(ValueError, match=said):
        encoder.encode(texts)


def test_bos_and_instruction_are_read_but_not_averaged(folder):
    model, plain = LLM2Vec.from_pretrained(folder), Tokenizer.from_file(f"{folder}/tokenizer.json")
    ids = plain.encode("find this:\na b").ids
    [row] = tokenize(model.tokenizer, ["a b"], 512, instruction="find this:")
    assert row == (ids, [False] * (len(ids) - 3) + [True] * 3), "a, a space, b"
    expected = model.decoder(torch.tensor([ids]))[0, -3:].mean(0).detach().numpy()
    got = model.encode(["a b"], instruction="find this:")[0]
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert not np.allclose(got, model.encode(["a b"])[0], atol=1e-3)
    [row] = tokenize(model.tokenizer, ["a b a b a b"], 4)
    assert row == (plain.encode("a b").ids[:4], [False, True, True, True]), "cut at the end"
    with pytest.raises(ValueError, match="leaves no room"):
        tokenize(model.tokenizer, ["a"], 3, instruction="find this:")


# --- Checkpoints -------------------------------------------------------------------------------


def test_saving_never_replaces_a_folder_of_something_else(encoder, tmp_path):
    (tmp_path / "thesis.txt").write_text("three years of work")
    (tmp_path / "config.json").write_text("{}")  # of any program
    with pytest.raises(ValueError, match="not a checkpoint"):
        encoder.save(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.parametrize(
    "owner, name, countdown",
    [
        (llm2vec_data.export, "save_file", 1),
        (Path, "write_text", 3),
        (os, "replace", 1),
        (os, "replace", 2),
    ],
)
def test_a_save_that_is_cut_short_leaves_what_was_there(
    owner, name, countdown, folder, tmp_path, monkeypatch
):
    out, model, original = tmp_path / "out", LLM2Vec.from_pretrained(folder), getattr(owner, name)
    model.save(out)
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}

    def full(*args, **kwargs):
        nonlocal countdown
        countdown -= 1
        if countdown == 0:
            raise OSError(28, "No space left on device")
        return original(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(owner, name, full)
        model.save(out)
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    assert not list(tmp_path.glob(".new-*")), "no scratch folder stays behind"


def test_a_whole_file_is_read_before_an_index_as_in_transformers(tmp_path):
    folder = Path(shutil.copytree(GOLDEN / "llama-llama3-sharded", tmp_path / "model"))
    state = {name: w for file in folder.glob("model-*") for name, w in load_file(file).items()}
    save_file(state | {NORM: torch.full([32], 7.0)}, folder / "model.safetensors")
    assert Decoder.from_pretrained(folder).norm.weight.eq(7).all()
    (folder / "model.safetensors").unlink()
    assert torch.equal(Decoder.from_pretrained(folder).norm.weight, state[NORM].float())


def test_a_model_is_saved_with_its_output_head_or_without_one(folder, tmp_path):
    model, ids = LLM2Vec.from_pretrained(folder), torch.tensor([[2, 3]])
    model.save(tmp_path / "out")
    again = LLM2Vec.from_pretrained(tmp_path / "out").decoder
    assert torch.equal(again.logits(again(ids)), model.decoder.logits(model.decoder(ids)))
    inner = load_file(folder / "model.safetensors").items()
    inner = {name.removeprefix("model."): w for name, w in inner if name != "lm_head.weight"}
    save_file(inner, folder / "model.safetensors")
    model = LLM2Vec.from_pretrained(folder)
    with pytest.raises(ValueError, match="lm_head"):
        model.decoder.logits(torch.zeros(1, 32))
    model.save(tmp_path / "again")
    again = LLM2Vec.from_pretrained(tmp_path / "again")
    assert not again.decoder.can_predict
    assert np.array_equal(again.encode(["a b"]), model.encode(["a b"]))


# --- What is said of bad input -----------------------------------------------------------------


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda s: s.pop(f"model.{UP}.weight"), f"{UP}.weight is missing"),
        (
            lambda s: s.update({f"model.{KEY}": s[f"model.{KEY}"][1:].contiguous()}),
            rf"{KEY} is \[15, 32\], expected \[16, 32\]",
        ),
    ],
)
def test_a_wrong_tensor_is_named(folder, change, said):
    spoil(folder / "model.safetensors", change)
    with pytest.raises(ValueError, match=said):
        Decoder.from_pretrained(folder)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"full_attention": {}}}, "differ by layer"),
        ({"vocab_size": "384"}, "vocab_size is '384'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_key_value_heads": 3}, "num_attention_heads is 4, expected a multiple"),
        ({"head_dim": 5}, "head_dim is 5"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "rope_type is 'yarn'"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_parameters": {"rope_theta": "big"}}, "'big'"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
        ({"layer_types": ["chunked_attention"] * 2}, "layer_types is .*chunked"),
        ({"layer_types": ["full_attention"]}, "layer_types is .*, expected one for each layer"),
        ({"model_type": "llama", "layer_types": ["sliding_attention"] * 2}, "expected full_att"),
    ],
)
def test_a_config_that_can_not_be_run_is_refused_by_file_and_field(folder, changes, said):
    spoil(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=f"config.json: .*{said}"):
        Decoder.from_pretrained(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        LLM2Vec.from_pretrained(folder)


@pytest.mark.parametrize("target", ["../other.safetensors", "/etc/passwd"])
def test_an_index_that_leaves_its_folder_is_refused(folder, target):
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": target}}))
    with pytest.raises(ValueError, match=f"{index}: '{target}' is not the name of a file"):
        Decoder.from_pretrained(folder)


# --- Files and the command line ----------------------------------------------------------------


def test_the_command_line_encodes_as_its_flags_say_and_tells_how_much_is_cut(folder, tmp_path):
    texts = ["a b c a b c", "", "find this"]
    (tmp_path / "t.txt").write_text("\n".join(texts) + "\n")
    args = ["encode", "--model", folder, "--dtype", "bfloat16", "--input", tmp_path / "t.txt"]
    args += ["--output", tmp_path / "v.npy", "--normalize", "--max-length", 4, "--pooling", "last"]
    done = python("llm2vec.py", *args)
    assert done.returncode == 0, done.stderr
    how = {"max_length": 4, "pooling": "last", "dtype": torch.bfloat16}
    model = LLM2Vec.from_pretrained(folder, **how)
    vectors = np.load(tmp_path / "v.npy")
    np.testing.assert_allclose(vectors, model.encode(texts, normalize=True), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    cut = sum(len(ids) > 4 for ids, _ in model.rows(texts, max_length=99))
    said = f"{cut} of 3 texts are cut at 4 tokens, which --max-length sets"
    assert done.stderr.splitlines()[-1] == said and cut > 0


def test_the_command_line_compares(encoder, command):
    texts = ["A man plays a guitar.", "Stocks fell."]
    _, out, _ = command("similar", "--model", TINY, *texts, main=llm2vec.main)
    a, b = encoder.encode(texts, normalize=True)
    said = [line.split(maxsplit=2) for line in out.splitlines()]
    assert said == [["1.000", f"{a @ b:.3f}", texts[0]], [f"{a @ b:.3f}", "1.000", texts[1]]]


def test_adapters_leave_the_sentences_to_the_command(folder, tmp_path, command):
    """Which stand behind them, where argparse would take them for adapters."""
    model, texts = LLM2Vec.from_pretrained(folder), ["a b", "c"]
    for name in ("one", "two"):
        for parameter in add_lora(model.decoder, rank=2):
            torch.nn.init.normal_(parameter)
        save_adapter(model.decoder, tmp_path / name)
        merge_lora(model.decoder)
    adapters = [str(tmp_path / "one"), str(tmp_path / "two")]
    a, b = model.encode(texts, normalize=True)
    start = ["similar", "--model", folder, "--dtype", "float32"]
    for args in (["--adapters", *adapters, *texts], [*texts, "--adapters", *adapters]):
        first, _ = command(*start, *args, main=llm2vec.main)[1].splitlines()
        assert first.split() == ["1.000", f"{a @ b:.3f}", "a", "b"]
    for args, said in ((adapters, "no sentences"), ([str(tmp_path / "thre"), *texts], "thre: no")):
        status, _, errors = command(*start, "--adapters", *args, main=llm2vec.main)
        assert status == 2 and said in errors


def test_one_string_is_one_vector(encoder):
    vector = encoder.encode("A man plays a guitar.")
    assert vector.shape == (encoder.decoder.config.hidden_size,)
    assert np.array_equal(vector, encoder.encode(["A man plays a guitar."])[0])
    with pytest.raises(TypeError, match="normalize_embeddings"):
        encoder.encode(["a"], normalize_embeddings=True)  # never taken and ignored


def test_json_lines_keep_their_fields(encoder, tmp_path):
    lines = [{"id": 7, "text": "One."}, {"text": "Zwei\u2028noch zwei.", "lang": "de"}]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert encode_file(encoder, str(source), str(target)) == 2
    found = [json.loads(line) for line in target.read_text().split("\n")[:-1]]
    vectors = np.array([line.pop("vector") for line in found])
    assert found == lines
    np.testing.assert_allclose(vectors, encoder.encode([x["text"] for x in lines]), atol=1e-5)


def test_a_file_of_several_chunks_keeps_its_order_and_has_its_name_once_it_is_whole(
    folder, tmp_path, monkeypatch
):
    words = ["a", "b", "c", "a b", "b c a"]
    texts = [words[i * i % 7 % 5] for i in range(2 * 4096 + 5)]
    source, target = tmp_path / "texts.txt", tmp_path / "v.npy"
    source.write_text("\n".join(texts) + "\n")
    model = LLM2Vec.from_pretrained(folder)
    each = dict(zip(words, model.encode(words), strict=True))
    encode, there = model.encode, []

    def watched(*args):  # one that is killed here leaves v.npy.part
        there.append((target.exists(), (tmp_path / "v.npy.part").exists()))
        return encode(*args)

    monkeypatch.setattr(model, "encode", watched)
    assert encode_file(model, str(source), str(target)) == len(texts)
    assert there == [(False, True)] * 3
    np.testing.assert_allclose(np.load(target), np.stack([each[t] for t in texts]), atol=1e-5)


# --- Chat templates ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mistral(tmp_path_factory) -> Path:
    """A folder with Mistral 7B's own tokenizer.json."""
    folder = tmp_path_factory.mktemp("mistral")
    packed = GOLDEN / "mistral-tokenizer.json.xz"
    (folder / "tokenizer.json").write_bytes(lzma.decompress(packed.read_bytes()))
    return folder


def test_the_mistral_template_is_attended_to_and_its_closing_marker_averaged(mistral):
    opening, closing = [733, 16289, 28793], [733, 28748, 16289, 28793]  # [INST], [/INST]
    tokenizer, plain = load_tokenizer(mistral, "mistral"), load_tokenizer(mistral)
    assert tokenize(plain, ["Hello world"], 512) == [([1, 22557, 1526], [False, True, True])]
    [row] = tokenize(tokenizer, ["Hello world"], 512)
    assert row[0] == [1, *opening, 22557, 1526, *closing]
    assert row[0] == plain.encode("[INST] Hello world [/INST]").ids
    assert own_ids(row) == [22557, 1526, *closing]
    [row] = tokenize(tokenizer, ["Hello"], 512, instruction="Find this:")
    assert row[0] == plain.encode("[INST] Find this:\nHello [/INST]").ids
    assert own_ids(row) == [16230, *closing]
    [row] = tokenize(tokenizer, ["Hello world and much more than fits"], 10)
    assert row[0] == [1, *opening, 22557, 1526, *closing]
    with pytest.raises(ValueError, match="max_length 8 leaves no room"):
        tokenize(tokenizer, ["Hello"], 8)


def test_the_llama_3_template_is_made_of_special_tokens(tmp_path):
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    opening, eot = "<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"
    for text in ("a text", f"a {eot} inside"):  # which is text
        tokenizer.encode_special_tokens = True
        own = [*tokenizer.encode(text).ids, tokenizer.token_to_id(eot)]
        tokenizer.encode_special_tokens = False
        [row] = tokenize(load_tokenizer(tmp_path, "llama-3"), [text], 512)
        assert row[0] == tokenizer.encode(opening).ids + own and own_ids(row) == own


def test_a_template_is_recorded_in_the_saved_folder(folder, mistral, tmp_path):
    shutil.copy(mistral / "tokenizer.json", folder)
    spoil(folder / "config.json", vocab_size=32000)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    spoil(folder / "model.safetensors", **{name: torch.randn(32000, 32) for name in names})
    model = LLM2Vec.from_pretrained(folder, template="mistral")
    model.save(tmp_path / "out")
    again = LLM2Vec.from_pretrained(tmp_path / "out")
    assert np.array_equal(model.encode(["Hello world"]), again.encode(["Hello world"]))
    assert not (tmp_path / "out" / "modules.json").exists()
    with pytest.raises(ValueError, match="has a template already"):
        LLM2Vec.from_pretrained(tmp_path / "out", template="mistral")
    with pytest.raises(ValueError, match="template 'gpt'"):
        LLM2Vec.from_pretrained(folder, template="gpt")


def test_a_tokenizer_without_bos_may_have_one_in_front_and_keeps_it(tmp_path, mistral):
    model, text = LLM2Vec.from_pretrained(TINY, template="endoftext"), "A text of its own"
    [(ids, own)] = tokenize(model.tokenizer, [text], 16)
    plain = model.tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == [model.tokenizer.token_to_id("<|endoftext|>"), *plain]
    assert own == [False] + [True] * len(plain)
    model.save(tmp_path / "out")
    again = LLM2Vec.from_pretrained(tmp_path / "out")
    np.testing.assert_array_equal(model.encode([text, "more"]), again.encode([text, "more"]))
    weights = json.loads((tmp_path / "out" / "1_WordWeights" / "config.json").read_text())
    assert weights["word_weights"][weights["vocab"][ids[0]]] == 0, "no BOS in the mean there too"
    assert weights["vocab"][ids[1]] not in weights["word_weights"]
    with pytest.raises(ValueError, match=r"tokenizer.json: has no token <\|endoftext\|>"):
        load_tokenizer(mistral, ("<|endoftext|>", ""))


def test_a_template_is_saved_as_the_tokens_that_it_consists_of(tmp_path, mistral):
    """Other readers look its names up: llama.cpp takes one that is no token for no BOS."""
    for tokenizer, template in (
        (load_tokenizer(TINY, "endoftext"), "<|endoftext|> A"),
        (load_tokenizer(mistral, "mistral"), "<s> ▁[ INST ] A ▁[ / INST ]"),
    ):
        processor = json.loads(tokenizer.to_str())["post_processor"]
        steps = [next(iter(step.values()))["id"] for step in processor["single"]]
        assert " ".join(steps) == template
        for name, token in processor["special_tokens"].items():
            assert token["ids"] == [tokenizer.token_to_id(name)] and token["tokens"] == [name]
    model = LLM2Vec.from_pretrained(TINY, template="endoftext")
    model.include_prompt = True  # BOS is averaged: a plain mean, as every server computes it
    model.save(tmp_path / "out")
    kinds = [m["type"] for m in json.loads((tmp_path / "out" / "modules.json").read_text())]
    assert [kind.rpartition(".")[2] for kind in kinds] == ["Transformer", "Pooling"]
    config, tokens = (
        json.loads((tmp_path / "out" / f"{name}.json").read_text())
        for name in ("config", "tokenizer_config")
    )
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, config["pad_token_id"])
    assert config["use_bidirectional_attention"] and "rope_scaling" not in config
    assert (tokens["bos_token"], tokens["add_bos_token"]) == ("<|endoftext|>", True)
    again = LLM2Vec.from_pretrained(tmp_path / "out")
    assert again.decoder.config == model.decoder.config
    np.testing.assert_array_equal(again.encode(["a text"]), model.encode(["a text"]))


def test_a_template_is_not_put_on_another(tmp_path, mistral):
    for template in ("mistral", ("", " and more"), ("one", "")):
        load_tokenizer(mistral, template).save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(ValueError, match="has a template already"):
            load_tokenizer(tmp_path, "mistral")
    tokenizer = load_tokenizer(mistral, "mistral")
    names = {"[OPEN]": tokenizer.encode("a").ids[:4], "[CLOSE]": [28793]}  # of earlier versions
    tokenizer.post_processor = TemplateProcessing(
        single="[OPEN] $A [CLOSE]",
        special_tokens=[
            {"id": name, "ids": ids, "tokens": [tokenizer.id_to_token(i) for i in ids]}
            for name, ids in names.items()
        ],
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="has a template already"):
        load_tokenizer(tmp_path, "mistral")
    assert load_tokenizer(tmp_path).encode("a").ids[:4] == names["[OPEN]"]


def test_what_starts_every_text_starts_it_once(tmp_path, mistral):
    plain = load_tokenizer(TINY, "endoftext")
    plain.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path, "endoftext").encode("a").ids == plain.encode("a").ids
    asked = load_tokenizer(TINY, "one-word").encode("a").ids
    assert load_tokenizer(tmp_path, "one-word").encode("a").ids == asked
    assert asked[:2] == [0, plain.token_to_id("This")] and asked.count(0) == 1
    llama_like = load_tokenizer(mistral, "one-word").encode("a").tokens  # whose BOS stays
    assert llama_like[:2] == ["<s>", "▁This"]


@pytest.mark.parametrize(
    "before, after", [("query: ", ""), ("So: ", " means:"), ("", "?"), ('A "', '" is "the"')]
)
def test_any_text_goes_around_every_text_and_is_never_cut(before, after, mistral):
    """As one reads it, where no token joins the parts; for both kinds of tokenizers."""
    for folder, text in ((TINY, "birds fly south"), (mistral, "birds fly south in winter")):
        plain = load_tokenizer(folder)
        tokenizer = load_tokenizer(folder, (before, after))
        whole, ids = (
            t.encode(x).ids for t, x in ((plain, before + text + after), (tokenizer, text))
        )
        assert plain.decode(ids).replace(" ", "") == plain.decode(whole).replace(" ", "")
        if before != 'A "':  # a quotation mark would join what follows
            assert ids == whole
        n = len(tokenizer.encode("").ids)
        [(cut, own)] = tokenize(tokenizer, [text], n + 2)
        opening = len(plain.encode(before.rstrip()).ids)
        assert cut == ids[: opening + 2] + ids[len(ids) - (n - opening) :]
        assert own == [False] * opening + [True] * (n + 2 - opening)


def test_a_text_around_every_text_is_given_by_flags_too(command, tmp_path):
    texts = ["birds fly south", "stocks fell"]
    (tmp_path / "t.txt").write_text("\n".join(texts))
    flags = ["--input", "t.txt", "--output", "v.npy", "--causal", "--pooling", "last"]
    around = ["--before", 'This sentence : "', "--after", '" means in one word:"']
    for how in (["--template", "endoftext", *around], ["--template", "one-word"]):
        assert command("encode", "--model", TINY, *flags, *how, main=llm2vec.main)[0] == 0
        model = tiny(6, template=TEMPLATES["one-word"], is_causal=True, pooling="last")
        np.testing.assert_allclose(np.load(tmp_path / "v.npy"), model.encode(texts), atol=1e-5)


def test_several_tokens_after_every_text_go_to_sentence_transformers_with_its_last_one(tmp_path):
    """Which is the last one for them too; of an average they would leave out too much."""
    for pooling, there in (("last", True), ("mean", False)):
        model = tiny(template="one-word", pooling=pooling, is_causal=True)
        model.save(tmp_path / pooling)
        assert (tmp_path / pooling / "modules.json").exists() == there
        again = LLM2Vec.from_pretrained(tmp_path / pooling)
        assert again.pooling == pooling and again.decoder.config.is_causal
        np.testing.assert_array_equal(again.encode(["a text", ""]), model.encode(["a text", ""]))
    pool = json.loads((tmp_path / "last" / "1_Pooling" / "config.json").read_text())
    assert pool["pooling_mode_lasttoken"] and pool["include_prompt"]


def test_what_ends_every_text_ends_it_behind_a_template_too(tmp_path):
    tokenizer = load_tokenizer(TINY)
    tokenizer.post_processor = TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", 2)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    model = LLM2Vec.from_pretrained(TINY)
    model.tokenizer = load_tokenizer(tmp_path, "endoftext")
    ids = model.tokenizer.encode("a").ids
    assert (ids[0], ids[-1], len(ids)) == (0, 2, 3)
    model.save(tmp_path / "out")
    tokens = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert tokens["add_bos_token"] and tokens["add_eos_token"]
    assert (tokens["bos_token"], tokens["eos_token"]) == ("<|endoftext|>", "<|im_end|>")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 2
