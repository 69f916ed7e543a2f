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

from data.benchmarks import held_out_of
from data.corpus import WIKIPEDIA, sentences
from llm2vec import LLM2Vec, add_model_flags, batches_by_length, load, pad, run, tokenize
from lora import load_adapter, merge_lora, write_whole

SHADES = " ·░▒▓█"


@torch.no_grad()
def layer_cosines(
    encoder: LLM2Vec, texts: Sequence[str], positions: int = 32, max_tokens: int = 1024
) -> np.ndarray:
    """How alike the hidden states of causal and bidirectional attention are, before any training.

    The cosine between the two states of each token after each layer (before the final norm),
    averaged over the texts that are long enough: (layers, positions), NaN where none is. Texts are
    cut at `positions` tokens. In section 5.2 of the paper it stays near 1 for Mistral-7B, and
    nowhere else.
    """
    decoder = encoder.decoder.train(False)
    both_ways = []
    for is_causal in (True, False):  # the same weights, attended in another way
        both_ways.append(copy.copy(decoder))
        both_ways[-1].config = replace(decoder.config, is_causal=is_causal)
    layers = len(decoder.layers)
    rows = [ids for ids, _ in tokenize(encoder.tokenizer, texts, positions)]
    total, count = torch.zeros(layers, positions), torch.zeros(positions)
    for batch in batches_by_length([len(ids) for ids in rows], max_tokens):
        ids = pad([rows[i] for i in batch], decoder.device)
        segments = pad([[1] * len(rows[i]) for i in batch], decoder.device)
        states = [view(ids, segments, last=layers) for view in both_ways]  # (layers, B, T, d)
        cosine = F.cosine_similarity(*states, dim=-1) * segments
        total[:, : ids.shape[1]] += cosine.sum(1).cpu()
        count[: ids.shape[1]] += segments.sum(0).cpu()
    return torch.where(count > 0, total / count, math.nan).numpy()


def mean(cosines: np.ndarray) -> float:
    known = np.asarray(cosines)[~np.isnan(cosines)]
    return float(known.mean()) if len(known) else math.nan


def heat_map(cosines: np.ndarray, title: str) -> str:
    """(layers, positions) as lines of shades, the last layer on top; two characters a position."""
    lines = [f"{title}: cosine of causal and bidirectional states"]
    for layer in reversed(range(len(cosines))):
        row = cosines[layer]
        shades = [
            "? "
            if math.isnan(c)
            else 2 * SHADES[min(len(SHADES) - 1, int(max(0, c) * len(SHADES)))]
            for c in row.tolist()
        ]
        lines.append(f"layer {layer + 1:3d} |{''.join(shades)}| mean {mean(row):.2f}")
    ticks = "".join(f"{i:<16}" for i in range(0, cosines.shape[1], 8))
    lines.append(f"token      {ticks}")
    scale = "  ".join(f"{2 * s} from {i / len(SHADES):.2f}" for i, s in enumerate(SHADES))
    lines.append(f"           {scale}")
    return "\n".join(lines) + "\n"


# --- SVG ---------------------------------------------------------------------------------------


def svg(width: float, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}" font-family="sans-serif" font-size="11">\n'
        f'<rect width="{width:g}" height="{height:g}" fill="#fff"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def text(x: float, y: float, content: object, anchor: str = "start", **attributes: str) -> str:
    more = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in attributes.items())
    start = f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{more}>'
    return f"{start}{escape(str(content))}</text>"


def colour(cosine: float) -> str:
    """From dark blue, 0 or less, over green to yellow, 1; grey for NaN."""
    if math.isnan(cosine):
        return "#bbb"
    stops = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]])
    place = min(max(cosine, 0.0), 1.0) * (len(stops) - 1)
    i = min(int(place), len(stops) - 2)
    mixed = stops[i] + (place - i) * (stops[i + 1] - stops[i])
    return "#" + "".join(f"{round(part):02x}" for part in mixed)


def heat_map_svg(panels: dict[str, np.ndarray]) -> str:
    """Panels of (layers, positions) cosines side by side, by title, on one scale from 0 to 1."""
    cell, left, top, gap = 7, 34, 38, 18
    parts, x0 = [], left
    depth = max(len(cosines) for cosines in panels.values())
    for title, cosines in panels.items():
        layers, positions = cosines.shape
        parts.append(text(x0, top - 20, title, font_weight="bold"))
        parts.append(text(x0, top - 6, f"mean {mean(cosines):.2f}", fill="#555"))
        for layer, row in enumerate(cosines.tolist()):
            y = top + (depth - 1 - layer) * cell
            parts.append(f"<g><title>layer {layer + 1}: mean {mean(row):.3f}</title>")
            for i, cosine in enumerate(row):
                box = f'x="{x0 + i * cell}" y="{y}" width="{cell}" height="{cell}"'
                parts.append(f'<rect {box} fill="{colour(cosine)}"/>')
            parts.append("</g>")
        bottom = top + depth * cell
        for i in range(0, positions, 8):
            parts.append(text(x0 + (i + 0.5) * cell, bottom + 13, i, "middle", fill="#555"))
        parts.append(text(x0 + positions * cell / 2, bottom + 27, "token", "middle"))
        if x0 == left:
            for layer in {0, layers - 1, *range(4, layers - 2, 5)}:
                y = top + (depth - 1 - layer) * cell + cell
                parts.append(text(left - 5, y, layer + 1, "end", fill="#555"))
            middle = top + depth * cell / 2
            turned = f"rotate(-90 10 {middle:g})"
            parts.append(text(10, middle, "layer", "middle", transform=turned))
        x0 += positions * cell + gap
    y = top + depth * cell + 40
    parts.append(text(left, y + 10, "cosine of causal and bidirectional states: 0"))
    start = left + 236
    for i in range(50):
        box = f'x="{start + 2 * i}" y="{y}" width="2" height="12"'
        parts.append(f'<rect {box} fill="{colour(i / 49)}"/>')
    parts.append(text(start + 106, y + 10, "1"))
    return svg(max(x0 - gap + 12, start + 130), y + 22, parts)


# --- Training curves ---------------------------------------------------------------------------


def read_log(run: str | Path) -> dict[str, list[dict]]:
    """The logs of a run folder, by stage: its own log.jsonl, or those of the folders in it.

    Raises FileNotFoundError without any, ValueError naming file and line.
    """
    run = Path(run)
    files = [run / "log.jsonl"] if (run / "log.jsonl").is_file() else list(run.glob("*/log.jsonl"))
    if not files:
        raise FileNotFoundError(f"{run}: no log.jsonl, neither in it nor one folder below")
    logs = {}
    for file in sorted(files, key=lambda f: f.stat().st_mtime):
        lines = []
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                record = json.loads(line)
                for key in ("step", "loss", "lr"):
                    record[key] = float(record[key])
            except (ValueError, KeyError, TypeError):
                what = "expected a JSON object with step, loss and lr"
                raise ValueError(f"{file}, line {number}: {what}") from None
            lines.append(record)
        if not lines:
            raise ValueError(f"{file}: no step in it yet")
        logs[file.parent.resolve().name] = lines
    return logs


def ticks(low: float, high: float, count: int = 5) -> list[float]:
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
        parts.append(text(x0, top - 22, title, font_weight="bold"))
        steps = ticks(0, max(line["step"] for line in lines))
        for i in steps:
            x = x0 + width * i / steps[-1]
            parts.append(text(x, top + height + 15, f"{i:g}", "middle", fill="#555"))
        parts.append(text(x0 + width / 2, top + height + 30, "step", "middle"))
        for key, name, shade, side in (
            ("loss", "loss (nats)", "#1f5fa8", "left"),
            ("lr", "learning rate", "#c46210", "right"),
        ):
            known = [line for line in lines if math.isfinite(line[key])]
            values = [line[key] for line in known] or [0.0]
            scale = ticks(min(0.0, *values), max(values), 4)
            low, high = scale[0], scale[-1]
            for value in scale:
                y = top + height * (high - value) / (high - low)
                if side == "left":
                    line = f'x1="{x0}" x2="{x0 + width}" y1="{y:.1f}" y2="{y:.1f}"'
                    parts.append(f'<line {line} stroke="#ddd"/>')
                    parts.append(text(x0 - 6, y + 4, f"{value:g}", "end", fill=shade))
                else:
                    parts.append(text(x0 + width + 6, y + 4, f"{value:.3g}", fill=shade))
            points = " ".join(
                f"{x0 + width * line['step'] / steps[-1]:.1f},"
                f"{top + height * (high - line[key]) / (high - low):.1f}"
                for line in known
            )
            parts.append(f'<polyline points="{points}" fill="none" stroke="{shade}"/>')
            anchor = "start" if side == "left" else "end"
            x = x0 if side == "left" else x0 + width
            parts.append(text(x, top - 7, name, anchor, fill=shade))
        x0 += width + gap
    return svg(x0 - gap + 58, top + height + 40, parts)


# --- Command line ------------------------------------------------------------------------------


def draw_layers(args: argparse.Namespace) -> None:
    held_out = held_out_of(args.corpus)
    texts = [sentence for document in held_out for sentence in sentences(document)][:200]
    model = load(args, adapters=[])
    panels = {Path(args.model).name: layer_cosines(model, texts)}
    for adapter in args.adapters:
        load_adapter(model.decoder, adapter)
        merge_lora(model.decoder)
        panels[f"+ {Path(adapter).name}"] = layer_cosines(model, texts)
    for title, cosines in panels.items():
        print(heat_map(cosines, title))
    write_whole(Path(args.output), heat_map_svg(panels).encode())
    print(f"{args.output}: the same as a picture")


def draw_curves(args: argparse.Namespace) -> None:
    file = Path(args.run_folder) / "curves.svg"
    write_whole(file, curves_svg(read_log(args.run_folder)).encode())
    print(file)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data.figures", description="Draw pictures.")
    commands = parser.add_subparsers(required=True)
    text = "show, layer by layer, how much a model changes when it looks both ways"
    layers = commands.add_parser("layers", help=text, description=text)
    add_model_flags(layers, required=True)
    layers.add_argument("--corpus", default=WIKIPEDIA, help="its held-out documents are read")
    layers.add_argument("--output", default="layers.svg", help="(default: %(default)s)")
    layers.set_defaults(draw=draw_layers)
    text = "draw the loss and learning rate of a run into RUN/curves.svg"
    curves = commands.add_parser("curves", help=text, description=text)
    text = "folder with a log.jsonl, or with such folders"
    curves.add_argument("run_folder", metavar="RUN", help=text)
    curves.set_defaults(draw=draw_curves)
    args = parser.parse_args()
    args.draw(args)


if __name__ == "__main__":
    run(main)
