"""What real people bring and do: each was once silent and wrong, or lost."""

import json
import os
import stat

import numpy as np
import pytest
import torch
from helpers import TINY, go, python, spoil, tiny
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import lora
from llm2vec import LLM2Vec
from llm2vec_data import runs
from train import STAGES, Settings

TEXTS = ["A man plays a guitar.", "Stocks fell sharply."]

# --- An adapter or an encoder that is trained further ------------------------------------------


def test_an_adapter_may_go_on_training_with_its_rank_on_its_projections(tmp_path):
    go("mntp", tmp_path / "first", tiny(1), rank=4, lr=1e-3, targets=["q_proj", "v_proj"])
    config = json.loads((tmp_path / "first" / "adapter_config.json").read_text())
    assert (config["target_modules"], config["r"]) == (["q_proj", "v_proj"], 4)
    model = tiny(1)
    lora.load_adapter(model, tmp_path / "first")
    go("mntp", tmp_path / "second", model, lr=1e-9, dropout=0.0, warm_up=0)
    first, second = map(load_file, sorted(tmp_path.glob("*/adapter_model.safetensors")))
    torch.testing.assert_close(second, first, atol=1e-6, rtol=0)


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
    model = tiny(6, [tmp_path])
    assert model.pooling == "last" and model.decoder.config.is_causal
    np.testing.assert_array_equal(model.encode(["a text"]), asked.encode(["a text"]))
    model = tiny(6, [tmp_path], template="endoftext", pooling="mean", is_causal=False)
    assert len(model.tokenizer.encode("a").ids) == 2, "what is asked for comes first"
    assert model.pooling == "mean" and not model.decoder.config.is_causal


# --- Printed and written -----------------------------------------------------------------------


def test_a_letter_that_can_not_be_shown_loses_no_result(tmp_path):
    run, env = tmp_path / "汉字", os.environ | {"PYTHONIOENCODING": "ascii"}
    (tmp_path / "corpus.txt").write_text("One text.\nAnother text.\n")
    args = ["simcse", "--model", TINY, "--preset", "tiny", "--steps", 1, "--output", run]
    done = python("train.py", *args, "--corpus", tmp_path / "corpus.txt", env=env, text=False)
    assert done.returncode == 0, done.stderr
    assert (run / "encoder" / "config.json").exists() and b"\\u6c49" in done.stdout


def test_padding_is_no_word_of_the_vocabulary_that_was_added(folder, tmp_path):
    def change(raw: dict) -> None:
        for token in raw["added_tokens"]:
            token["special"] = token["content"] in ("<s>", "<|begin_of_text|>")

    spoil(folder / "tokenizer.json", change)
    model = LLM2Vec.from_pretrained(folder)
    model.tokenizer.add_tokens(["find"])
    model.save(tmp_path / "out")
    pad = json.loads((tmp_path / "out" / "config.json").read_text())["pad_token_id"]
    [bos], added = model.tokenizer.encode("").ids, model.tokenizer.get_added_tokens_decoder()
    assert pad != bos and (pad not in added or added[pad].special)


def test_what_is_replaced_later_is_no_view_of_its_file(tmp_path, monkeypatch):
    """On Windows a file that is mapped into memory can't be replaced or deleted."""
    p, run = torch.nn.Parameter(torch.zeros(3)), runs.RunFolder(tmp_path, Settings(), {}, float)
    optimizer, loaded = torch.optim.AdamW([p]), {"p": torch.ones(3), "p:exp_avg": torch.ones(3)}
    (tmp_path / "state-00000002.safetensors").touch()
    monkeypatch.setattr(runs, "load_file", lambda file: dict(loaded))
    assert run.restore({"p": p}, optimizer) == 2
    for name, tensor in (("p", p), ("p:exp_avg", optimizer.state[p]["exp_avg"])):
        assert torch.equal(tensor, loaded[name]) and tensor.data_ptr() != loaded[name].data_ptr()


def test_an_export_has_a_card_that_hubs_read_and_modes_as_the_umask_says(tmp_path):
    model = tiny(template="endoftext", include_prompt=True)
    model.made_of = ["some/model", "some/adapter"]
    model.prompts = {"query": "Find:\n"}
    before = os.umask(0o022)
    try:
        model.save(tmp_path / "encoder")
    finally:
        os.umask(before)
    files = [file for file in (tmp_path / "encoder").iterdir() if file.is_file()]
    assert os.name == "nt" or {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o644}
    card = ModelCard.load(tmp_path / "encoder" / "README.md")
    given = card.data.base_model, card.data.library_name
    assert given == ("some/model", "sentence-transformers")
    for words in ("`some/adapter`", "both ways", "the mean of all tokens", "Find:", "float32"):
        assert words in card.text
