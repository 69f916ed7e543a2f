"""What real people bring and do: each was once silent and wrong, or lost."""

import io
import json
import math
import os
import stat
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import DOCUMENTS, TINY, adapter_bytes, go, log_of, pair, python, refused, spoil, tiny
from huggingface_hub import ModelCard
from tokenizers import Tokenizer

import lora
import train
from llm2vec import LLM2Vec, contrastive_loss
from llm2vec_data import benchmarks, disk, runs
from llm2vec_data.encode import encode_file
from train import STAGES, Batches, known_right

TEXTS = ["A man plays a guitar.", "Stocks fell sharply."]


# --- Settings ----------------------------------------------------------------------------------


def test_a_warm_up_that_was_given_stays_and_a_share_is_one_of_the_steps(capsys):
    items, settings = list(range(40)), STAGES["simcse"].presets["tiny"]
    given = replace(settings, epochs=4, batch=8, warm_up=10)
    Batches([items], given)
    assert (given.steps, given.warm_up) == (20, 10)
    assert train.learning_rate(9, given) == given.lr > train.learning_rate(8, given)
    share = replace(settings, steps=40, warm_up=0.25)
    assert train.learning_rate(9, share) == share.lr > train.learning_rate(8, share)
    Batches([items], replace(settings, epochs=1, batch=7))
    assert "leaves out 5 items" in capsys.readouterr().out


def test_only_the_chosen_projections_are_adapted_and_a_long_warm_up_is_said(tmp_path, capsys):
    go("mntp", tmp_path, targets=["q_proj", "v_proj"], warm_up=5)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert "--warm-up 5 is longer than the run" in capsys.readouterr().out


def test_training_stops_when_scores_get_no_better_and_a_resumed_run_stops_there_too(
    tmp_path, monkeypatch
):
    scores = [0.3, 0.5, 0.4, 0.45, 0.9]
    dev = tmp_path / "dev.tsv"
    dev.write_text("5\ta\tb\n1\tc\td\n")
    for name in ("whole", "stopped"):
        run = tmp_path / name

        def sts(*_, run=run):
            return {"dev": scores[len(log_of(run))]}

        monkeypatch.setattr(benchmarks, "sts", sts)
        how = {"steps": 9, "dev": str(dev), "patience": 2, "save_every": 1}
        if name == "stopped":
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(runs, "save_adapter", lambda *_: interrupt())
                go("simcse", run, **how)
        go("simcse", run, **how)
        assert len(log_of(run)) == 4, "0.9 would have come next"
    both = [adapter_bytes(tmp_path / n) for n in ("whole", "stopped")]
    assert both[0] == both[1]


def interrupt():
    raise KeyboardInterrupt


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
    go("simcse", tmp_path, tiny(is_causal=True), pooling="last")
    model = LLM2Vec.from_pretrained(TINY, [tmp_path])
    assert model.pooling == "last" and model.decoder.config.is_causal
    model = LLM2Vec.from_pretrained(TINY, [tmp_path], pooling="mean", is_causal=False)
    assert model.pooling == "mean" and not model.decoder.config.is_causal


def test_pairs_without_an_instruction_have_the_encoders_own_prompt(tmp_path, monkeypatch):
    model, seen = tiny(separator=""), []
    model.prompts = {"query": "Q: "}
    backward = train.backward_through_encoder

    def watched(model, rows, *args):
        seen.extend(rows)
        return backward(model, rows, *args)

    monkeypatch.setattr(train, "backward_through_encoder", watched)
    go("supervised", tmp_path, model, [[pair("one", "two"), pair("three", "four")]], steps=1)
    assert model.tokenizer.decode(seen[0][0]).startswith("Q: ")
    assert model.prompts == {"query": "Q: "}


# --- Right answers, and batches with nothing to learn ------------------------------------------


def test_what_is_known_to_be_right_is_no_wrong_answer():
    """By a brute-force loop over texts, of which two are equal once they are cut."""
    model = tiny()
    pairs = [pair("q", "a", "b"), pair("q", "b"), pair("a", "q"), pair("q", "c", instruction="is")]
    pairs += [pair("r", "long text, cut short here", "r")]
    pairs += [pair("s", "long text, cut short there")]
    texts = [p["query"] for p in pairs] + [p["positive"] for p in pairs]
    texts += [n for p in pairs for n in p["negatives"]]
    leads = [p["instruction"] for p in pairs] + [""] * len(texts)
    rows = [model.rows([t], lead, 5)[0] for t, lead in zip(texts, leads, strict=False)]
    cut = ["long" if t.startswith("long") else t for t in texts]
    n, found = len(pairs), known_right(texts, rows, len(pairs))
    for i, j in np.ndindex(*found.shape):
        right = {cut[n + k] for k in range(n) if (texts[k], leads[k]) == (texts[i], leads[i])}
        assert found[i, j] == (cut[n + j] in right | {cut[i]} and i != j), (i, j)
    assert not found.diagonal().any() and found.sum() > 6


def test_answers_that_are_right_for_all_leave_nothing_to_lose(tmp_path):
    """Pairs in both directions, several positives of a query, texts that a cut makes equal."""
    several = [pair("q", text) for text in "abcd"]
    for items in (several, [pair("one", "two"), pair("two", "one")]):
        how = {"data": [items], "batch": len(items), "dropout": 0.0}
        go("supervised", tmp_path / str(len(items)), **how)
    texts = [f"One and the same beginning of a text {end}." for end in ("here", "there", "now")]
    go("simcse", tmp_path / "equal", data=texts, batch=3, length=6)
    losses = [line["loss"] for run in tmp_path.iterdir() for line in log_of(run)]
    assert len(losses) == 9 and max(losses) < 1e-6


@pytest.mark.parametrize(
    "stage, data", [("simcse", ["One. Two here."]), ("supervised", [[pair("a", "b")] * 2])]
)
def test_a_batch_of_one_is_refused_unless_it_has_negatives(stage, data, tmp_path):
    refused("--batch 1", go, stage, tmp_path / "run", data=data, batch=1)
    assert not (tmp_path / "run").exists()
    go("supervised", tmp_path / "run", data=[[pair("a", "b", "c")] * 2], batch=1)


def test_a_dev_file_of_equal_scores_is_refused_and_a_run_without_a_score_survives(
    tmp_path, monkeypatch, capsys
):
    dev = tmp_path / "dev.tsv"
    dev.write_text("3\ta\tb\n3\tc\td\n")
    refused("dev.tsv: all scores are equal", go, "simcse", tmp_path / "run", dev=str(dev))
    dev.write_text("3\ta\tb\n4\tc\td\n")
    monkeypatch.setattr(benchmarks, "sts", lambda *_: {"dev": math.nan})
    go("simcse", tmp_path / "run", dev=str(dev))
    assert "no step has a score" in capsys.readouterr().out
    assert (tmp_path / "run" / "finished").exists()


def test_negatives_may_differ_in_number():
    """The loss of a batch with none to three negatives a row, as a closed form."""
    draw = torch.Generator().manual_seed(0)
    query, positive = torch.randn(2, 3, 8, generator=draw)
    negative = torch.randn(4, 8, generator=draw)
    scores = 20 * torch.cosine_similarity(query[:, None], torch.cat([positive, negative]), dim=-1)
    expected = -scores.log_softmax(1).diagonal().mean()
    torch.testing.assert_close(contrastive_loss(query, positive, negative), expected)


# --- Interrupted, printed, exported ------------------------------------------------------------


def test_an_interrupted_cell_runs_again_and_goes_on(tmp_path, monkeypatch):
    """The model is the same object, as in a notebook."""
    whole, model = go("mntp", tmp_path / "whole"), tiny()
    rate, calls = train.learning_rate, iter(range(2))
    with monkeypatch.context() as patch, pytest.raises(StopIteration):
        patch.setattr(train, "learning_rate", lambda *a: next(calls) and rate(*a) or rate(*a))
        go("mntp", tmp_path / "run", model)
    assert not lora.adapted(model) and not lora.trained(model)
    go("mntp", tmp_path / "run", model)
    for name, weight in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name


def test_standard_output_without_a_buffer_takes_vectors(tmp_path, monkeypatch):
    (tmp_path / "t.txt").write_text("Grüße.\n", encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", out := io.StringIO())
    encode_file(tiny(), str(tmp_path / "t.txt"), "-")
    assert json.loads(out.getvalue())["text"] == "Grüße."


@pytest.mark.parametrize("encoding", ["ascii", pytest.param("cp1252", marks=pytest.mark.slow)])
def test_a_letter_that_can_not_be_shown_loses_no_result(encoding, tmp_path):
    run, env = tmp_path / "汉字", os.environ | {"PYTHONIOENCODING": encoding}
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
    loaded, optimizers, seen = [], [], []
    load, write, adam = runs.load_file, disk.write_whole, torch.optim.AdamW

    def watched(file):
        loaded.append(load(file))
        return loaded[-1]

    def kept(*args, **how):
        optimizers.append(adam(*args, **how))
        return optimizers[-1]

    def stop_after_two(file, content):
        write(file, content)
        seen.append(file)
        if len(seen) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(runs, "load_file", watched)
    monkeypatch.setattr(torch.optim, "AdamW", kept)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs, "write_whole", stop_after_two)
        go("mntp", tmp_path, steps=6, save_every=1)
    go("mntp", tmp_path, steps=6, save_every=1)
    assert loaded
    files = {t.untyped_storage().data_ptr() for state in loaded for t in state.values()}
    moments = [v for s in optimizers[-1].state.values() for v in s.values() if torch.is_tensor(v)]
    assert moments and files.isdisjoint(v.untyped_storage().data_ptr() for v in moments)


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
    again = LLM2Vec.from_pretrained(tmp_path / "encoder")
    assert again.include_prompt and not (tmp_path / "encoder" / "1_WordWeights").exists()
