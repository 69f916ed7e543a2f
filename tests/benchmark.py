# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch", "numpy", "tokenizers", "safetensors",
#   "transformers==5.23.*", "peft==0.21.*", "sentence-transformers==6.2.*",
# ]
# ///
"""How fast this is, side by side with what people use today, on a CPU or on a GPU.

    python tests/benchmark.py --model data/models/smollm2-135m [--tasks stsb mntp] [--rounds 1]
    python tests/benchmark.py --device cuda --model smollm2 --llm2vec FOLDER

--model is a folder, or `mistral-7b` or `smollm2` for random weights of that shape. The contenders:

here        this project; on a CPU also in bfloat16, where the hardware multiplies it
packages    sentence-transformers, and for MNTP transformers with PEFT
llm2vec     the authors' package, if FOLDER has it: pip install --target FOLDER --no-deps
            llm2vec==0.2.3 transformers==4.44.2 tokenizers==0.19.1 huggingface_hub==0.36.2

They take turns, each round in a process of its own, with the same weights, texts and threads, on a
CPU in float32, on a GPU in bfloat16. Medians are printed, as multiples of this project's; --output
adds them to a results file. On a GPU that is too small for a step, the others compute activations
twice, as this project does. `--device cuda` on a machine without a GPU is a dry run with a
small model. tests/README.md has the commands for a machine without a network.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace as Job  # kind, task, folder, device, dtype, texts, ...

import torch
from torch import nn

ENCODING = ["stsb", "wikipedia"]  # 1,000 sentences; 100 introductions
TASKS = [*ENCODING, "mntp", "simcse"]
BATCHES = {"cpu": ((8, 128), 32), "cuda": ((32, 512), 128)}  # of MNTP, of SimCSE; cuda: the paper's
MASK_RATE = 0.2
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": "all-linear"}
DROPOUT = {"attention_dropout": 0.3}  # of SimCSE
SHAPES = {"mistral-7b": (32000, 4096, 14336, 32, 32, 8, 128, "mistral")}
SHAPES["smollm2"] = (49152, 576, 1536, 30, 9, 3, 64)
DRY = (6252, 64, 128, 2, 4, 2, 16)

# --- The contenders: each returns a function that runs one round --------------------------------


def here(job: Job) -> Callable[[], object]:
    import checkout  # noqa: F401

    from llm2vec import LLM2Vec
    from lora import add_lora
    from train import STAGES, Batches

    dtype = torch.bfloat16 if job.kind == "bfloat16" else job.dtype
    encoder = LLM2Vec.from_pretrained(job.folder, dtype=dtype, device=job.device)
    if job.task in ENCODING:
        return lambda: encoder.encode(job.texts)
    stage = STAGES[job.task]
    how = {"batch": len(job.texts), "length": 128, "split": "line"} | DROPOUT
    how = {"batch": job.blocks[0], "length": job.blocks[1]} if job.task == "mntp" else how
    settings = replace(stage.presets["paper"], max_tokens=job.max_tokens, **how)
    settings = settings.for_model(encoder)
    settings = replace(settings, mask_rate=MASK_RATE) if job.task == "mntp" else settings
    data, backward = stage.task(encoder, job.texts, settings)
    encoder.decoder.config.attention_dropout = settings.attention_dropout
    add_lora(encoder.decoder, dropout=LORA["lora_dropout"])
    return step(job, encoder.decoder, lambda: backward(Batches(data, settings)[0], 0))


def packages(job: Job) -> Callable[[], object]:
    from peft import LoraConfig, get_peft_model
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import losses
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if job.task == "mntp":
        decoder = AutoModelForCausalLM.from_pretrained(job.folder, dtype=job.dtype)
        decoder = get_peft_model(decoder.to(job.device), LoraConfig(**LORA))
        return masked_step(job, decoder, AutoTokenizer.from_pretrained(job.folder))
    how = {"device": job.device, "model_kwargs": {"dtype": job.dtype}}
    if job.task in ENCODING:
        return partial(SentenceTransformer(job.folder, **how).encode, job.texts, batch_size=32)
    encoder = SentenceTransformer(job.folder, config_kwargs=DROPOUT, **how)
    encoder.max_seq_length = 128
    encoder.add_adapter(LoraConfig(**LORA))
    loss = losses.MultipleNegativesRankingLoss(encoder)
    views = [to(job.device, encoder.preprocess(job.texts)) for _ in range(2)]
    return step(job, encoder, lambda: loss(map(dict, views), None).backward())


def llm2vec(job: Job) -> Callable[[], object]:
    """The authors' package, with its older transformers."""
    import torch.distributed.tensor  # noqa: F401 (peft uses it without importing it)
    from peft import LoraConfig, get_peft_model

    from llm2vec import LLM2Vec
    from llm2vec.loss.HardNegativeNLLLoss import HardNegativeNLLLoss
    from llm2vec.models import LlamaBiForMNTP, MistralBiForMNTP

    how = {"torch_dtype": job.dtype, "attn_implementation": "sdpa"}
    how |= DROPOUT if job.task == "simcse" else {}
    longest = 128 if job.task == "simcse" else 512
    encoder = LLM2Vec.from_pretrained(job.folder, max_length=longest, **how)
    if job.task == "mntp":
        kind = MistralBiForMNTP if encoder.config.model_type == "mistral" else LlamaBiForMNTP
        decoder, encoder.model = kind.from_pretrained(job.folder, **how).to(job.device), None
        decoder.model = get_peft_model(decoder.model, LoraConfig(**LORA))
        return masked_step(job, decoder, encoder.tokenizer)
    if job.task in ENCODING:
        how = {"batch_size": 32, "show_progress_bar": False, "device": job.device}
        return partial(encoder.encode, job.texts, **how)
    encoder.model = get_peft_model(encoder.model.to(job.device), LoraConfig(**LORA))
    batch = encoder.tokenize([encoder.prepare_for_tokenization(text) for text in job.texts])
    batch, loss = to(job.device, batch), HardNegativeNLLLoss(scale=20.0)
    views = lambda: (encoder.forward(dict(batch)) for _ in range(2))  # noqa: E731
    return step(job, encoder, lambda: loss(*views()).backward())


def to(device: str, batch: dict) -> dict:
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def masked_step(job: Job, decoder: nn.Module, tokenizer) -> Callable[[], object]:
    """An MNTP step of a model of transformers, which shifts the labels by itself."""
    encodings = tokenizer(job.texts, add_special_tokens=False).encodings
    ids = [i for encoding in encodings for i in encoding.ids]
    rows, length = job.blocks
    batch = torch.tensor(ids[: rows * length], device=job.device).view(rows, length)

    def backward() -> None:
        chosen = torch.rand(batch.shape, device=job.device) < MASK_RATE
        labels = batch.masked_fill(~chosen, -100)
        decoder(input_ids=batch.masked_fill(chosen, 0), labels=labels).loss.backward()

    return step(job, decoder, backward)


def step(job: Job, model: nn.Module, backward: Callable[[], object]) -> Callable[[], object]:
    """An optimiser step of the adapters, on the gradients that `backward` leaves."""
    trained = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def fits() -> bool:
        try:
            backward()
        except torch.OutOfMemoryError:
            return False
        return True

    def once() -> None:
        if job.twice:
            backward()
        elif not fits():
            job.twice = True
            optimizer.zero_grad()
            torch.cuda.empty_cache()
            able = [m for m in model.modules() if hasattr(m, "gradient_checkpointing_enable")]
            if able:
                able[-1].gradient_checkpointing_enable({"use_reentrant": False})
            else:
                model.recompute = len(model.layers)
            backward()
        optimizer.step()
        optimizer.zero_grad()

    return once


# --- Rounds -------------------------------------------------------------------------------------


def work(job: Job) -> None:
    """The process of one round: prints its seconds and its peak memory in GiB."""
    torch.manual_seed(0)
    gpu, job.dtype, job.twice = job.device == "cuda", getattr(torch, job.dtype), False
    once = {"packages": packages, "llm2vec": llm2vec}.get(job.kind, here)(job)

    def seconds() -> float:
        start = time.perf_counter()
        once()
        torch.cuda.synchronize() if gpu else None
        return time.perf_counter() - start

    for _ in range(job.warm_up):
        seconds()
    torch.cuda.reset_peak_memory_stats() if gpu else None
    found = median(seconds() for _ in range(job.times))
    if gpu:
        peak = torch.cuda.max_memory_allocated() / 2**30
    else:  # not of `resource`, where a process begins with the peak of the one that started it
        status = Path("/proc/self/status").read_text()  # Linux
        peak = int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) / 2**20
    print(f"\n{found} {peak} {int(job.twice)}")


def write_older(folder: Path, older: Path) -> None:
    """The same checkpoint for tokenizers 0.19: merges as strings, and a token named for padding."""
    older.mkdir()
    for file in (folder / "config.json", *folder.glob("model*")):
        (older / file.name).symlink_to(file.resolve())
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    merges = content["model"]["merges"]
    content["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in merges]
    (older / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    token = content["added_tokens"][0]["content"]
    tokens = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": token, "eos_token": token}
    tokens["model_input_names"] = ["input_ids", "attention_mask"]
    (older / "tokenizer_config.json").write_text(json.dumps(tokens))


def texts_of(task: str, sentences: int) -> list[str]:
    from llm2vec_data.benchmarks import STSB_TEST, read_sts
    from llm2vec_data.corpus import WIKIPEDIA, read_documents

    if task == "stsb":
        _, *sides = read_sts(STSB_TEST)
        return list(dict.fromkeys(sum(zip(*sides, strict=True), ())))[:1000]
    documents = read_documents(WIKIPEDIA)[::9]
    if task in ("wikipedia", "mntp"):
        return documents[: 100 if task == "wikipedia" else 1000]
    openings = dict.fromkeys(text.partition(". ")[0] + "." for text in documents)
    return list(openings)[:sentences]


def race(args: argparse.Namespace, scratch: Path) -> None:
    import checkout  # noqa: F401

    from llm2vec import Config, Decoder, LLM2Vec, has_bfloat16
    from llm2vec_data.checkpoints import TINY, load_tokenizer
    from llm2vec_data.compare import add_results, describe, table

    gpu, dry = args.device == "cuda", args.device == "cuda" and not torch.cuda.is_available()
    device, dtype = ("cpu" if dry else args.device), (torch.bfloat16 if gpu else torch.float32)
    blocks, sentences = ((4, 32), 8) if dry else BATCHES[args.device]
    if args.model in SHAPES:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            config = Config(*(DRY if dry else SHAPES[args.model]), is_causal=False)
            model = LLM2Vec(Decoder(config), load_tokenizer(TINY))
        torch.set_default_dtype(torch.float32)
        model.made_of, weights = [TINY], {"random": args.model}
    else:
        model, weights = LLM2Vec.from_pretrained(args.model, dtype=dtype, device=device), None
    model.save(scratch / "model")
    run = describe("python tests/benchmark.py", model)
    run["weights"] = weights or run["weights"]
    del model
    kinds = ["here", "packages"]
    kinds[1:1] = ["bfloat16"] if not gpu and has_bfloat16("cpu") else []
    if args.llm2vec:
        write_older(scratch / "model", scratch / "older")
        kinds.append("llm2vec")
    scores = run["rows"] = {kind: [{}] for kind in kinds}
    for task in args.tasks:
        found = {kind: [] for kind in kinds}
        same = {"task": task, "device": device, "dtype": str(dtype).partition(".")[2]}
        same |= {"texts": texts_of(task, sentences)[: 20 if dry else None], "blocks": blocks}
        same |= {"warm_up": 2, "times": 5} if gpu else {"warm_up": 1, "times": 1}
        for kind in args.rounds * list(found):
            folder, env = scratch / "model", dict(os.environ)
            if kind == "llm2vec":
                folder, env["PYTHONPATH"] = scratch / "older", args.llm2vec
            job = {"kind": kind, "folder": str(folder), "max_tokens": args.max_tokens} | same
            (scratch / "job.json").write_text(json.dumps(job))
            command = [sys.executable, __file__, "--worker", scratch / "job.json"]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env)
            if done.returncode == 0:
                found[kind].append([float(x) for x in done.stdout.splitlines()[-1].split()])
            else:
                print(f"{kind}, {task}: failed", flush=True)
        for kind, rounds in found.items():
            names = ("s", "GiB", "activations twice")
            for name, numbers in zip(names, zip(*rounds, strict=True), strict=False):
                if name == names[-1] and not any(numbers):
                    continue
                first = scores["here"][0].get(f"{task}: {name}")
                scores[kind][0][f"{task}: {name}"] = value = median(numbers)
                if kind != "here" and first:
                    scores[kind][0][f"{task}: x {name}"] = value / first
        print(table({kind: only(task, row) for kind, [row] in scores.items()}), flush=True)
        if task in ENCODING and "bfloat16" in kinds:
            show_rounding(scratch / "model", same["texts"], scores)
        if args.output:
            add_results(args.output, run)


def only(task: str, row: dict[str, float]) -> dict[str, float]:
    return {score: value for score, value in row.items() if score.partition(":")[0] == task}


def show_rounding(folder: Path, texts: list[str], scores: dict) -> None:
    """How near vectors in bfloat16 are to those in float32."""
    from sentence_transformers import SentenceTransformer

    from llm2vec import LLM2Vec

    for kind, load, how in (
        ("bfloat16", LLM2Vec.from_pretrained, lambda dtype: {"dtype": dtype}),
        ("packages", SentenceTransformer, lambda dtype: {"model_kwargs": {"dtype": dtype}}),
    ):
        dtypes = (torch.float32, torch.bfloat16)
        encoders = (load(str(folder), device="cpu", **how(dtype)) for dtype in dtypes)
        cosines = torch.cosine_similarity(*(torch.from_numpy(e.encode(texts)) for e in encoders))
        found = {"median": cosines.median().item(), "lowest": cosines.min().item()}
        scores[kind][0] |= {f"bfloat16 cosine, {name}": value for name, value in found.items()}
        print(f"{kind}: cosine of bfloat16 with float32: {found}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="data/tiny-llama", help="folder, or a shape")
    parser.add_argument("--device", default="cpu", choices=BATCHES)
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=8192, help="in one pass, of this project")
    parser.add_argument("--llm2vec", metavar="FOLDER", help="folder with llm2vec 0.2.3")
    parser.add_argument("--output", help="results file to add to")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(Job(**json.loads(Path(args.worker).read_text(encoding="utf-8"))))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            race(args, Path(scratch))
