"""Pictures: what looking both ways changes in a model, and how a run went.

    python -m data.figures layers --model MODEL --adapters MNTP SIMCSE --output layers.svg
    python -m data.figures curves RUN

An SVG is text, so no plotting package is needed; a heat map for the terminal is made of shades.
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
import lora
from data.benchmarks import held_out_of, read_lines
from data.corpus import WIKIPEDIA, sentences
from llm2vec import LLM2Vec, batches_by_length, pad

SHADES = " ·░▒▓█"
# Of cosines from 0 to 1: dark blue, blue, green, light green, yellow.
COLOURS = [(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)]


@torch.no_grad()
def layer_cosines(
    encoder: LLM2Vec, texts: Sequence[str], positions: int = 32, max_tokens: int = 1024
) -> np.ndarray:
    """How alike the hidden states of causal and bidirectional attention are, before any training.

    The cosine between the two states of each token after each layer (before the final norm),
    averaged over the texts that are long enough: (layers, positions), NaN where none is. Texts are
    cut at `positions` tokens. The paper (section 5.2) finds it near 1 for Mistral-7B alone.
    """
    decoder = encoder.decoder.train(False)
    both_ways = [copy.copy(decoder), copy.copy(decoder)]  # the same weights
    for view, is_causal in zip(both_ways, (True, False), strict=True):
        view.config = replace(decoder.config, is_causal=is_causal)
    layers = len(decoder.layers)
    rows = [ids for ids, _ in llm2vec.tokenize(encoder.tokenizer, texts, positions)]
    total, count = torch.zeros(layers, positions), torch.zeros(positions)
    for batch in batches_by_length([len(ids) for ids in rows], max_tokens):
        ids = pad([rows[i] for i in batch], decoder.device)
        segments = pad([[1] * len(rows[i]) for i in batch], decoder.device)
        states = [view(ids, segments, last=layers) for view in both_ways]  # (layers, B, T, d)
        cosine = F.cosine_similarity(*states, dim=-1) * segments
        total[:, : ids.shape[1]] += cosine.sum(1).cpu()
        count[: ids.shape[1]] += segments.sum(0).cpu()
    return torch.where(count > 0, total / count, math.nan).numpy()


def mean(cosines: Sequence[float] | np.ndarray) -> float:
    known = np.asarray(cosines)[~np.isnan(cosines)]
    return float(known.mean()) if len(known) else math.nan


def heat_map(cosines: np.ndarray, title: str) -> str:
    """(layers, positions) as lines of shades, the last layer on top; two characters a position."""
    lines, n = [f"{title}: cosine of causal and bidirectional states"], len(SHADES)
    for layer, row in reversed(list(enumerate(cosines, start=1))):
        shades = "".join(
            "? " if math.isnan(c) else 2 * SHADES[int(min(max(0, c) * n, n - 1))]
            for c in row.tolist()
        )
        lines.append(f"layer {layer:3d} |{shades}| mean {mean(row):.2f}")
    lines.append("token      " + "".join(f"{i:<16}" for i in range(0, cosines.shape[1], 8)))
    scale = (f"{2 * s} from {i / n:.2f}" for i, s in enumerate(SHADES))
    lines.append("           " + "  ".join(scale))
    return "\n".join(lines) + "\n"


# --- SVG ---------------------------------------------------------------------------------------


def svg(width: float, height: float, parts: Sequence[str]) -> str:
    size = f'width="{width:g}" height="{height:g}"'
    space = f'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}"'
    start = f'<svg {space} {size} font-family="sans-serif" font-size="11">'
    return "\n".join([start, f'<rect {size} fill="#fff"/>', *parts, "</svg>"]) + "\n"


def text(x: float, y: float, content: object, anchor: str = "start", **attributes: str) -> str:
    more = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in attributes.items())
    start = f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{more}>'
    return f"{start}{escape(str(content))}</text>"


def box(x: int, y: int, width: int, height: int, cosine: float) -> str:
    """A rectangle of the cosine's colour; grey for NaN."""
    colour = "#bbb"
    if not math.isnan(cosine):
        stops = np.linspace(0, 1, len(COLOURS))
        mixed = (np.interp(cosine, stops, channel) for channel in zip(*COLOURS, strict=True))
        colour = "#" + "".join(f"{round(part):02x}" for part in mixed)
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{colour}"/>'


def heat_map_svg(panels: dict[str, np.ndarray]) -> str:
    """Panels of (layers, positions) cosines side by side, by title, on one scale from 0 to 1."""
    cell, left, top, gap = 7, 34, 38, 18
    height = max(map(len, panels.values())) * cell
    bottom, middle = top + height, top + height / 2
    parts, x0 = [], left
    for title, cosines in panels.items():
        layers, positions = cosines.shape
        parts.append(text(x0, top - 20, title, font_weight="bold"))
        parts.append(text(x0, top - 6, f"mean {mean(cosines):.2f}", fill="#555"))
        for layer, row in enumerate(cosines.tolist(), start=1):
            parts.append(f"<g><title>layer {layer}: mean {mean(row):.3f}</title>")
            y = bottom - layer * cell
            parts += [box(x0 + i * cell, y, cell, cell, cosine) for i, cosine in enumerate(row)]
            parts.append("</g>")
        for i in range(0, positions, 8):
            parts.append(text(x0 + (i + 0.5) * cell, bottom + 13, i, "middle", fill="#555"))
        parts.append(text(x0 + positions * cell / 2, bottom + 27, "token", "middle"))
        if x0 == left:
            for i in {0, layers - 1, *range(4, layers - 2, 5)}:
                parts.append(text(left - 5, bottom - i * cell, i + 1, "end", fill="#555"))
            turned = f"rotate(-90 10 {middle:g})"
            parts.append(text(10, middle, "layer", "middle", transform=turned))
        x0 += positions * cell + gap
    y, x = bottom + 40, left + 236
    parts.append(text(left, y + 10, "cosine of causal and bidirectional states: 0"))
    parts += [box(x + 2 * i, y, 2, 12, i / 49) for i in range(50)]
    parts.append(text(x + 106, y + 10, "1"))
    return svg(max(x0 - gap + 12, x + 130), y + 22, parts)


# --- Training curves ---------------------------------------------------------------------------


def read_log(run: str | Path) -> dict[str, list[dict]]:
    """The logs of a run folder, by stage: its own log.jsonl, or those of the folders in it."""

    def parse(line: str) -> dict:
        record = json.loads(line)
        return record | {key: float(record[key]) for key in ("step", "loss", "lr")}

    own, logs = Path(run) / "log.jsonl", {}
    files = [own] if own.is_file() else list(Path(run).glob("*/log.jsonl"))
    if not files:
        raise FileNotFoundError(f"{run}: no log.jsonl, neither in it nor one folder below")
    for file in sorted(files, key=lambda f: f.stat().st_mtime):
        lines = read_lines(file, "a JSON object with step, loss and lr", parse)
        if not lines:
            raise ValueError(f"{file}: no step in it yet")
        logs[file.parent.resolve().name] = lines
    return logs


def ticks(low: float, high: float, count: int) -> list[float]:
    """Some `count` round numbers that span low to high."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * k for k in (1, 2, 2.5, 5, 10) if unit * k >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    return [step * i for i in range(first, math.ceil(high / step - 1e-9) + 1)]


def curves_svg(runs: dict[str, list[dict]]) -> str:
    """Loss (blue, left axis) and learning rate (orange, right axis) by step; a panel a stage."""
    width, height, left, top, gap = 300, 180, 52, 40, 120
    parts, x0 = [], left
    for title, lines in runs.items():
        x1, bottom = x0 + width, top + height
        parts.append(text(x0, top - 22, title, font_weight="bold"))
        steps = ticks(0, max(line["step"] for line in lines), 5)
        for i in steps:
            x = x0 + width * i / steps[-1]
            parts.append(text(x, bottom + 15, f"{i:g}", "middle", fill="#555"))
        parts.append(text(x0 + width / 2, bottom + 30, "step", "middle"))
        for key, name, shade, edge, anchor, label, label_anchor in (
            ("loss", "loss (nats)", "#1f5fa8", x0, "start", x0 - 6, "end"),
            ("lr", "learning rate", "#c46210", x1, "end", x1 + 6, "start"),
        ):
            known = [line for line in lines if math.isfinite(line[key])]
            values = [line[key] for line in known] or [0.0]
            scale = ticks(min(0.0, *values), max(values), 4)
            low, high = scale[0], scale[-1]
            for value in scale:
                y = top + height * (high - value) / (high - low)
                if key == "loss":
                    line = f'x1="{x0}" x2="{x1}" y1="{y:.1f}" y2="{y:.1f}"'
                    parts.append(f'<line {line} stroke="#ddd"/>')
                parts.append(text(label, y + 4, f"{value:.3g}", label_anchor, fill=shade))
            points = " ".join(
                f"{x0 + width * line['step'] / steps[-1]:.1f},"
                f"{top + height * (high - line[key]) / (high - low):.1f}"
                for line in known
            )
            parts.append(f'<polyline points="{points}" fill="none" stroke="{shade}"/>')
            parts.append(text(edge, top - 7, name, anchor, fill=shade))
        x0 += width + gap
    return svg(x0 - gap + 58, top + height + 40, parts)


def draw_layers(args: argparse.Namespace) -> None:
    held_out = held_out_of(args.corpus)
    texts = [sentence for document in held_out for sentence in sentences(document)][:200]
    model = llm2vec.load(args, adapters=[])
    panels = {Path(args.model).name: layer_cosines(model, texts)}
    for adapter in args.adapters:
        lora.load_adapter(model.decoder, adapter)
        lora.merge_lora(model.decoder)
        panels[f"+ {Path(adapter).name}"] = layer_cosines(model, texts)
    for title, cosines in panels.items():
        print(heat_map(cosines, title))
    lora.write_whole(Path(args.output), heat_map_svg(panels).encode())
    print(f"{args.output}: the same as a picture")


def draw_curves(args: argparse.Namespace) -> None:
    file = Path(args.run) / "curves.svg"
    lora.write_whole(file, curves_svg(read_log(args.run)).encode())
    print(file)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data.figures", description="Draw pictures.")
    commands = parser.add_subparsers(required=True)
    layers = commands.add_parser("layers", help="what looking both ways changes, layer by layer")
    llm2vec.add_model_flags(layers, required=True)
    layers.add_argument("--corpus", default=WIKIPEDIA, help="its held-out documents are read")
    layers.add_argument("--output", default="layers.svg", help="(default: %(default)s)")
    layers.set_defaults(draw=draw_layers)
    curves = commands.add_parser("curves", help="the loss and learning rate of a run: curves.svg")
    curves.add_argument("run", metavar="RUN", help="folder with a log.jsonl, or with such folders")
    curves.set_defaults(draw=draw_curves)
    args = parser.parse_args()
    args.draw(args)


if __name__ == "__main__":
    llm2vec.run(main)
