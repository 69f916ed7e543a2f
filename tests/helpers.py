"""What the test files share: folders, a small model, short runs of a stage, files to spoil."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import checkout
import pytest
import torch
from safetensors.torch import load_file, save_file

from llm2vec import Config, Decoder, LLM2Vec
from llm2vec_data.checkpoints import TINY
from train import STAGES, Stage

ROOT = checkout.ROOT
GOLDEN = ROOT / "tests" / "golden"
INTEROP = GOLDEN / "interop"
SHAPE = dict(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
SHAPE |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=4)


# --- Models ------------------------------------------------------------------------------------


def small_decoder(**changes) -> Decoder:
    """Random weights in float64."""
    torch.manual_seed(0)
    decoder = Decoder(Config(**SHAPE | changes)).double().eval()
    for weight in decoder.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    return decoder


def tiny(layers: int = 2, adapters: tuple = (), **how) -> LLM2Vec:
    """The bundled model in float32, or its first layers."""
    model = LLM2Vec.from_pretrained(TINY, adapters, **{"dtype": torch.float32} | how)
    del model.decoder.layers[layers:]
    model.decoder.config.num_hidden_layers = len(model.decoder.layers)
    return model


# --- Short runs of a stage ---------------------------------------------------------------------


def bundled(stage: Stage) -> list | None:
    """Some of the data that a stage has without being told; None if it has none."""
    try:
        data = stage.read(next(iter(stage.presets.values())))
    except (OSError, ValueError):
        return None
    return data[:200] if isinstance(data[0], str) else [items[:40] for items in data]


DATA = {name: bundled(stage) for name, stage in STAGES.items()}
DOCUMENTS = DATA["mntp"]
QUICK = {
    name: replace(presets.get("tiny", next(iter(presets.values()))), steps=3, batch=8, length=32)
    for name, presets in ((name, STAGES[name].presets) for name in STAGES if DATA[name])
}


def go(stage: str, folder: Path, model: LLM2Vec | None = None, data=None, **changes) -> LLM2Vec:
    """Train three steps in a run folder; returns the model, which is `tiny()` if none is given."""
    model = model or tiny()
    STAGES[stage].run(model, data or DATA[stage], replace(QUICK[stage], **changes), folder)
    return model


def pair(query: str, positive: str, *negatives: str, instruction: str = "") -> dict:
    pair = {"query": query, "positive": positive, "negatives": [*negatives]}
    return pair | {"instruction": instruction}


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").open()]


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


# --- Files and commands ------------------------------------------------------------------------


def spoil(file: Path, change: Callable[[dict], object] | None = None, **fields) -> Path:
    """Change what a JSON or safetensors file holds, by a function or field by field."""
    is_json = file.suffix == ".json"
    content = json.loads(file.read_text(encoding="utf-8")) if is_json else load_file(file)
    if change is not None:
        change(content)
    content.update(fields)
    if is_json:
        file.write_text(json.dumps(content), encoding="utf-8")
    else:
        save_file(content, file)
    return file


def python(*args: object, **how) -> subprocess.CompletedProcess:
    """Run Python in the project's folder, or elsewhere: what it prints is kept."""
    how = {"cwd": ROOT, "capture_output": True, "text": True} | how
    return subprocess.run([sys.executable, *map(str, args)], **how)


def refused(said: str, call: Callable, *args, **how) -> None:
    """A call ends in one line that matches `said`."""
    with pytest.raises((ValueError, FileNotFoundError), match=said) as error:
        call(*args, **how)
    assert "\n" not in str(error.value)


failed = []  # checks of a script that compares with other libraries, live


def report(name: str, value: float, holds: bool) -> None:
    """Print a number, and remember the name if it is not as it should be."""
    if not holds:
        failed.append(name)
    print(f"{'ok    ' if holds else 'FAILED'}  {value:.7g}  {name}", flush=True)


def finish() -> None:
    print(f"{len(failed)} failed" if failed else "all agree")
    sys.exit(bool(failed))
