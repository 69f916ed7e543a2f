"""What only a GPU can tell: whether the stages are right there, how fast they are, what they take.

    PYTHONUNBUFFERED=1 python tests/gpu_check.py [STEP ...]

Each fact is printed as soon as it is known, and where the environment variable OUT names a folder,
added to facts.jsonl in it; tests/README.md has those of an H100 and an H200. A step that fails, or
finds a difference above its limit, says so, and the next one runs. `large` is Mistral-7B's shape
and `small` SmolLM2-135M's, with random weights. Without a GPU small layers and few texts take
their place, traced where they would be compiled: a dry run, whose speeds mean nothing.
"""

import contextlib
import json
import os
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from timeit import repeat

import checkout  # noqa: F401
import torch
from safetensors.torch import load_file

import train
from llm2vec import Config, Decoder, LLM2Vec, compile_layers, load_tokenizer, tokenize
from llm2vec_data.benchmarks import STSB_TEST, read_sts
from llm2vec_data.checkpoints import TINY
from llm2vec_data.corpus import WIKIPEDIA, read_documents
from llm2vec_data.pairs import PAIRS, read_pairs
from lora import add_lora, quantize_nf4

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
SHAPES = {"large": (32000, 4096, 14336, 32, 32, 8, 128, "mistral")}
SHAPES["small"] = (49152, 576, 1536, 30, 9, 3, 64)
DRY, DOCUMENTS = {}, read_documents(WIKIPEDIA)
if not GPU:
    SHAPES = {"large": (6252, 64, 128, 2, 4, 2, 16), "small": (6252, 64, 128, 1, 4, 2, 16)}
    DRY, DOCUMENTS = {"length": 32, "batch": 4, "max_tokens": 64}, DOCUMENTS[:200]
    compiler = torch.compile
    torch.compile = lambda f, dynamic, options: compiler(f, dynamic=dynamic, backend="eager")
TEXTS = {"64 x 512 tokens": [" ".join(DOCUMENTS[12 * i :][:12]) for i in range(64 if GPU else 4)]}
TEXTS["STS-B sentences"] = list(dict.fromkeys(read_sts(STSB_TEST)[1]))[: 1000 if GPU else 20]


def fact(name: str, value: float | str, most: float | None = None) -> None:
    """Print what was found, and keep it in $OUT; above `most` it counts as a failure."""
    shown = value if isinstance(value, str) else f"{value:,.6g}"
    limit = "" if most is None else f"   at most {most:g}"
    print(f"{STEP:9} {name:50} {shown:>12}{limit}", flush=True)
    if "OUT" in os.environ:
        with (Path(os.environ["OUT"]) / "facts.jsonl").open("a") as file:
            line = {"step": STEP, "fact": name, "value": value, "at_most": most}
            file.write(json.dumps(line) + "\n")
    if most is not None and not value <= most:
        failed.append(f"{STEP}, {name}")


def encoder(size: str, how: str = "") -> LLM2Vec:
    """Random weights in bfloat16, the same ones each time, with the tiny model's tokenizer."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        decoder = Decoder(Config(*SHAPES[size], is_causal=False)).requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    {"": id, "compiled": compile_layers, "nf4": lambda d: quantize_nf4(d, DEVICE)}[how](decoder)
    return LLM2Vec(decoder, load_tokenizer(TINY))


def stage(name: str, model: LLM2Vec, folder: str | None = None, **changes) -> list[dict]:
    """The lines of a run's log, one a step: the paper's settings but for `changes`."""
    settings = replace(train.STAGES[name].presets["paper"], **{"steps": 4} | DRY | changes)
    data = read_pairs([PAIRS]) if name == "supervised" else DOCUMENTS
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(folder or scratch)
        train.STAGES[name].run(model, data, settings, folder)
        return [json.loads(line) for line in (folder / "log.jsonl").open()]


def timed(name: str, size: str, how: str = "", **changes) -> None:
    """Seconds of a step, the first one apart; what it computes; memory; and compiled losses."""
    what = f"{size} {name} {how} {changes.get('max_tokens', '')}"
    plain = stage(name, encoder(size), **changes) if how == "compiled" else None
    torch.cuda.reset_peak_memory_stats() if GPU else None
    log = stage(name, encoder(size, how), **changes)
    ends = [line["seconds"] for line in log]
    seconds = median(b - a for a, b in zip(ends, ends[1:], strict=False))
    pace = log[-1]["tokens_per_second"] * ends[-1] / len(log) / seconds  # without the first step
    _, d, ff, layers, heads, kv_heads, D = SHAPES[size][:7]  # forward, and backward to the inputs:
    useful = 4e-12 * pace * layers * d * (2 * heads * D + 2 * kv_heads * D + 3 * ff)
    peak = torch.cuda.max_memory_allocated() / 2**30 if GPU else 0
    found = {"seconds a step": seconds, "seconds of the first": ends[0], "tokens/s": pace}
    found |= {"TFLOP/s": useful, "share of peak": useful / PEAK, "peak GiB": peak}
    for key, value in found.items():
        fact(f"{what}: {key}", value)
    if plain:
        worst = abs(plain[-1]["loss"] - log[-1]["loss"])
        fact(f"{what}: last loss against plain", worst, 2e-2)


def right() -> None:
    texts = [text[: 20 + 7 * i] for i, text in enumerate(DOCUMENTS[: 64 if GPU else 16])]
    same = {"steps": 3, "batch": 8, "length": 64} | DRY
    same |= {"dropout": 0.0, "attention_dropout": 0.0}
    for dtype, near in ((torch.float32, (1e-5, 1e-3)), (torch.bfloat16, (1e-2, 3e-2))):
        make = partial(LLM2Vec.from_pretrained, TINY, dtype=dtype, device=DEVICE)
        both = (make, partial(make, dtype=torch.float32, device="cpu"))
        a, b = (torch.from_numpy(load().encode(texts)) for load in both)
        worst = 1 - torch.cosine_similarity(a, b).min().item()
        fact(f"vectors, {dtype}: 1 - cosine with the CPU's", worst, near[0])
        for name in train.STAGES:
            logs = (stage(name, load(), **same) for load in both)
            worst = max(abs(x["loss"] - y["loss"]) for x, y in zip(*logs, strict=True))
            fact(f"{name}, {dtype}: loss against the CPU's", worst, near[1])
    how = {"batch": 4, "length": 64} | DRY | {"save_every": 1, "attention_dropout": 0.1}
    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as stopped:
        stage("mntp", make(), whole, **how)
        model, calls = make(), iter((0, 0, 1))
        model.decoder.register_forward_pre_hook(lambda *_: 1 / (1 - next(calls)) and None)
        with contextlib.suppress(ZeroDivisionError):  # in the third step
            stage("mntp", model, stopped, **how)
        stage("mntp", make(), stopped, **how)
        a, b = (load_file(Path(f) / "adapter_model.safetensors") for f in (whole, stopped))
    worst = max((a[name] - b[name]).abs().max().item() for name in a)
    fact("mntp, stopped and resumed: adapters", worst, 0)
    model, vectors = make(), []
    add_lora(model.decoder.train(), dropout=0.1)
    for with_gradients in (False, True):
        torch.manual_seed(1)
        with torch.set_grad_enabled(with_gradients):
            vectors.append(model.embed(tokenize(model.tokenizer, texts, 128)))
    fact("one seed, two passes: vectors", (vectors[0] - vectors[1]).abs().max().item(), 0)


def encoding() -> None:
    for size, how in ((size, how) for size in SHAPES for how in ("", "compiled")):
        model = encoder(size, how)
        for name, texts in TEXTS.items():
            tokens = sum(len(ids) for ids, _ in tokenize(model.tokenizer, texts, 512))
            times = repeat(lambda m=model, t=texts: m.encode(t), number=1, repeat=4)
            fact(f"{size}, {name} {how}: tokens/s", tokens / median(times[1:]))
            fact(f"{size}, {name} {how}: seconds of the first", times[0])


BOTH, FEW = ("mntp", "simcse"), {"max_tokens": 512, "recompute": 32}
STEPS = {
    "right": right,
    "training": lambda: [timed(name, "large") for name in BOTH],
    "encoding": encoding,
    "nf4": lambda: [timed("mntp", "large", "nf4", **changes) for changes in ({}, FEW)],
    "small": lambda: [timed(n, "small", how, steps=8) for how in ("", "compiled") for n in BOTH],
    "compiled": lambda: [timed(name, "large", "compiled") for name in BOTH],
}
STEP, failed = "machine", []
fact("device", torch.cuda.get_device_name() if GPU else "CPU, a dry run")
fact("torch", torch.__version__)
a = torch.randn(8192 if GPU else 256, 8192 if GPU else 256, device=DEVICE, dtype=torch.bfloat16)
PEAK = 2e-12 * len(a) ** 3 / min(repeat(lambda: float((a @ a)[0, 0]), number=1, repeat=10))
fact("TFLOP/s of a bfloat16 matrix product", PEAK)
for STEP in sys.argv[1:] or STEPS:
    start = time.perf_counter()
    try:
        STEPS[STEP]()
    except Exception as error:
        failed.append(f"{STEP}, {error!r}")
        traceback.print_exc()
    torch.cuda.empty_cache()
    fact("seconds", time.perf_counter() - start)
sys.exit(f"failed: {'; '.join(failed)}" if failed else 0)
