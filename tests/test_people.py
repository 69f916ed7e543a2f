"""What real people bring and do: each was once silent and wrong, or lost."""

import json
import os
import stat

import numpy as np
import pytest
import torch
from helpers import DOCUMENTS, TINY, go, python, spoil, tiny
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from tokenizers import Tokenizer

import lora
from llm2vec import LLM2Vec
from llm2vec_data import runs
from train import STAGES, Settings

TEXTS = ["A man plays a guitar.", "Stocks fell sharply."]


# --- Settings ----------------------------------------------------------------------------------


def test_only_the_chosen_projections_are_adapted(tmp_path):
    go("mntp", tmp_path, tiny(1), targets=["q_proj", "v_proj"])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "v_proj"]


def test_an_adapter_may_go_on_training(tmp_path):
    go("mntp", tmp_path / "first", rank=4, lr=1e-3)
    model = tiny()
    lora.load_adapter(model, tmp_path / "first")
    before = {n: p.detach().clone() for n, p in lora.trained(model).items()}
    assert {p.shape[0] for n, p in before.items() if "lora_A" in n} == {4}
    go("mntp", tmp_path / "second", model, lr=1e-9, dropout=0.0, warm_up=0)
    again = tiny()
    lora.load_adapter(again, tmp_path / "second")
    after = lora.trained(again)
    assert before.keys() == after.keys()
    assert all(torch.allclose(after[n], w, atol=1e-6) for n, w in before.items())


# --- An encoder that is trained further --------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_an_encoder_stays_what_its_folder_says(stage, tmp_path, command):
    model = tiny(pooling="last", is_causal=True)
    expected = model.encode(TEXTS)
    model.save(tmp_path / "encoder")
    args = [stage, "--model", tmp_path / "encoder", "--output", tmp_path / "run", "--lr", "1e-9"]
    args += ["--preset", "tiny", "--steps", 1, "--batch", 4, "--dropout", 0, "--dtype", "float32"]
    assert command(*args)[0] == 0
    again = LLM2Vec.from_pretrained(args[2], [args[4]], dtype=torch.float32)
    np.testing.assert_allclose(again.encode(TEXTS), expected, atol=1e-4)
    assert again.decoder.config.is_causal and again.pooling == "last"


def test_a_run_that_is_given_as_an_adapter_says_how_it_was_trained(tmp_path):
    asked = tiny(6, is_causal=True, template="one-word")
    go("simcse", tmp_path, asked, pooling="last", length=40)
    model = LLM2Vec.from_pretrained(TINY, [tmp_path], dtype=torch.float32)
    assert model.pooling == "last" and model.decoder.config.is_causal
    np.testing.assert_array_equal(model.encode(["a text"]), asked.encode(["a text"]))
    model = LLM2Vec.from_pretrained(TINY, [tmp_path], template="endoftext")
    assert len(model.tokenizer.encode("a").ids) == 2
    model = LLM2Vec.from_pretrained(TINY, [tmp_path], pooling="mean", is_causal=False)
    assert model.pooling == "mean" and not model.decoder.config.is_causal


# --- Printed and exported --------------------------------------------------------------------


def test_a_letter_that_can_not_be_shown_loses_no_result(tmp_path):
    run, env = tmp_path / "汉字", os.environ | {"PYTHONIOENCODING": "ascii"}
    (tmp_path / "corpus.txt").write_text("\n".join(DOCUMENTS), encoding="utf-8")
    args = ["simcse", "--model", TINY, "--preset", "tiny", "--steps", 1, "--batch", 2]
    args += ["--output", run, "--dtype", "float32", "--corpus", tmp_path / "corpus.txt"]
    done = python("train.py", *args, env=env, text=False)
    assert done.returncode == 0, done.stderr
    assert (run / "encoder" / "config.json").exists() and b"\\u6c49" in done.stdout


def test_padding_is_no_word_of_the_vocabulary_that_was_added(folder, tmp_path):
    def change(raw: dict) -> None:
        for token in raw["added_tokens"]:
            token["special"] = token["content"] in ("<s>", "<|begin_of_text|>")

    spoil(folder / "tokenizer.json", change)
    model = LLM2Vec.from_pretrained(folder)
    bos = model.tokenizer.encode("").ids
    model.tokenizer.add_tokens(["find"])
    model.save(tmp_path / "out")
    pad = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["pad_token"]
    added = model.tokenizer.get_added_tokens_decoder()
    ordinary = {token.content for token in added.values() if not token.special}
    saved = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert bos and pad not in ordinary and saved.token_to_id(pad) not in bos


@pytest.mark.skipif(os.name == "nt", reason="modes of files")
def test_others_may_read_an_export_as_the_umask_says(tmp_path):
    before = os.umask(0o022)
    try:
        tiny().save(tmp_path / "encoder")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(f.stat().st_mode) for f in (tmp_path / "encoder").glob("*.*")}
    assert modes == {0o644}


def test_what_is_replaced_later_is_no_view_of_its_file(tmp_path, monkeypatch):
    """On Windows a file that is mapped into memory can't be replaced or deleted."""
    loaded, load, name = {}, runs.load_file, "decoder.weight"
    monkeypatch.setattr(runs, "load_file", lambda file: loaded.update(load(file)) or dict(loaded))
    p = torch.nn.Parameter(torch.zeros(3))
    save_file({name: p.detach(), f"{name}:exp_avg": p + 1}, tmp_path / "state-00000002.safetensors")
    (tmp_path / "settings.json").write_text("{}")
    run = runs.RunFolder(tmp_path, Settings(), {}, lambda: 0.0)
    optimizer = torch.optim.AdamW([p])
    assert run.restore({name: p}, optimizer) == 2
    assert optimizer.state[p]["exp_avg"].tolist() == [1, 1, 1]
    kept = {t.untyped_storage().data_ptr() for t in (p, optimizer.state[p]["exp_avg"])}
    assert kept.isdisjoint(t.untyped_storage().data_ptr() for t in loaded.values())


def test_an_export_has_a_card_that_hubs_read(tmp_path):
    model = tiny(template="endoftext", include_prompt=True)
    model.made_of = ["some/model", "some/adapter"]
    model.prompts = {"query": "Find:\n"}
    model.save(tmp_path / "encoder")
    card = ModelCard.load(tmp_path / "encoder" / "README.md")
    assert card.data.base_model == "some/model"
    assert card.data.library_name == "sentence-transformers"
    for words in ("`some/adapter`", "both ways", "the mean of all tokens", "Find:", "float32"):
        assert words in card.text
