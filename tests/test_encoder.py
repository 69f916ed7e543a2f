"""Texts to vectors, folders written and read again, and what goes around every text."""

import io
import itertools
import json
import lzma
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import DOCUMENTS, GOLDEN, INTEROP, TINY, refused, spoil, tiny
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

import llm2vec
from llm2vec import Decoder, LLM2Vec, load_tokenizer, tokenize
from llm2vec_data import export
from llm2vec_data.checkpoints import TEMPLATES
from llm2vec_data.disk import read_json
from llm2vec_data.encode import encode_file

load = LLM2Vec.from_pretrained


def own_ids(row: tuple[list[int], list[bool]]) -> list[int]:
    return [i for i, own in zip(*row, strict=True) if own]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_vector_does_not_depend_on_its_neighbours(dtype):
    encoder = load(TINY, dtype=dtype)
    texts = [text[: 20 + 19 * i] for i, text in enumerate(DOCUMENTS[:12])]
    alone = np.concatenate([encoder.encode([text]) for text in texts])
    assert alone.dtype == np.float32 and alone.shape == (12, encoder.decoder.config.hidden_size)
    together = [encoder.encode(texts, max_tokens=n) for n in (1, 300, 100_000)]
    for vectors in (*together, encoder.encode(texts[::-1])[::-1]):
        norms = np.linalg.norm(alone, axis=1) * np.linalg.norm(vectors, axis=1)
        assert ((alone * vectors).sum(1) / norms).min() > 0.9999
        if dtype == torch.float32:
            assert np.abs(vectors - alone).max() < 1e-5 * max(1, np.abs(alone).max())


def test_an_empty_text_has_a_finite_vector(encoder, folder):
    for model in (encoder, load(folder)):
        vectors = model.encode(["", "  ", "a b", "\n"])
        found = np.abs(vectors).max(1) > 0
        assert np.isfinite(vectors).all() and found[1:].all()
        assert found[0] == bool(model.tokenizer.encode("").ids), "0 where there is no BOS either"
        np.testing.assert_allclose(model.encode([""])[0], model.encode(["", "a"])[0], atol=1e-5)
    assert encoder.encode([]).shape == (0, encoder.decoder.config.hidden_size)


def test_one_string_is_one_vector_and_what_is_no_text_is_refused(encoder):
    assert np.array_equal(encoder.encode("A man."), encoder.encode(["A man."])[0])
    refused("text 1 is NoneType", encoder.encode, ["a", None])
    refused("text 1 holds half a surrogate", encoder.encode, ["fine", "a \ud800"])
    with pytest.raises(TypeError, match="normalize_embeddings"):
        encoder.encode(["a"], normalize_embeddings=True)  # never taken and ignored


def test_a_text_is_cut_at_its_end_and_an_instruction_is_not(folder):
    model = load(folder)
    [row] = tokenize(model.tokenizer, ["a b a b a b"], 4)
    assert row == (model.tokenizer.encode("a b").ids[:4], [False, True, True, True])
    refused("leaves no room", tokenize, model.tokenizer, ["a"], 3, instruction="find this:")


# --- Checkpoints -------------------------------------------------------------------------------


def test_saving_never_replaces_a_folder_of_something_else(encoder, tmp_path):
    (tmp_path / "config.json").write_text("{}")  # of any program
    refused("not a checkpoint", encoder.save, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


CUTS = [(Path, "write_text", 3, OSError), (os, "replace", 1, OSError), (os, "replace", 2, OSError)]
CUTS += [(export, "save_file", 1, SafetensorError)]  # as safetensors calls a full disk


@pytest.mark.parametrize("owner, name, n, error", CUTS)
def test_a_save_cut_short_loses_nothing(owner, name, n, error, folder, tmp_path, monkeypatch):
    model, original, calls = load(folder), getattr(owner, name), itertools.count(1)

    def full(*args, **how):
        if next(calls) == n:
            raise error("No space left on device")
        return original(*args, **how)

    model.save(tmp_path / "out")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.*")}
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(owner, name, full)
        model.save(tmp_path / "out")
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.*")} == before


def test_a_whole_file_is_read_before_an_index_as_in_transformers(tmp_path):
    folder = Path(shutil.copytree(GOLDEN / "llama-llama3-sharded", tmp_path / "model"))
    norm = Decoder.from_pretrained(folder).norm.weight
    state = {name: w for file in folder.glob("model-*") for name, w in load_file(file).items()}
    save_file(state | {"model.norm.weight": norm + 7}, folder / "model.safetensors")
    assert torch.equal(Decoder.from_pretrained(folder).norm.weight, norm + 7)


def test_a_model_is_saved_with_its_output_head_or_without_one(folder, tmp_path):
    weights, ids = folder / "model.safetensors", torch.tensor([[2, 3]])
    spoil(folder / "config.json", tie_word_embeddings=False)
    spoil(weights, **{"lm_head.weight": torch.randn(384, 32)})
    model = load(folder)
    model.save(tmp_path / "out")
    again = load(tmp_path / "out").decoder
    assert torch.equal(again.logits(again(ids)), model.decoder.logits(model.decoder(ids)))
    inner = {name.removeprefix("model."): weight for name, weight in load_file(weights).items()}
    del inner["lm_head.weight"]
    save_file(inner, weights)
    load(folder).save(tmp_path / "again")
    again = load(tmp_path / "again")
    refused("lm_head", again.decoder.logits, torch.zeros(1, 32))
    assert np.array_equal(again.encode(["a b"]), model.encode(["a b"]))


# --- Files and the command line ----------------------------------------------------------------


def test_the_command_line_encodes_as_its_flags_say_and_tells_how_much_is_cut(folder, command):
    texts = ["a b c a b c", "", "find this"]
    Path("t.txt").write_text("\n".join(texts) + "\n")
    model = load(folder, pooling="last", dtype=torch.bfloat16)
    longest, _, model.max_length = (len(ids) for ids, _ in model.rows(texts))
    args = ["encode", "--model", folder, "--dtype", "bfloat16", "--input", "t.txt", "--normalize"]
    args += ["--output", "v.npy", "--max-length", model.max_length, "--pooling", "last"]
    status, _, errors = command(*args, main=llm2vec.main)
    assert status == 0, errors
    np.testing.assert_allclose(np.load("v.npy"), model.encode(texts, normalize=True), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(np.load("v.npy"), axis=1), 1, atol=1e-6)
    said = f"1 of 3 texts are cut at {model.max_length} tokens"
    assert errors.splitlines()[-1].startswith(said) and longest > model.max_length


def test_sentences_are_compared_before_and_after_the_adapters_on_a_command_line(folder, command):
    """Where argparse would take them for adapters."""
    adapters = ["--adapters", INTEROP / "inner-list", INTEROP / "inner-pattern"]
    a, b = load(folder, adapters[1:]).encode(["a b", "c"], normalize=True)
    start = ["similar", "--model", folder, "--dtype", "float32"]
    for args in ([*adapters, "a b", "c"], ["a b", "c", *adapters]):
        rows = [x.split() for x in command(*start, *args, main=llm2vec.main)[1].splitlines()]
        assert rows == [["1.000", f"{a @ b:.3f}", "a", "b"], [f"{a @ b:.3f}", "1.000", "c"]]
    for args, said in ((adapters, "no sentences"), (["--adapters", "thre", "a", "b"], "thre: no")):
        status, _, errors = command(*start, *args, main=llm2vec.main)
        assert status == 2 and said in errors


def test_json_lines_keep_their_fields(encoder, tmp_path, monkeypatch):
    """On the standard output of a notebook, which has no buffer."""
    file, out = tmp_path / "in.jsonl", io.StringIO()
    lines = [{"id": 7, "text": "Grüße."}, {"text": "Zwei\u2028noch zwei.", "lang": "de"}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        encode_file(encoder, str(file), "-")
    found = [json.loads(line) for line in out.getvalue().split("\n")[:-1]]
    vectors = [line.pop("vector") for line in found]
    assert found == lines
    np.testing.assert_allclose(vectors, encoder.encode([x["text"] for x in lines]), atol=1e-5)


def test_chunks_keep_their_order_and_a_file_is_there_once_whole(encoder, tmp_path, monkeypatch):
    texts, target, there = [str(i) for i in range(2 * 4096 + 5)], tmp_path / "v.npy", []
    (tmp_path / "texts.txt").write_text("\n".join(texts))

    def encode(texts: list[str], _) -> np.ndarray:
        there.append(target.exists())
        return np.outer(np.float32(texts), np.ones(encoder.width, "f"))

    monkeypatch.setattr(encoder, "encode", encode)
    assert encode_file(encoder, str(tmp_path / "texts.txt"), str(target)) == len(texts)
    assert there == [False] * 3
    np.testing.assert_array_equal(np.load(target), encode(texts, None))


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


def test_a_template_is_saved_as_the_tokens_that_it_consists_of(mistral):
    """Other readers look its names up: llama.cpp takes one that is no token for no BOS."""
    saved = {"<|endoftext|> A": load_tokenizer(TINY, "endoftext")}
    saved["<s> ▁[ INST ] A ▁[ / INST ]"] = load_tokenizer(mistral, "mistral")
    for template, tokenizer in saved.items():
        processor = json.loads(tokenizer.to_str())["post_processor"]
        steps = [next(iter(step.values()))["id"] for step in processor["single"]]
        assert " ".join(steps) == template
        for name, token in processor["special_tokens"].items():
            assert token["ids"] == [tokenizer.token_to_id(name)] and token["tokens"] == [name]


def test_with_bos_in_the_average_an_export_is_the_plain_mean_that_every_server_computes(tmp_path):
    model = tiny(template="endoftext", include_prompt=True)
    model.save(tmp_path)
    kinds = [module["type"] for module in json.loads((tmp_path / "modules.json").read_text())]
    assert [kind.rpartition(".")[2] for kind in kinds] == ["Transformer", "Pooling"]
    assert not (tmp_path / "1_WordWeights").exists()
    again = load(tmp_path)
    assert again.include_prompt and again.decoder.config == model.decoder.config
    np.testing.assert_array_equal(again.encode(["a text"]), model.encode(["a text"]))


def test_a_template_is_refused_by_name_or_where_there_is_one(tmp_path, mistral):
    refused("template 'gpt'", load, TINY, template="gpt")
    refused("tokenizer.json: .*endoftext", load_tokenizer, mistral, ("<|endoftext|>", ""))
    for template in ("mistral", ("", " and more")):
        load_tokenizer(mistral, template).save(str(tmp_path / "tokenizer.json"))
        refused("has a template already", load_tokenizer, tmp_path, "mistral")


def test_what_starts_every_text_starts_it_once(tmp_path, mistral):
    plain = load_tokenizer(TINY, "endoftext")
    plain.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path, "endoftext").encode("a").ids == plain.encode("a").ids
    asked = load_tokenizer(TINY, "one-word").encode("a").ids
    assert load_tokenizer(tmp_path, "one-word").encode("a").ids == asked
    assert asked[:2] == plain.encode("Sentence").ids[:2] and asked.count(0) == 1
    marked = load_tokenizer(TINY, ("", " <|endoftext|>")).encode("a").ids  # without its space
    assert marked == plain.encode("a").ids[1:] + [0]
    llama_like = load_tokenizer(mistral, "one-word").encode("a").tokens  # whose BOS stays
    assert llama_like[:2] == ["<s>", "▁S"]


@pytest.mark.parametrize(
    "before, after",
    [("query: ", ""), ("So: ", " means:"), ("", "?"), ("", " and"), ('A "', '" is "the"')],
)
def test_any_text_goes_around_every_text_and_is_never_cut(before, after, mistral):
    """As one reads it, where no token joins the parts; for both kinds of tokenizers."""
    for folder, text in ((TINY, "birds fly south"), (mistral, "birds fly south in winter")):
        plain, tokenizer = load_tokenizer(folder), load_tokenizer(folder, (before, after))
        whole, ids = plain.encode(before + text + after).ids, tokenizer.encode(text).ids
        assert plain.decode(ids).replace(" ", "") == plain.decode(whole).replace(" ", "")
        if before != 'A "':  # a quotation mark would join what follows
            assert ids == whole
        n, opening = len(tokenizer.encode("").ids), len(plain.encode(before.rstrip()).ids)
        [(cut, own)] = tokenize(tokenizer, [text], n + 2)
        assert cut == ids[: opening + 2] + ids[len(ids) - (n - opening) :]
        assert own == [False] * opening + [True] * (n + 2 - opening)


def test_a_text_around_every_text_is_given_by_flags_too(command):
    texts = ["birds fly south", "stocks fell"]
    Path("t.txt").write_text("\n".join(texts))
    flags = ["encode", "--model", TINY, "--input", "t.txt", "--output", "v.npy"]
    flags += ["--causal", "--pooling", "last"]
    before, after = TEMPLATES["one-word"]
    around = ["--before", before.removeprefix("<|endoftext|>"), "--after", after]
    model = tiny(6, template=TEMPLATES["one-word"], is_causal=True, pooling="last")
    for how in (["--template", "endoftext", *around], ["--template", "one-word"]):
        assert command(*flags, *how, main=llm2vec.main)[0] == 0
        np.testing.assert_allclose(np.load("v.npy"), model.encode(texts), atol=1e-5)


def test_several_tokens_after_every_text_go_to_sentence_transformers_with_its_last_one(tmp_path):
    """Which is the last one for them too; of an average they would leave out too much."""
    for pooling, there in (("last", True), ("mean", False)):
        model = tiny(template="one-word", pooling=pooling, is_causal=True)
        model.save(tmp_path / pooling)
        assert (tmp_path / pooling / "modules.json").exists() == there
        again = load(tmp_path / pooling)
        assert again.pooling == pooling and again.decoder.config.is_causal
        np.testing.assert_array_equal(again.encode(["a text", ""]), model.encode(["a text", ""]))
    pool = read_json(tmp_path / "last" / "1_Pooling" / "config.json")
    assert pool["pooling_mode_lasttoken"] and pool["include_prompt"]


def test_what_ends_every_text_ends_it_after_a_template_too(tmp_path):
    model, tokenizer = tiny(), load_tokenizer(TINY)
    end = [("<|im_end|>", 2)]
    tokenizer.post_processor = TemplateProcessing("$A <|im_end|>", special_tokens=end)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    model.tokenizer = load_tokenizer(tmp_path, "endoftext")
    ids = model.tokenizer.encode("a").ids
    assert (ids[0], ids[-1], len(ids)) == (0, 2, 3)
    model.save(tmp_path / "out")
    tokens, config = (read_json(tmp_path / "out" / f"{x}config.json") for x in ("tokenizer_", ""))
    assert tokens["add_bos_token"] and tokens["add_eos_token"]
    assert (tokens["bos_token"], tokens["eos_token"]) == ("<|endoftext|>", "<|im_end|>")
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, 2)
