"""Pictures: the method's three steps, what they change in a model, a run's loss, its scores.

    python train.py && python -m data.figures method
    python -m data.figures layers --model MODEL --adapters MNTP SIMCSE --output layers.svg
    python -m data.figures curves RUN
    python -m data.figures bars RUN/results.json --output results.svg

An SVG is text, so no plotting package is needed. Its colours follow the reader's light or dark
mode, and it has no background of its own.
"""

import argparse
import copy
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import llm2vec
from llm2vec import LLM2Vec, pad, tokenize
from llm2vec_data.benchmarks import held_out_of, mask_id_of
from llm2vec_data.commands import cli
from llm2vec_data.corpus import WIKIPEDIA, sentences
from llm2vec_data.disk import read_json, reading, write_whole

HERE = Path(__file__).parent
# What the picture of the method reads: each word is one token of the tiny model.
SENTENCE, HIDDEN = "The official language is French.", "language"
OTHERS = ["Most people speak French.", "The two countries share a border."]
OTHERS += ["Paris is the capital of France.", "A man is playing a guitar."]


# --- What is measured --------------------------------------------------------------------------


@torch.no_grad()
def layer_cosines(encoder: LLM2Vec, texts: Sequence[str], positions: int = 32) -> np.ndarray:
    """How alike the hidden states of causal and bidirectional attention are, before any training.

    The cosine between the two states of each token after each layer (before the final norm),
    averaged over the texts that are long enough: (layers, positions), NaN where none is. Texts are
    cut at `positions` tokens. The paper (section 5.2) finds it near 1 for Mistral-7B alone.
    """
    decoder = encoder.decoder.eval()
    causal, both_ways = copy.copy(decoder), copy.copy(decoder)  # of the same weights
    causal.config = replace(decoder.config, is_causal=True)
    both_ways.config = replace(decoder.config, is_causal=False)
    layers = len(decoder.layers)
    total, count = torch.zeros(layers, positions), torch.zeros(positions)
    for ids, _ in tokenize(encoder.tokenizer, texts, positions):
        row = pad([ids], decoder.device)
        states = causal(row, last=layers), both_ways(row, last=layers)
        total[:, : len(ids)] += F.cosine_similarity(*states, dim=-1)[:, 0].cpu()  # (layers, T)
        count[: len(ids)] += 1
    return torch.where(count > 0, total / count, math.nan).numpy()


@torch.no_grad()
def guesses(
    encoder: LLM2Vec, sentence: str, word: str
) -> tuple[list[str], dict[str, float], float]:
    """The tokens of a sentence, and what the model guesses where `word` is hidden behind `_`.

    These are the three likeliest tokens with their probabilities, and the probability of `word`.
    As in MNTP, they are read off the state before the hidden token.
    """
    [(ids, own)] = tokenize(encoder.tokenizer, [sentence], encoder.max_length)
    words = [encoder.tokenizer.decode([k]).strip() for k in ids]
    if word not in words[1:]:
        raise ValueError(f"{word!r} is not one token of this model: {' '.join(words)}")
    i, decoder = words.index(word), encoder.decoder.eval()
    masked = pad([[*ids[:i], mask_id_of(encoder), *ids[i + 1 :]]], decoder.device)
    chances = decoder.logits(decoder(masked)[0, i - 1]).float().softmax(-1)
    likeliest = chances.topk(3).indices.tolist()
    named = {encoder.tokenizer.decode([k]).strip(): chances[k].item() for k in likeliest}
    return words[own.index(True) :], named, chances[ids[i]].item()


@torch.no_grad()
def view_cosines(encoder: LLM2Vec, texts: Sequence[str], draws: int = 32) -> list[float]:
    """The cosines that SimCSE trains, of the first text and each text (itself too) read again.

    Each reading has its own dropout, the paper's 0.3 on attention; the mean of so many draws.
    """
    decoder, rows = encoder.decoder, tokenize(encoder.tokenizer, texts, encoder.max_length)
    before, decoder.config.attention_dropout = decoder.config.attention_dropout, 0.3
    decoder.train()
    torch.manual_seed(0)
    views = [F.normalize(encoder.embed(rows + rows), dim=-1) for _ in range(draws)]
    decoder.eval().config.attention_dropout = before
    return torch.stack([view[len(rows) :] @ view[0] for view in views]).mean(0).tolist()


# --- SVG ---------------------------------------------------------------------------------------

STYLE = """
text,rect,circle{fill:currentColor} path{fill:none;stroke:currentColor}
.ink{color:#1f2328} .muted{color:#59636e} .rule{color:#d1d9e0}
.blue{color:#0969da} .orange{color:#bc4c00}
@media(prefers-color-scheme:dark){
.ink{color:#f0f6fc} .muted{color:#9198a1} .rule{color:#3d444d}
.blue{color:#4493f7} .orange{color:#f0883e}
}"""
FONT = 'font-family="system-ui,-apple-system,Segoe UI,Helvetica,Arial,sans-serif" font-size="12"'


def svg(width: float, height: float, parts: Sequence[str]) -> str:
    """A picture that scales with the page, and follows its light or dark mode even in <img>."""
    size = f'viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}"'
    start = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {FONT}><style>{STYLE}</style>'
    return "\n".join([start, *parts, "</svg>"]) + "\n"


def text(x: float, y: float, content: object, kind="ink", anchor="start") -> str:
    place = f'x="{x:.5g}" y="{y:.5g}" text-anchor="{anchor}"'
    return f'<text class="{kind}" {place}>{escape(str(content))}</text>'


def box(kind: str, x: float, y: float, width: float, height: float, opacity: float = 1) -> str:
    size = f'x="{x:.5g}" y="{y:.5g}" width="{width:.5g}" height="{height:.5g}" rx="3"'
    return f'<rect class="{kind}" {size} fill-opacity="{opacity}"/>'


def path(kind: str, d: str, width: float = 2, opacity: float = 1) -> str:
    return f'<path class="{kind}" d="{d}" stroke-width="{width}" stroke-opacity="{opacity:.5g}"/>'


def dot(kind: str, x: float, y: float, hollow: bool = False) -> str:
    how = 'r="4" fill-opacity="0" stroke="currentColor" stroke-width="2"' if hollow else 'r="5"'
    return f'<circle class="{kind}" cx="{x:.5g}" cy="{y:.5g}" {how}/>'


def legend(kind: str, said: str, y: float, x: float = 0, hollow: bool = False) -> list[str]:
    return [dot(kind, x + 6, y - 4, hollow), text(x + 18, y, said, "muted")]


def panel(x: float, y: float, title: str, about: str, parts: Sequence[str]) -> str:
    """Parts under a title and a line about them, moved to (x, y)."""
    head = f'<g font-size="15" font-weight="600">{text(0, 18, title)}</g>'
    parts = [head, text(0, 38, about, "muted"), *parts]
    return "\n".join([f'<g transform="translate({x:g} {y:g})">', *parts, "</g>"])


def bars(
    rows: dict[str, float], best: str, x: float, y: float, unit: float, pitch: int, digits: str
) -> list[str]:
    """A bar for each row, `unit` long for 1, with its number; that of `best` is orange."""
    parts = []
    for k, (name, value) in enumerate(rows.items()):
        kind, top, width = ("blue", "orange")[name == best], y + pitch * k, max(2, unit * value)
        middle = top + pitch / 2 - 1
        parts.append(text(x - 10, middle, name, anchor="end"))
        parts.append(box(kind, x, top, width, pitch - 10))
        parts.append(text(x + width + 8, middle, format(value, digits), kind))
    return parts


# --- The method --------------------------------------------------------------------------------


def mask_panel(place: tuple[float, float], words: Sequence[str]) -> str:
    """Step 1: a row for each token, with a cell for each that it attends to, blue if causally."""
    T, left, top = len(words), 70, 112
    cell, causal = 156 / T, llm2vec.attention_mask(torch.ones(1, T), is_causal=True)[0, 0]
    parts = legend("blue", "causal: what came before", 302)
    parts += legend("orange", "step 1 adds what comes after", 322)
    for i, word in enumerate(words):
        x, y = left + (i + 0.5) * cell, top + (i + 0.5) * cell
        start = f'<g transform="translate({x + 4:g} {top - 8}) rotate(-45)">'
        parts += [start, text(0, 0, word), "</g>"]
        parts.append(text(left - 10, y + 4, word, anchor="end"))
        for j in range(T):
            kind = "blue" if causal[i, j] else "orange"
            parts.append(box(kind, left + j * cell, y - cell / 2, cell - 2, cell - 2))
    return panel(*place, "1 · Look both ways", "The mask opens, no weight changes.", parts)


def mntp_panel(
    place: tuple[float, float], words: Sequence[str], likeliest: dict[str, float], untrained: float
) -> str:
    """Step 2: the state before a hidden token, and what it guesses."""
    i, x = words.index(HIDDEN), 0.0
    shown, names = [*words[:i], "_", *words[i + 1 :]], {i - 1: "i − 1", i: "i"}
    unit = 275 / sum(len(word) + 2.4 for word in shown)  # the width of a letter
    parts = bars(likeliest, HIDDEN, 88, 64, 130, 24, ".0%")
    parts.append(box("ink", 0, 220, 270, 28, 0.08))
    parts.append(text(135, 238, "decoder, looking both ways", "muted", "middle"))
    for k, word in enumerate(shown):
        width, kind = unit * (len(word) + 2.4) - 5, ("ink", "orange")[k == i]
        middle = x + width / 2
        parts.append(box(kind, x, 258, width, 26, 0.12))
        parts.append(text(middle, 275, word, kind, "middle"))
        parts.append(text(middle, 302, names.get(k, ""), "muted", "middle"))
        parts.append(path("rule", f"M{middle:g} 258v-10m0 -28v-16", 1))
        parts.append(dot(("rule", "blue")[k == i - 1], middle, 200))
        if k == i - 1:
            parts.append(path("blue", f"M{middle:g} 188v-46m-5 6l5 -6l5 6"))
        x += width + 5
    parts.append(text(0, 322, f"Looking back only, untrained: {HIDDEN} {untrained:.0%}", "muted"))
    return panel(*place, "2 · Name what is hidden", "MNTP: read off the state before it.", parts)


def simcse_panel(place: tuple[float, float], cosines: dict[str, tuple[float, float]]) -> str:
    """Step 3: cosines of a sentence with others, before and after."""
    parts = legend("muted", "before", 322, hollow=True)
    parts += legend("muted", "after SimCSE", 322, 90)
    for k, (said, pair) in enumerate(cosines.items()):
        y, kind, (x, x1) = 91 + 46 * k, ("blue", "orange")[k == 0], np.clip(pair, 0, 1) * 150
        parts += [text(0, y - 15, said), path("rule", f"M0 {y}H150")]
        parts += [path(kind, f"M{x:.5g} {y}H{x1:.5g}"), dot(kind, x, y, True), dot(kind, x1, y)]
        parts.append(text(240, y + 4, "{:.2f} → {:.2f}".format(*pair), kind, "end"))
    return panel(*place, "3 · Tell sentences apart", "SimCSE: cosines of this sentence with", parts)


def draw_method(args: argparse.Namespace) -> str:
    if len(args.adapters) != 2:
        raise ValueError("--adapters: expected two, which MNTP and SimCSE trained")
    steps = (llm2vec.load(args, adapters=args.adapters[:n], is_causal=n == 0) for n in range(3))
    _, _, untrained = guesses(next(steps), SENTENCE, HIDDEN)
    model, texts = next(steps), [SENTENCE, *OTHERS]
    words, likeliest, _ = guesses(model, SENTENCE, HIDDEN)
    pairs = zip(view_cosines(model, texts), view_cosines(next(steps), texts), strict=True)
    cosines = dict(zip(["itself, under other dropout", *OTHERS], pairs, strict=True))
    places = [(30, 0), (30, 360), (30, 720)] if args.narrow else [(0, 0), (285, 0), (590, 0)]
    parts = [mask_panel(places[0], words), mntp_panel(places[1], words, likeliest, untrained)]
    parts.append(simcse_panel(places[2], cosines))
    return svg(*((330, 1050) if args.narrow else (830, 330)), parts)


# --- Layers ------------------------------------------------------------------------------------


def shades(cosines: np.ndarray, place: str) -> str:
    """A path over the cells (layer, position) of each shade, moved and scaled by `place`.

    A shade is the cube of its cosine: most are near 1, and would look the same.
    """
    level, parts = np.round(np.clip(cosines, 0, 1) * 40), []
    for value in np.unique(level[level > 0]).tolist():
        cells = np.argwhere(level == value).tolist()
        d = "".join(f"M{i} {len(cosines) - layer - 0.5}h1" for layer, i in cells)
        parts.append(path("blue", d, 1, (value / 40) ** 3))
    return f'<g transform="{place}" shape-rendering="crispEdges">{"".join(parts)}</g>'


def heat_map_svg(panels: dict[str, np.ndarray]) -> str:
    """Panels of (layers, positions) cosines side by side, by title, the last layer on top."""
    layers, positions = next(iter(panels.values())).shape
    cell, x, parts = max(7, min(20, 120 / layers)), 30, []
    bottom = 54 + layers * cell
    for title, cosines in panels.items():
        own = [shades(cosines, f"translate(0 54) scale(7.5 {cell:g})")]
        for i in range(0, positions, 8):
            own.append(text(7.5 * i + 4, bottom + 16, i, "muted", "middle"))
        for i in {0, layers - 1, *range(4, layers - 2, 5)} if x == 30 else ():
            own.append(text(-8, bottom - (i + 0.5) * cell + 4, i + 1, "muted", "end"))
        parts.append(panel(x, 0, title, f"mean {np.nanmean(cosines):.2f}", own))
        x += 7.5 * positions + 26
    said = "Cosine of causal and bidirectional states, by layer (upwards) and token: 0"
    parts += [text(30, bottom + 46, said, "muted"), text(620, bottom + 46, "1", "muted")]
    parts.append(shades(np.arange(1, 21)[None] / 20, f"translate(490 {bottom + 36}) scale(6 12)"))
    return svg(max(x - 22, 640), bottom + 58, parts)


def draw_layers(args: argparse.Namespace) -> str:
    held_out, panels = held_out_of(args.corpus), {}
    texts = [sentence for document in held_out for sentence in sentences(document)][:200]
    for n, name in enumerate([args.model, *args.adapters]):
        title = ("+ " if n else "") + Path(name).name
        cosines = layer_cosines(llm2vec.load(args, adapters=args.adapters[:n]), texts)
        print(f"{title}, by layer:", *(f"{c:.2f}" for c in np.nanmean(cosines, axis=1)))
        panels[title] = cosines
    return heat_map_svg(panels)


# --- Curves and bars ---------------------------------------------------------------------------


def read_log(run: str | Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and their losses, by stage, from the log.jsonl of a run folder or of those in it."""
    files, logs = [*Path(run).glob("log.jsonl"), *Path(run).glob("*/log.jsonl")], {}
    for file in sorted(files, key=lambda file: file.stat().st_mtime):
        with reading(file):
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            points = [(int(line["step"]), float(line["loss"])) for line in lines]
        if points:
            logs[file.parent.resolve().name] = points
    if not logs:
        raise FileNotFoundError(f"{run}: no log.jsonl with a step, in it or one folder below")
    return logs


def curves_svg(logs: dict[str, list[tuple[int, float]]]) -> str:
    """The loss by step, a panel for each stage, two in a row."""
    parts, width, height, bottom = [], 340, 180, 238
    for n, (title, points) in enumerate(logs.items()):
        steps, most, own = points[-1][0], max(loss for _, loss in points) or 1.0, []
        unit = 10.0 ** math.floor(math.log10(most))
        rules = math.ceil(most / unit)  # lines a unit apart, the last above all
        for k in range(rules + 1):
            y = bottom - height * k / rules
            own.append(path("rule", f"M0 {y:g}H{width}", 1))
            own.append(text(-8, y + 4, f"{unit * k:g}", "muted", "end"))
        for k in range(5):
            own.append(text(width * k / 4, bottom + 18, f"{steps * k / 4:g}", "muted", "middle"))
        across, up = width / steps, height / rules / unit  # pixels for a step, and for a nat
        line = (f"{across * step:.1f},{bottom - up * loss:.1f}" for step, loss in points)
        own.append(path("blue", "M" + " ".join(line)))
        parts.append(panel(44 + 420 * (n % 2), 276 * (n // 2), title, "loss (nats) by step", own))
    return svg(410 if len(logs) == 1 else 830, 276 * math.ceil(len(logs) / 2), parts)


def draw_bars(args: argparse.Namespace) -> str:
    rows, scores = read_json(Path(args.table)), {}
    with reading(args.table):
        for name, runs in rows.items():
            runs = runs if isinstance(runs, list) else [runs]  # of several seeds
            if args.score in runs[0]:
                scores[name] = float(np.mean([run[args.score] for run in runs]))
        if not scores:
            raise ValueError(f"no row has the score {args.score}")
    best = max(scores, key=scores.get)
    parts = bars(scores, best, 200, 36, 560 / max(scores[best], 1e-9), 34, ".3f")
    return svg(830, 40 + 34 * len(scores), [panel(0, 0, args.title or args.score, "", parts)])


# --- Command line ------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data.figures", description="Draw pictures.")
    commands = parser.add_subparsers(required=True)
    method = commands.add_parser("method", help="the three steps, with a model's own numbers")
    llm2vec.add_model_flags(method, default=HERE / "tiny-llama")
    method.set_defaults(draw=draw_method, adapters=["runs/tiny/mntp", "runs/tiny/simcse"])
    method.add_argument("--narrow", action="store_true", help="the steps one below the other")
    method.add_argument("--output", default=HERE / "pictures" / "method.svg")
    layers = commands.add_parser("layers", help="what looking both ways changes, layer by layer")
    llm2vec.add_model_flags(layers, required=True)
    layers.set_defaults(draw=draw_layers)
    layers.add_argument("--corpus", default=WIKIPEDIA, help="its held-out documents are read")
    layers.add_argument("--output", default="layers.svg")
    curves = commands.add_parser("curves", help="the loss of a run by step")
    curves.set_defaults(draw=lambda args: curves_svg(read_log(args.run)))
    curves.add_argument("run", metavar="RUN", help="folder with a log.jsonl, or with such folders")
    curves.add_argument("--output", help="(default: RUN/curves.svg)")
    table = commands.add_parser("bars", help="a score of each row of a table")
    table.set_defaults(draw=draw_bars)
    table.add_argument("table", metavar="TABLE", help="results.json, as train.py writes it")
    table.add_argument("--score", default="stsb-test", help="its name there (default: %(default)s)")
    table.add_argument("--title", help="(default: the name)")
    table.add_argument("--output", default="bars.svg")
    args = parser.parse_args()
    file = Path(args.output or f"{args.run}/curves.svg")
    write_whole(file, args.draw(args).encode())
    print(file)


if __name__ == "__main__":
    cli(main)
