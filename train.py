"""The three stages of LLM2Vec, from a causal checkpoint to a text encoder.

    python train.py                    all of it on the bundled tiny Llama, in minutes
    python train.py mntp ...           step 2 on your own Llama or Mistral folder
    python train.py simcse ...         step 3, on top of the adapter of step 2
    python train.py supervised ...     the fourth stage, for those who have pairs
    python train.py evaluate ...       score a checkpoint, with or without adapters
    python train.py inspect ...        see what looking both ways changes, layer by layer
    python train.py plot RUN           see how a run went

A stage is a function from a model and a corpus to an adapter: it freezes the weights, trains fresh
adapters on them, and writes those. The next stage merges them first. The stages differ in their
batches and their loss, and share the loop `fit`.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

# Batches differ in length: memory in pieces that can be joined again loses less to gaps. Torch
# reads this once, when it is imported.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as save_bytes
from torch import Tensor, nn

from data.benchmarks import (
    BASELINES,
    EWT,
    STS_FILES,
    STSB_TEST,
    WNUT,
    articles,
    masked_accuracy,
    sts,
    words,
)
from data.corpus import WIKIPEDIA, cut_into_blocks, read_documents, sentences, split_documents
from data.figures import curves_svg, heat_map, heat_map_svg, layer_cosines, read_log
from data.pairs import PAIRS, read_pairs
from llm2vec import (
    FAMILIES,
    POOLING,
    RANK,
    RANKS,
    TEMPLATES,
    Decoder,
    LLM2Vec,
    add_device,
    batches_by_length,
    compile_layers,
    contrastive_loss,
    default_device,
    has_bfloat16,
    is_out_of_memory,
    mask_tokens,
    mntp_loss,
    processes,
    read_json,
    run,
    tokenize,
)
from lora import (
    add_lora,
    is_quantized,
    load_adapter,
    merge_lora,
    quantize_nf4,
    save_adapter,
    write_whole,
)

TINY = Path(__file__).parent / "data" / "tiny-llama"
MASK_TOKEN = "_"  # the plain token that the paper hides others with

# --- Settings ----------------------------------------------------------------------------------


@dataclass
class Settings:
    """Everything that a stage can be told."""

    length: int  # tokens in a block (mntp), or at most in a text (simcse, supervised)
    batch: int  # blocks, sentences or pairs in one optimiser step
    steps: int  # optimiser steps
    lr: float  # learning rate at its peak
    warm_up: int = 0  # steps of linear warm-up before the linear decay to zero, see with_steps
    rank: int = 16  # of the adapters
    alpha: int = 32  # of the adapters, whose scale is alpha / rank
    dropout: float = 0.05  # on the adapters' input
    attention_dropout: float = 0.0  # on the attention weights: what makes SimCSE's views differ
    mask_rate: float | None = None  # share of tokens hidden; None: by model_type, see MASKING
    max_tokens: int = 8192  # in one forward pass, padding included; more are taken in parts
    recompute: int = 0  # layers computed twice, to save memory
    save_every: int = 50  # steps between two saved states
    seed: int = 0


SETTINGS = {
    "mntp": {
        "paper": Settings(length=512, batch=32, steps=1000, lr=5e-5),
        "tiny": Settings(length=64, batch=16, steps=120, lr=2e-3, warm_up=10),
        "laptop": Settings(length=128, batch=8, steps=250, lr=2e-3, warm_up=20, dropout=0.0),
    },
    "simcse": {
        "paper": Settings(length=128, batch=128, steps=1000, lr=3e-5, attention_dropout=0.3),
        # So small a model solves the paper's task at once: hence more dropout and a higher rate.
        "tiny": Settings(length=24, batch=64, steps=40, lr=5e-3, warm_up=10, attention_dropout=0.6),
        "laptop": Settings(
            length=32, batch=32, steps=80, lr=1e-3, warm_up=8, attention_dropout=0.3, dropout=0.0
        ),
    },
    "supervised": {
        "paper": Settings(length=512, batch=512, steps=1000, lr=2e-4, warm_up=300),
        "tiny": Settings(length=64, batch=32, steps=60, lr=2e-3, warm_up=10),
        "laptop": Settings(length=64, batch=32, steps=40, lr=5e-4, warm_up=5, dropout=0.0),
    },
}

# Share of tokens to hide; of those, the share that becomes the mask token and a random one.
MASKING = dict.fromkeys(FAMILIES, (0.2, (0.8, 0.1))) | {"mistral": (0.8, (1.0, 0.0))}


# --- The loop ----------------------------------------------------------------------------------

# One optimiser step's gradients: takes a batch, leaves gradients, returns its loss and tokens.
Backward = Callable[[list], tuple[float, int]]


def fit(
    model: LLM2Vec,
    datasets: Sequence[Sequence],
    backward: Backward,
    settings: Settings,
    folder: Path,
) -> None:
    """Train fresh adapters on a frozen model, write them to `folder`, and merge them.

    A 4-bit model's stay unmerged.

    AdamW without weight decay, linear warm-up and decay, gradients clipped to norm 1. Everything
    random in a step follows from the seed and the step's number, so a run that was stopped goes on
    from its newest state and ends with the same bits as one that was not. `backward` leaves this
    process's part of the gradients; see "Many processes" below.
    """
    decoder = model.decoder
    identity = asdict(settings) | {
        "data": digest(itertools.chain(*datasets)),
        "quantize": "nf4" if is_quantized(decoder) else None,
        "model": digest_of(decoder),
        "dtype": str(decoder.norm.weight.dtype),
        "tokenizer": digest([model.tokenizer.to_str()]),
        "processes": RANKS,
    }
    merge = (lambda _: None) if is_quantized(decoder) else merge_lora
    if not on_rank_0_first(lambda: open_run(folder, identity)):
        load_adapter(decoder, folder)  # this stage was finished before
        merge(decoder)
        return
    torch.manual_seed(settings.seed)
    parameters = add_lora(decoder.train(), settings.rank, settings.alpha, settings.dropout)
    decoder.config.attention_dropout = settings.attention_dropout
    decoder.recompute = min(settings.recompute, len(decoder.layers))
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.0, fused=True)
    done = load_state(folder, parameters, optimizer)

    def where(step: int) -> str:
        epoch, place = divmod(step, len(slots_of(datasets, settings.batch)))
        return f"step {step + 1} (batch {place + 1} of epoch {epoch + 1})"

    with Log(folder / "log.jsonl", settings.steps, done) as log, stop_signals() as stop:
        for step in range(done, settings.steps):
            batch = batch_at(step, datasets, settings.batch, settings.seed)

            def gradients(step: int = step, batch: list = batch) -> tuple[float, int]:
                torch.manual_seed(settings.seed + 1_000_003 * (step + 1))
                return backward(batch)

            try:
                loss, tokens = within_memory(decoder, gradients)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                optimizer.zero_grad()
                save_state(folder, step, parameters, optimizer)
                what = f"--max-tokens ({settings.max_tokens}) or --length ({settings.length})"
                raise ValueError(f"{where(step)}: out of memory; lower {what}: {error}") from None
            loss, stopping = add_up(parameters, loss, bool(stop))
            norm = nn.utils.clip_grad_norm_(parameters, 1.0)
            if not math.isfinite(loss + norm.item()):
                save_state(folder, step, parameters, optimizer)
                what = f"the loss is {loss} and the gradient's norm {norm.item()}"
                raise ValueError(f"{where(step)}: {what}; the state before it is in {folder}")
            lr = learning_rate(step, settings)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
            log(step + 1, loss, lr, tokens)
            if stopping or (step + 1) % settings.save_every == 0:
                save_state(folder, step + 1, parameters, optimizer)
            if stopping:
                say(f"\nstopped after step {step + 1}; the same command goes on from there")
                sys.exit(128 + (stop or [signal.SIGTERM])[0])
    decoder.config.attention_dropout = 0.0
    decoder.recompute = 0
    decoder.train(False)
    on_rank_0_first(lambda: finish(decoder, folder) if RANK == 0 else None)
    merge(decoder)


def within_memory(decoder: Decoder, gradients: Callable[[], tuple[float, int]]) -> tuple:
    """What `gradients` returns, where need be after more layers are computed twice.

    A GPU that is short of memory says so, and each time an eighth of the layers is added. All that
    is random in a step follows from its number, so it comes to the bits of a run that began so.
    """
    layers, before = len(decoder.layers), decoder.recompute
    while True:
        try:
            result = gradients()
            break
        except torch.OutOfMemoryError:
            if RANKS > 1 or decoder.recompute >= layers:  # other processes would wait
                raise
        decoder.zero_grad()
        torch.cuda.empty_cache()
        decoder.recompute = min(layers, decoder.recompute + math.ceil(layers / 8))
    if decoder.recompute > before:
        n = decoder.recompute
        say(
            f"memory is short: from here on {n} of {layers} layers are computed twice, as with "
            f"--recompute {n}"
        )
    return result


def finish(decoder: Decoder, folder: Path) -> None:
    save_adapter(decoder, folder)
    for state in folder.glob("state-*.safetensors"):
        state.unlink()


def with_steps(settings: Settings, steps: int) -> Settings:
    """The same settings for another number of steps; the warm-up keeps its share of them."""
    return replace(settings, steps=steps, warm_up=settings.warm_up * steps // settings.steps)


def learning_rate(step: int, settings: Settings) -> float:
    """Linear from 0 to `lr` in warm_up steps, then linear to 0 at the end; step counts from 0."""
    rise = (step + 1) / max(1, settings.warm_up)
    fall = (settings.steps - step) / max(1, settings.steps - settings.warm_up)
    return settings.lr * min(rise, fall)


def batch_at(step: int, datasets: Sequence[Sequence], size: int, seed: int) -> list:
    """Batch number `step`, from one dataset: every item once an epoch, as seed and epoch order it.

    What is left of a dataset when it is cut into batches waits for another epoch's order. A dataset
    smaller than a batch is one.
    """
    slots = slots_of(datasets, size)
    epoch, place = divmod(step, len(slots))
    generator = torch.Generator().manual_seed(seed + 1_000_003 * epoch)
    orders = [torch.randperm(len(items), generator=generator) for items in datasets]
    if len(datasets) > 1:  # their batches take turns at random
        place = int(torch.randperm(len(slots), generator=generator)[place])
    d, first, last = slots[place]
    return [datasets[d][i] for i in orders[d][first:last].tolist()]


def slots_of(datasets: Sequence[Sequence], size: int) -> list[tuple[int, int, int]]:
    """The batches of an epoch: dataset, first item, behind the last item."""
    slots = []
    for d, items in enumerate(datasets):
        n = min(size, len(items))
        slots += [(d, i, i + n) for i in range(0, len(items) - n + 1, n)]
    return slots


# --- Many processes ----------------------------------------------------------------------------
# torchrun starts a process for each GPU. Each has the whole model and draws the whole batch, but
# computes on its share of it. Losses are divided by counts of the whole batch, never of a share, so
# the sum of the processes' gradients is the gradient; only adapters have any, so it is small.


def add_up(parameters: list[nn.Parameter], loss: float, stop: bool) -> tuple[float, bool]:
    """Sum gradients and loss over all processes; stop if one was asked to."""
    if RANKS == 1:
        return loss, stop
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    both = torch.tensor([loss, stop], device=parameters[0].device)
    everything = torch.cat([*(grad.flatten() for grad in grads), both])
    torch.distributed.all_reduce(everything)
    sizes = [p.numel() for p in parameters]
    for p, grad in zip(parameters, everything[:-2].split(sizes), strict=True):
        p.grad = grad.view_as(p)
    return everything[-2].item(), bool(everything[-1] > 0)


def on_rank_0_first(make: Callable[[], object]) -> object:
    """What `make` returns, called once process 0 has done what has to be done once."""
    result = make() if RANK == 0 else None
    if RANKS > 1:
        torch.distributed.barrier()
    return result if RANK == 0 else make()


def say(text: str) -> None:
    if RANK == 0:
        print(text, flush=True)


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
    changes_nothing = (
        "max_tokens",
        "recompute",
        "save_every",
    )  # but memory, time and dropout's random numbers
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
    if RANK > 0:
        return
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
                optimizer.state[p] = {k: v.to(p.device) for k, v in own.items()}
        return int(file.stem.removeprefix("state-"))
    return 0


def digest(items: Iterable) -> str:
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
        text = file.read_text() if file.exists() else ""
        whole = text[: text.rfind("\n") + 1].splitlines()  # the last one may have been cut off
        kept = [line for line in whole if json.loads(line)["step"] <= done]
        self.steps, self.first = steps, done
        if RANK == 0:
            write_whole(file, "".join(line + "\n" for line in kept).encode())
        self.file = (file if RANK == 0 else Path(os.devnull)).open("a")
        self.before = json.loads(kept[-1])["seconds"] if kept else 0.0
        self.start = self.shown = self.last = time.monotonic()
        self.losses, self.tokens = [], 0

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_) -> None:
        self.file.close()
        if RANK == 0 and sys.stdout.isatty():
            print()

    def __call__(self, step: int, loss: float, lr: float, tokens: int) -> None:
        self.losses.append(loss)
        self.tokens += tokens
        if RANK > 0 or step % max(1, self.steps // 100) and step < self.steps:
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
    device = model.decoder.device
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
        total, loss = int(chosen.sum()), 0.0  # of all processes
        torch.manual_seed(torch.initial_seed() + 1 + RANK)  # for dropout
        n = max(1, settings.max_tokens // settings.length)
        parts = zip(*(t[RANK::RANKS].split(n) for t in (masked, ids, chosen)), strict=True)
        for part in parts:
            if not len(part[0]):  # more processes than blocks
                continue
            part_loss = mntp_loss(model.decoder, *(t.to(device) for t in part), total=total)
            part_loss.backward()
            loss += part_loss.item()
        return loss, ids.numel()

    fit(model, [blocks], backward, settings, folder)


# --- Step 3: SimCSE ----------------------------------------------------------------------------


def train_simcse(
    model: LLM2Vec, documents: Sequence[str], settings: Settings, folder: Path
) -> None:
    """Teach a model that a sentence is like itself and unlike others: adapters, trained, merged.

    Of equal sentences the corpus counts one: no batch holds a sentence as its own negative. A
    corpus of fewer sentences than a batch is one batch.
    """
    texts = list(dict.fromkeys(s for document in documents for s in sentences(document)))
    if len(texts) < 2:
        raise ValueError("the corpus has fewer than two different sentences: nothing to contrast")

    def backward(batch: list[str]) -> tuple[float, int]:
        rows = 2 * tokenize(model.tokenizer, batch, settings.length)  # dropout makes two views
        return contrast(model, rows, lambda v: contrastive_loss(*v.chunk(2)), settings.max_tokens)

    fit(model, [texts], backward, settings, folder)


def contrast(
    model: LLM2Vec, rows: Sequence, loss_of: Callable[[Tensor], Tensor], max_tokens: int
) -> tuple[float, int]:
    """Gradients of a contrastive batch; this process's share of its loss, and its tokens.

    loss_of takes the vectors of all rows, (len(rows), d), in their order. Rows of like length are
    encoded together. A batch of more than max_tokens, or one that many processes share, still has
    all its candidates, with exact gradients (GradCache, Gao et al. 2021, arXiv 2101.06983): encode
    it in parts without keeping activations; take the loss's gradient with respect to the vectors;
    encode each part again, with the same dropout, and pass its vectors' gradient on.
    """
    lengths, device = [len(ids) for ids, _ in rows], model.decoder.device
    own = sorted(range(len(rows)), key=lambda i: -lengths[i])[RANK::RANKS]
    parts = [
        [own[i] for i in part]
        for part in batches_by_length(
            [lengths[i] for i in own], max_tokens, model.decoder.least_tokens
        )
    ]
    sizes = [len(part) * lengths[part[0]] for part in parts]
    in_one_graph = RANKS == 1 and sum(sizes) <= max_tokens
    seed = int(torch.randint(2**62, ()))

    def vectors_of(part: list[int]) -> Tensor:
        torch.manual_seed(seed + part[0])
        return model.embed([rows[i] for i in part])

    if in_one_graph:
        order = torch.tensor([i for part in parts for i in part])
        loss = loss_of(torch.cat([vectors_of(part) for part in parts])[order.argsort()])
        loss.backward()
        return loss.item(), sum(lengths)
    vectors = torch.zeros(len(rows), model.decoder.config.hidden_size, device=device)
    with torch.no_grad():
        for part in parts:
            vectors[part] = vectors_of(part)
    if RANKS > 1:
        torch.distributed.all_reduce(vectors)  # of zeros and one process's vector each
    loss = loss_of(vectors.requires_grad_())
    loss.backward()
    for part in parts:
        vectors_of(part).backward(vectors.grad[part])
    return loss.item() / RANKS, sum(lengths)


# --- The fourth stage: supervised contrastive learning -------------------------------------------


def train_supervised(
    model: LLM2Vec, datasets: Sequence[Sequence[str]], settings: Settings, folder: Path
) -> None:
    """Teach a model that a query is like what answers it: adapters, trained and merged.

    datasets: of `read_pairs`. A batch comes from one of them; every positive and every hard
    negative of the batch is a candidate for each of its queries (section 4 of the paper).
    """

    def backward(batch: list[str]) -> tuple[float, int]:
        pairs, rows = [json.loads(pair) for pair in batch], []
        for p in pairs:
            rows += tokenize(model.tokenizer, [p["query"]], settings.length, p["instruction"])
        answers = [p["positive"] for p in pairs] + [n for p in pairs for n in p["negatives"]]
        rows += tokenize(model.tokenizer, answers, settings.length)

        def loss_of(vectors: Tensor) -> Tensor:
            query, positive = vectors[: 2 * len(pairs)].chunk(2)
            return contrastive_loss(query, positive, vectors[2 * len(pairs) :])

        return contrast(model, rows, loss_of, settings.max_tokens)

    fit(model, datasets, backward, settings, folder)


STAGES = {"mntp": train_mntp, "simcse": train_simcse, "supervised": train_supervised}


# --- Scores ------------------------------------------------------------------------------------


BENCHMARKS = ("sts", "articles", "words", "masked")


def evaluate(
    model: LLM2Vec,
    held_out: Sequence[str],
    benchmarks: Sequence[str] = ("sts", "masked"),
    sts_files: str | Path | Sequence[str | Path] = STSB_TEST,
    columns: Sequence[Sequence[str | Path]] = (EWT, WNUT),
) -> dict[str, float]:
    """Scores by name, see data/benchmarks.py; masked tokens are those of held-out documents."""
    masked = "masked" in benchmarks and model.decoder.can_predict
    if masked:  # what may be wrong with them is said before the long work
        rows = (e.ids for e in model.tokenizer.encode_batch(list(held_out)))
        blocks, mask_id = cut_into_blocks(rows, length=128, limit=256), mask_id_of(model)
    scores = sts(model, sts_files) if "sts" in benchmarks else {}
    if "articles" in benchmarks:
        scores |= articles(model)
    if "words" in benchmarks:
        for train, test in columns:
            scores |= words(model, train, test, {EWT[1]: "POS", WNUT[1]: "NER"}.get(test))
    if masked:
        scores["masked tokens"] = masked_accuracy(model, blocks, mask_id)
    return scores


def baselines(model: LLM2Vec) -> Iterator[tuple[str, LLM2Vec]]:
    """The encoders that a causal model is without training, by name."""
    for name, (kind, pooling) in BASELINES.items():
        yield name, kind(model.decoder, model.tokenizer, pooling, model.max_length)


def table(rows: dict[str, dict[str, float]]) -> str:
    """Rows of scores as a Markdown table, which is as readable in a terminal."""
    columns = list(dict.fromkeys(key for scores in rows.values() for key in scores))
    columns.sort(key=lambda key: key == "seconds")  # last
    first = max(map(len, rows))
    lines = [" | ".join([" " * first, *(f"{c:>6}" for c in columns)])]
    lines.append(" | ".join(["-" * first, *("-" * (max(6, len(c)) - 1) + ":" for c in columns)]))
    for name, scores in rows.items():
        cells = [
            f"{scores[c]:.{0 if c == 'seconds' else 3}f}" if c in scores else "" for c in columns
        ]
        cells = [f"{x:>{max(6, len(c))}}" for x, c in zip(cells, columns, strict=True)]
        lines.append(" | ".join([f"{name:{first}}", *cells]))
    return "\n".join(f"| {line} |" for line in lines)


# --- Commands ----------------------------------------------------------------------------------


def load(args: argparse.Namespace, adapters: Sequence[str] = (), **how) -> LLM2Vec:
    device = torch.device(args.device or default_device())
    dtype = getattr(torch, args.dtype) if args.dtype else None
    if dtype is None:
        dtype = torch.bfloat16 if has_bfloat16(device) else torch.float32
    how = {"dtype": dtype, "device": device, "template": args.template} | how
    model = LLM2Vec.from_pretrained(args.model, adapters, **how)
    if args.compile:
        compile_layers(model.decoder)
    return model


def run_everything(args: argparse.Namespace) -> None:
    """The whole method, scored before and after each step; by default on the bundled tiny Llama."""
    output = Path(args.output)
    documents, held_out = split_documents(read_documents(WIKIPEDIA))
    rows: dict[str, dict[str, float]] = {}

    def score(name: str, model: LLM2Vec, training: float = 0.0) -> None:
        start = time.monotonic()
        if not args.compare:
            rows[name] = evaluate(model, held_out)
        elif type(model) is LLM2Vec and model.pooling == "mean":
            rows[name] = evaluate(model, held_out, BENCHMARKS, STS_FILES)
        else:  # the words' states do not depend on how a text is pooled
            rows[name] = evaluate(model, held_out, ("sts", "articles"), STS_FILES)
        rows[name]["seconds"] = training + time.monotonic() - start
        print(f"{name}: {json.dumps(rows[name])}", flush=True)

    def train(model: LLM2Vec, stage: str, folder: Path) -> float:
        settings = SETTINGS[stage][args.preset]
        if args.steps:
            settings = with_steps(settings, args.steps)
        what = f"{settings.steps} steps of {settings.batch} x {settings.length} tokens"
        print(f"{stage}: {what}", flush=True)
        clear(folder, args.overwrite)
        STAGES[stage](model, documents, settings, folder)
        return json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["seconds"]

    model = load(args, is_causal=True)
    for name, baseline in baselines(model) if args.compare else [("causal", model)]:
        score(name, baseline)
    model.decoder.config.is_causal = False  # step 1
    score("bidirectional, untrained", model)
    score("+ MNTP", model, train(model, "mntp", output / "mntp"))
    score("+ SimCSE", model, train(model, "simcse", output / "simcse"))
    model.save(output / "encoder")
    if args.compare:
        del model, baseline  # room for another
        model = load(args)
        score("SimCSE without MNTP", model, train(model, "simcse", output / "simcse-alone"))
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
    settings = with_steps(settings, args.steps or settings.steps)
    settings = replace(
        settings, **{f.name: given[f.name] for f in fields(Settings) if f.name in given}
    )
    if args.compile and args.quantize:  # torch would keep decoded weights for the backward pass
        raise ValueError("--compile: not with --quantize nf4, whose 4 bits it would undo")
    if args.command == "supervised":
        data = read_pairs(args.pairs, args.instructions)
    else:
        data, _ = split_documents(read_documents(args.corpus, args.errors))
    model = load(args, args.adapters, **({"device": "cpu"} if args.quantize else {}))
    if args.quantize:  # what does not fit on a GPU as it is, passes through the machine's memory
        quantize_nf4(model.decoder, args.device or default_device())
    if RANK == 0:
        clear(Path(args.output), args.overwrite)
    STAGES[args.command](model, data, settings, Path(args.output))
    say(f"The adapter is in {args.output}")
    if args.command != "mntp" and RANK == 0:
        if args.quantize:
            model = load(args, [*args.adapters, args.output], device="cpu")
        model.save(Path(args.output) / "encoder")
        print_next(Path(args.output) / "encoder")


def held_out_of(corpus: str) -> list[str]:
    _, held_out = split_documents(read_documents(corpus))
    if not held_out:
        raise ValueError(f"{corpus}: none of its documents is held out, which is one in fifty")
    return held_out


def run_evaluate(args: argparse.Namespace) -> None:
    held_out = held_out_of(args.corpus)
    names = [Path(test).stem for _, test in args.words or ()]
    if len(set(names)) < len(names):
        raise ValueError(f"--words: test files of one name ({', '.join(names)}) have one score")
    model = load(args, args.adapters, pooling=args.pooling, is_causal=args.causal)

    def score(encoder: LLM2Vec, which: Sequence[str]) -> dict[str, float]:
        start = time.monotonic()
        scores = evaluate(encoder, held_out, which, args.sts, args.words or (EWT, WNUT))
        return scores | {"seconds": time.monotonic() - start}

    rows = {Path(args.model).name: score(model, args.benchmarks)}
    del model  # room for another
    if args.baselines:
        which = [name for name in args.benchmarks if name in ("sts", "articles")]
        untrained = baselines(load(args, is_causal=True))
        rows = {name: score(baseline, which) for name, baseline in untrained} | rows
    print(table(rows))
    print(json.dumps(rows[Path(args.model).name] if len(rows) == 1 else rows))


def run_inspect(args: argparse.Namespace) -> None:
    held_out = held_out_of(args.corpus)
    texts = [sentence for document in held_out for sentence in sentences(document)][:200]
    model = load(args)
    panels = {Path(args.model).name: layer_cosines(model, texts)}
    for adapter in args.adapters:
        load_adapter(model.decoder, adapter)
        merge_lora(model.decoder)
        panels[f"+ {Path(adapter).name}"] = layer_cosines(model, texts)
    for title, cosines in panels.items():
        print(heat_map(cosines, title))
    write_whole(Path(args.output), heat_map_svg(panels).encode())
    print(f"{args.output}: the same as a picture")


def run_plot(args: argparse.Namespace) -> None:
    file = Path(args.run_folder) / "curves.svg"
    write_whole(file, curves_svg(read_log(args.run_folder)).encode())
    print(file)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python train.py",
        description="Turn a causal language model into a text encoder. Without a command: all "
        "three steps, by default on the bundled tiny Llama, in minutes.",
    )
    again = {"action": "store_true", "help": "start anew instead of going on"}

    def add_model(command: argparse.ArgumentParser, **how) -> None:
        command.add_argument("--model", help="checkpoint folder", **how)
        text = f"what stands around a text, one of {', '.join(TEMPLATES)}"
        command.add_argument("--template", choices=TEMPLATES, metavar="NAME", help=text)
        types = ("float32", "bfloat16")
        command.add_argument("--dtype", choices=types, help="(default: bfloat16 if in hardware)")
        add_device(command)

    add = top.add_argument
    add_model(top, default=TINY)
    add("--preset", default="tiny", choices=SETTINGS["mntp"], help="(default: %(default)s)")
    add("--output", default="runs/tiny", help="run folder (default: %(default)s)")
    add("--steps", type=positive, help="steps of each stage (default: its settings)")
    add("--compare", action="store_true", help="with every benchmark, baseline, and SimCSE alone")
    add("--overwrite", **again)
    top.set_defaults(run=run_everything)
    commands = top.add_subparsers(dest="command", title="commands", metavar="COMMAND")
    for name, about in COMMANDS.items():
        needed = "RUN" if name == "plot" else "--model MODEL [options]"
        usage = f"python train.py {name} {needed}"
        command = commands.add_parser(name, help=about, description=about, usage=usage)
        add = command.add_argument
        if name == "plot":
            command.set_defaults(run=run_plot)
            add("run_folder", metavar="RUN", help="folder with a log.jsonl, or with such folders")
            continue
        add_model(command, required=True)
        add("--adapters", nargs="*", default=[], help="adapter folders to merge first, in order")
        if name == "supervised":
            text = "JSON lines with query, positive, perhaps negative and instruction, or a folder"
            add("--pairs", nargs="+", default=[PAIRS], metavar="FILE", help=text + " of such files")
            text = "in front of the queries: one for each of --pairs, or one for all"
            add("--instructions", nargs="+", default=[None], metavar="TEXT", help=text)
        else:
            text = "text, a document a line, or .jsonl with `text` (default: bundled Wikipedia)"
            add("--corpus", default=WIKIPEDIA, help=text)
        if name == "evaluate":
            command.set_defaults(run=run_evaluate)
            text = f"any of {', '.join(BENCHMARKS)} (default: all)"
            add("--benchmarks", nargs="+", choices=BENCHMARKS, default=BENCHMARKS, help=text)
            text = "score<TAB>a<TAB>b lines (default: STS12, STS15 and STS-B test)"
            add("--sts", nargs="+", default=STS_FILES, metavar="FILE", help=text)
            text = "column files to probe words with (default: EWT tags and WNUT-17 entities)"
            pair = {"nargs": 2, "action": "append", "metavar": ("TRAIN", "TEST")}
            add("--words", **pair, help=text)
            add("--pooling", default="mean", choices=POOLING, help="(default: %(default)s)")
            add("--causal", action="store_true", help="leave out step 1: attend to the left only")
            add("--baselines", action="store_true", help="score the causal model's baselines too")
            continue
        if name == "inspect":
            command.set_defaults(run=run_inspect)
            add("--output", default="inspect.svg", help="(default: %(default)s)")
            continue
        command.set_defaults(run=run_stage)
        if name != "supervised":
            text = "what to do with lines that hold no text (default: %(default)s)"
            add("--errors", default="strict", choices=("strict", "skip"), help=text)
        text = "keep the frozen weights in 4 bits while training (nf4): for a small GPU"
        add("--quantize", choices=("nf4",), help=text)
        add("--output", required=True, help="run folder; a run that is there goes on")
        add("--overwrite", **again)
        add("--preset", default="paper", choices=SETTINGS[name], help="(default: %(default)s)")
        for field in fields(Settings):
            if field.name in FLAGS and (field.name != "mask_rate" or name == "mntp"):
                values = {p: getattr(s, field.name) for p, s in SETTINGS[name].items()}
                if len(set(values.values())) == 1:
                    values = {"default": values["paper"]}
                presets = [f"{preset}: {value}" for preset, value in values.items()]
                flag, text = "--" + field.name.replace("_", "-"), FLAGS[field.name]
                kind = positive if field.type is int else fraction
                kind = whole if field.name == "recompute" else kind
                add(flag, type=kind, metavar="N", help=f"{text} ({', '.join(presets)})")
    return top


COMMANDS = {
    "mntp": "Step 2: masked next-token prediction, on a model or on top of adapters.",
    "simcse": "Step 3: unsupervised contrastive learning; writes the encoder too.",
    "supervised": "The fourth stage: contrastive learning on pairs; writes the encoder too.",
    "evaluate": "Score a checkpoint on sentences, articles, words and masked tokens.",
    "inspect": "Show, layer by layer, how much a checkpoint changes when it looks both ways.",
    "plot": "Draw a run's loss and learning rate into RUN/curves.svg.",
}
FLAGS = {
    "length": "tokens in a block or text",
    "batch": "blocks, sentences or pairs a step",
    "steps": "optimiser steps",
    "lr": "peak learning rate",
    "rank": "of the adapters",
    "mask_rate": "share of tokens hidden; by default llama 0.2, mistral 0.8",
    "max_tokens": "in one forward pass: lower it to save memory",
    "recompute": "layers computed twice to save memory; a GPU short of it raises this by itself",
}


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def whole(text: str) -> int:
    return 0 if text == "0" else positive(text)


def fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and at most 1")
    return value


def main() -> None:
    args = parser().parse_args()
    if RANKS > 1 and args.command not in STAGES:
        raise ValueError(f"torchrun shares out a stage ({', '.join(STAGES)}), nothing else")
    with processes():
        args.run(args)


if __name__ == "__main__":
    run(main)
