"""The three stages of LLM2Vec, from a causal checkpoint to a text encoder.

    python train.py                    all of it on the bundled tiny Llama, in minutes
    python train.py mntp ...           step 2 on your own Llama or Mistral folder
    python train.py simcse ...         step 3, on top of the adapter of step 2
    python train.py evaluate ...       score a checkpoint, with or without adapters

A stage is a function from a model and a corpus to an adapter: it freezes the weights, trains fresh
adapters on them, and writes those. The next stage merges them first. The stages differ in their
batches and their loss, and share the loop `fit`.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from data.benchmarks import STSB_TEST, masked_accuracy, sts
from data.corpus import WIKIPEDIA, cut_into_blocks, read_documents, sentences, split_documents
from llm2vec import (
    POOLING,
    LLM2Vec,
    batches_by_length,
    contrastive_loss,
    mask_tokens,
    mntp_loss,
    run,
    tokenize,
)
from lora import add_lora, merge_lora, save_adapter

TINY = Path(__file__).parent / "data" / "tiny-llama"
MASK_TOKEN = "_"  # the plain token that the paper hides others with

# --- Settings ----------------------------------------------------------------------------------


@dataclass
class Settings:
    """Everything that a stage can be told."""

    length: int  # tokens in a block (mntp), or at most in a sentence (simcse)
    batch: int  # blocks or sentences in one optimiser step
    steps: int  # optimiser steps
    lr: float  # learning rate at its peak
    warm_up: int = 0  # steps of linear warm-up before the linear decay to zero
    rank: int = 16  # of the adapters
    alpha: int = 32  # of the adapters, whose scale is alpha / rank
    dropout: float = 0.05  # on the adapters' input
    attention_dropout: float = 0.0  # on the attention weights: what makes SimCSE's views differ
    mask_rate: float | None = None  # share of tokens hidden; None: by model_type, see MASKING
    max_tokens: int = 8192  # in one forward pass, padding included; more are taken in parts
    recompute: bool = False  # keep one tensor a layer and compute the rest twice: less memory
    seed: int = 0


SETTINGS = {
    "mntp": {
        "paper": Settings(length=512, batch=32, steps=1000, lr=5e-5, recompute=True),
        "tiny": Settings(length=128, batch=16, steps=150, lr=2e-3, warm_up=10),
    },
    "simcse": {
        "paper": Settings(
            length=128, batch=128, steps=1000, lr=3e-5, attention_dropout=0.3, recompute=True
        ),
        "tiny": Settings(
            length=64, batch=64, steps=100, lr=1e-3, warm_up=10, attention_dropout=0.3
        ),
    },
}

# Share of tokens to hide; of those, the share that becomes the mask token and a random one.
MASKING = {"llama": (0.2, (0.8, 0.1)), "mistral": (0.8, (1.0, 0.0))}


# --- The loop ----------------------------------------------------------------------------------

# One optimiser step's gradients: takes a batch, leaves gradients, returns its loss and tokens.
Backward = Callable[[object], tuple[float, int]]


def fit(
    model: LLM2Vec, batches: Iterator, backward: Backward, settings: Settings, folder: Path
) -> None:
    """Train fresh adapters on a frozen model, write them to `folder`, and merge them.

    AdamW without weight decay, linear warm-up and decay, gradients clipped to norm 1. The log is
    `folder`/log.jsonl and, shorter, standard output.
    """
    torch.manual_seed(settings.seed)
    decoder = model.decoder.train()
    parameters = add_lora(decoder, settings.rank, settings.alpha, settings.dropout)
    decoder.config.attention_dropout = settings.attention_dropout
    decoder.recompute = settings.recompute
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda done: min(
            (done + 1) / max(1, settings.warm_up),
            (settings.steps - done) / max(1, settings.steps - settings.warm_up),
        ),
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.json").write_text(json.dumps(asdict(settings), indent=2) + "\n")
    with Log(folder / "log.jsonl", settings.steps) as log:
        for step in range(1, settings.steps + 1):
            loss, tokens = backward(next(batches))
            if not loss < float("inf"):
                raise ValueError(f"step {step}: the loss is {loss}; try a lower --lr")
            nn.utils.clip_grad_norm_(parameters, 1.0)
            lr = schedule.get_last_lr()[0]
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            log(step, loss, lr, tokens)
    decoder.config.attention_dropout = 0.0
    decoder.recompute = False
    decoder.eval()
    save_adapter(decoder, folder)
    merge_lora(decoder)


class Log:
    """Loss (mean since the last line), learning rate, pace and time left, some hundred times."""

    def __init__(self, file: Path, steps: int):
        self.file, self.steps = file.open("w"), steps
        self.start = self.shown = self.last = time.monotonic()
        self.losses, self.tokens = [], 0

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_) -> None:
        self.file.close()
        if sys.stdout.isatty():
            print()

    def __call__(self, step: int, loss: float, lr: float, tokens: int) -> None:
        self.losses.append(loss)
        self.tokens += tokens
        if step % max(1, self.steps // 100) and step < self.steps:
            return
        now = time.monotonic()
        line = {
            "step": step,
            "steps": self.steps,
            "loss": sum(self.losses) / len(self.losses),
            "lr": lr,
            "tokens_per_second": self.tokens / max(now - self.last, 1e-9),
            "seconds_left": (now - self.start) / step * (self.steps - step),
        }
        print(json.dumps(line), file=self.file, flush=True)
        self.losses, self.tokens, self.last = [], 0, now
        minutes, seconds = divmod(round(line["seconds_left"]), 60)
        text = (
            f"step {step:4d} of {self.steps}  loss {line['loss']:.3f}  lr {lr:.1e}  "
            f"{line['tokens_per_second']:,.0f} tokens/s  {minutes}:{seconds:02d} left"
        )
        if sys.stdout.isatty():
            print(f"\r{text:<78}", end="", flush=True)
        elif now - self.shown > 15 or step == self.steps:
            print(text, flush=True)
            self.shown = now


def shuffled(items: Sequence, batch: int, seed: int) -> Iterator[list]:
    """Batches without end: every item once in a new order, then again. Short ones are skipped."""
    batch = min(batch, len(items))
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(items), generator=generator).tolist()
        for i in range(0, len(items) - batch + 1, batch):
            yield [items[j] for j in order[i : i + batch]]


# --- Step 2: masked next-token prediction ------------------------------------------------------


def mask_id_of(model: LLM2Vec) -> int:
    mask_id = model.tokenizer.token_to_id(MASK_TOKEN)
    if mask_id is None:
        raise ValueError(f"the mask token {MASK_TOKEN!r} is not in the tokenizer's vocabulary")
    return mask_id


def train_mntp(model: LLM2Vec, documents: Sequence[str], settings: Settings, folder: Path) -> None:
    """Teach a model, now bidirectional, to use what it sees: adapters, trained and merged."""
    mask_id, V = mask_id_of(model), model.decoder.config.vocab_size
    rate, fate = MASKING[model.decoder.config.model_type]
    rate = settings.mask_rate or rate
    device = model.decoder.embed_tokens.weight.device
    added = model.tokenizer.get_added_tokens_decoder()
    special = torch.tensor([i for i, token in added.items() if token.special] or [-1])
    generator = torch.Generator().manual_seed(settings.seed)

    order = torch.randperm(len(documents), generator=generator).tolist()
    chunks = (order[i : i + 256] for i in range(0, len(order), 256))
    rows = (e.ids for c in chunks for e in model.tokenizer.encode_batch([documents[i] for i in c]))
    blocks = cut_into_blocks(rows, settings.length, limit=settings.steps * settings.batch)

    def backward(batch: list[Tensor]) -> tuple[float, int]:
        ids = torch.stack(batch)
        maskable = ~torch.isin(ids, special)
        masked, chosen = mask_tokens(ids, mask_id, V, rate, fate, maskable, generator)
        total, loss = int(chosen.sum()), 0.0
        n = max(1, settings.max_tokens // settings.length)
        for part in zip(masked.split(n), ids.split(n), chosen.split(n), strict=True):
            part_loss = mntp_loss(model.decoder, *(t.to(device) for t in part), total=total)
            part_loss.backward()
            loss += part_loss.item()
        return loss, ids.numel()

    fit(model, shuffled(blocks, settings.batch, settings.seed), backward, settings, folder)


# --- Step 3: SimCSE ----------------------------------------------------------------------------


def train_simcse(
    model: LLM2Vec, documents: Sequence[str], settings: Settings, folder: Path
) -> None:
    """Teach a model that a sentence is like itself and unlike others: adapters, trained, merged."""
    texts = list(dict.fromkeys(s for document in documents for s in sentences(document)))
    if len(texts) < 2:
        raise ValueError("the corpus has fewer than two different sentences: nothing to contrast")

    def backward(batch: list[str]) -> tuple[float, int]:
        rows = tokenize(model.tokenizer, batch, settings.length)
        loss = contrast(model, rows, settings.max_tokens)
        return loss, 2 * sum(len(ids) for ids, _ in rows)

    fit(model, shuffled(texts, settings.batch, settings.seed), backward, settings, folder)


def contrast(model: LLM2Vec, rows: Sequence, max_tokens: int) -> float:
    """Loss and gradients of a contrastive batch whose positives are the rows themselves.

    A batch that does not fit into one forward pass still has all its sentences as negatives, with
    exact gradients (GradCache, Gao et al. 2021, arXiv 2101.06983): encode it in parts without
    keeping activations; take the loss's gradient with respect to the vectors; encode each part
    again, with the same dropout, and pass its vectors' gradient on.
    """
    parts = list(batches_by_length([len(ids) for ids, _ in rows], max_tokens // 2))

    def two_views(part: list[int]) -> Tensor:  # (2, n, d): dropout makes them differ
        once = [rows[i] for i in part]
        return model.embed([*once, *once]).unflatten(0, (2, len(once)))

    if len(parts) == 1:
        loss = contrastive_loss(*two_views(parts[0]))
        loss.backward()
        return loss.item()
    states, views = [], []
    with torch.no_grad():
        for part in parts:
            states.append(random_state())
            views.append(two_views(part))
    joined = torch.cat(views, dim=1).requires_grad_()
    loss = contrastive_loss(*joined)
    loss.backward()
    after = random_state()
    for part, state, gradient in zip(
        parts, states, joined.grad.split([len(p) for p in parts], dim=1), strict=True
    ):
        random_state(state)
        two_views(part).backward(gradient)
    random_state(after)
    return loss.item()


def random_state(new: list[Tensor] | None = None) -> list[Tensor]:
    """The state of torch's generators, CPU and GPU; with `new`, set it first."""
    if new is not None:
        torch.set_rng_state(new[0])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state(new[1])
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] * torch.cuda.is_available())


STAGES = {"mntp": train_mntp, "simcse": train_simcse}


# --- Scores ------------------------------------------------------------------------------------


def evaluate(model: LLM2Vec, held_out: Sequence[str], sts_file: str | Path = STSB_TEST) -> dict:
    """STS, alignment and uniformity; masked-token accuracy on blocks of held-out documents."""
    scores = sts(model, sts_file)
    rows = (e.ids for e in model.tokenizer.encode_batch(list(held_out)))
    blocks = cut_into_blocks(rows, length=128, limit=256)
    scores["masked_accuracy"] = masked_accuracy(model, blocks, mask_id_of(model))
    return scores


COLUMNS = {
    "spearman": "STS Spearman",
    "masked_accuracy": "masked-token accuracy",
    "alignment": "alignment",
    "uniformity": "uniformity",
    "seconds": "seconds",
}


def table(rows: dict[str, dict]) -> str:
    """Rows of scores as a Markdown table, which is as readable in a terminal."""
    lines = [f"| {'':30} | " + " | ".join(COLUMNS.values()) + " |"]
    lines.append(
        f"| {'-' * 30} | " + " | ".join("-" * (len(c) - 1) + ":" for c in COLUMNS.values()) + " |"
    )
    for name, scores in rows.items():
        cells = [
            f"{scores[key]:{len(title)}.{0 if key == 'seconds' else 3}f}"
            for key, title in COLUMNS.items()
        ]
        lines.append(f"| {name:30} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# --- Commands ----------------------------------------------------------------------------------


def run_everything(args: argparse.Namespace) -> None:
    """The whole method on the bundled tiny Llama, scored before and after each step."""
    documents, held_out = split_documents(read_documents(WIKIPEDIA))
    model = LLM2Vec.from_pretrained(TINY, is_causal=True)
    rows, start = {}, time.monotonic()

    def score(name: str) -> None:
        nonlocal start
        rows[name] = evaluate(model, held_out)
        rows[name]["seconds"], start = time.monotonic() - start, time.monotonic()

    score("causal")
    model.decoder.config.is_causal = False  # step 1
    score("bidirectional (no training)")
    for stage, title in {"mntp": "+ MNTP", "simcse": "+ SimCSE"}.items():
        settings = SETTINGS[stage]["tiny"]
        if args.steps:
            settings = replace(settings, steps=args.steps)
        print(
            f"{title}: {settings.steps} steps of {settings.batch} x {settings.length}", flush=True
        )
        STAGES[stage](model, documents, settings, Path(args.output) / stage)
        score(title)
    encoder = Path(args.output) / "encoder"
    model.save(encoder)
    (Path(args.output) / "results.json").write_text(json.dumps(rows, indent=2) + "\n")
    print(f"\n{table(rows)}\n")
    print_next(encoder)


def print_next(encoder: Path) -> None:
    print("The encoder is an ordinary checkpoint folder. Try it on your own sentences:")
    example = '"A man plays a guitar." "Someone makes music." "Stocks fell sharply."'
    print(f"  python llm2vec.py similar --model {encoder} {example}")
    print(f"  python llm2vec.py encode --model {encoder} --input texts.txt --output vectors.npy")


def run_stage(args: argparse.Namespace) -> None:
    given = {k: v for k, v in vars(args).items() if v is not None}
    settings = SETTINGS[args.command][args.preset]
    settings = replace(
        settings, **{f.name: given[f.name] for f in fields(Settings) if f.name in given}
    )
    documents, _ = split_documents(read_documents(args.corpus))
    model = LLM2Vec.from_pretrained(args.model, args.adapters)
    STAGES[args.command](model, documents, settings, Path(args.output))
    print(f"The adapter is in {args.output}")
    if args.command == "simcse":
        model.save(Path(args.output) / "encoder")
        print_next(Path(args.output) / "encoder")


def run_evaluate(args: argparse.Namespace) -> None:
    model = LLM2Vec.from_pretrained(args.model, args.adapters, args.pooling, is_causal=args.causal)
    _, held_out = split_documents(read_documents(args.corpus))
    start = time.monotonic()
    scores = evaluate(model, held_out, args.sts)
    scores["seconds"] = time.monotonic() - start
    print(table({Path(args.model).name: scores}))
    print(json.dumps(scores))


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python train.py",
        description="Turn a causal language model into a text encoder. Without a command: all "
        "three steps on the bundled tiny Llama, in minutes.",
    )
    top.set_defaults(run=run_everything)
    top.add_argument("--output", default="runs/tiny", help="run folder (default: %(default)s)")
    top.add_argument("--steps", type=positive, help="steps of each stage (default: its settings)")
    commands = top.add_subparsers(dest="command", title="commands", metavar="")
    for name, about in COMMANDS.items():
        command = commands.add_parser(name, help=about, description=about)
        add = command.add_argument
        add("--model", required=True, help="Llama or Mistral checkpoint folder")
        add("--adapters", nargs="*", default=[], help="adapter folders to merge first, in order")
        add("--corpus", default=WIKIPEDIA, help="text, a document a line, or .jsonl with `text`")
        if name == "evaluate":
            command.set_defaults(run=run_evaluate)
            add("--sts", default=STSB_TEST, help="score<TAB>a<TAB>b lines (default: STS-B test)")
            add("--pooling", default="mean", choices=POOLING, help="(default: %(default)s)")
            add("--causal", action="store_true", help="leave out step 1: attend to the left only")
            continue
        command.set_defaults(run=run_stage)
        add("--output", required=True, help="run folder: adapter, log, settings")
        add("--preset", default="paper", choices=SETTINGS[name], help="(default: %(default)s)")
        for field in fields(Settings):
            if field.name in FLAGS and (field.name != "mask_rate" or name == "mntp"):
                presets = [f"{p}: {getattr(s, field.name)}" for p, s in SETTINGS[name].items()]
                flag, text = "--" + field.name.replace("_", "-"), FLAGS[field.name]
                kind = positive if field.type is int else fraction
                add(flag, type=kind, metavar="N", help=f"{text} ({', '.join(presets)})")
    return top


COMMANDS = {
    "mntp": "Step 2: masked next-token prediction, on a model or on top of adapters.",
    "simcse": "Step 3: unsupervised contrastive learning; writes the encoder too.",
    "evaluate": "Score a checkpoint on STS and on masked tokens of held-out text.",
}
FLAGS = {
    "length": "tokens in a block or sentence",
    "batch": "blocks or sentences a step",
    "steps": "optimiser steps",
    "lr": "peak learning rate",
    "rank": "of the adapters",
    "mask_rate": "share of tokens hidden; by default llama 0.2, mistral 0.8",
    "max_tokens": "in one forward pass: lower it to save memory",
}


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and at most 1")
    return value


if __name__ == "__main__":
    run(lambda: (args := parser().parse_args()).run(args))
