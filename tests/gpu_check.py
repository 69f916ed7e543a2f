"""What only a GPU can tell: whether the stages are right there, how fast they are, what they take.

    PYTHONUNBUFFERED=1 python tests/gpu_check.py [STEP ...]

Each fact is printed as soon as it is known; tests/README.md has those of an H100 and an H200. A
step that fails, or finds a difference above its limit, says so, and the next one runs. `LARGE` is
Mistral-7B's shape and `SMALL` SmolLM2-135M's, with random weights. Without a GPU small layers take
their place: a dry run, whose speeds mean nothing.
"""

import contextlib
import json
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path
from statistics import median
from timeit import repeat

import checkout  # noqa: F401, I001 (and train before torch: it chooses how torch allocates memory)
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
LARGE = (32000, 4096, 14336, 32, 32, 8, 128, "mistral") if GPU else (6252, 64, 128, 2, 4, 2, 16)
SMALL = (49152, 576, 1536, 30, 9, 3, 64) if GPU else (6252, 64, 128, 1, 4, 2, 16)
DRY = {} if GPU else {"length": 32, "batch": 4, "max_tokens": 64}
HOW, FEW = ("", "compiled"), {"max_tokens": 512, "recompute": 32}
DOCUMENTS = read_documents(WIKIPEDIA)


def fact(name: str, value: object, most: float | None = None) -> None:
    """Print what was found; above `most` it counts as a failure."""
    value = f"{value:.4g}" if isinstance(value, float) else value
    limit = "" if most is None else f"   at most {most:g}"
    print(f"{STEP:9} {name:50} {value!s:>12}{limit}", flush=True)
    if most is not None and not float(value) <= most:
        failed.append(f"{STEP}, {name}")


def encoder(shape: tuple, how: str = "") -> LLM2Vec:
    """Random weights in bfloat16, the same ones each time, with the tiny model's tokenizer."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        decoder = Decoder(Config(*shape, is_causal=False)).requires_grad_(False)
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
        return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def timed(name: str, shape: tuple, how: str = "", **changes) -> None:
    """Seconds of a step, the first one apart; what it computes; memory; and compiled losses."""
    plain = stage(name, encoder(shape), **changes) if how == "compiled" else ()
    torch.cuda.reset_peak_memory_stats() if GPU else None
    log = stage(name, encoder(shape, how), **changes)
    ends = [line["seconds"] for line in log]
    steps = median(b - a for a, b in zip(ends, ends[1:], strict=False))
    pace = log[-1]["tokens_per_second"] * ends[-1] / len(log) / steps  # without the first step
    _, d, ff, layers, heads, kv_heads, D = shape[:7]  # forward, and backward to the inputs:
    useful = 4e-12 * pace * layers * d * (2 * heads * D + 2 * kv_heads * D + 3 * ff)
    what = f"{'small' if shape is SMALL else 'large'} {name} {how} {changes.get('max_tokens', '')}"
    fact(f"{what}: seconds a step; the first", f"{steps:.3g}; {ends[0]:.3g}")
    peak = torch.cuda.max_memory_allocated() / 2**30 if GPU else 0
    fact(f"{what}: TFLOP/s; its share of peak", f"{useful:.0f}; {useful / PEAK:.2f}")
    fact(f"{what}: tokens/s; peak GiB", f"{pace:,.0f}; {peak:.1f}")
    if plain:
        worst = abs(plain[-1]["loss"] - log[-1]["loss"])
        fact(f"{what}: last loss against plain", worst, 2e-2)


def right() -> None:
    texts = [text[: 20 + 7 * i] for i, text in enumerate(DOCUMENTS[:64])]
    same = {"steps": 3, "batch": 8, "length": 64, "dropout": 0.0, "attention_dropout": 0.0}
    for dtype, near in ((torch.float32, (1e-5, 1e-3)), (torch.bfloat16, (1e-2, 3e-2))):

        def make(device: str = DEVICE, dtype: torch.dtype = dtype) -> LLM2Vec:
            dtype = torch.float32 if device != DEVICE else dtype
            return LLM2Vec.from_pretrained(TINY, dtype=dtype, device=device)

        a, b = (torch.from_numpy(make(device).encode(texts)) for device in (DEVICE, "cpu"))
        worst = 1 - torch.cosine_similarity(a, b).min().item()
        fact(f"vectors, {dtype}: 1 - cosine with the CPU's", worst, near[0])
        for name in train.STAGES:
            logs = (stage(name, make(device), **same) for device in (DEVICE, "cpu"))
            worst = max(abs(x["loss"] - y["loss"]) for x, y in zip(*logs, strict=True))
            fact(f"{name}, {dtype}: loss against the CPU's", worst, near[1])
    how = {"batch": 4, "length": 64, "save_every": 1, "attention_dropout": 0.1}
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
    jobs = {"64 x 512 tokens": [" ".join(DOCUMENTS[12 * i :][:12]) for i in range(64)]}
    jobs["1,000 STS-B sentences"] = list(dict.fromkeys(read_sts(STSB_TEST)[1]))[:1000]
    for shape, how in ((LARGE, ""), (LARGE, "compiled"), (SMALL, ""), (SMALL, "compiled")):
        model = encoder(shape, how)
        for name, texts in jobs.items():
            tokens = sum(len(ids) for ids, _ in tokenize(model.tokenizer, texts, 512))
            times = repeat(lambda m=model, t=texts: m.encode(t), number=1, repeat=4)
            what = f"{'small' if shape is SMALL else 'large'}, {name} {how}"
            fact(f"{what}: tokens/s; first", f"{tokens / median(times[1:]):,.0f}; {times[0]:.1f} s")


STEPS = {
    "right": right,
    "training": lambda: [timed(name, LARGE) for name in ("mntp", "simcse")],
    "encoding": encoding,
    "nf4": lambda: [timed("mntp", LARGE, "nf4", **changes) for changes in ({}, FEW)],
    "small": lambda: [timed(n, SMALL, h, steps=8) for h in HOW for n in ("mntp", "simcse")],
    "compiled": lambda: [timed(name, LARGE, "compiled") for name in ("mntp", "simcse")],
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
