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

from llm2vec import LLM2Vec, attention_mask, mntp_loss
from llm2vec_data import figures
from llm2vec_data.benchmarks import mask_id_of
from llm2vec_data.figures import (
    curves_svg,
    guesses,
    heat_map_svg,
    layer_cosines,
    read_log,
    view_cosines,
)
from lora import add_lora, save_adapter

TINY = Path(__file__).parent.parent / "data" / "tiny-llama"
TEXTS = ["A short one.", "This text is a little longer than the other, so that positions differ."]
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def encoder() -> LLM2Vec:
    return LLM2Vec.from_pretrained(TINY)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> list[Path]:
    """Two adapters that do nothing much, in folders named mntp and simcse."""
    folder = tmp_path_factory.mktemp("adapters")
    decoder = LLM2Vec.from_pretrained(TINY).decoder
    for parameter in add_lora(decoder, rank=1):
        parameter.data += 0.1
    for name in ("mntp", "simcse"):
        save_adapter(decoder, folder / name)
    return [folder / "mntp", folder / "simcse"]


@pytest.fixture
def draw(monkeypatch, tmp_path):
    def draw(*command: object, file: Path = tmp_path / "drawn.svg") -> ElementTree.Element:
        """The picture that a command writes."""
        monkeypatch.setattr(sys, "argv", ["figures", *map(str, command), "--output", str(file)])
        figures.main()
        return checked(file.read_text(encoding="utf-8"))

    return draw


def checked(picture: str) -> ElementTree.Element:
    """A picture as XML, once it is known to be small, and all of it has a colour in both modes."""
    assert len(picture.encode()) < 60_000
    root = ElementTree.fromstring(picture)
    light, dark = root.find(f"{SVG}style").text.split("@media(prefers-color-scheme:dark)")
    names = set(re.findall(r"\.(\w+)\{color:", dark))
    drawn = [node for node in root.iter() if node.tag[len(SVG) :] in ("text", "rect", "path")]
    assert {node.get("class") for node in drawn} <= names
    assert names == set(re.findall(r"\.(\w+)\{color:", light))
    assert root.get("viewBox") == f"0 0 {root.get('width')} {root.get('height')}"
    return root


def said_in(root: ElementTree.Element) -> list[str]:
    return [node.text for node in root.iter(f"{SVG}text") if node.text]


# --- The method --------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [2, 6])
def test_the_picture_of_the_mask_has_the_cells_of_the_mask(T):
    words = [f"w{i} <&>" for i in range(T)]
    root = checked(figures.svg(270, 330, [figures.mask_panel((0, 0), words)]))
    causal = attention_mask(torch.ones(1, T), is_causal=True)
    kinds = [box.get("class") for box in root.iter(f"{SVG}rect")]
    assert kinds == [("orange", "blue")[cell] for cell in causal.flatten().tolist()]
    assert [said for said in said_in(root) if said in words] == [w for w in words for _ in "xy"]


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
    with pytest.raises(ValueError, match="'Sprache' is not one token"):
        guesses(encoder, sentence, "Sprache")


def test_the_method_is_drawn_with_the_numbers_of_a_model(adapters, draw):
    how = ["method", "--dtype", "float32", "--device", "cpu", "--adapters"]
    root = draw(*how, *adapters)
    causal = LLM2Vec.from_pretrained(TINY, is_causal=True)
    mntp, simcse = (LLM2Vec.from_pretrained(TINY, adapters[:n]) for n in (1, 2))
    said, (_, likeliest, _) = said_in(root), guesses(mntp, figures.SENTENCE, figures.HIDDEN)
    assert {f"{chance:.0%}" for chance in likeliest.values()} | set(likeliest) <= set(said)
    _, _, untrained = guesses(causal, figures.SENTENCE, figures.HIDDEN)
    assert any(line.endswith(f"{figures.HIDDEN} {untrained:.0%}") for line in said)
    texts = [figures.SENTENCE, *figures.OTHERS]
    for pair in zip(view_cosines(mntp, texts), view_cosines(simcse, texts), strict=True):
        assert "{:.2f} → {:.2f}".format(*pair) in said
    narrow = draw(*how, *adapters, "--narrow")
    assert said_in(narrow) == said and float(narrow.get("width")) < 380
    with pytest.raises(ValueError, match="expected two"):
        draw(*how, adapters[0])


def test_the_pictures_at_hand_are_small_and_for_both_modes():
    files = list((TINY.parent / "pictures").glob("*.svg"))
    assert files
    for file in files:
        checked(file.read_text(encoding="utf-8"))


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


# --- Layers ------------------------------------------------------------------------------------


def test_the_last_token_has_seen_everything_in_both_directions(encoder):
    length = len(encoder.tokenizer.encode(TEXTS[1]).ids)
    cosines = layer_cosines(encoder, TEXTS[1:], positions=length + 3)
    assert cosines.shape == (6, length + 3)
    assert np.isnan(cosines[:, length:]).all() and np.isfinite(cosines[:, :length]).all()
    assert cosines[0, length - 1] == pytest.approx(1, abs=1e-5)
    assert cosines[1, length - 1] < 0.99999, "its neighbours' states differ from layer 2 on"
    assert cosines[0, 0] < 0.99
    # Cut behind the first four tokens, the fourth is the last that there is.
    assert layer_cosines(encoder, TEXTS[1:], positions=4)[0, 3] == pytest.approx(1, abs=1e-5)


def test_cosines_average_the_texts_that_are_long_enough(encoder):
    one, other = (layer_cosines(encoder, [text], positions=30) for text in TEXTS)
    both = layer_cosines(encoder, TEXTS, positions=30)
    expected = np.where(np.isnan(one), other, (one + other) / 2)  # the first one is shorter
    np.testing.assert_allclose(both, expected, atol=1e-5)


def test_a_heat_map_shades_every_cell_by_its_cosine():
    panels = {"base <&>": np.full((3, 5), 0.5), "+ MNTP": np.full((3, 5), np.nan)}
    panels["+ MNTP"][0, 0] = 1
    root = checked(heat_map_svg(panels))
    shaded = [(p.get("stroke-opacity"), p.get("d")) for p in root.iter(f"{SVG}path")]
    assert [opacity for opacity, _ in shaded[:2]] == ["0.125", "1"]
    assert len(set(re.findall(r"M[\d.]+ [\d.]+h1", shaded[0][1]))) == 15
    assert shaded[1][1] == "M0 2.5h1", "the first layer is the lowest row; NaN is left out"
    assert {"base <&>", "+ MNTP", "mean 0.50", "mean 1.00"} <= set(said_in(root))
    checked(heat_map_svg(dict.fromkeys("abc", np.random.default_rng(0).random((32, 32)))))


def test_the_layers_command_draws_a_panel_for_each_adapter(tmp_path, adapters, draw, monkeypatch):
    monkeypatch.setattr(figures, "held_out_of", lambda corpus: TEXTS)
    draw("layers", "--model", TINY, "--dtype", "float32", "--adapters", *adapters)
    panels = {
        name: layer_cosines(LLM2Vec.from_pretrained(TINY, adapters[:n]), TEXTS)
        for n, name in enumerate(["tiny-llama", "+ mntp", "+ simcse"])
    }
    assert (tmp_path / "drawn.svg").read_text() == heat_map_svg(panels)


# --- Curves and bars ---------------------------------------------------------------------------


@pytest.mark.parametrize("losses", [[3.0, 2.5, 1.0], [2.0], [0.0, 0.0]])
def test_curves_have_a_point_for_each_step(losses):
    logs = {"mntp": list(enumerate(losses, start=1)), "simcse": [(1, 1.0), (2, 0.1)]}
    root = checked(curves_svg(logs))
    lines = [p.get("d")[1:].split() for p in root.iter(f"{SVG}path") if p.get("class") == "blue"]
    points = [[tuple(map(float, point.split(","))) for point in line] for line in lines]
    assert [len(line) for line in points] == [len(losses), 2]
    assert all(0 < x <= 340 and 58 <= y <= 238 for line in points for x, y in line)
    assert points[1] == [(170, 58), (340, 220)], "of 180 pixels for 1 nat, above 238"
    assert {"mntp", "simcse"} <= set(said_in(root))


def test_the_curves_of_a_run_stand_in_the_order_in_which_its_stages_ran(tmp_path, draw):
    with pytest.raises(FileNotFoundError, match=r"no log\.jsonl"):
        read_log(tmp_path)
    for i, stage in enumerate(("zeta", "mntp")):
        file = tmp_path / stage / "log.jsonl"
        file.parent.mkdir()
        file.write_text('{"step": 1, "loss": 2.0, "lr": 0.1}\n{"step": 2, "loss": 1, "lr": 0}\n')
        os.utime(file, (i, i))
    assert list(read_log(tmp_path)) == ["zeta", "mntp"]
    assert read_log(tmp_path / "mntp") == {"mntp": [(1, 2.0), (2, 1.0)]}
    draw("curves", tmp_path, file=tmp_path / "curves.svg")
    assert (tmp_path / "curves.svg").read_text() == curves_svg(read_log(tmp_path))
    file.write_text('{"step": 1, "loss": []}')
    with pytest.raises(ValueError, match=r"mntp/log\.jsonl: "):
        read_log(tmp_path)


def test_bars_are_as_long_as_scores_are_high(tmp_path, draw):
    table, both = tmp_path / "results.json", [{"sts": 0.3}, {"sts": 0.5}]  # of two seeds
    rows = {"causal": {"sts": 0.2}, "<both>": both, "no sts": {}, "bad": {"sts": -0.1}}
    table.write_text(json.dumps(rows))
    root = draw("bars", table, "--score", "sts")
    found = [(b.get("class"), float(b.get("width"))) for b in root.iter(f"{SVG}rect")]
    assert found == [("blue", 280), ("orange", 560), ("blue", 2)]
    said = ["sts", "causal", "0.200", "<both>", "0.400", "bad", "-0.100"]
    assert said_in(root) == said
    with pytest.raises(ValueError, match="results.json: no row has the score sts12"):
        draw("bars", table, "--score", "sts12")
