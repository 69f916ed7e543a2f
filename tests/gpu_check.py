"""What only a GPU can tell: whether the stages are right there, how fast they are, what they take.

    PYTHONUNBUFFERED=1 python tests/gpu_check.py [STEP ...]

The most valuable facts come first. Each is printed, and appended to $OUT/gpu_check.jsonl, as soon as
it is known; a step that fails says so and the next one runs. `large` is Mistral-7B's shape and
`small` SmolLM2-135M's, with random weights. Without a GPU small layers take their place: a dry run,
whose speeds mean nothing. What an H100 said is in tests/README.md.
"""

import json
import os
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402, I001 (before torch: it chooses how torch allocates memory)
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from data.corpus import WIKIPEDIA, read_documents  # noqa: E402
from data.pairs import PAIRS, read_pairs  # noqa: E402
from llm2vec import Config, Decoder, LLM2Vec, compile_layers, load_tokenizer, tokenize  # noqa: E402
from lora import add_lora, quantize_nf4  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
OUT = Path(os.environ.get("OUT", tempfile.gettempdir())) / "gpu_check.jsonl"
LARGE = (32000, 4096, 14336, 32, 32, 8, 128, "mistral") if GPU else (6252, 64, 128, 2, 4, 2, 16)
SMALL = (49152, 576, 1536, 30, 9, 3, 64) if GPU else LARGE
TINY, DOCUMENTS = ROOT / "data" / "tiny-llama", read_documents(WIKIPEDIA)


def fact(name: str, value: object, expected: str = "") -> None:
    value = round(value, 7) if isinstance(value, float) else value
    with OUT.open("a") as file:
        line = {"step": STEP, "name": name, "value": value, "expected": expected}
        print(json.dumps(line), file=file)
    print(f"{STEP:9} {name:52} {value!s:>12}   {expected}", flush=True)


def encoder(shape: tuple, compiled: bool = False) -> LLM2Vec:
    """Random weights in bfloat16, the same ones each time, with the tiny model's tokenizer."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        decoder = Decoder(Config(*shape, is_causal=False)).requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    if compiled:
        compile_layers(decoder)
    return LLM2Vec(decoder, load_tokenizer(TINY))


def stage(name: str, model: LLM2Vec, folder: str | None = None, **changes) -> list[dict]:
    """The lines of a run's log, one a step: the paper's settings but for `changes`."""
    changes = {"steps": 4} | ({} if GPU else {"length": 32, "batch": 4, "max_tokens": 64}) | changes
    data = read_pairs([PAIRS]) if name == "supervised" else DOCUMENTS
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(folder or scratch)
        train.STAGES[name](model, data, replace(train.SETTINGS[name]["paper"], **changes), folder)
        return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def matrix_peak() -> float:
    """Operations a second of a large bfloat16 matrix product."""
    n = 8192 if GPU else 256
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / median(seconds(lambda: float((a @ b)[0, 0])) for _ in range(10))


def timed_stage(what: str, name: str, model: LLM2Vec, expected: str = "", **changes) -> list[dict]:
    """Seconds of a step, the first one apart; and the share of peak of what it has to compute."""
    linear = [m for m in model.decoder.layers.modules() if isinstance(m, torch.nn.Linear)]
    torch.cuda.reset_peak_memory_stats() if GPU else None
    log = stage(name, model, **changes)
    ends, pace = ([line[key] for line in log] for key in ("seconds", "tokens_per_second"))
    useful = 4 * median(pace[1:]) * sum(m.in_features * m.out_features for m in linear)
    steps = median(b - a for a, b in zip(ends, ends[1:], strict=False))
    fact(f"{what}: seconds a step; the first", f"{steps:.3f}; {ends[0]:.1f}", expected)
    fact(f"{what}: TFLOP/s; share of peak", f"{useful / 1e12:.0f}; {useful / matrix_peak():.2f}")
    fact(f"{what}: peak GiB", torch.cuda.max_memory_allocated() / 2**30 if GPU else 0)
    return log


# --- The steps -----------------------------------------------------------------------------------


def right() -> None:
    texts = [text[: 20 + 7 * i] for i, text in enumerate(DOCUMENTS[:64])]
    same = {"steps": 3, "batch": 8, "length": 64, "dropout": 0.0, "attention_dropout": 0.0}
    for dtype, near in ((torch.float32, (1e-5, 1e-3)), (torch.bfloat16, (1e-2, 3e-2))):

        def make(device: str = DEVICE, dtype: torch.dtype = dtype) -> LLM2Vec:
            dtype = torch.float32 if device != DEVICE else dtype
            return LLM2Vec.from_pretrained(TINY, dtype=dtype, device=device)

        a, b = (torch.from_numpy(make(device).encode(texts)) for device in (DEVICE, "cpu"))
        worst = 1 - torch.cosine_similarity(a, b).min().item()
        fact(f"vectors, {dtype}: 1 - cosine with the CPU's", worst, f"below {near[0]}")
        for name in train.STAGES:
            logs = (stage(name, make(device), **same) for device in (DEVICE, "cpu"))
            worst = max(abs(x["loss"] - y["loss"]) for x, y in zip(*logs, strict=True))
            fact(f"{name}, {dtype}: loss against the CPU's", worst, f"below {near[1]}")
    how = {"batch": 4, "length": 64, "save_every": 1, "attention_dropout": 0.1}
    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as stopped:
        stage("mntp", make(), whole, **how)
        model, calls = make(), iter((0, 0, 1))
        model.decoder.register_forward_pre_hook(lambda *_: 1 / (1 - next(calls)) and None)
        try:
            stage("mntp", model, stopped, **how)
        except ZeroDivisionError:  # in the third step
            stage("mntp", make(), stopped, **how)
        a, b = (load_file(Path(f) / "adapter_model.safetensors") for f in (whole, stopped))
    worst = max((a[name] - b[name]).abs().max().item() for name in a)
    fact("mntp, stopped and resumed: adapters", worst, "below 1e-6")
    model = make()
    add_lora(model.decoder.train(), dropout=0.1)
    rows, vectors = tokenize(model.tokenizer, texts, 128), []
    for with_gradients in (False, True):
        torch.manual_seed(1)
        with torch.set_grad_enabled(with_gradients):
            vectors.append(model.embed(rows))
    fact("one seed, two passes: vectors", (vectors[0] - vectors[1]).abs().max().item(), "0")


def training() -> None:
    timed_stage("mntp 32 x 512", "mntp", encoder(LARGE), "1.35 on an H100")
    timed_stage("simcse 128", "simcse", encoder(LARGE), "1.6 on an H100")


def kernels() -> None:
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if GPU else activity.CPU]) as profile:
        stage("mntp", encoder(LARGE), steps=1)
    name = "self_device_time_total" if GPU else "self_cpu_time_total"
    for event in sorted(profile.key_averages(), key=lambda e: -getattr(e, name))[:16]:
        fact(event.key[:52], f"{getattr(event, name) / 1000:.0f} ms", f"{event.count} calls")


def encoding(shape: tuple = LARGE) -> None:
    lines = (ROOT / "data/sts/stsb-test.tsv").read_text(encoding="utf-8").splitlines()
    sides = list(dict.fromkeys(text for line in lines for text in line.split("\t")[1:3]))
    long = [" ".join(DOCUMENTS[12 * i :][:12]) for i in range(64)]
    for compiled in (False, True):
        model = encoder(shape, compiled)
        for name, texts in (("64 x 512 tokens", long), ("1,000 STS-B sentences", sides[:1000])):
            tokens = sum(len(ids) for ids, _ in tokenize(model.tokenizer, texts, 512))
            times = [seconds(lambda m=model, texts=texts: m.encode(texts)) for _ in range(4)]
            name += ", compiled" if compiled else ""
            fact(f"{name}: tokens/s", round(tokens / median(times[1:])), f"first {times[0]:.1f} s")


def nf4() -> None:
    for name, how in (("8,192", {}), ("512", {"max_tokens": 512, "recompute": 32 if GPU else 2})):
        model = encoder(LARGE)
        fact("quantising: seconds", seconds(lambda m=model: quantize_nf4(m.decoder, DEVICE)))
        timed_stage(f"nf4, mntp, {name} tokens a pass", "mntp", model, **how)


def small() -> None:
    for compiled in (False, True):
        for name in ("mntp", "simcse"):
            how = "small, compiled" if compiled else "small"
            timed_stage(f"{how}, {name}", name, encoder(SMALL, compiled), steps=8)
    encoding(SMALL)


def compiled() -> None:
    for name in ("mntp", "simcse"):
        plain = stage(name, encoder(LARGE))
        log = timed_stage(f"{name}, compiled", name, encoder(LARGE, True), "mntp 1.04 on an H100")
        worst = max(abs(a["loss"] - b["loss"]) for a, b in zip(plain, log, strict=True))
        fact(f"{name}, compiled: losses against plain", worst, "below 2e-2")


STEPS = {f.__name__: f for f in (right, training, kernels, encoding, nf4, small, compiled)}

if __name__ == "__main__":
    STEP, failed = "machine", []
    fact("device", torch.cuda.get_device_name() if GPU else "CPU, a dry run", torch.__version__)
    fact("TFLOP/s of a bfloat16 matrix product", matrix_peak() / 1e12, "about 790 on an H100")
    for STEP in sys.argv[1:] or STEPS:
        start = time.perf_counter()
        try:
            STEPS[STEP]()
        except Exception:
            failed.append(STEP)
            traceback.print_exc()
        torch.cuda.empty_cache()
        fact("failed" if STEP in failed else "done", time.perf_counter() - start, "seconds")
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)
