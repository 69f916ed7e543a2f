"""Checkpoint folders from anywhere, and text with every kind of dirt."""

import ast
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import INTEROP, ROOT, TINY, refused, spoil
from safetensors.torch import load_file

from llm2vec import Decoder, LLM2Vec
from llm2vec_data.corpus import read_documents, read_record, sentences
from llm2vec_data.encode import encode_file, read_records
from lora import load_adapter

# --- Folders -----------------------------------------------------------------------------------

WEIGHTS, CONFIG, WORDS = "model.safetensors", "config.json", "tokenizer.json"
LORA, SETTINGS = "adapter/adapter_model.safetensors", "adapter/adapter_config.json"
NORM, UP = "model.norm.weight", "base_model.model.layers.0.mlp.up_proj.lora_A.weight"
TYPES = (torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2)


def template(change: Callable[[dict], object]) -> Callable[[dict], None]:
    """Change the tokens of the template that puts a BOS in front."""

    def changed(raw: dict) -> None:
        [template] = raw["post_processor"]["processors"]
        change(template["special_tokens"])

    return changed


@pytest.mark.parametrize(
    "name, change, said",
    [(WEIGHTS, lambda s, t=t: s.update({NORM: s[NORM].to(t)}), f"{NORM}.*{t}") for t in TYPES]
    + [
        (WEIGHTS, lambda s: s.update({NORM: s[NORM].double() * 1e300}), f"{NORM}.* infinity as"),
        (CONFIG, lambda raw: raw.update(vocab_size=2**23, hidden_size=2**40), ""),
        (CONFIG, lambda raw: raw.update(num_hidden_layers=300), ""),
        (WORDS, template(lambda tokens: tokens["<s>"].update(ids=[10**6])), ""),
        (WORDS, template(lambda tokens: tokens["<s>"].update(ids=[-1])), ""),
        (WORDS, template(dict.clear), ""),  # where the library panics, which is no Exception
        (LORA, lambda s: s[UP].fill_(float("nan")), "up_proj.lora_A holds NaN"),
        (LORA, lambda s: s.update({UP: s[UP].int()}), "up_proj.lora_A.*int32"),
        (LORA, dict.clear, "no adapter"),
        (
            LORA,
            lambda s: s.update({k.replace("model.l", "model.model.l"): s[k] + 1 for k in [*s]}),
            "twice, once as model.layers.0",
        ),
        (SETTINGS, lambda raw: raw.update(lora_alpha=float("inf")), "lora_alpha is inf"),
        (
            SETTINGS,
            lambda raw: raw.update(alpha_pattern={"q_proj": 1e308}),
            "alpha_pattern.*q_proj",
        ),
        (SETTINGS, lambda raw: raw.update(rank_pattern={"((q_proj)": 8}), "subpattern"),
        (SETTINGS, lambda raw: raw.update(alpha_pattern={"(?i)q_proj": 8}), "lags not at"),
        (SETTINGS, lambda raw: raw.update(rank_pattern={"(" * 5000 + ")" * 5000: 8}), ""),
    ],
)
def test_what_is_wrong_in_a_file_is_named(name, change, said, folder):
    shutil.copytree(INTEROP / "inner-list", folder / "adapter")
    spoil(folder / name, change)

    def load() -> None:
        load_adapter(LLM2Vec.from_pretrained(folder).decoder, folder / "adapter")

    place = folder if name == CONFIG else Path(name).name
    refused(f"{place}.*: .*{said}", load)


def test_weights_in_64_bits_are_read(folder):
    file = spoil(folder / WEIGHTS, lambda s: s.update({NORM: s[NORM].double()}))
    assert torch.equal(Decoder.from_pretrained(folder).norm.weight, load_file(file)[NORM].float())


def test_a_token_that_the_tokenizer_has_no_word_for_is_one_clear_error(folder):
    words = {"type": "WordLevel", "vocab": {"a": 3}, "unk_token": "[UNK]"}
    spoil(folder / WORDS, model=words, normalizer=None)
    refused("tokenizer.json: .*UNK", LLM2Vec.from_pretrained(folder).encode, ["b"])


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
    assert next(read_records(str(tmp_path / "a.txt")))["text"] == "one", "without its mark"
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
    refused("a.jsonl.* line 2: ", read_documents, file)
    assert read_documents(file, errors="skip") == ["good", "too"]
    assert f"{file}: skipped 2 lines, the first of them line 2" in capsys.readouterr().err
    file.write_bytes(bad)
    refused("empty corpus", read_documents, file, errors="skip")
    refused("a.jsonl, line 7: ", read_record, bad, "a.jsonl", "line 7")


def test_half_a_surrogate_pair_in_another_field_is_passed_through(encoder, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "good", "id": "\\ud800"}\n')
    encode_file(encoder, str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"))
    [again] = (tmp_path / "b.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(again)["id"] == "\ud800"
