"""What only a GPU can tell: whether the stages are right there, how fast they are, what they take.

    PYTHONUNBUFFERED=1 python tests/gpu_check.py [STEP ...]

Six minutes on an H100, the most valuable facts first. Each fact is printed, and appended to
$OUT/gpu_check.jsonl, as soon as it is known; a step that fails says so and the next one runs.
`large` is Mistral-7B's shape and `small` SmolLM2-135M's, with random weights. Without a GPU small
layers take their place: a dry run of this script, whose speeds mean nothing.
"""

import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402 (before torch: it chooses how torch allocates memory)

# isort: split
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import llm2vec  # noqa: E402
import lora  # noqa: E402
from data.corpus import WIKIPEDIA, read_documents  # noqa: E402
from data.pairs import PAIRS, read_pairs  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
OUT = Path(os.environ.get("OUT", tempfile.gettempdir())) / "gpu_check.jsonl"
NAMES = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"]
NAMES += ["num_attention_heads", "num_key_value_heads", "head_dim", "model_type"]
LARGE = (32000, 4096, 14336, 32, 32, 8, 128, "mistral")
SMALL = (49152, 576, 1536, 30, 9, 3, 64, "llama")
DRY = (6252, 64, 128, 2, 4, 2, 16, "llama")
DOCUMENTS = read_documents(WIKIPEDIA)
TINY = ROOT / "data" / "tiny-llama"


def fact(name: str, value: object, expected: str) -> None:
    value = round(value, 7) if isinstance(value, float) else value
    line = {"step": STEP, "name": name, "value": value, "expected": expected}
    with OUT.open("a") as file:
        print(json.dumps(line), file=file)
    print(f"{STEP:9} {name:52} {value!s:>12}   {expected}", flush=True)


def encoder(shape: tuple) -> llm2vec.LLM2Vec:
    """Random weights in bfloat16, the same ones each time, with the tiny model's tokenizer."""
    torch.manual_seed(0)
    config = llm2vec.Config(**dict(zip(NAMES, shape if GPU else DRY, strict=True)), is_causal=False)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        decoder = llm2vec.Decoder(config)
    torch.set_default_dtype(torch.float32)
    return llm2vec.LLM2Vec(decoder.requires_grad_(False), llm2vec.load_tokenizer(TINY))


def stage(name: str, model: llm2vec.LLM2Vec, folder: str | None = None, **changes) -> list[dict]:
    """The lines of a run's log: a line a step, of the paper's settings but for `changes`."""
    dry = {} if GPU else {"length": 32, "batch": 4, "max_tokens": 64}
    settings = replace(train.SETTINGS[name]["paper"], **{"steps": 4} | dry | changes)
    data = read_pairs([PAIRS]) if name == "supervised" else DOCUMENTS
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(folder or scratch)
        train.STAGES[name](model, data, settings, folder)
        return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def peak_gib() -> float:
    peak = torch.cuda.max_memory_allocated() / 2**30 if GPU else 0.0
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    return peak


def matrix_peak() -> float:
    """Operations a second of a large bfloat16 matrix product."""
    n = 8192 if GPU else 256
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(10):
        start = time.perf_counter()
        float((a @ b)[0, 0])
        times.append(time.perf_counter() - start)
    return 2 * n**3 / statistics.median(times)


def weights_of(model: llm2vec.LLM2Vec) -> int:
    layers = model.decoder.layers.named_modules()
    return sum(m.in_features * m.out_features for _, m in layers if isinstance(m, torch.nn.Linear))


def report(what: str, log: list[dict], weights: int, expected: str) -> None:
    """Seconds of a step, the first one apart; and the share of peak of what it has to compute."""
    ends = [0.0, *(line["seconds"] for line in log)]
    seconds = statistics.median(b - a for a, b in zip(ends[1:-1], ends[2:], strict=True))
    tokens = statistics.median(line["tokens_per_second"] for line in log[1:])
    useful = 4 * weights * tokens  # forward, and backward to the inputs
    fact(f"{what}: seconds a step", seconds, expected)
    fact(f"{what}: first step", log[0]["seconds"], "")
    fact(f"{what}: tokens/s, TFLOP/s", f"{tokens:,.0f}, {useful / 1e12:.0f}", "")
    fact(f"{what}: share of matrix peak", useful / matrix_peak(), "0.4 or more")
    fact(f"{what}: peak GiB", peak_gib(), "at most 75")


# --- The steps -----------------------------------------------------------------------------------


class Stopped(Exception):
    pass


def right() -> None:
    texts = [text[: 20 + 7 * i] for i, text in enumerate(DOCUMENTS[:64])]
    for dtype, near, losses_near in ((torch.float32, 1e-5, 1e-3), (torch.bfloat16, 1e-2, 3e-2)):
        models = [
            lambda dtype=dtype, device=device: llm2vec.LLM2Vec.from_pretrained(
                TINY, dtype=dtype if device == DEVICE else torch.float32, device=device
            )
            for device in (DEVICE, "cpu")
        ]
        a, b = (torch.from_numpy(make().encode(texts)) for make in models)
        worst = 1 - torch.cosine_similarity(a, b).min().item()
        fact(f"vectors, {dtype}: 1 - cosine with the CPU's", worst, f"below {near}")
        for name in train.STAGES:
            how = {"steps": 3, "batch": 8, "length": 64, "dropout": 0.0, "attention_dropout": 0.0}
            here, there = ([x["loss"] for x in stage(name, make(), **how)] for make in models)
            worst = max(abs(x - y) for x, y in zip(here, there, strict=True))
            fact(f"{name}, {dtype}: loss against the CPU's", worst, f"below {losses_near}")
    how = {"steps": 4, "batch": 4, "length": 64, "save_every": 1, "attention_dropout": 0.1}
    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as stopped:
        stage("mntp", models[0](), whole, **how)
        model, calls = models[0](), iter(range(100))

        def stop(*_) -> None:
            if next(calls) == 2:
                raise Stopped

        model.decoder.register_forward_pre_hook(stop)
        try:
            stage("mntp", model, stopped, **how)
        except Stopped:
            stage("mntp", models[0](), stopped, **how)
        a, b = (load_file(Path(f) / "adapter_model.safetensors") for f in (whole, stopped))
        worst = max((a[name] - b[name]).abs().max().item() for name in a)
        fact("mntp, stopped and resumed: adapters", worst, "below 1e-6")
    model = models[0]()
    lora.add_lora(model.decoder.train(), dropout=0.1)
    model.decoder.config.attention_dropout = 0.3
    rows = llm2vec.tokenize(model.tokenizer, texts, 128)
    torch.manual_seed(1)
    with torch.no_grad():
        a = model.embed(rows)
    torch.manual_seed(1)
    fact("one seed, two passes: vectors", (a - model.embed(rows)).abs().max().item(), "0")


def training() -> None:
    model = encoder(LARGE)
    weights = weights_of(model)
    report("large, mntp 32 x 512", stage("mntp", model), weights, "1.5 (model)")
    report("large, simcse 128", stage("simcse", model), weights, "0.9 to 1.3 (model)")


def kernels() -> None:
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if GPU else activity.CPU]) as profile:
        stage("mntp", encoder(LARGE), steps=1)
    name = "self_device_time_total" if GPU else "self_cpu_time_total"
    events = sorted(profile.key_averages(), key=lambda e: -getattr(e, name))
    for event in events[:16]:
        ms = getattr(event, name) / 1000
        fact(event.key[:52], f"{ms:.0f} ms", f"{event.count} calls")


def encoding(shape: tuple = LARGE, expected: tuple = ("35,000", "28,000", "42,000", "")) -> None:
    model = encoder(shape)
    joined = " ".join(DOCUMENTS)
    lines = (ROOT / "data/sts/stsb-test.tsv").read_text(encoding="utf-8").splitlines()
    sides = list(dict.fromkeys(text for line in lines for text in line.split("\t")[1:3]))
    jobs = {"64 x 512 tokens": [joined[9000 * i :][:9000] for i in range(64)]}
    jobs["1,000 STS-B sentences"] = sides[:1000]
    if not GPU:
        jobs = {name: texts[:8] for name, texts in jobs.items()}
    expected = iter(expected)
    for how in ("", ", compiled"):
        if how:
            llm2vec.compile_layers(model.decoder)
        for name, texts in jobs.items():
            rows = llm2vec.tokenize(model.tokenizer, texts, 512)
            times = []
            for _ in range(4 if GPU else 2):
                start = time.perf_counter()
                model.encode(texts)
                times.append(time.perf_counter() - start)
            tokens = sum(len(ids) for ids, _ in rows) / statistics.median(times[1:])
            fact(f"{name}{how}: tokens/s", round(tokens), next(expected))
            useful = 2 * weights_of(model) * tokens / matrix_peak()
            fact(f"{name}{how}: share of peak; first call", f"{useful:.2f}; {times[0]:.1f} s", "")


def nf4() -> None:
    few = {"steps": 3, "max_tokens": 512, "recompute": 32} if GPU else {}
    for name, expected, how in (
        ("8,192 a pass", "1.8 (model)", {"steps": 3}),
        ("512 a pass", "below 4; below 8 GiB", few),
        ("512 a pass, decoding compiled", "below that", few),
    ):
        model = encoder(LARGE)
        weights = weights_of(model)
        start = time.perf_counter()
        lora.quantize_nf4(model.decoder, DEVICE)
        fact("quantising: seconds", time.perf_counter() - start, "")
        if "compiled" in name:
            lora.compile_decoding()
        peak_gib()
        report(f"nf4, mntp, {name}", stage("mntp", model, **how), weights, expected)


def small() -> None:
    for how in ("", ", compiled"):
        for name in ("mntp", "simcse"):
            model = encoder(SMALL)
            if how:
                llm2vec.compile_layers(model.decoder)
            report(f"small, {name}{how}", stage(name, model, steps=8), weights_of(model), "")
    encoding(SMALL, ("", "", "compiled must win", "compiled must win"))


def compiled() -> None:
    for name in ("mntp", "simcse"):
        plain = [line["loss"] for line in stage(name, encoder(LARGE))]
        model = encoder(LARGE)
        llm2vec.compile_layers(model.decoder)
        log = stage(name, model)
        report(f"large, {name}, compiled", log, weights_of(model), "1.1 (model); first below 120")
        worst = max(abs(a - b["loss"]) for a, b in zip(plain, log, strict=True))
        fact(f"large, {name}, compiled: losses against plain", worst, "below 5e-3")


STEPS = {f.__name__: f for f in (right, training, kernels, encoding, nf4, small, compiled)}

if __name__ == "__main__":
    STEP = "machine"
    fact("device", torch.cuda.get_device_name() if GPU else "CPU, a dry run", "")
    fact("torch", torch.__version__, "2.6 or later")
    fact("TFLOP/s of a bfloat16 matrix product", matrix_peak() / 1e12, "about 790 on an H100")
    failed = []
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
