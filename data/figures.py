"""Pictures: the three steps of the method, their effect in a model, the loss of a run, its scores.

    python train.py && python -m data.figures method
    python -m data.figures layers --model MODEL --adapters MNTP SIMCSE --output layers.svg
    python -m data.figures curves RUN
    python -m data.figures bars RUN/results.json --output results.svg

matplotlib draws them (`pip install -e ".[figures]"`), as SVG without a background. The colours
follow the reader's light or dark mode.
"""

import argparse
import copy
import io
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import llm2vec
from llm2vec import LLM2Vec, pad, tokenize
from llm2vec_data.benchmarks import held_out_of, mask_id_of
from llm2vec_data.checkpoints import TINY
from llm2vec_data.commands import cli
from llm2vec_data.compare import read_results, row_of, spread
from llm2vec_data.corpus import WIKIPEDIA, sentences
from llm2vec_data.disk import reading, write_whole

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ImportError:  # only pictures need it
    Axes = Figure = None

HERE = Path(__file__).parent
# The texts in the picture of the method: each word is one token of the tiny model.
SENTENCE, HIDDEN = "The official language is French.", "language"
OTHERS = ["Most people speak French.", "The two countries share a border."]
OTHERS += ["Paris is the capital of France.", "A man is playing a guitar."]


# --- Measurements ------------------------------------------------------------------------------


@torch.no_grad()
def layer_cosines(encoder: LLM2Vec, texts: Sequence[str], positions: int = 32) -> np.ndarray:
    """Cosines between the hidden states of causal and of bidirectional attention, before training.

    The cosine between the two states of each token after each layer (before the final norm),
    averaged over the texts that are long enough: (layers, positions), NaN if no text is. Texts are
    cut at `positions` tokens. In the paper (section 5.2), only Mistral-7B has cosines near 1.
    """
    decoder = encoder.decoder.eval()
    causal, both_ways = copy.copy(decoder), copy.copy(decoder)  # with the same weights
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
    """The tokens of a sentence, and the model's guesses for `word`, which is masked by `_`.

    The guesses are the three likeliest tokens with their probabilities, and the probability of
    `word`. As in MNTP, they are predicted from the state before the masked token.
    """
    [(ids, pooled)] = tokenize(encoder.tokenizer, [sentence], encoder.max_length)
    words = [encoder.tokenizer.decode([k]).strip() for k in ids]
    if word not in words[1:]:
        raise ValueError(f"{word!r} is not one token of this model: {' '.join(words)}")
    i, decoder = words.index(word), encoder.decoder.eval()
    masked = pad([[*ids[:i], mask_id_of(encoder), *ids[i + 1 :]]], decoder.device)
    chances = decoder.logits(decoder(masked)[0, i - 1]).float().softmax(-1)
    likeliest = chances.topk(3).indices.tolist()
    named = {encoder.tokenizer.decode([k]).strip(): chances[k].item() for k in likeliest}
    return words[pooled.index(True) :], named, chances[ids[i]].item()


@torch.no_grad()
def view_cosines(encoder: LLM2Vec, texts: Sequence[str], draws: int = 32) -> list[float]:
    """The cosines that SimCSE trains: of the first text with a second reading of every text.

    Each reading has another dropout, the paper's 0.3 on attention. Means over `draws` readings.
    """
    decoder, rows = encoder.decoder, tokenize(encoder.tokenizer, texts, encoder.max_length)
    before, decoder.config.attention_dropout = decoder.config.attention_dropout, 0.3
    decoder.train()
    torch.manual_seed(0)
    views = [F.normalize(encoder.embed(rows + rows), dim=-1) for _ in range(draws)]
    decoder.eval().config.attention_dropout = before
    return torch.stack([view[len(rows) :] @ view[0] for view in views]).mean(0).tolist()


def read_log(run: str | Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and losses, by stage, from the log.jsonl of a run folder, or of the folders in it."""
    files, logs = [*Path(run).glob("log.jsonl"), *Path(run).glob("*/log.jsonl")], {}
    for file in sorted(files, key=lambda file: file.stat().st_mtime):
        with reading(file):
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            points = [(int(line["step"]), float(line["loss"])) for line in lines]
        if points:
            logs[file.parent.resolve().name] = points
    if not logs:
        raise FileNotFoundError(f"{run}: no log.jsonl with a step, in it or in its folders")
    return logs


# --- Drawing -----------------------------------------------------------------------------------

# Each colour on a light page, and the one for a dark page.
COLOURS = {"#1f2328": "#f0f6fc", "#59636e": "#9198a1", "#d1d9e0": "#3d444d", "#e6e8eb": "#262c36"}
COLOURS |= {"#0969da": "#4493f7", "#bc4c00": "#f0883e"}
INK, MUTED, RULE, FAINT, BLUE, ORANGE = COLOURS
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "", "text.parse_math": False, "font.size": 12}
STYLE |= {"font.sans-serif": "DejaVu Sans", "text.color": MUTED, "grid.color": RULE}
FONTS = "system-ui,-apple-system,Segoe UI,Helvetica,Arial,sans-serif"
Place = tuple[float, float, float, float]  # x, y, width, height in pixels from the upper left


def new_figure(width: float, height: float) -> Figure:
    """A figure with a size in pixels: at 72 dots per inch, a point is a pixel."""
    if Figure is None:
        raise ValueError('pictures need matplotlib: pip install -e ".[figures]"')
    matplotlib.rcParams.update(STYLE)
    return Figure((width / 72, height / 72), dpi=72, frameon=False)


def panel(figure: Figure, place: Place, title: str = "", about: str = "") -> Axes:
    """Axes in pixels, below a title and a line of text."""
    (x, y, width, height), (w, h) = place, figure.bbox.size
    ax = figure.add_axes((x / w, 1 - (y + height) / h, width / w, height / h), facecolor="none")
    ax.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    ax.tick_params(length=0, labelcolor=MUTED)
    ax.spines[:].set_visible(False)
    figure.text(x / w, 1 - (y - 36) / h, title, size=15, weight="bold", color=INK)
    figure.text(x / w, 1 - (y - 16) / h, about)
    return ax


def svg(figure: Figure) -> str:
    """The figure as SVG that follows the reader's light or dark mode, even in <img>."""
    out, dark = io.StringIO(), ""
    figure.savefig(out, format="svg", metadata=dict.fromkeys(["Creator", "Date", "Format", "Type"]))
    for colour, other in COLOURS.items():
        for key in ("fill", "stroke"):
            dark += f'[style*="{key}: {colour}"]{{{key}:{other}!important}}'
    css = f"[id^=cells]{{shape-rendering:crispEdges}}@media(prefers-color-scheme:dark){{{dark}}}"
    picture = out.getvalue().replace('pt"', '"', 2)  # the unit of its width and height
    return picture.replace("</style>", css + "</style>").replace("'DejaVu Sans', sans-serif", FONTS)


def label(mean: float, low: float, high: float, digits: str) -> str:
    """A score as a bar shows it: with its range, if there is one."""
    return f"{mean:{digits}}" + (f" ({low:{digits}} to {high:{digits}})" if low < high else "")


def bars(ax: Axes, rows: dict[str, tuple], x: float, unit: float, best: str, digits: str) -> None:
    """A bar for each row, from x on; a score of 1 is `unit` long. The bar of `best` is orange.

    rows: mean, lowest and highest score by name; a line goes from the lowest to the highest.
    """
    for k, (name, (mean, low, high)) in enumerate(rows.items()):
        y, width, colour = 12 + 24 * k, max(2, unit * mean), ORANGE if name == best else BLUE
        ax.barh(y, width, 10, left=x, color=colour, ec=colour, lw=4, joinstyle="round")
        ax.text(x - 10, y + 4, name, color=INK, ha="right")
        if low < high:
            ax.hlines(y, x + unit * low, x + unit * high, INK, lw=2)
        text = label(mean, low, high, digits)
        ax.text(x + max(width, unit * high) + 8, y + 4, text, color=colour)


def mask_panel(figure: Figure, place: Place, words: Sequence[str]) -> None:
    """Step 1: a row for each token, with a cell for each token it sees; causal ones are blue."""
    ax = panel(figure, place, "1 · Look both ways", "The mask opens, no weight changes.")
    T, cell = len(words), 156 / len(words)
    causal = llm2vec.attention_mask(torch.ones(1, T), is_causal=True).flatten()
    y, x = (np.indices((T, T)).reshape(2, -1) + 0.5) * cell
    ax.scatter(69 + x, 57 + y, (cell - 6) ** 2, np.where(causal, BLUE, ORANGE), marker="s", lw=4)
    for middle, word in zip(x[:T], words, strict=True):
        ax.text(60, 62 + middle, word, color=INK, ha="right")
        ax.text(74 + middle, 50, word, color=INK, rotation=45, rotation_mode="anchor")
    ax.text(0, 248, "■ causal: what came before", color=BLUE)
    ax.text(0, 268, "■ step 1 adds what comes after", color=ORANGE)


def mntp_panel(figure: Figure, place: Place, words: Sequence[str], guessed, untrained) -> None:
    """Step 2: the state before a masked token, and its guesses."""
    ax = panel(figure, place, "2 · Predict the mask", "MNTP: from the state before it.")
    i, x = words.index(HIDDEN), np.linspace(16, 258, len(words))
    box = {"boxstyle": "round,pad=0.5", "fc": FAINT, "ec": "none"}
    ax.vlines(x, 146, 206, RULE, lw=1, zorder=0)
    ax.axhspan(166, 194, color=FAINT)
    ax.text(135, 184, "decoder, looking both ways", ha="center")
    ax.scatter(x, 146 + 0 * x, 80, [BLUE if k == i - 1 else RULE for k in range(len(x))])
    for k, word in enumerate([*words[:i], "_", *words[i + 1 :]]):
        ax.text(x[k], 221, word, color=ORANGE if k == i else INK, ha="center", bbox=box)
    ax.text(x[i - 1], 248, "i − 1", ha="center")
    ax.text(x[i], 248, "i", ha="center")
    arrow = {"arrowstyle": "->", "mutation_scale": 18, "color": BLUE, "lw": 2}
    ax.annotate("", (x[i - 1], 84), (x[i - 1], 138), arrowprops=arrow)
    bars(ax, {k: (p, p, p) for k, p in guessed.items()}, 88, 130, HIDDEN, ".0%")
    ax.text(0, 268, f"Looking back only, untrained: {HIDDEN} {untrained:.0%}")


def simcse_panel(figure: Figure, place: Place, cosines: dict[str, tuple[float, float]]) -> None:
    """Step 3: cosines of a sentence with others, before and after."""
    ax = panel(figure, place, "3 · Compare sentences", "SimCSE: cosines of this sentence with")
    for k, (text, pair) in enumerate(cosines.items()):
        y, colour, (x, x1) = 37 + 46 * k, BLUE if k else ORANGE, np.clip(pair, 0, 1) * 150
        ax.hlines([y, y], [0, x], [150, x1], [RULE, colour], lw=2)
        ax.plot(x, y, "o", color=colour, mfc="none", ms=8, mew=2)
        ax.plot(x1, y, "o", color=colour, ms=9)
        ax.text(0, y - 15, text, color=INK)
        ax.text(240, y + 4, "{:.2f} → {:.2f}".format(*pair), color=colour, ha="right")
    ax.text(0, 268, "○ before, ● after SimCSE")


def draw_method(args: argparse.Namespace) -> Figure:
    if len(args.adapters) != 2:
        raise ValueError("--adapters: expected two, trained by MNTP and by SimCSE")
    figure = new_figure(*((330, 1050) if args.narrow else (830, 330)))
    steps = (llm2vec.load(args, adapters=args.adapters[:n], is_causal=n == 0) for n in range(3))
    _, _, untrained = guesses(next(steps), SENTENCE, HIDDEN)
    model, texts = next(steps), [SENTENCE, *OTHERS]
    words, guessed, _ = guesses(model, SENTENCE, HIDDEN)
    pairs = zip(view_cosines(model, texts), view_cosines(next(steps), texts), strict=True)
    cosines = dict(zip(["itself, under other dropout", *OTHERS], pairs, strict=True))
    corners = [(30, 54), (30, 414), (30, 774)] if args.narrow else [(0, 54), (285, 54), (590, 54)]
    one, two, three = ((*corner, 270, 276) for corner in corners)
    mask_panel(figure, one, words)
    mntp_panel(figure, two, words, guessed, untrained)
    simcse_panel(figure, three, cosines)
    return figure


def shade(ax: Axes, cosines: np.ndarray) -> None:
    """A row of cells for each layer, the first one lowest; NaN is left out.

    A shade is the cube of its cosine: most cosines are near 1, and would look the same. All cells
    of a shade are one thick line with gaps, because a path for each cell would make a large file.
    """
    level = np.pad(np.round(np.clip(cosines, 0, 1) * 40), ((0, 0), (0, 1))).repeat(2, axis=1)
    y, x = np.indices(level.shape)
    edges, (layers, positions) = (x.ravel() + 1) // 2 - 0.5, cosines.shape
    options = {"lw": ax.bbox.height / layers, "solid_capstyle": "butt", "color": BLUE}
    for value in np.unique(level[level > 0]):
        line = np.where(level == value, y + 1, np.nan).ravel()
        ax.plot(edges, line, alpha=(value / 40) ** 3, **options)
    ax.set(xlim=(-0.5, positions - 0.5), ylim=(0.5, layers + 0.5))
    ax.set_gid(f"cells{len(ax.figure.axes)}")  # svg() has a rule for it


def draw_layers(args: argparse.Namespace) -> Figure:
    held_out, names = held_out_of(args.corpus), [args.model, *args.adapters]
    texts = [sentence for document in held_out for sentence in sentences(document)][:200]
    figure = new_figure(max(266 * len(names) + 8, 640), 322)
    for n, name in enumerate(names):
        title = ("+ " if n else "") + Path(name).name
        cosines = layer_cosines(llm2vec.load(args, adapters=args.adapters[:n]), texts)
        print(f"{title}, by layer:", *(f"{c:.2f}" for c in np.nanmean(cosines, axis=1)))
        ax = panel(figure, (30 + 266 * n, 54, 240, 210), title, f"mean {np.nanmean(cosines):.2f}")
        shade(ax, cosines)
        ax.set_xticks(range(0, 32, 8))
        ax.set_yticks([] if n else sorted({1, *range(5, len(cosines) - 1, 5), len(cosines)}))
    legend = panel(figure, (490, 300, 120, 12))
    shade(legend, np.arange(1, 21)[None] / 20)
    text = "Cosine of causal and bidirectional states, by layer (upwards) and token: 0"
    legend.text(-1.5, 0.7, text, ha="right")
    legend.text(20.5, 0.7, "1")
    return figure


def draw_curves(args: argparse.Namespace) -> Figure:
    logs = {name: points for run in args.run for name, points in read_log(run).items()}
    figure = new_figure(410 if len(logs) == 1 else 830, 276 * math.ceil(len(logs) / 2))
    for n, (title, points) in enumerate(logs.items()):  # two in a row
        place = (44 + 420 * (n % 2), 54 + 276 * (n // 2), 340, 184)
        ax = panel(figure, place, title, "loss (nats) by step")
        ax.plot(*zip(*points, strict=True), color=BLUE, lw=2, clip_on=False)
        ax.set(xlim=(0, points[-1][0]), ylim=(0, 1.05 * max(loss for _, loss in points) or 1))
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        ax.yaxis.set_major_locator(MaxNLocator(6))
        ax.grid(axis="y", clip_on=False)
    return figure


def read_spreads(args: argparse.Namespace) -> dict[str, tuple[float, float, float]]:
    """Mean, lowest and highest score of each row of a results file."""
    rows, score = read_results(args.table), args.score
    chosen = {name: row_of({str(args.table): rows}, name) for name in args.rows or rows}
    having = {name: [one for one in seeds if score in one] for name, seeds in chosen.items()}
    if not any(having.values()):
        raise ValueError(f"{args.table}: no row has the score {score}")
    return {name: spread(seeds, score) for name, seeds in having.items() if seeds}


def bar_labels(args: argparse.Namespace) -> list[str]:
    """The names and numbers that `draw_bars` writes."""
    spreads = read_spreads(args)
    return [*spreads, *(label(*numbers, ".3f") for numbers in spreads.values())]


def draw_bars(args: argparse.Namespace) -> Figure:
    spreads, score = read_spreads(args), args.score
    best, height = max(spreads, key=spreads.get), 24 * len(spreads)
    x = 20 + 7 * max(map(len, spreads))  # pixels for the names
    figure = new_figure(x + 420, 54 + height)
    ax = panel(figure, (0, 54, x + 420, height), args.title or score)
    bars(ax, spreads, x, 240 / max(spreads[best][0], 1e-9), best, ".3f")
    return figure


# --- Command line ------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data.figures", description="Draw pictures.")
    commands = parser.add_subparsers(required=True)
    method = commands.add_parser("method", help="the three steps, with the numbers of a model")
    llm2vec.add_model_flags(method, default=TINY)
    method.set_defaults(draw=draw_method, adapters=["runs/tiny/mntp", "runs/tiny/simcse"])
    method.add_argument("--narrow", action="store_true", help="the steps one below the other")
    method.add_argument("--output", default=HERE / "pictures" / "method.svg")
    layers = commands.add_parser("layers", help="the effect of looking both ways, layer by layer")
    llm2vec.add_model_flags(layers, required=True)
    layers.set_defaults(draw=draw_layers)
    layers.add_argument("--corpus", default=WIKIPEDIA, help="its held-out documents are read")
    layers.add_argument("--output", default="layers.svg")
    curves = commands.add_parser("curves", help="the loss of a run by step")
    curves.set_defaults(draw=draw_curves)
    text = "run folders, or a folder of run folders"
    curves.add_argument("run", nargs="+", metavar="RUN", help=text)
    curves.add_argument("--output", help="(default: RUN/curves.svg)")
    table = commands.add_parser("bars", help="a score of each row of a table")
    table.set_defaults(draw=draw_bars)
    table.add_argument("table", metavar="TABLE", help="results file, as train.py writes it")
    table.add_argument("--score", default="stsb-test", help="score (default: %(default)s)")
    table.add_argument("--rows", nargs="+", help="names of rows, in order (default: all)")
    table.add_argument("--title", help="(default: the name)")
    table.add_argument("--output", default="bars.svg")
    args = parser.parse_args()
    file = Path(args.output or f"{args.run[0]}/curves.svg")
    write_whole(file, svg(args.draw(args)).encode())
    print(file)


if __name__ == "__main__":
    cli(main)
