"""What the pictures show is what was computed."""

import json
import os
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from data import figures
from data.figures import curves_svg, heat_map, heat_map_svg, layer_cosines, read_log
from llm2vec import LLM2Vec
from lora import add_lora, save_adapter

TINY = Path(__file__).parent.parent / "data" / "tiny-llama"
TEXTS = ["A short one.", "This text is a little longer than the other, so that positions differ."]
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def encoder() -> LLM2Vec:
    return LLM2Vec.from_pretrained(TINY)


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
    np.testing.assert_allclose(layer_cosines(encoder, ["a"], positions=1), 1, atol=1e-5)


@pytest.mark.parametrize("max_tokens", [1, 1024])
def test_cosines_average_the_texts_that_are_long_enough(encoder, max_tokens):
    one, other = (layer_cosines(encoder, [text], positions=30) for text in TEXTS)
    both = layer_cosines(encoder, TEXTS, positions=30, max_tokens=max_tokens)
    expected = np.where(np.isnan(one), other, (one + other) / 2)  # the first one is shorter
    np.testing.assert_allclose(both, expected, atol=1e-5)


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_look_leaves_the_model_as_it_was(encoder, is_causal, monkeypatch):
    monkeypatch.setattr(encoder.decoder.config, "is_causal", is_causal)
    before = encoder.encode(TEXTS)
    layer_cosines(encoder, TEXTS)
    assert encoder.decoder.config.is_causal is is_causal
    assert np.array_equal(encoder.encode(TEXTS), before)


def test_a_heat_map_has_a_line_a_layer_and_a_shade_a_token():
    cosines = np.array([[1.0, 0.5, np.nan], [0.0, -0.3, 1.0]])
    lines = heat_map(cosines, "mine").splitlines()
    assert "mine" in lines[0]
    assert lines[1] == "layer   2 |    ██| mean 0.23"
    assert lines[2] == "layer   1 |██▒▒? | mean 0.75"
    assert lines[3].split() == ["token", "0"]


def test_a_heat_map_as_svg_has_a_box_a_cell():
    panels = {"base <&>": np.full((3, 5), 0.5), "+ MNTP": np.full((3, 5), np.nan)}
    panels["+ MNTP"][0, 0] = 1
    root = ElementTree.fromstring(heat_map_svg(panels))
    fills = [box.get("fill") for box in root.iter(f"{SVG}rect") if box.get("width") == "7"]
    assert len(fills) == 30 and fills.count("#bbb") == 14 and "#fde725" in fills
    said = {node.text for node in root.iter(f"{SVG}text")}
    assert {"base <&>", "+ MNTP", "layer", "token"} <= said


# --- Curves ------------------------------------------------------------------------------------


def log(values: list[float]) -> list[dict]:
    return [{"step": i + 1, "loss": v, "lr": 1e-3 / (i + 1)} for i, v in enumerate(values)]


@pytest.mark.parametrize("values", [[3.0, 2.5, 1.0], [2.0], [0.0, 0.0], [1.0, float("nan"), 0.5]])
def test_curves_have_a_point_for_each_finite_value(values):
    root = ElementTree.fromstring(curves_svg({"mntp": log(values), "simcse": log([1.0, 0.1])}))
    lines = [line.get("points").split() for line in root.iter(f"{SVG}polyline")]
    assert [len(points) for points in lines] == [sum(map(np.isfinite, values)), len(values), 2, 2]
    for point in sum(lines, []):
        x, y = map(float, point.split(","))
        assert 0 <= x <= float(root.get("width")) and 40 <= y <= 220
    y = [float(point.split(",")[1]) for point in lines[2]]
    assert y[0] < y[1], "a smaller loss is further down"


@pytest.mark.parametrize("line", ["no", "[]", '{"step": 1}', '{"step": 1, "loss": [], "lr": 0}'])
def test_a_bad_log_is_named(tmp_path, line):
    with pytest.raises(FileNotFoundError, match=r"no log\.jsonl"):
        read_log(tmp_path)
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(ValueError, match="no step"):
        read_log(tmp_path)
    (tmp_path / "log.jsonl").write_text(json.dumps(log([1.0])[0]) + f"\n{line}\n")
    with pytest.raises(ValueError, match="log.jsonl, line 2"):
        read_log(tmp_path)


# --- Commands ----------------------------------------------------------------------------------


def test_the_curves_of_a_run_stand_in_the_order_in_which_its_stages_ran(tmp_path, monkeypatch):
    for i, stage in enumerate(("zeta", "mntp")):
        file = tmp_path / stage / "log.jsonl"
        file.parent.mkdir()
        file.write_text("\n".join(map(json.dumps, log([2.0, 1.0]))) + "\n")
        os.utime(file, (i, i))
    assert list(read_log(tmp_path)) == ["zeta", "mntp"]
    assert [line["loss"] for line in read_log(tmp_path / "mntp")["mntp"]] == [2.0, 1.0]
    monkeypatch.setattr(sys, "argv", ["figures", "curves", str(tmp_path)])
    figures.main()
    assert (tmp_path / "curves.svg").read_text() == curves_svg(read_log(tmp_path))


def test_the_layers_command_draws_a_panel_for_each_adapter(tmp_path, monkeypatch, capsys):
    model = LLM2Vec.from_pretrained(TINY)
    for parameter in add_lora(model.decoder, rank=1):
        parameter.data += 0.1
    save_adapter(model.decoder, tmp_path / "mine")
    monkeypatch.setattr(figures, "held_out_of", lambda corpus: TEXTS)
    command = ["figures", "layers", "--model", str(TINY), "--dtype", "float32"]
    command += ["--adapters", str(tmp_path / "mine"), "--output", str(tmp_path / "a.svg")]
    monkeypatch.setattr(sys, "argv", command)
    figures.main()
    panels = {"tiny-llama": LLM2Vec.from_pretrained(TINY)}
    panels["+ mine"] = LLM2Vec.from_pretrained(TINY, [tmp_path / "mine"])
    panels = {title: layer_cosines(encoder, TEXTS) for title, encoder in panels.items()}
    assert (tmp_path / "a.svg").read_text() == heat_map_svg(panels)
    assert heat_map(panels["+ mine"], "+ mine") in capsys.readouterr().out
