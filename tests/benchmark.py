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
a round of warm-up, then the one that counts. Printed are medians and their ratios to this
project's, and the share of the machine's peak (of a large matrix product) that the useful
operations come to: those of the texts' own tokens through the frozen weights.

`ours` is this project, and `bfloat16` too, where the hardware multiplies it; `reference` is
sentence-transformers, and for MNTP transformers with PEFT; `llm2vec` is the authors' package, in
another environment's Python, where `pip install llm2vec==0.2.3` was run. On a GPU: gpu_check.py.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from statistics import median
from timeit import repeat

import torch
from torch import nn

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))  # at the end: in the authors' environment, `llm2vec` is their package
ENCODING = ["stsb", "wikipedia"]  # 1,000 sentences; 100 introductions
TASKS = [*ENCODING, "mntp", "simcse", "simcse-512"]  # a step of 8 x 128; of 32, of 512 sentences
DTYPES = {"ours": torch.float32, "bfloat16": torch.bfloat16}
BLOCKS, MASK_RATE = (8, 128), 0.2  # of an MNTP step; as in the paper, like what follows
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": "all-linear"}
DROPOUT = {"attention_dropout": 0.3}  # of SimCSE


def texts_of(task: str) -> list[str]:
    if task == "stsb":
        lines = (ROOT / "data/sts/stsb-test.tsv").read_text(encoding="utf-8").splitlines()
        return list(dict.fromkeys(text for line in lines for text in line.split("\t")[1:3]))[:1000]
    with (ROOT / "data/wikipedia.jsonl").open(encoding="utf-8") as file:
        documents = [json.loads(line)["text"] for line in file][::9]
    if task in ("wikipedia", "mntp"):
        return documents[: 100 if task == "wikipedia" else 400]
    openings = dict.fromkeys(text.partition(". ")[0] + "." for text in documents)
    return list(openings)[: 512 if task == "simcse-512" else 32]


def useful_flops(task: str, lengths: list[int], config) -> float:
    """Multiplications and additions, counted as two, that the task's own tokens need."""
    d, layers, D = config.hidden_size, config.num_hidden_layers, config.head_dim
    q, kv = config.num_attention_heads * D, config.num_key_value_heads * D
    matrices = layers * d * (2 * q + 2 * kv + 3 * config.intermediate_size)
    projection = 2 * matrices * sum(lengths)
    attention = sum(4 * layers * q * n * n for n in lengths)
    if task in ENCODING:
        return projection + attention
    # Backward through frozen weights: the gradient of their inputs alone; attention has two inputs.
    step = 2 * projection + 3 * attention
    head = 4 * config.vocab_size * d * MASK_RATE * sum(lengths)
    return step + head if task == "mntp" else 2 * step  # two views


# --- The contenders: each returns a function that runs one round ---------------------------------


def ours(task: str, model: Path, max_tokens: int, dtype: torch.dtype) -> Callable[[], object]:
    import llm2vec
    from lora import add_lora
    from train import STAGES, Batches

    encoder = llm2vec.LLM2Vec.from_pretrained(model, dtype=dtype, device="cpu")
    texts, stage = texts_of(task), STAGES.get(task.partition("-")[0])
    if stage is None:
        return lambda: encoder.encode(texts)
    how = {"batch": BLOCKS[0], "steps": 1} if task == "mntp" else {"batch": len(texts)} | DROPOUT
    how |= {"split": "line"} if task != "mntp" else {}
    settings = replace(stage.presets["paper"], length=128, max_tokens=max_tokens, **how)
    data, backward = stage.task(encoder, texts, settings := settings.for_model(encoder))
    encoder.decoder.config.attention_dropout = settings.attention_dropout
    parameters = add_lora(encoder.decoder.train(), dropout=LORA["lora_dropout"])
    return step(parameters, lambda: backward(Batches(data, settings)[0], 0))


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
        encoder = SentenceTransformer(model, device="cpu")
        return lambda: encoder.encode(texts, batch_size=32)
    encoder = SentenceTransformer(model, device="cpu", config_kwargs=DROPOUT)
    encoder.max_seq_length = 128
    encoder.add_adapter(LoraConfig(**LORA))
    loss = losses.MultipleNegativesRankingLoss(encoder.train())
    if task == "simcse-512":
        loss = losses.CachedMultipleNegativesRankingLoss(encoder, mini_batch_size=32)
    views = [encoder.preprocess(texts) for _ in range(2)]
    return step(encoder.parameters(), lambda: loss(map(dict, views), None).backward())


def llm2vec(task: str, model: str) -> Callable[[], object]:
    """The authors' package, in an environment of its own."""
    import torch.distributed.tensor  # noqa: F401 (peft uses it without importing it)
    from peft import LoraConfig, get_peft_model

    from llm2vec import LLM2Vec
    from llm2vec.loss.HardNegativeNLLLoss import HardNegativeNLLLoss
    from llm2vec.models import LlamaBiForMNTP

    texts, how = texts_of(task), {"torch_dtype": torch.float32, "attn_implementation": "sdpa"}
    how |= DROPOUT if task == "simcse" else {}
    encoder = LLM2Vec.from_pretrained(model, max_length=128 if task == "simcse" else 512, **how)
    if task in ENCODING:
        return lambda: encoder.encode(texts, batch_size=32, show_progress_bar=False, device="cpu")
    if task == "mntp":
        decoder = LlamaBiForMNTP.from_pretrained(model, **how)
        decoder.model = get_peft_model(decoder.model, LoraConfig(**LORA))
        return masked_step(decoder, encoder.tokenizer)
    encoder.model = get_peft_model(encoder.model, LoraConfig(**LORA))
    batch = encoder.tokenize([encoder.prepare_for_tokenization(text) for text in texts])
    views = lambda: (encoder.forward(dict(batch)) for _ in range(2))  # noqa: E731
    loss = HardNegativeNLLLoss(scale=20.0)
    return step(encoder.train().parameters(), lambda: loss(*views()).backward())


def step(parameters: Iterable[nn.Parameter], backward: Callable[[], object]) -> Callable[[], None]:
    """An optimiser step of the adapters, on the gradients that `backward` leaves."""
    trained = [p for p in parameters if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    return lambda: (backward(), optimizer.step(), optimizer.zero_grad())


def masked_step(decoder: nn.Module, tokenizer) -> Callable[[], object]:
    """An MNTP step of a model of transformers, which shifts the labels by itself."""
    encodings = tokenizer(texts_of("mntp"), add_special_tokens=False).encodings
    ids = [i for encoding in encodings for i in encoding.ids]
    batch = torch.tensor(ids[: BLOCKS[0] * BLOCKS[1]]).view(BLOCKS)

    def backward() -> None:
        chosen = torch.rand(batch.shape) < MASK_RATE
        labels = batch.masked_fill(~chosen, -100)
        decoder(batch.masked_fill(chosen, 0), labels=labels).loss.backward()

    return step(decoder.train().parameters(), backward)


# --- Rounds ------------------------------------------------------------------------------------


def work(kind: str, task: str, model: str, max_tokens: int) -> None:
    """The process of one round: prints its seconds and its peak memory in MiB (Linux)."""
    torch.manual_seed(0)
    if kind in DTYPES:
        once = ours(task, model, max_tokens, DTYPES[kind])
    else:
        once = {"reference": reference, "llm2vec": llm2vec}[kind](task, model)
    if task != "simcse-512":  # which is long enough to need no warm-up
        once()
    start = time.perf_counter()
    once()
    seconds = time.perf_counter() - start
    # Not of `resource`, where a process begins with the peak of the one that started it.
    [kib] = re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    print(f"\n{seconds} {int(kib) / 1024}")


def write_older(model: Path, folder: Path) -> None:
    """The same checkpoint for tokenizers 0.19: merges as strings, and a token named for padding."""
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).symlink_to((model / name).resolve())
    content = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    merges = content["model"]["merges"]
    content["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in merges]
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    token = content["added_tokens"][0]["content"]
    tokens = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": token, "eos_token": token}
    tokens["model_input_names"] = ["input_ids", "attention_mask"]
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))


def race(args: argparse.Namespace, scratch: Path) -> None:
    from sentence_transformers import SentenceTransformer

    from llm2vec import LLM2Vec, has_bfloat16
    from llm2vec_data.compare import table

    model = LLM2Vec.from_pretrained(args.model, dtype=torch.float32, device="cpu")
    model.save(scratch / "exported")
    dtypes = DTYPES if has_bfloat16("cpu") else {"ours": torch.float32}  # else it takes six times
    contenders = {kind: (sys.executable, args.model) for kind in dtypes}
    contenders["reference"] = (sys.executable, scratch / "exported")
    if args.llm2vec:
        write_older(args.model, scratch / "older")
        contenders["llm2vec"] = (args.llm2vec, scratch / "older")
    peaks = {}
    for kind, dtype in dtypes.items():
        a = torch.randn(2048, 2048, dtype=dtype)
        peaks[kind] = 2 * 2048**3 / min(repeat(lambda a=a: a @ a, number=1, repeat=10))
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, FLOP/s at peak: {peaks}")
    for task in args.tasks:
        able = dict(contenders)
        if task == "simcse-512":  # the authors' package has no way to take a batch in parts
            able.pop("llm2vec", None)
        found, rows = {kind: [] for kind in able}, {}
        for kind in args.rounds * list(able):
            python, folder = able[kind]
            command = [python, __file__, "--worker", kind, "--model", folder, "--tasks", task]
            command += ["--max-tokens", str(args.max_tokens)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[kind].append([float(x) for x in done.stdout.splitlines()[-1].split()])
        encodings = model.tokenizer.encode_batch(texts_of(task))
        lengths = [min(512, len(encoding)) for encoding in encodings]
        lengths = BLOCKS[0] * [BLOCKS[1]] if task == "mntp" else lengths
        flops = useful_flops(task, lengths, model.decoder.config)
        for kind, rounds in found.items():
            (time, peak), (first, memory) = (
                [median(numbers) for numbers in zip(*of, strict=True)]
                for of in (rounds, found["ours"])
            )
            rows[kind] = {f"{task}: s": time, "times ours": time / first, "peak MiB": peak}
            rows[kind] |= {"times its memory": peak / memory, "tokens/s": sum(lengths) / time}
            rows[kind] |= {"share of peak": flops / time / peaks.get(kind, peaks["ours"])}
        print(table(rows), flush=True)
        if task not in ENCODING or "bfloat16" not in dtypes:
            continue
        loaders = {
            "ours": lambda t: LLM2Vec.from_pretrained(args.model, dtype=t, device="cpu"),
            "reference": lambda t: SentenceTransformer(
                str(scratch / "exported"), device="cpu", model_kwargs={"dtype": t}
            ),
        }
        for kind, load in loaders.items():  # how near bfloat16 is to float32
            vectors = (load(dtype).encode(texts_of(task)) for dtype in dtypes.values())
            cosines = torch.cosine_similarity(*map(torch.from_numpy, vectors))
            said = f"median {cosines.median():.5f}, smallest {cosines.min():.3f}, above 0.999:"
            print(f"{kind}, cosines: {said} {(cosines > 0.999).float().mean():.1%}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=ROOT / "data/tiny-llama", type=Path, help="folder")
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=8192, help="in one pass, of this project")
    parser.add_argument("--llm2vec", metavar="PYTHON", help="Python that has llm2vec 0.2.3")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.tasks[0], str(args.model), args.max_tokens)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            race(args, Path(scratch))
