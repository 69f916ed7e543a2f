# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch", "numpy", "tokenizers", "safetensors",
#   "transformers==5.23.*", "peft==0.21.*", "sentence-transformers==6.2.*",
# ]
# ///
"""How fast this is on a CPU, side by side with what people use today.

    python tests/benchmark.py --model data/models/smollm2-135m
    python tests/benchmark.py --model data/models/smollm2-135m --tasks stsb mntp --rounds 1

Each round of a contender is a process of its own, on the same weights, texts and threads: after a
round of warm-up comes the one that counts. The contenders take turns. Printed are the median of
seconds and their range, the ratio of medians to this project's, texts (or blocks) and tokens a
second, the process's peak memory, and the share of the machine's own peak, measured with a large
matrix product of that type, that the useful floating-point operations come to: those of the text's
own tokens through the frozen weights, without padding, recomputation and adapters; and, for the
encoding tasks, how near the vectors in bfloat16 are to those in float32.

Contenders: `ours`; where the hardware multiplies it, `bfloat16`, which is this project in that
type; `reference`, which is sentence-transformers for encoding and transformers with PEFT for
training; and, with --llm2vec PYTHON, the authors' package, in another environment's Python, where
`pip install llm2vec==0.2.3` was run (it brings transformers 4.44.2). On a GPU, see gpu_check.py.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from timeit import repeat

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))  # at the end: in the authors' environment, `llm2vec` is their package
TASKS = {
    "stsb": "encode 1,000 STS-B test sentences",
    "wikipedia": "encode 100 Wikipedia introductions",
    "mntp": "MNTP step, 8 x 128",
    "simcse": "SimCSE step, first sentences of 32 introductions",
    "simcse-512": "SimCSE step, batch of 512",
}
ENCODING = ("stsb", "wikipedia")
BLOCKS = (8, 128)  # of an MNTP step: how many, and tokens in each
MASK_RATE, ATTENTION_DROPOUT = 0.2, 0.3  # the paper's, as are the adapters
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": "all-linear"}


# --- The texts, and what they cost -------------------------------------------------------------


def texts_of(task: str) -> list[str]:
    if task == "stsb":
        lines = (ROOT / "data/sts/stsb-test.tsv").read_text(encoding="utf-8").splitlines()
        sides = dict.fromkeys(text for line in lines for text in line.split("\t")[1:3])
        return list(sides)[:1000]
    with (ROOT / "data/wikipedia.jsonl").open(encoding="utf-8") as file:
        documents = [json.loads(line)["text"] for line in file][::9]
    if task == "wikipedia":
        return documents[:100]
    if task == "mntp":
        return documents[:400]
    batch = 512 if task == "simcse-512" else 32
    return [document.partition(". ")[0] + "." for document in documents[:batch]]


def blocks_of(encodings: list) -> Tensor:
    """The tokens of texts end to end, cut into BLOCKS."""
    count, length = BLOCKS
    ids = [i for encoding in encodings for i in encoding.ids][: count * length]
    return torch.tensor(ids).view(count, length)


def useful_flops(task: str, lengths: list[int], config) -> float:
    """Multiplications and additions, counted as two, that the task's own tokens need."""
    d, layers = config.hidden_size, config.num_hidden_layers
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    matrices = layers * (2 * d * q + 2 * d * kv + 3 * d * config.intermediate_size)
    projection = sum(2 * matrices * n for n in lengths)
    attention = sum(4 * layers * q * n * n for n in lengths)
    if task in ENCODING:
        return projection + attention
    # Backward through frozen weights: the gradient of their inputs alone; attention has two inputs.
    step = 2 * projection + 3 * attention
    if task == "mntp":
        return step + 2 * 2 * config.vocab_size * d * MASK_RATE * sum(lengths)
    return 2 * step  # two views


def matrix_peak(dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product, the best of ten."""
    n = 2048
    a, b = (torch.randn(n, n, dtype=dtype) for _ in range(2))
    return 2 * n**3 / min(repeat(lambda: a @ b, number=1, repeat=10))


# --- The contenders: each returns a function that runs one round ---------------------------------


def ours(task: str, model: str, max_tokens: int, dtype: torch.dtype) -> Callable[[], object]:
    import llm2vec
    import train
    from lora import add_lora

    encoder = llm2vec.LLM2Vec.from_pretrained(model, dtype=dtype, device="cpu")
    decoder, texts = encoder.decoder, texts_of(task)
    if task in ENCODING:
        return lambda: encoder.encode(texts)
    parameters = add_lora(decoder.train(), dropout=0.05)
    if task == "mntp":
        batch = blocks_of(encoder.tokenizer.encode_batch(texts))

        def mntp() -> None:  # as train_mntp does it
            masked, chosen = llm2vec.mask_tokens(batch, 0, decoder.config.vocab_size, MASK_RATE)
            total, n = int(chosen.sum()), max(1, max_tokens // BLOCKS[1])
            for part in zip(*(t.split(n) for t in (masked, batch, chosen)), strict=True):
                llm2vec.mntp_loss(decoder, *part, total=total).backward()

        return step(parameters, mntp)
    decoder.config.attention_dropout = ATTENTION_DROPOUT
    views = 2 * llm2vec.tokenize(encoder.tokenizer, texts, 128)

    def loss_of(vectors: Tensor) -> Tensor:
        return llm2vec.contrastive_loss(*vectors.chunk(2))

    return step(
        parameters, lambda: train.backward_through_encoder(encoder, views, loss_of, max_tokens)
    )


def reference(task: str, folder: str) -> Callable[[], object]:
    """sentence-transformers on the exported folder; transformers with PEFT, as in their guides."""
    from peft import LoraConfig, get_peft_model
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import losses
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    texts, tokenizer = texts_of(task), AutoTokenizer.from_pretrained(folder)
    dropout = {"attention_dropout": ATTENTION_DROPOUT}
    if task in ENCODING:
        encoder = SentenceTransformer(folder, device="cpu")
        return lambda: encoder.encode(texts, batch_size=32)
    if task == "mntp":
        decoder = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(**LORA))
        batch = blocks_of(tokenizer(texts, add_special_tokens=False).encodings)
        return step(decoder.train().parameters(), lambda: masked_loss(decoder, batch).backward())
    if task == "simcse-512":
        encoder = SentenceTransformer(folder, device="cpu", config_kwargs=dropout)
        encoder.max_seq_length = 128
        encoder.add_adapter(LoraConfig(**LORA))
        loss = losses.CachedMultipleNegativesRankingLoss(encoder.train(), mini_batch_size=32)

        def cached() -> None:
            features = encoder.preprocess(texts)
            loss([dict(features), dict(features)], None).backward()

        return step(encoder.parameters(), cached)
    decoder = get_peft_model(AutoModel.from_pretrained(folder, **dropout), LoraConfig(**LORA))
    batch = tokenizer(2 * texts, padding=True, truncation=True, max_length=128, return_tensors="pt")

    def simcse() -> None:
        hidden = decoder(**batch).last_hidden_state
        own = batch["attention_mask"][..., None]
        vectors = (hidden * own).sum(1) / own.sum(1)
        a, b = nn.functional.normalize(vectors, dim=-1).chunk(2)
        nn.functional.cross_entropy(20 * a @ b.T, torch.arange(len(a))).backward()

    return step(decoder.train().parameters(), simcse)


def llm2vec(task: str, folder: str) -> Callable[[], object]:
    """The authors' package, in an environment of its own."""
    import torch.distributed.tensor  # noqa: F401 (peft uses it without importing it)
    from peft import LoraConfig, get_peft_model

    from llm2vec import LLM2Vec
    from llm2vec.loss.HardNegativeNLLLoss import HardNegativeNLLLoss
    from llm2vec.models import LlamaBiForMNTP

    texts, how = texts_of(task), {"torch_dtype": torch.float32, "attn_implementation": "sdpa"}
    if task in ENCODING:
        encoder = LLM2Vec.from_pretrained(folder, **how)
        return lambda: encoder.encode(texts, batch_size=32, show_progress_bar=False, device="cpu")
    how["attention_dropout"] = 0.0 if task == "mntp" else ATTENTION_DROPOUT
    encoder = LLM2Vec.from_pretrained(folder, max_length=128, **how)
    if task == "mntp":
        decoder = LlamaBiForMNTP.from_pretrained(folder, **how)
        decoder.model = get_peft_model(decoder.model, LoraConfig(**LORA))
        batch = blocks_of(encoder.tokenizer(texts, add_special_tokens=False).encodings)
        return step(decoder.train().parameters(), lambda: masked_loss(decoder, batch).backward())
    encoder.model = get_peft_model(encoder.model, LoraConfig(**LORA))
    loss = HardNegativeNLLLoss(scale=20.0)

    def simcse() -> None:
        features = encoder.tokenize([encoder.prepare_for_tokenization(text) for text in texts])
        views = [encoder.forward({k: v for k, v in features.items()}) for _ in range(2)]
        loss(*views).backward()

    return step(encoder.train().parameters(), simcse)


def step(parameters: Iterable[nn.Parameter], backward: Callable[[], object]) -> Callable[[], None]:
    """An optimiser step of the adapters, on the gradients that `backward` leaves."""
    trained = [p for p in parameters if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def once() -> None:
        backward()
        optimizer.step()
        optimizer.zero_grad()

    return once


def masked_loss(decoder: nn.Module, batch: Tensor) -> Tensor:
    """The MNTP loss of a model of transformers, which shifts the labels by itself."""
    chosen = torch.rand(batch.shape) < MASK_RATE
    return decoder(batch.masked_fill(chosen, 0), labels=batch.masked_fill(~chosen, -100)).loss


def write_older(model: Path, folder: Path) -> None:
    """The same checkpoint for tokenizers 0.19: merges as strings, and a token named for padding."""
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).symlink_to((model / name).resolve())
    content = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    token = content["added_tokens"][0]["content"]
    tokens = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": token, "eos_token": token}
    tokens["model_input_names"] = ["input_ids", "attention_mask"]
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    merges = content["model"]["merges"]
    content["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in merges]
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


# --- Rounds ------------------------------------------------------------------------------------


def work(kind: str, task: str, model: str, max_tokens: int) -> None:
    """The process of one round: prints its seconds and its peak memory in MiB (Linux)."""
    torch.manual_seed(0)
    if kind in ("ours", "bfloat16"):
        dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
        once = ours(task, model, max_tokens, dtype)
    else:
        once = {"reference": reference, "llm2vec": llm2vec}[kind](task, model)
    if task != "simcse-512":  # which is long enough to need no warm-up
        once()
    start = time.perf_counter()
    once()
    seconds = time.perf_counter() - start
    # Not of `resource`, where a process begins with the peak of the one that started it.
    [kib] = re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    print(json.dumps({"seconds": seconds, "peak": int(kib) / 1024}))


def compete(
    task: str, contenders: dict[str, tuple[str, Path]], args: argparse.Namespace
) -> dict[str, list[dict[str, float]]]:
    """Rounds taken in turns; a contender that fails is named and left out."""
    rounds = {kind: [] for kind in contenders}
    for turn in range(1, args.rounds + 1):
        for kind in list(rounds):
            python, model = contenders[kind]
            command = [python, __file__, "--worker", kind, "--model", model, "--tasks", task]
            command += ["--max-tokens", str(args.max_tokens)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                said = done.stderr.strip().splitlines()[-1:]
                print(f"{task}: {kind} failed: status {done.returncode}, {said}", flush=True)
                del rounds[kind]
                continue
            rounds[kind].append(json.loads(done.stdout.splitlines()[-1]))
            seconds = rounds[kind][-1]["seconds"]
            print(f"{task}, round {turn}: {kind} {seconds:.2f} s", file=sys.stderr)
    return rounds


def agreement(load: Callable[[torch.dtype], object], texts: list[str]) -> str:
    """Cosines of the vectors in bfloat16 with those in float32, of what `load` gives for a type."""
    encoders = (load(dtype) for dtype in (torch.float32, torch.bfloat16))
    cosines = torch.cosine_similarity(*(torch.from_numpy(e.encode(texts)) for e in encoders))
    above = (cosines > 0.999).float().mean()
    text = f"median {cosines.median():.5f}, mean {cosines.mean():.5f}, smallest {cosines.min():.3f}"
    return f"{text}, above 0.999: {above:.1%}"


def race(args: argparse.Namespace, scratch: Path) -> None:
    from sentence_transformers import SentenceTransformer

    from llm2vec import LLM2Vec, has_bfloat16

    def load_ours(dtype: torch.dtype) -> LLM2Vec:
        return LLM2Vec.from_pretrained(args.model, dtype=dtype, device="cpu")

    def load_reference(dtype: torch.dtype) -> SentenceTransformer:
        return SentenceTransformer(str(exported), device="cpu", model_kwargs={"dtype": dtype})

    exported, older = scratch / "exported", scratch / "older"
    model = load_ours(torch.float32)
    model.save(exported)
    contenders = {"ours": (sys.executable, args.model)}
    peaks = {"float32": matrix_peak(torch.float32)}
    if has_bfloat16(torch.device("cpu")):  # without the hardware for it, a round takes six times
        contenders["bfloat16"] = (sys.executable, args.model)
        peaks["bfloat16"] = matrix_peak(torch.bfloat16)
    contenders["reference"] = (sys.executable, exported)
    if args.llm2vec:
        write_older(args.model, older)
        contenders["llm2vec"] = (args.llm2vec, older)
    print(f"{args.model}, {torch.get_num_threads()} threads, torch {torch.__version__};")
    shown = (f"{name} {peak / 1e9:,.0f} GFLOP/s" for name, peak in peaks.items())
    print(f"matrix peak: {', '.join(shown)}; {args.rounds} rounds\n")
    columns = ["task", "contender", "seconds", "range", "times ours", "texts/s", "tokens/s"]
    print(f"| {' | '.join([*columns, 'share of peak', 'peak MiB'])} |")
    print("| --- | --- " + "| --: " * 7 + "|", flush=True)
    for task in args.tasks:
        encodings = model.tokenizer.encode_batch(texts_of(task))
        count, length = BLOCKS
        lengths = [length] * count if task == "mntp" else [min(512, len(e)) for e in encodings]
        flops = useful_flops(task, lengths, model.decoder.config)
        able = dict(contenders)
        if task == "simcse-512":  # the authors' package has no way to take a batch in parts
            able.pop("llm2vec", None)
        rounds = compete(task, able, args)
        for kind, found in rounds.items():
            times = [result["seconds"] for result in found]
            seconds, views = median(times), 2 if task.startswith("simcse") else 1
            first = rounds.get("ours", found)
            cells = [
                TASKS[task],
                kind,
                f"{seconds:.2f}",
                f"{min(times):.2f} to {max(times):.2f}",
                f"{seconds / median(result['seconds'] for result in first):.2f}",
                f"{len(lengths) / seconds:,.1f}",
                f"{views * sum(lengths) / seconds:,.0f}",
                f"{flops / seconds / peaks.get(kind, peaks['float32']):.0%}",
                f"{max(result['peak'] for result in found):,.0f}",
            ]
            print(f"| {' | '.join(cells)} |", flush=True)
    for task in ENCODING:
        if task in args.tasks and "bfloat16" in contenders:
            for kind, load in (("ours", load_ours), ("reference", load_reference)):
                what = f"{TASKS[task]}, {kind}, cosines of bfloat16 with float32"
                print(f"{what}: {agreement(load, texts_of(task))}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=ROOT / "data/tiny-llama", type=Path, help="folder")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--rounds", type=int, default=5)
    text = "of this project, in one forward pass; MNTP and SimCSE go in parts where they take more"
    parser.add_argument("--max-tokens", type=int, default=8192, help=text)
    parser.add_argument("--llm2vec", metavar="PYTHON", help="Python that has llm2vec 0.2.3")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.tasks[0], str(args.model), args.max_tokens)
        return
    with tempfile.TemporaryDirectory() as scratch:
        race(args, Path(scratch))


if __name__ == "__main__":
    main()
