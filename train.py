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
import contextlib
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as save_bytes
from torch import Tensor, nn

from data.benchmarks import STSB_TEST, masked_accuracy, sts
from data.corpus import WIKIPEDIA, cut_into_blocks, read_documents, sentences, split_documents
from llm2vec import (
    FAMILIES,
    POOLING,
    Decoder,
    LLM2Vec,
    batches_by_length,
    contrastive_loss,
    mask_tokens,
    mntp_loss,
    read_json,
    run,
    tokenize,
)
from lora import add_lora, load_adapter, merge_lora, save_adapter

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
    save_every: int = 50  # steps between two saved states
    seed: int = 0


SETTINGS = {
    "mntp": {
        "paper": Settings(length=512, batch=32, steps=1000, lr=5e-5, recompute=True),
        "tiny": Settings(length=64, batch=16, steps=120, lr=2e-3, warm_up=10),
    },
    "simcse": {
        "paper": Settings(
            length=128, batch=128, steps=1000, lr=3e-5, attention_dropout=0.3, recompute=True
        ),
        # So small a model solves the paper's task at once: hence more dropout and a higher rate.
        "tiny": Settings(length=24, batch=64, steps=40, lr=5e-3, warm_up=10, attention_dropout=0.6),
    },
}

# Share of tokens to hide; of those, the share that becomes the mask token and a random one.
MASKING = dict.fromkeys(FAMILIES, (0.2, (0.8, 0.1))) | {"mistral": (0.8, (1.0, 0.0))}


# --- The loop ----------------------------------------------------------------------------------

# One optimiser step's gradients: takes a batch, leaves gradients, returns its loss and tokens.
Backward = Callable[[list], tuple[float, int]]


def fit(
    model: LLM2Vec, items: Sequence, backward: Backward, settings: Settings, folder: Path
) -> None:
    """Train fresh adapters on a frozen model, write them to `folder`, and merge them.

    AdamW without weight decay, linear warm-up and decay, gradients clipped to norm 1. Everything
    random in a step follows from the seed and the step's number, so a run that was stopped goes on
    from its newest state and ends with the same bits as one that was not.
    """
    decoder = model.decoder
    if not open_run(
        folder, asdict(settings) | {"data": digest(items), "model": digest_of(decoder)}
    ):
        load_adapter(decoder, folder)  # this stage was finished before
        merge_lora(decoder)
        return
    torch.manual_seed(settings.seed)
    parameters = add_lora(decoder.train(), settings.rank, settings.alpha, settings.dropout)
    decoder.config.attention_dropout = settings.attention_dropout
    decoder.recompute = settings.recompute
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.0)
    done = load_state(folder, parameters, optimizer)
    with Log(folder / "log.jsonl", settings.steps, done) as log, stop_signals() as stop:
        for step in range(done, settings.steps):
            torch.manual_seed(settings.seed + 1_000_003 * (step + 1))
            loss, tokens = backward(batch_at(step, items, settings.batch, settings.seed))
            norm = nn.utils.clip_grad_norm_(parameters, 1.0)
            if not math.isfinite(loss + norm.item()):
                save_state(folder, step, parameters, optimizer)
                what = f"the loss is {loss} and the gradient's norm {norm.item()}"
                raise ValueError(f"step {step + 1}: {what}; the state before it is in {folder}")
            lr = learning_rate(step, settings)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
            log(step + 1, loss, lr, tokens)
            if stop or (step + 1) % settings.save_every == 0:
                save_state(folder, step + 1, parameters, optimizer)
            if stop:
                print(f"\nstopped after step {step + 1}; the same command goes on from there")
                sys.exit(128 + stop[0])
    decoder.config.attention_dropout = 0.0
    decoder.recompute = False
    decoder.eval()
    save_adapter(decoder, folder)
    for state in folder.glob("state-*.safetensors"):
        state.unlink()
    merge_lora(decoder)


def learning_rate(step: int, settings: Settings) -> float:
    """Linear from 0 to `lr` in warm_up steps, then linear to 0 at the end; step counts from 0."""
    rise = (step + 1) / max(1, settings.warm_up)
    fall = (settings.steps - step) / max(1, settings.steps - settings.warm_up)
    return settings.lr * min(rise, fall)


def batch_at(step: int, items: Sequence, size: int, seed: int) -> list:
    """Batch number `step`: every item once an epoch, in an order that seed and epoch give."""
    size = min(size, len(items))
    epoch, place = divmod(step, len(items) // size)
    generator = torch.Generator().manual_seed(seed + 1_000_003 * epoch)
    order = torch.randperm(len(items), generator=generator)
    return [items[i] for i in order[place * size : (place + 1) * size].tolist()]


# --- The run folder: what a stage leaves, and goes on from --------------------------------------
# settings.json, log.jsonl, the newest two states while it runs, the adapter when it is done.


def open_run(folder: Path, identity: dict) -> bool:
    """Make or check a run folder; False if its stage is finished already.

    Raises ValueError if the folder holds something else, or a run with other settings or data.
    """
    file = folder / "settings.json"
    if not file.exists():
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(
                f"{folder}: is not empty and not a run folder; choose another --output"
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(file, (json.dumps(identity, indent=2) + "\n").encode())
    before = read_json(file)
    changes_nothing = ("max_tokens", "recompute", "save_every")  # but memory and time
    for key in (key for key in identity if key not in changes_nothing):
        if before.get(key) != identity[key]:
            change = f"{key} was {before.get(key)!r} and is {identity[key]!r}"
            raise ValueError(
                f"{folder}: a run with other settings, {change}; --overwrite restarts it"
            )
    return not (folder / "adapter_config.json").exists()


def save_state(
    folder: Path, step: int, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Write adapters and Adam's moments after `step` steps; keep this state and the one before."""
    tensors = {f"{i}.weight": p.detach() for i, p in enumerate(parameters)}
    for i, p in enumerate(parameters):
        tensors |= {f"{i}.{name}": value for name, value in optimizer.state[p].items()}
    write_whole(folder / f"state-{step:08d}.safetensors", save_bytes(tensors))
    for old in sorted(folder.glob("state-*.safetensors"))[:-2]:
        old.unlink()


@torch.no_grad()
def load_state(
    folder: Path, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer
) -> int:
    """Go back to the newest whole state; returns the number of steps done, 0 without a state."""
    for file in sorted(folder.glob("state-*.safetensors"), reverse=True):
        try:
            tensors = load_file(file)
        except SafetensorError:
            continue
        for i, p in enumerate(parameters):
            own = {k.partition(".")[2]: v for k, v in tensors.items() if k.startswith(f"{i}.")}
            p.copy_(own.pop("weight"))
            if own:
                optimizer.state[p] = {
                    k: v if k == "step" else v.to(p.device) for k, v in own.items()
                }
        return int(file.stem.removeprefix("state-"))
    return 0


def write_whole(file: Path, content: bytes) -> None:
    """Write a file so that its name never stands for a part of it, whatever stops the process."""
    part = file.with_name(file.name + ".part")
    with part.open("wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())
    os.replace(part, file)


def digest(items: Sequence) -> str:
    """A short fingerprint of training data, texts or blocks of tokens."""
    sha = hashlib.sha256()
    for item in items:
        sha.update(item.encode() if isinstance(item, str) else item.numpy().tobytes())
    return sha.hexdigest()[:16]


def digest_of(decoder: Decoder) -> str:
    """A short fingerprint of a model: of the first numbers of every weight."""
    firsts = [p.detach().flatten()[:256].float().cpu() for p in decoder.parameters()]
    return digest([torch.cat(firsts)])


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that SIGINT and SIGTERM are added to, instead of ending the process in mid-step."""
    received: list[int] = []
    before = {s: signal.signal(s, lambda s, _: received.append(s)) for s in (2, 15)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Log:
    """Loss (mean since the last line), learning rate, pace and time left, some hundred times.

    As JSON lines in `file`, which starts again after step `done`, and as text on standard output:
    in place on a terminal, a line now and then elsewhere.
    """

    def __init__(self, file: Path, steps: int, done: int):
        kept = file.read_text().splitlines() if file.exists() else []
        kept = [line for line in kept if json.loads(line)["step"] <= done]
        self.file, self.steps, self.first = file.open("w"), steps, done
        print(*kept, sep="\n", end="\n" * bool(kept), file=self.file)
        self.before = json.loads(kept[-1])["seconds"] if kept else 0.0
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
            "seconds": self.before + now - self.start,
            "seconds_left": (now - self.start) / (step - self.first) * (self.steps - step),
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

    # Only as many documents are tokenised as the run will read, in random order.
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(len(documents), generator=generator).tolist()
    chunks = (order[i : i + 256] for i in range(0, len(order), 256))
    rows = (e.ids for c in chunks for e in model.tokenizer.encode_batch([documents[i] for i in c]))
    blocks = cut_into_blocks(rows, settings.length, limit=settings.steps * settings.batch)

    def backward(batch: list[Tensor]) -> tuple[float, int]:
        ids = torch.stack(batch)
        maskable = ~torch.isin(ids, special)
        masked, chosen = mask_tokens(ids, mask_id, V, rate, fate, maskable)
        total, loss = int(chosen.sum()), 0.0
        n = max(1, settings.max_tokens // settings.length)
        for part in zip(masked.split(n), ids.split(n), chosen.split(n), strict=True):
            part_loss = mntp_loss(model.decoder, *(t.to(device) for t in part), total=total)
            part_loss.backward()
            loss += part_loss.item()
        return loss, ids.numel()

    fit(model, blocks, backward, settings, folder)


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

    fit(model, texts, backward, settings, folder)


def contrast(model: LLM2Vec, rows: Sequence, max_tokens: int) -> float:
    """Loss and gradients of a contrastive batch whose positives are the rows themselves.

    A batch that does not fit into one forward pass still has all its sentences as negatives, with
    exact gradients (GradCache, Gao et al. 2021, arXiv 2101.06983): encode it in parts without
    keeping activations; take the loss's gradient with respect to the vectors; encode each part
    again, with the same dropout, and pass its vectors' gradient on.
    """
    parts = list(batches_by_length([len(ids) for ids, _ in rows], max_tokens // 2))
    seeds = torch.randint(2**62, (len(parts),)).tolist()

    def two_views(part: list[int], seed: int) -> Tensor:  # (2, n, d): dropout makes them differ
        torch.manual_seed(seed)
        once = [rows[i] for i in part]
        return model.embed([*once, *once]).unflatten(0, (2, len(once)))

    if len(parts) == 1:
        loss = contrastive_loss(*two_views(parts[0], seeds[0]))
        loss.backward()
        return loss.item()
    with torch.no_grad():
        vectors = [two_views(part, seed) for part, seed in zip(parts, seeds, strict=True)]
    joined = torch.cat(vectors, dim=1).requires_grad_()
    loss = contrastive_loss(*joined)
    loss.backward()
    gradients = joined.grad.split([len(part) for part in parts], dim=1)
    for part, seed, gradient in zip(parts, seeds, gradients, strict=True):
        two_views(part, seed).backward(gradient)
    return loss.item()


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
    output = Path(args.output)
    documents, held_out = split_documents(read_documents(WIKIPEDIA))
    model = LLM2Vec.from_pretrained(TINY, is_causal=True)
    rows = {}

    def score(name: str, training: float = 0.0) -> None:
        start = time.monotonic()
        rows[name] = evaluate(model, held_out)
        rows[name]["seconds"] = training + time.monotonic() - start

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
        clear(output / stage, args.overwrite)
        STAGES[stage](model, documents, settings, output / stage)
        last_line = (output / stage / "log.jsonl").read_text().splitlines()[-1]
        score(title, json.loads(last_line)["seconds"])
    model.save(output / "encoder")
    write_whole(output / "results.json", (json.dumps(rows, indent=2) + "\n").encode())
    print(f"\n{table(rows)}\n")
    print_next(output / "encoder")


def clear(folder: Path, overwrite: bool) -> None:
    """With --overwrite, remove a run folder, and never any other."""
    if overwrite and (folder / "settings.json").exists():
        shutil.rmtree(folder)


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
    clear(Path(args.output), args.overwrite)
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
    again = {"action": "store_true", "help": "start anew instead of going on"}
    top.add_argument("--overwrite", **again)
    commands = top.add_subparsers(dest="command", title="commands", metavar="COMMAND")
    for name, about in COMMANDS.items():
        command = commands.add_parser(name, help=about, description=about)
        add = command.add_argument
        add("--model", required=True, help="checkpoint folder")
        add("--adapters", nargs="*", default=[], help="adapter folders to merge first, in order")
        text = "text, a document a line, or .jsonl with `text` (default: the bundled Wikipedia)"
        add("--corpus", default=WIKIPEDIA, help=text)
        if name == "evaluate":
            command.set_defaults(run=run_evaluate)
            add("--sts", default=STSB_TEST, help="score<TAB>a<TAB>b lines (default: STS-B test)")
            add("--pooling", default="mean", choices=POOLING, help="(default: %(default)s)")
            add("--causal", action="store_true", help="leave out step 1: attend to the left only")
            continue
        command.set_defaults(run=run_stage)
        add("--output", required=True, help="run folder; a run that is there goes on")
        add("--overwrite", **again)
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
