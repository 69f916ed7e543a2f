"""What the pictures show is what was computed."""

import json
import os
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY, refused, tiny

from llm2vec import attention_mask, mntp_loss
from llm2vec_data import figures
from llm2vec_data.benchmarks import mask_id_of
from llm2vec_data.figures import guesses, layer_cosines, read_log, view_cosines
from lora import add_lora, save_adapter

TEXTS = ["A short one.", "This text is a little longer than the other, so that positions differ."]


@pytest.fixture
def adapters(tmp_path) -> list[Path]:
    """Two adapters that do nothing much, in folders named mntp and simcse."""
    decoder, folders = tiny(6).decoder, [tmp_path / "mntp", tmp_path / "simcse"]
    for parameter in add_lora(decoder, rank=1):
        parameter.data += 0.1
    for folder in folders:
        save_adapter(decoder, folder)
    return folders


@pytest.fixture
def draw(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")

    def draw(*command: object) -> tuple[list[str], str]:
        """What the picture of a command says, and the picture."""
        file = tmp_path / "drawn.svg"
        monkeypatch.setattr(sys, "argv", ["", *map(str, command), "--output", str(file)])
        figures.main()
        return said_in(file), file.read_text(encoding="utf-8")

    return draw


def said_in(file: Path) -> list[str]:
    """The texts of a picture that is small, with a dark value for each colour that it has."""
    picture = file.read_text(encoding="utf-8")
    style, drawn = picture.split("</style>")
    used = set(re.findall(r"(?:fill|stroke): #\w+", drawn))
    assert used and used <= set(re.findall(r'\[style\*="(.*?)"\]{\w+:#\w+!important}', style))
    assert "(prefers-color-scheme:dark)" in style and len(picture.encode()) < 60_000
    return [node.text for node in ElementTree.fromstring(picture).iter() if node.tag[-4:] == "text"]


def test_a_guess_is_what_mntp_trains(encoder):
    sentence, word = figures.SENTENCE, figures.HIDDEN
    words, likeliest, chance = guesses(encoder, sentence, word)
    assert words == ["The", "official", "language", "is", "French", "."]
    ids = torch.tensor([encoder.tokenizer.encode(sentence).ids])
    chosen = torch.arange(6)[None] == words.index(word)
    masked = ids.masked_fill(chosen, mask_id_of(encoder))
    with torch.no_grad():
        loss = mntp_loss(encoder.decoder, masked, ids, chosen)
    assert -np.log(chance) == pytest.approx(loss.item(), abs=1e-4)
    best = list(likeliest.values())
    assert best == sorted(best, reverse=True) and len(best) == 3 and sum(best) <= 1
    assert likeliest.get(word, chance) == chance
    refused("'Sprache' is not one token", guesses, encoder, sentence, "Sprache")


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_look_leaves_the_model_as_it_was(encoder, is_causal, monkeypatch):
    monkeypatch.setattr(encoder.decoder.config, "is_causal", is_causal)
    before = encoder.encode(TEXTS)
    layer_cosines(encoder, TEXTS)
    cosines = view_cosines(encoder, TEXTS, draws=2)
    assert cosines == view_cosines(encoder, TEXTS, draws=2)
    assert 1 > cosines[0] > cosines[1], "a text is more like itself than like another one"
    assert encoder.decoder.config.is_causal is is_causal
    assert encoder.decoder.config.attention_dropout == 0 and not encoder.decoder.training
    assert np.array_equal(encoder.encode(TEXTS), before)


def test_the_last_token_has_seen_everything_in_both_directions(encoder):
    length = len(encoder.tokenizer.encode(TEXTS[1]).ids)
    one, other, both = (
        layer_cosines(encoder, texts, positions=length + 3)
        for texts in (TEXTS[:1], TEXTS[1:], TEXTS)
    )
    assert other.shape == (6, length + 3)
    assert np.isnan(other[:, length:]).all() and np.isfinite(other[:, :length]).all()
    assert other[0, length - 1] == pytest.approx(1, abs=1e-5)
    assert other[1, length - 1] < 0.99999, "its neighbours' states differ from layer 2 on"
    assert layer_cosines(encoder, TEXTS[1:], positions=4)[0, 3] == pytest.approx(1, abs=1e-5)
    mean = np.where(np.isnan(one), other, (one + other) / 2)  # the first one is shorter
    np.testing.assert_allclose(both, mean, atol=1e-5)


def test_the_pictures_at_hand_are_small_and_for_both_modes():
    files = list((TINY.parent / "pictures").glob("*.svg"))
    assert files and all(said_in(file) for file in files)


@pytest.mark.slow
def test_the_method_is_drawn_with_the_numbers_of_a_model(adapters, draw):
    how = ["method", "--dtype", "float32", "--device", "cpu", "--adapters"]
    said, drawn = draw(*how, *adapters)
    causal, mntp, simcse = tiny(6, is_causal=True), tiny(6, adapters[:1]), tiny(6, adapters)
    words, likeliest, _ = guesses(mntp, figures.SENTENCE, figures.HIDDEN)
    assert {f"{chance:.0%}" for chance in likeliest.values()} | {*likeliest, *words} <= set(said)
    _, _, untrained = guesses(causal, figures.SENTENCE, figures.HIDDEN)
    assert any(line.endswith(f"{figures.HIDDEN} {untrained:.0%}") for line in said)
    texts = [figures.SENTENCE, *figures.OTHERS]
    for pair in zip(view_cosines(mntp, texts), view_cosines(simcse, texts), strict=True):
        assert "{:.2f} → {:.2f}".format(*pair) in said
    cells = re.findall(r"<use .*fill: (#\w+)", drawn)[:36]  # of the mask, row by row
    mask = attention_mask(torch.ones(1, 6), is_causal=True).flatten().tolist()
    assert cells == [figures.BLUE if cell else figures.ORANGE for cell in mask]
    assert draw(*how, *adapters, "--narrow")[0] == said
    refused("expected two", draw, *how, adapters[0])


def test_layers_are_drawn_with_their_means_and_the_first_one_lowest(adapters, draw, monkeypatch):
    panels = {"tiny-llama": np.full((2, 32), 0.5), "+ mntp": np.full((2, 32), np.nan)}
    panels["+ mntp"][:, 1] = 0.25, 1
    measured = iter(panels.values())
    monkeypatch.setattr(figures, "held_out_of", lambda corpus: TEXTS)
    monkeypatch.setattr(figures, "layer_cosines", lambda encoder, texts: next(measured))
    said, drawn = draw("layers", "--model", TINY, "--dtype", "float32", "--adapters", adapters[0])
    assert {*panels, "mean 0.50", "mean 0.62"} <= set(said)
    lines = re.findall(rf'd="M \S+ (\S+)[^"]*"[^>]*stroke: {figures.BLUE}', drawn)
    assert float(lines[1]) > float(lines[2]), "its cell is further down the page"


def test_curves_are_of_whole_steps_and_in_the_order_of_the_stages(draw, tmp_path):
    refused(r"no log\.jsonl", read_log, tmp_path)
    logs = {"zeta": [(1, 3.0), (2, 2.5), (3, 1.0)], "mntp": [(1, 0.0)]}
    for k, (stage, points) in enumerate(logs.items()):
        file = tmp_path / stage / "log.jsonl"
        file.parent.mkdir()
        file.write_text("".join(f'{{"step": {step}, "loss": {loss}}}\n' for step, loss in points))
        os.utime(file, (k, k))
    assert list(read_log(tmp_path).items()) == list(logs.items())
    assert read_log(tmp_path / "mntp") == {"mntp": [(1, 0.0)]}
    assert [text for text in draw("curves", tmp_path)[0] if text in logs] == ["zeta", "mntp"]
    file.write_text('{"step": 1, "loss": []}')
    refused(r"mntp/log\.jsonl: ", read_log, tmp_path)


def test_bars_are_as_long_as_scores_are_high(draw, tmp_path):
    table, both = tmp_path / "results.json", [{"sts": 0.3}, {"sts": 0.5}]  # of two seeds
    rows = {"causal": [{"sts": 0.2}], "<both> $x$": both, "no sts": [{}], "bad": [{"sts": -0.1}]}
    table.write_text(json.dumps({"runs": [{"command": "", "weights": {}, "rows": rows}]}))
    said, drawn = draw("bars", table, "--score", "sts")
    several = "0.400 (0.300 to 0.500)"
    assert said == ["causal", "0.200", "<both> $x$", several, "bad", "-0.100", "sts"]
    bars = re.findall(r'd="M (\S+) \S+ \nL (\S+) [^>]*fill: #\w+; stroke', drawn)
    assert [float(x1) - float(x) for x, x1 in bars] == [120, 240, 2]
    refused("results.json: no row has the score sts12", draw, "bars", table, "--score", "sts12")


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(figures, "Figure", None)
    refused(r'pip install -e "\.\[figures\]"', figures.new_figure, 10, 10)
