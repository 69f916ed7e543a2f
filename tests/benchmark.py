# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch", "numpy", "tokenizers", "safetensors",
#   "transformers==5.23.*", "peft==0.21.*", "sentence-transformers==6.2.*",
# ]
# ///
"""How fast this is on a CPU, side by side with what people use today.

    python tests/benchmark.py --model data/models/smollm2-135m [--tasks stsb mntp] [--rounds 1]

Contenders take turns, each round in a process of its own, on the same weights, texts and threads:
a round of warm-up, then the one that counts. Printed are medians, their ratios to this project's,
and how near vectors in bfloat16 are to those in float32. `ours` is this project, and `bfloat16`
too, where the hardware multiplies it; `reference` is sentence-transformers, and for MNTP
transformers with PEFT. On a GPU: gpu_check.py.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from timeit import timeit

import checkout  # noqa: F401
import torch
from torch import nn

from llm2vec import LLM2Vec, has_bfloat16
from llm2vec_data.benchmarks import STSB_TEST, read_sts
from llm2vec_data.checkpoints import TINY
from llm2vec_data.compare import table
from llm2vec_data.corpus import WIKIPEDIA, cut_into_blocks
from lora import add_lora
from train import STAGES, Batches

ENCODING = ["stsb", "wikipedia"]  # 1,000 sentences; 100 introductions
TASKS = [*ENCODING, "mntp", "simcse", "simcse-512"]  # a step of 8 x 128; of 32, of 512 sentences
DTYPES = {"ours": torch.float32, "bfloat16": torch.bfloat16}
BLOCKS, MASK_RATE = (8, 128), 0.2  # of an MNTP step; as in the paper, like what follows
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": "all-linear"}
DROPOUT = {"attention_dropout": 0.3}  # of SimCSE


def texts_of(task: str) -> list[str]:
    if task == "stsb":
        _, *sides = read_sts(STSB_TEST)
        return list(dict.fromkeys(sum(zip(*sides, strict=True), ())))[:1000]
    lines = WIKIPEDIA.read_text(encoding="utf-8").splitlines()
    documents = [json.loads(line)["text"] for line in lines][::9]
    if task in ("wikipedia", "mntp"):
        return documents[: 100 if task == "wikipedia" else 400]
    openings = dict.fromkeys(text.partition(". ")[0] + "." for text in documents)
    return list(openings)[: 512 if task == "simcse-512" else 32]


# --- The contenders: each returns a function that runs one round ---------------------------------


def ours(task: str, model: Path, max_tokens: int, dtype: torch.dtype) -> Callable[[], object]:
    encoder = LLM2Vec.from_pretrained(model, dtype=dtype, device="cpu")
    texts, stage = texts_of(task), STAGES.get(task.partition("-")[0])
    if stage is None:
        return lambda: encoder.encode(texts)
    how = {"batch": len(texts), "split": "line"} | DROPOUT
    how = {"batch": BLOCKS[0], "steps": 1} if task == "mntp" else how
    settings = replace(stage.presets["paper"], length=128, max_tokens=max_tokens, **how)
    data, backward = stage.task(encoder, texts, settings := settings.for_model(encoder))
    encoder.decoder.config.attention_dropout = settings.attention_dropout
    add_lora(encoder.decoder, dropout=LORA["lora_dropout"])
    return step(encoder.decoder, lambda: backward(Batches(data, settings)[0], 0))


def reference(task: str, model: str) -> Callable[[], object]:
    """sentence-transformers on the exported folder; for MNTP, transformers with PEFT."""
    from peft import LoraConfig, get_peft_model
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import losses
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if task == "mntp":
        decoder = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(**LORA))
        return masked_step(decoder, AutoTokenizer.from_pretrained(model))
    texts = texts_of(task)
    if task in ENCODING:
        return partial(SentenceTransformer(model, device="cpu").encode, texts, batch_size=32)
    encoder = SentenceTransformer(model, device="cpu", config_kwargs=DROPOUT)
    encoder.max_seq_length = 128
    encoder.add_adapter(LoraConfig(**LORA))
    loss = losses.MultipleNegativesRankingLoss(encoder)
    if task == "simcse-512":
        loss = losses.CachedMultipleNegativesRankingLoss(encoder, mini_batch_size=32)
    views = [encoder.preprocess(texts) for _ in range(2)]
    return step(encoder, lambda: loss(map(dict, views), None).backward())


def step(model: nn.Module, backward: Callable[[], object]) -> Callable[[], object]:
    """An optimiser step of the adapters, on the gradients that `backward` leaves."""
    trained = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    return lambda: (backward(), optimizer.step(), optimizer.zero_grad())


def masked_step(decoder: nn.Module, tokenizer) -> Callable[[], object]:
    """An MNTP step of a model of transformers, which shifts the labels by itself."""
    rows = tokenizer(texts_of("mntp"), add_special_tokens=False)["input_ids"]
    batch = cut_into_blocks(rows, length=BLOCKS[1], limit=BLOCKS[0])

    def backward() -> None:
        chosen = torch.rand(batch.shape) < MASK_RATE
        labels = batch.masked_fill(~chosen, -100)
        decoder(batch.masked_fill(chosen, 0), labels=labels).loss.backward()

    return step(decoder, backward)


# --- Rounds ------------------------------------------------------------------------------------


def work(kind: str, task: str, model: Path, max_tokens: int) -> None:
    """The process of one round: prints its seconds and its peak memory in MiB (Linux)."""
    torch.manual_seed(0)
    dtype = DTYPES.get(kind)
    once = ours(task, model, max_tokens, dtype) if dtype else reference(task, str(model))
    if task != "simcse-512":  # which is long enough to need no warm-up
        once()
    seconds = timeit(once, number=1)
    # Not of `resource`, where a process begins with the peak of the one that started it.
    [kib] = re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    print(f"\n{seconds} {int(kib) / 1024}")


def race(args: argparse.Namespace, exported: Path) -> None:
    model = LLM2Vec.from_pretrained(args.model, dtype=torch.float32, device="cpu")
    model.save(exported)
    ours = DTYPES if has_bfloat16("cpu") else ["ours"]  # else it takes six times as long
    folders = dict.fromkeys(ours, args.model) | {"reference": exported}
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}", flush=True)
    for task in args.tasks:
        found, rows = {kind: [] for kind in folders}, {}
        for kind in args.rounds * list(folders):
            command = [sys.executable, __file__, "--worker", kind, "--model", folders[kind]]
            command += ["--tasks", task, "--max-tokens", str(args.max_tokens)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[kind].append([float(x) for x in done.stdout.splitlines()[-1].split()])
        for kind, rounds in found.items():
            seconds, peak = map(median, zip(*rounds, strict=True))
            first, memory = map(median, zip(*found["ours"], strict=True))
            rows[kind] = {f"{task}: s": seconds, "times ours": seconds / first, "peak MiB": peak}
            rows[kind]["times its memory"] = peak / memory
        print(table(rows), flush=True)
        if task in ENCODING and "bfloat16" in folders:
            show_rounding(args.model, exported, texts_of(task))


def show_rounding(model: Path, exported: Path, texts: list[str]) -> None:
    """How near vectors in bfloat16 are to those in float32."""
    from sentence_transformers import SentenceTransformer

    for kind, load, folder, how in (
        ("ours", LLM2Vec.from_pretrained, model, lambda dtype: {"dtype": dtype}),
        ("reference", SentenceTransformer, exported, lambda d: {"model_kwargs": {"dtype": d}}),
    ):
        encoders = (load(str(folder), device="cpu", **how(dtype)) for dtype in DTYPES.values())
        vectors = [torch.from_numpy(encoder.encode(texts)) for encoder in encoders]
        cosines = torch.cosine_similarity(*vectors)
        said = f"median {cosines.median():.5f}, smallest {cosines.min():.3f}, above 0.999:"
        print(f"{kind}, cosines: {said} {(cosines > 0.999).float().mean():.1%}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=TINY, type=Path, help="folder")
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=8192, help="in one pass, of this project")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.tasks[0], args.model, args.max_tokens)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            race(args, Path(scratch))
