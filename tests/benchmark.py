# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch", "numpy", "tokenizers", "safetensors",
#   "transformers==5.23.*", "peft==0.21.*", "sentence-transformers==6.2.*",
# ]
# ///
"""How fast this is, side by side with what people use today.

    python tests/benchmark.py --model data/models/smollm2-135m
    python tests/benchmark.py --model data/models/smollm2-135m --dtype bfloat16 --tasks stsb mntp
    python tests/benchmark.py --model mistral-7b --dtype bfloat16 --tasks mntp-paper --compile

The last is for a GPU, and has random weights.

Each contender runs in a process of its own, on the same weights, texts and threads; they take
turns, round by round, after a round of warm-up (on a GPU, one after another: two 7B models may not
fit). Printed are the median of seconds and their range, the ratio of medians to this project's,
texts (or blocks) and tokens a second, the process's peak memory (on a GPU, the peak that torch
allocated), and the share of the machine's own peak, measured with a large matrix product of that
type, that the useful floating-point operations come to: those of the text's own tokens through the
frozen weights, without padding, recomputation and adapters; and, for the encoding tasks, how near
the vectors in bfloat16 are to those in float32.

Contenders: `ours`; beside float32, where the hardware multiplies it or with --bfloat16,
`bfloat16`, which is this project in that type; with --compile,
`compiled`, which is this project with its layers compiled by torch; `reference`, which is
sentence-transformers for encoding and transformers with PEFT for training; and, with --llm2vec
PYTHON, the authors' package, in another environment's Python, where `pip install llm2vec==0.2.3`
was run (it brings transformers 4.44.2). A named shape (mistral-7b, llama-3-8b, smollm2-135m, tiny)
has random weights and is for `ours` alone; so is the supervised step.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
ENCODING = ("stsb", "wikipedia", "long")
BLOCKS = {"mntp": (8, 128), "mntp-paper": (32, 512)}
SENTENCES = {"simcse": 32, "simcse-512": 512, "simcse-paper": 128, "supervised-paper": 512}
SHAPES = {  # vocabulary, width, feed-forward, layers, heads, key/value heads
    "mistral-7b": (32000, 4096, 14336, 32, 32, 8),
    "llama-3-8b": (128256, 4096, 14336, 32, 32, 8),
    "smollm2-135m": (49152, 576, 1536, 30, 9, 3),
    "tiny": (6252, 256, 704, 6, 4, 2),
}
TASKS = {
    "stsb": "encode 1,000 STS-B test sentences",
    "wikipedia": "encode 100 Wikipedia introductions",
    "mntp": "MNTP step, 8 x 128",
    "simcse": "SimCSE step, first sentences of 32 introductions",
    "simcse-512": "SimCSE step, batch of 512",
    "long": "encode 64 texts of 512 tokens",
    "mntp-paper": "MNTP step of the paper, 32 x 512",
    "simcse-paper": "SimCSE step of the paper, batch of 128",
    "supervised-paper": "supervised step of the paper, batch of 512",
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# --- The texts, and what they cost -------------------------------------------------------------


def texts_of(task: str) -> list[str]:
    if task == "stsb":
        lines = (ROOT / "data/sts/stsb-test.tsv").read_text(encoding="utf-8").splitlines()
        sides = dict.fromkeys(text for line in lines for text in line.split("\t")[1:3])
        return list(sides)[:1000]
    with (ROOT / "data/wikipedia.jsonl").open(encoding="utf-8") as file:
        documents = [json.loads(line)["text"] for line in file]
    if task == "supervised-paper":  # queries, their answers, and hard negatives
        queries = [document.partition(". ")[0] for document in documents[:512]]
        return queries + documents[:512] + documents[512:1024]
    documents = documents[::9]
    if task == "wikipedia":
        return documents[:100]
    if task == "long":
        return [" ".join(documents[i : i + 12]) for i in range(64)]
    if task in BLOCKS:
        return documents[:400]
    return [document.partition(". ")[0] + "." for document in documents[: SENTENCES[task]]]


def masking(model: str) -> tuple[float, tuple[float, float]]:
    """Share of tokens hidden, and of those, replaced by the mask and at random (the paper's)."""
    return (0.8, (1.0, 0.0)) if model == "mistral-7b" else (0.2, (0.8, 0.1))


def useful_flops(task: str, lengths: list[int], config: dict) -> float:
    """Multiplications and additions, counted as two, that the task's own tokens need."""
    d, layers = config["hidden_size"], config["num_hidden_layers"]
    head = config.get("head_dim") or d // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    matrices = layers * (2 * d * q + 2 * d * kv + 3 * d * config["intermediate_size"])
    projection = sum(2 * matrices * n for n in lengths)
    attention = sum(4 * layers * q * n * n for n in lengths)
    if task in ENCODING:
        return projection + attention
    # Backward through frozen weights: the gradient of their inputs alone; attention has two inputs.
    step = 2 * projection + 3 * attention
    if task == "supervised-paper":
        return step
    if task in BLOCKS:
        return step + 2 * 2 * config["vocab_size"] * d * config["mask_rate"] * sum(lengths)
    return 2 * step  # two views


def matrix_peak(dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product, the best of ten."""
    n = 8192 if DEVICE == "cuda" else 2048
    a, b = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(10):
        start = time.perf_counter()
        float((a @ b)[0, 0])
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times)


# --- The contenders: each returns a function that runs one round ---------------------------------


def ours(
    task: str, model: str, dtype: torch.dtype, max_tokens: int, compiled: bool
) -> Callable[[], object]:
    sys.path.insert(0, str(ROOT))
    import llm2vec
    import train
    from lora import add_lora

    if model in SHAPES:
        names = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"]
        names += ["num_attention_heads", "num_key_value_heads"]
        shape = dict(zip(names, SHAPES[model], strict=True))
        head = shape["hidden_size"] // shape["num_attention_heads"]
        with torch.device(DEVICE):
            torch.set_default_dtype(dtype)
            decoder = llm2vec.Decoder(llm2vec.Config(**shape, head_dim=head, is_causal=False))
            torch.set_default_dtype(torch.float32)
        tokenizer = llm2vec.load_tokenizer(ROOT / "data/tiny-llama")
        encoder = llm2vec.LLM2Vec(decoder.requires_grad_(False), tokenizer)
    else:
        encoder = llm2vec.LLM2Vec.from_pretrained(model, dtype=dtype, device=DEVICE)
    decoder, texts = encoder.decoder, texts_of(task)
    if compiled:
        llm2vec.compile_layers(decoder)
    if task in ENCODING:
        return lambda: encoder.encode(texts)
    decoder.train()
    parameters = add_lora(decoder, dropout=0.05)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    supervised, simcse_too = task == "supervised-paper", task.startswith("simcse")
    count, length = BLOCKS.get(task, (len(texts), 512 if supervised else 128))
    decoder.config.attention_dropout = 0.3 * simcse_too

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    if task in BLOCKS:
        batch = blocks_of(task, encoder.tokenizer.encode_batch(texts)).to(DEVICE)

        def mntp() -> None:  # as train_mntp does it
            masked, chosen = llm2vec.mask_tokens(
                batch, 0, decoder.config.vocab_size, *masking(model)
            )
            total, n = int(chosen.sum()), max(1, max_tokens // length)
            for part in zip(*(t.split(n) for t in (masked, batch, chosen)), strict=True):
                llm2vec.mntp_loss(decoder, *part, total=total).backward()
            update()

        return mntp
    views = llm2vec.tokenize(encoder.tokenizer, texts, length) * (1 + simcse_too)

    def contrastive() -> None:
        train.contrast(
            encoder,
            views,
            lambda v: llm2vec.contrastive_loss(*v.chunk(3 if supervised else 2)),
            max_tokens,
        )
        update()

    return contrastive


def blocks_of(task: str, encodings: list) -> Tensor:
    count, length = BLOCKS[task]
    ids = [i for encoding in encodings for i in encoding.ids][: count * length]
    return torch.tensor(ids).view(count, length)


def reference(task: str, model: str, dtype: torch.dtype) -> Callable[[], object]:
    """sentence-transformers on the exported folder; transformers with PEFT, as in their guides."""
    from peft import LoraConfig, get_peft_model
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import losses
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    sys.path.insert(0, str(ROOT))
    import llm2vec

    texts = texts_of(task)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "encoder"
        llm2vec.LLM2Vec.from_pretrained(model, dtype=dtype).save(folder)
        how = {"dtype": dtype, "attn_implementation": "sdpa"}
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if task in (*ENCODING, "simcse-512"):
            encoder = SentenceTransformer(str(folder), device=DEVICE, model_kwargs=how)
        elif task in BLOCKS:
            decoder = AutoModelForCausalLM.from_pretrained(folder, **how).to(DEVICE)
        else:
            decoder = AutoModel.from_pretrained(folder, attention_dropout=0.3, **how).to(DEVICE)
    if task in ENCODING:
        return lambda: encoder.encode(texts, batch_size=32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=targets)
    if task == "simcse-512":
        encoder.max_seq_length = 128
        transformer = encoder[0].model if hasattr(encoder[0], "model") else encoder[0].auto_model
        transformer.config.attention_dropout = 0.3
        for layer in transformer.layers:
            layer.self_attn.attention_dropout = 0.3
        encoder.add_adapter(lora)
        loss = losses.CachedMultipleNegativesRankingLoss(encoder, mini_batch_size=32)
        trained = encoder.train()
    else:
        trained = get_peft_model(decoder, lora).train()
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-4)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    if task in BLOCKS:
        batch = blocks_of(task, tokenizer(texts, add_special_tokens=False).encodings).to(DEVICE)

        def mntp() -> None:
            chosen = torch.rand(batch.shape, device=DEVICE) < masking(model)[0]
            masked = batch.masked_fill(chosen, 0)
            trained(masked, labels=batch.masked_fill(~chosen, -100)).loss.backward()
            update()

        return mntp
    if task == "simcse-512":

        def cached() -> None:
            features = encoder.preprocess(texts) if hasattr(encoder, "preprocess") else None
            features = features or encoder.tokenize(texts)
            loss([dict(features), dict(features)], None).backward()
            update()

        return cached
    batch = tokenizer(2 * texts, padding=True, truncation=True, max_length=128, return_tensors="pt")

    def simcse() -> None:
        hidden = trained(**batch.to(DEVICE)).last_hidden_state
        own = batch["attention_mask"][..., None]
        vectors = (hidden * own).sum(1) / own.sum(1)
        a, b = torch.nn.functional.normalize(vectors.float(), dim=-1).chunk(2)
        target = torch.arange(len(a), device=DEVICE)
        torch.nn.functional.cross_entropy(20 * a @ b.T, target).backward()
        update()

    return simcse


def llm2vec(task: str, model: str, dtype: torch.dtype) -> Callable[[], object]:
    """The authors' package, in an environment of its own."""
    sys.path = [p for p in sys.path if p not in (str(ROOT), str(ROOT / "tests"))]
    from llm2vec import LLM2Vec

    texts = texts_of(task)
    scratch = tempfile.TemporaryDirectory()
    model = older_tokenizer(Path(model), Path(scratch.name))
    how = {"torch_dtype": dtype, "attn_implementation": "sdpa", "device_map": DEVICE}
    encoder = LLM2Vec.from_pretrained(model, enable_bidirectional=True, **how)
    if task in ENCODING:
        return lambda: encoder.encode(texts, batch_size=32, show_progress_bar=False)
    import torch.distributed.tensor  # noqa: F401 (peft uses it without importing it)
    from llm2vec.loss.HardNegativeNLLLoss import HardNegativeNLLLoss
    from llm2vec.models import LlamaBiForMNTP
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=targets)
    if task in BLOCKS:
        decoder = LlamaBiForMNTP.from_pretrained(model, torch_dtype=dtype).to(DEVICE)
        decoder.model = get_peft_model(decoder.model, lora)
        trained = decoder.train()
    else:
        encoder.model.config.attention_dropout = 0.3
        for layer in encoder.model.layers:
            layer.self_attn.attention_dropout = 0.3
        encoder.model = get_peft_model(encoder.model, lora)
        encoder.max_length = 128
        trained = encoder.train()
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-4)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    if task in BLOCKS:
        batch = blocks_of(task, encoder.tokenizer(texts, add_special_tokens=False).encodings).to(
            DEVICE
        )

        def mntp() -> None:
            chosen = torch.rand(batch.shape, device=DEVICE) < masking(model)[0]
            labels = batch.masked_fill(~chosen, -100)
            trained(batch.masked_fill(chosen, 0), labels=labels).loss.backward()
            update()

        return mntp
    loss = HardNegativeNLLLoss(scale=20.0)

    def simcse() -> None:
        prepared = [encoder.prepare_for_tokenization(text) for text in texts]
        features = encoder.tokenize(prepared).to(DEVICE)
        views = [encoder.forward({k: v for k, v in features.items()}) for _ in range(2)]
        loss(*views).backward()
        update()

    return simcse


def older_tokenizer(model: Path, folder: Path) -> str:
    """The same checkpoint for tokenizers 0.19: merges as strings, and a token named for padding."""
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
    return str(folder)


# --- Rounds ------------------------------------------------------------------------------------


def work(kind: str, task: str, model: str, dtype: str, max_tokens: int) -> None:
    """A contender's process: a round for each line on standard input."""
    out, sys.stdout = sys.stdout, sys.stderr
    torch.manual_seed(0)
    if kind in ("ours", "bfloat16", "compiled"):
        dtype = "bfloat16" if kind == "bfloat16" else dtype
        once = ours(task, model, getattr(torch, dtype), max_tokens, kind == "compiled")
    else:
        once = {"reference": reference, "llm2vec": llm2vec}[kind](
            task, model, getattr(torch, dtype)
        )
    print("ready", file=out, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        once()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        if DEVICE == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**20
        print(json.dumps({"seconds": seconds, "peak": peak}), file=out, flush=True)


class Worker:
    """A contender's process, warmed up by one round; on a CPU 512 sentences in parts need none."""

    def __init__(self, kind: str, python: str, task: str, args: argparse.Namespace):
        command = [python, __file__, "--worker", kind, "--model", args.model, "--dtype", args.dtype]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command += ["--max-tokens", str(args.max_tokens)]
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the process)
        self.process = subprocess.Popen([*command, "--tasks", task], stderr=self.log, **pipes)
        if self.process.stdout.readline() != "ready\n":
            self.fail()
        if task != "simcse-512" or DEVICE == "cuda":
            self.round()

    def round(self) -> dict[str, float]:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        return json.loads(line) if line else self.fail()

    def fail(self) -> None:
        status = self.process.wait()
        self.log.seek(0)
        said = self.log.read().strip().splitlines()[-1:]
        raise ChildProcessError(f"status {status}, {said}")

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def compete(task: str, contenders: dict[str, str], args: argparse.Namespace) -> dict[str, dict]:
    """Medians of rounds taken in turns; a contender that fails is named and left out.

    A SimCSE step may take most of the machine's memory, so there a process lives for one turn.
    """
    rounds: dict[str, list[dict]] = {kind: [] for kind in contenders}
    workers: dict[str, Worker] = {}
    turns = list(contenders) * args.rounds
    if DEVICE == "cuda":
        turns.sort(key=list(contenders).index)
    for turn, kind in enumerate(turns):
        if kind not in rounds:
            continue
        try:
            worker = workers.pop(kind, None) or Worker(kind, contenders[kind], task, args)
            rounds[kind].append(worker.round())
            seconds = rounds[kind][-1]["seconds"]
            print(f"{task}, round {len(rounds[kind])}: {kind} {seconds:.2f} s", file=sys.stderr)
        except ChildProcessError as error:
            print(f"{task}: {kind} failed: {error}", flush=True)
            rounds.pop(kind)
            continue
        crowded = DEVICE == "cuda" or task.startswith("simcse")
        if crowded and turns[turn + 1 : turn + 2] != [kind]:
            worker.stop()
        else:
            workers[kind] = worker
    for worker in workers.values():
        worker.stop()
    results = {}
    for kind, found in rounds.items():
        seconds = [r["seconds"] for r in found]
        results[kind] = {
            "seconds": statistics.median(seconds),
            "peak": max(r["peak"] for r in found),
        }
        results[kind] |= {"least": min(seconds), "most": max(seconds)}
    return results


def agreement(task: str, model: str, kind: str) -> str:
    """Cosines of the vectors in bfloat16 with those in float32."""
    from llm2vec import LLM2Vec

    types, texts = (torch.float32, torch.bfloat16), texts_of(task)
    if kind == "ours":
        encoders = (LLM2Vec.from_pretrained(model, dtype=dtype) for dtype in types)
        exact, rounded = (torch.from_numpy(encoder.encode(texts)) for encoder in encoders)
    else:
        from sentence_transformers import SentenceTransformer

        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "encoder"
            LLM2Vec.from_pretrained(model, dtype=torch.float32).save(folder)
            exact, rounded = (
                SentenceTransformer(
                    str(folder), device=DEVICE, model_kwargs={"dtype": dtype}
                ).encode(texts, convert_to_tensor=True)
                for dtype in types
            )
    cosines = torch.cosine_similarity(exact.float(), rounded.float())
    above = (cosines > 0.999).float().mean()
    text = f"median {cosines.median():.5f}, mean {cosines.mean():.5f}, smallest {cosines.min():.3f}"
    what = f"{TASKS[task]}, {kind}, cosines of bfloat16 with float32"
    return f"{what}: {text}, above 0.999: {above:.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "data/tiny-llama"), help="folder or shape")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    default = [task for task in TASKS if task != "long" and "paper" not in task]
    parser.add_argument("--tasks", nargs="+", default=default, choices=TASKS)
    parser.add_argument("--rounds", type=int, default=5)
    text = "of this project, in one forward pass; MNTP and SimCSE go in parts where they take more"
    parser.add_argument("--max-tokens", type=int, default=8192, help=text)
    parser.add_argument("--llm2vec", metavar="PYTHON", help="Python that has llm2vec 0.2.3")
    parser.add_argument("--alone", action="store_true", help="this project alone")
    parser.add_argument("--compile", action="store_true", help="also with torch.compile")
    text = "beside float32 also bfloat16 (default: where the hardware multiplies it)"
    parser.add_argument("--bfloat16", action=argparse.BooleanOptionalAction, help=text)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.tasks[0], args.model, args.dtype, args.max_tokens)
        return
    sys.path.insert(0, str(ROOT))
    from llm2vec import has_bfloat16, load_tokenizer

    contenders = {"ours": sys.executable}
    fast = has_bfloat16(torch.device(DEVICE)) if args.bfloat16 is None else args.bfloat16
    if args.dtype == "float32" and fast:  # without the hardware for it, a round takes six times
        contenders["bfloat16"] = sys.executable
    if args.compile:
        contenders["compiled"] = sys.executable
    if args.model in SHAPES:
        tokenizer = load_tokenizer(ROOT / "data/tiny-llama")
        names = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"]
        names += ["num_attention_heads", "num_key_value_heads"]
        config = dict(zip(names, SHAPES[args.model], strict=True))
    else:
        tokenizer = load_tokenizer(args.model)
        config = json.loads((Path(args.model) / "config.json").read_text())
        if not args.alone:
            contenders["reference"] = sys.executable
        if args.llm2vec:
            contenders["llm2vec"] = args.llm2vec
    config["mask_rate"], _ = masking(args.model)
    types = {kind: "bfloat16" if kind == "bfloat16" else args.dtype for kind in contenders}
    peaks = {name: matrix_peak(getattr(torch, name)) for name in dict.fromkeys(types.values())}
    print(f"{args.model}, {DEVICE}, {torch.get_num_threads()} threads, torch {torch.__version__};")
    shown = (f"{name} {peak / 1e9:,.0f} GFLOP/s" for name, peak in peaks.items())
    print(f"matrix peak: {', '.join(shown)}; {args.rounds} rounds\n")
    columns = ["task", "contender", "seconds", "range", "times ours", "texts/s", "tokens/s"]
    print(f"| {' | '.join([*columns, 'share of peak', 'peak MiB'])} |")
    print("| --- | --- " + "| --: " * 7 + "|", flush=True)
    for task in args.tasks:
        lengths = [min(512, len(e.ids)) for e in tokenizer.encode_batch(texts_of(task))]
        if task in BLOCKS:
            count, length = BLOCKS[task]
            lengths = [length] * count
        flops = useful_flops(task, lengths, config)
        own = {k: v for k, v in contenders.items() if k not in ("reference", "llm2vec")}
        results = compete(task, own if task == "supervised-paper" else contenders, args)
        for kind, result in results.items():
            seconds = result["seconds"]
            views = 2 if task.startswith("simcse") else 1
            cells = [
                TASKS[task],
                kind,
                f"{seconds:.2f}",
                f"{result['least']:.2f} to {result['most']:.2f}",
                f"{seconds / results['ours']['seconds']:.2f}" if "ours" in results else "",
                f"{len(lengths) / seconds:,.1f}",
                f"{views * sum(lengths) / seconds:,.0f}",
                f"{flops / seconds / peaks[types[kind]]:.0%}",
                f"{result['peak']:,.0f}",
            ]
            print(f"| {' | '.join(cells)} |", flush=True)
    for task in args.tasks:
        if task in ENCODING and "bfloat16" in contenders and args.model not in SHAPES:
            for kind in ("ours", "reference"):
                if kind in contenders:
                    print(agreement(task, args.model, kind), flush=True)


if __name__ == "__main__":
    main()
