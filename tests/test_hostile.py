"""Checkpoint folders from anywhere, and text with every kind of dirt."""

import ast
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import GOLDEN, ROOT, TINY, spoil
from safetensors.torch import load_file

from llm2vec import Decoder, LLM2Vec
from llm2vec_data.corpus import read_documents, read_record, sentences
from llm2vec_data.encode import encode_file, read_records
from lora import load_adapter


@pytest.fixture
def adapter(tmp_path) -> Path:
    return Path(shutil.copytree(GOLDEN / "llama-grouped-adapter", tmp_path / "adapter"))


# --- Folders -----------------------------------------------------------------------------------

NORM = "model.norm.weight"


@pytest.mark.parametrize("dtype", ["int8", "uint8", "bool", "float8_e4m3fn", "float8_e5m2"])
def test_types_that_are_no_numbers_by_themselves_are_refused(dtype, folder):
    dtype = getattr(torch, dtype)
    file = spoil(folder / "model.safetensors", lambda s: s.update({NORM: s[NORM].to(dtype)}))
    with pytest.raises(ValueError, match=f"{file}: tensor {NORM} has type {dtype}"):
        Decoder.from_pretrained(folder)


def test_a_number_that_is_too_large_for_the_type_is_refused(folder):
    file = spoil(folder / "model.safetensors", lambda s: s.update({NORM: s[NORM].double()}))
    weight = load_file(file)[NORM]
    assert torch.equal(Decoder.from_pretrained(folder).norm.weight, weight.float())
    spoil(file, **{NORM: weight * 1e300})  # finite in 64 bits
    with pytest.raises(ValueError, match=f"{NORM} holds NaN or infinity as torch.float32"):
        Decoder.from_pretrained(folder)


@pytest.mark.parametrize(
    "changes", [{"vocab_size": 2**23, "hidden_size": 2**40}, {"num_hidden_layers": 300}]
)
def test_shapes_that_nothing_holds_are_refused(folder, changes):
    spoil(folder / "config.json", lambda raw: raw.update(changes))
    with pytest.raises(ValueError, match=f"{folder}.*: "):
        Decoder.from_pretrained(folder)


UP_A = "base_model.model.layers.0.mlp.up_proj.lora_A.weight"


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda s: s[UP_A].fill_(float("nan")), "up_proj.lora_A holds NaN or infinity"),
        (lambda s: s.update({UP_A: s[UP_A].int()}), "up_proj.lora_A has type torch.int32"),
        (lambda s: s.clear(), "holds no adapter"),
        (
            lambda s: s.update({k.replace("model.l", "model.model.l"): s[k] + 1 for k in [*s]}),
            "is there twice, once as model.layers.0",
        ),
    ],
)
def test_a_wrong_tensor_of_an_adapter_is_named(change, said, adapter):
    file = spoil(adapter / "adapter_model.safetensors", change)
    with pytest.raises(ValueError, match=f"{file}: .*{said}"):
        load_adapter(Decoder.from_pretrained(GOLDEN / "llama-grouped"), adapter)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
        ({"alpha_pattern": {"q_proj": 1e308}}, "alpha_pattern of q_proj is 1e"),
        ({"rank_pattern": {"((q_proj)": 8}}, "unterminated subpattern"),
        ({"alpha_pattern": {"(?i)q_proj": 8}}, "lags not at the start"),
        ({"rank_pattern": {"(" * 5000 + ")" * 5000: 8}}, ""),
    ],
)
def test_numbers_and_patterns_of_an_adapter_are_held_in_bounds(changes, said, adapter):
    file = spoil(adapter / "adapter_config.json", lambda raw: raw.update(changes))
    with pytest.raises(ValueError, match=f"{file}: .*{said}"):
        load_adapter(Decoder.from_pretrained(GOLDEN / "llama-grouped"), adapter)


@pytest.mark.parametrize("ids", [[10**6], [-1], None])
def test_a_template_of_tokens_that_are_not_there_is_refused(ids, folder):
    """Without an entry for its token, the library panics, which is no Exception."""

    def change(raw: dict) -> None:
        [template] = raw["post_processor"]["processors"]
        if ids is None:
            template["special_tokens"] = {}
        else:
            template["special_tokens"]["<s>"]["ids"] = ids

    spoil(folder / "tokenizer.json", change)
    with pytest.raises(ValueError, match="tokenizer.json: "):
        LLM2Vec.from_pretrained(folder)


def test_a_token_that_the_tokenizer_has_no_word_for_is_one_clear_error(folder):
    words = {"type": "WordLevel", "vocab": {"a": 3}, "unk_token": "[UNK]"}
    spoil(folder / "tokenizer.json", lambda raw: raw.update({"model": words, "normalizer": None}))
    encoder = LLM2Vec.from_pretrained(folder)
    with pytest.raises(ValueError, match="tokenizer.json: .*UNK"):
        encoder.encode(["b"])


def test_nothing_here_can_execute_what_it_reads():
    """No call of eval or exec, and nothing unpickled."""
    for file in [*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("tests/**/*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert name not in ("eval", "exec", "torch.load"), f"{file}, line {node.lineno}"
            names = [alias.name for alias in getattr(node, "names", ()) if hasattr(alias, "name")]
            names.append(getattr(node, "module", None))
            assert "pickle" not in names, f"{file}, line {node.lineno}"


# --- Dirty text --------------------------------------------------------------------------------


DIRT = {
    "nul": "before\0after",
    "right to left": "שלום עולם, مرحبا بالعالم",
    "combining": "e\u0301 a\u0308\u0323 " + "o" + "\u0301" * 500,
    "special tokens": "<|endoftext|> <|im_start|>user [INST] <s> </s>",
    "a megabyte": "All work and no play makes a dull text. " * 26_000,
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈",
    "controls": "\x01\x02\x7f\u200b\u2028 x",
}


@pytest.mark.parametrize("kind", DIRT)
def test_dirt_goes_from_a_corpus_to_finite_vectors(kind, tmp_path):
    text = DIRT[kind]
    (tmp_path / "a.txt").write_bytes(f"\ufeffone\r\n{text}\r\n\r\nlast".encode())
    documents = read_documents(tmp_path / "a.txt")
    assert documents == ["one", text.strip(), "last"]
    found = [s for document in documents for s in sentences(document)]
    encoder = LLM2Vec.from_pretrained(TINY, max_length=64)
    vectors = encoder.encode([*found[:14], text])
    assert np.isfinite(vectors).all()
    alone = encoder.encode([text[:10_000]])[0]  # 64 tokens are read of either
    np.testing.assert_allclose(vectors[-1], alone, atol=1e-5)


BAD = [b"\xff\xfe", b"{", b"[]", b'{"title": "x"}', b'{"text": 5}', b'{"text": "\\ud800"}']


@pytest.mark.parametrize("bad", [*BAD, b"[" * 9999])
def test_a_line_without_text_is_named_or_skipped_and_counted(bad, tmp_path, capsys):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "good"}\r\n' + bad + b'\n{"text": "too"}\n' + bad)
    with pytest.raises(ValueError, match="a.jsonl.* line 2: "):
        read_documents(file)
    assert read_documents(file, errors="skip") == ["good", "too"]
    assert capsys.readouterr().err == f"{file}: skipped 2 lines, the first of them line 2\n"
    file.write_bytes(bad)
    with pytest.raises(ValueError, match="empty corpus"):
        read_documents(file, errors="skip")
    with pytest.raises(ValueError, match="a.jsonl, line 7: "):
        read_record(bad, "a.jsonl", "line 7")


def test_a_byte_order_mark_is_no_text(tmp_path):
    for name, line in (("a.txt", "\ufeffgood\n"), ("a.jsonl", '\ufeff{"text": "good"}\n')):
        (tmp_path / name).write_text(line, encoding="utf-8")
        assert read_documents(tmp_path / name) == ["good"]
        assert [record["text"] for record in read_records(str(tmp_path / name))] == ["good"]


def test_half_a_surrogate_pair_in_another_field_is_passed_through(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "good", "id": "\\ud800"}\n')
    encoder = LLM2Vec.from_pretrained(TINY)
    encode_file(encoder, str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"))
    [again] = (tmp_path / "b.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(again)["id"] == "\ud800"
