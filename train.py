"""The stages of LLM2Vec, from a causal checkpoint to a text encoder.

    python train.py                    all of it on the bundled tiny Llama, in minutes
    python train.py mntp ...           step 2 on your own Llama or Mistral folder
    python train.py simcse ...         step 3, on top of the adapter of step 2
    python train.py supervised ...     the fourth stage, for those who have pairs

A stage is a function from a model and a corpus to an adapter: it freezes the weights, trains fresh
adapters on them, and writes those. The next stage merges them first. The stages differ in their
batches and their loss, and share the loop `fit`. To add one, write its function and its entry in
STAGES. Encoders are scored by `python -m data.benchmarks`, runs drawn by `python -m data.figures`.
"""

import argparse
import contextlib
import datetime
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

# Batches differ in length: memory in pieces that can be joined again loses less to gaps. Torch
# reads this once, when it is imported.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from safetensors.torch import load_file
from safetensors.torch import save as save_bytes
from torch import Tensor, nn

import llm2vec
import lora
from data import benchmarks
from data.corpus import WIKIPEDIA, cut_into_blocks, read_documents, sentences, split_documents
from data.export import checkpoint_files
from data.pairs import PAIRS, read_pairs
from llm2vec import Decoder, LLM2Vec, contrastive_loss, lead_of, mask_tokens, mntp_loss

TINY = Path(__file__).parent / "data" / "tiny-llama"

# --- Settings ----------------------------------------------------------------------------------


def setting(
    about: str,
    default: object,
    encoder: bool | None = None,
    pairs: bool | None = None,
    choices: Iterable[str] | None = None,
) -> object:
    """A field; of its flag, the help, and the values to choose from.

    encoder, pairs: what `Stage` says of the stages that have the flag; None: either.
    """
    only = {"encoder": encoder, "pairs": pairs}
    return field(default=default, metadata={"help": about, "only": only, "choices": choices})


@dataclass
class Settings:
    """Everything that a stage can be told. Each field is a flag of the command line."""

    length: int = setting("tokens in a block (mntp), or at most in a text", 512)
    batch: int = setting("blocks, sentences or pairs in one optimiser step", 32)
    steps: int = setting("optimiser steps", 1000)
    epochs: int | None = setting("times through the corpus, instead of --steps", None)
    lr: float = setting("learning rate at its peak", 5e-5)
    warm_up: int = setting("steps of linear warm-up before the linear decay to zero", 0)
    decay_epochs: float | None = setting(
        "times through the data by which the rate is zero, if more than --steps", None
    )
    rank: int = setting("rank of the adapters", 16)
    alpha: float | None = setting("over rank, it scales the adapters; default: twice rank", None)
    dropout: float = setting("dropout on the input of the adapters", 0.05)
    attention_dropout: float = setting("dropout on the attention weights", 0.0)
    mask_rate: float | None = setting(
        "share hidden; default: 0.8 for mistral, else 0.2", None, encoder=False
    )
    mask_token: str = setting("the plain token that hides others", "_", encoder=False)
    scale: float = setting("inverse temperature of the loss", 20.0, encoder=True)
    pooling: str = setting(
        "how states become a vector", "mean", encoder=True, choices=llm2vec.POOLING
    )
    split: str = setting(
        "what is a text to learn from",
        "sentence",
        encoder=True,
        pairs=False,
        choices=("sentence", "line"),
    )
    dev: str | None = setting(
        "STS file to score every --save-every steps: the best step is kept", None, encoder=True
    )
    max_tokens: int = setting("tokens in one forward pass; lower it to save memory", 8192)
    recompute: int = setting("layers computed twice to save memory; a GPU raises it itself", 0)
    save_every: int = setting("steps between two saved states", 50)
    seed: int = setting("seed of all that is random", 0)

    def __post_init__(self) -> None:
        for f in fields(self):
            value, name = getattr(self, f.name), f.name.replace("_", "-")
            least = 1 if f.type in (int, int | None) else 1e-9
            least = 0 if f.default == 0 or "dropout" in f.name else least
            most = 0.99 if "dropout" in f.name else {"mask_rate": 1}.get(f.name, 1e12)
            if isinstance(value, (int, float)) and not least <= value <= most:
                raise ValueError(f"--{name} is {value}, expected {least:g} to {most:g}")


# --- The loop ----------------------------------------------------------------------------------


class Trained(NamedTuple):
    """What `fit` trains, and how it is written, read back, and left in the model at the end."""

    start: Callable[[Decoder, Settings], list[nn.Parameter]]
    write: Callable[[Decoder, Path], None]
    read: Callable[[Decoder, Path], None]
    settle: Callable[[Decoder], None]


ADAPTERS = Trained(
    lambda decoder, s: lora.add_lora(decoder, s.rank, s.alpha, s.dropout),
    lora.save_adapter,
    lora.load_adapter,
    lambda decoder: None if lora.is_quantized(decoder) else lora.merge_lora(decoder),
)


def fit(
    model: LLM2Vec,
    datasets: Sequence[Sequence],
    backward: Callable[[list], tuple[float, int]],
    settings: Settings,
    folder: Path,
    trained: Trained = ADAPTERS,
) -> None:
    """Train fresh adapters on a frozen model, write them to `folder`, and merge them.

    AdamW without weight decay, linear warm-up and decay, gradients clipped to norm 1. `backward`
    takes a batch, leaves this process's part of the gradients, and returns its part of the loss and
    the tokens of the batch. `trained` says what is trained, by default adapters.

    Everything random in a step follows from the seed and the number of the step, so a run that was
    stopped goes on from its newest state and ends with the same bits as one that was not.
    """
    decoder, batches = model.decoder, Batches(datasets, settings)
    settings, epoch = batches.settings, len(batches.slots)
    run = Run(folder, settings, identity(model, datasets, settings))
    if run.finished:
        say(f"{folder}: finished before; --overwrite trains it anew")
        trained.read(decoder, folder)
        return trained.settle(decoder)
    torch.manual_seed(settings.seed)
    parameters = trained.start(decoder, settings)
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0, fused=True)
    with training(decoder, settings):
        for step in range(run.restore(parameters, optimizer), settings.steps):
            loss, tokens = within_memory(decoder, settings, step, backward, batches[step])
            loss = sum_over_processes(parameters, loss)
            norm = nn.utils.clip_grad_norm_(parameters, 1.0).item()
            if not math.isfinite(loss + norm):
                run.save(step, parameters, optimizer)
                what = f"step {step + 1}: the loss is {loss} and the norm of the gradient {norm}"
                raise ValueError(f"{what}; the state before it is in {folder}")
            lr = learning_rate(step, settings, epoch)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
            run.log(step + 1, loss, lr, tokens, run.score(step + 1, model, parameters))
            if (step + 1) % settings.save_every == 0:
                run.save(step + 1, parameters, optimizer)
    run.take_best(parameters)
    once(lambda: run.finish(model, trained))
    trained.settle(decoder)


@contextlib.contextmanager
def training(decoder: Decoder, settings: Settings) -> Iterator[None]:
    """What training changes on a decoder, and puts back."""
    before = decoder.training, decoder.config.attention_dropout, decoder.recompute
    decoder.train()
    decoder.config.attention_dropout = settings.attention_dropout
    decoder.recompute = min(settings.recompute, len(decoder.layers))
    try:
        yield
    finally:
        decoder.train(before[0])
        decoder.config.attention_dropout, decoder.recompute = before[1:]


def within_memory(
    decoder: Decoder, settings: Settings, step: int, backward: Callable, batch: list
) -> tuple[float, int]:
    """`backward` of a batch, again with more layers recomputed where memory is short.

    A GPU that is out of memory says so, and each time an eighth of the layers is added. The step
    draws the same numbers again, so its bits are those of a run that had known.
    """
    layers = len(decoder.layers)
    while True:
        torch.manual_seed(settings.seed + 1_000_003 * (step + 1))
        try:
            return backward(batch)
        except torch.OutOfMemoryError as error:
            if WORLD_SIZE > 1 or decoder.recompute >= layers:  # other processes would wait
                what = f"step {step + 1}: out of memory; lower --max-tokens ({settings.max_tokens})"
                raise ValueError(f"{what} or --length ({settings.length}): {error}") from None
        decoder.zero_grad()
        torch.cuda.empty_cache()
        decoder.recompute = min(layers, decoder.recompute + math.ceil(layers / 8))
        say(f"memory is short: from here on as with --recompute {decoder.recompute}")


def learning_rate(step: int, settings: Settings, epoch: int = 0) -> float:
    """Linear from 0 to `lr` in warm_up steps, then linear to 0; step counts from 0.

    It is 0 at the end of the run, or behind decay_epochs epochs of so many steps, if that is later.
    """
    end = max(settings.steps, round((settings.decay_epochs or 0) * epoch))
    rise = (step + 1) / max(1, settings.warm_up)
    fall = (end - step) / max(1, end - settings.warm_up)
    return settings.lr * min(rise, fall)


class Batches:
    """Batch number `step`, each from one dataset; every item comes once an epoch.

    The order follows from seed and epoch. What is left of a dataset when it is cut into batches
    waits for the order of another epoch. A dataset smaller than a batch is one.
    """

    def __init__(self, datasets: Sequence[Sequence], settings: Settings):
        self.datasets, self.slots = datasets, []  # of an epoch: dataset, first item, behind last
        for d, items in enumerate(datasets):
            n = min(settings.batch, len(items))
            self.slots += [(d, i, i + n) for i in range(0, len(items) - n + 1, n)]
        if settings.epochs:
            settings = with_steps(settings, settings.epochs * len(self.slots))
        self.settings = settings

    def __getitem__(self, step: int) -> list:
        epoch, place = divmod(step, len(self.slots))
        generator = torch.Generator().manual_seed(self.settings.seed + 1_000_003 * epoch)
        orders = [torch.randperm(len(items), generator=generator) for items in self.datasets]
        if len(orders) > 1:  # the batches of several datasets take turns at random
            place = int(torch.randperm(len(self.slots), generator=generator)[place])
        d, first, last = self.slots[place]
        return [self.datasets[d][i] for i in orders[d][first:last].tolist()]


def with_steps(settings: Settings, steps: int) -> Settings:
    """The same settings for another number of steps; the warm-up keeps its share of them."""
    return replace(settings, steps=steps, warm_up=settings.warm_up * steps // settings.steps)


# --- Step 2: masked next-token prediction ------------------------------------------------------


def train_mntp(model: LLM2Vec, documents: Sequence[str], settings: Settings, folder: Path) -> None:
    """Teach a model, now bidirectional, to use what it sees."""
    mask_id, V = benchmarks.mask_id_of(model, settings.mask_token), model.decoder.config.vocab_size
    # The paper hides more of Mistral's tokens, all behind the mask token (its appendix).
    mistral = model.decoder.config.model_type == "mistral"
    rate = settings.mask_rate or (0.8 if mistral else 0.2)
    corruption = (1.0, 0.0) if mistral else (0.8, 0.1)
    added = model.tokenizer.get_added_tokens_decoder()
    special = torch.tensor([i for i, token in added.items() if token.special] or [-1])
    blocks = blocks_of(model, documents, settings)

    def backward(batch: list[Tensor]) -> tuple[float, int]:
        ids = torch.stack(batch)
        maskable = ~torch.isin(ids, special)
        masked, chosen = mask_tokens(ids, mask_id, V, rate, corruption, maskable)
        total, loss = int(chosen.sum()), 0.0  # of all processes
        torch.manual_seed(torch.initial_seed() + 1 + RANK)  # for dropout
        n = max(1, settings.max_tokens // settings.length)
        shares = (t[RANK::WORLD_SIZE].to(model.decoder.device) for t in (masked, ids, chosen))
        for part in zip(*(share.split(n) for share in shares), strict=True):
            if len(part[0]):  # there may be more processes than blocks
                part_loss = mntp_loss(model.decoder, *part, total=total)
                part_loss.backward()
                loss += part_loss.item()
        return loss, ids.numel()

    fit(model, [blocks], backward, settings, folder)


def blocks_of(model: LLM2Vec, documents: Sequence[str], settings: Settings) -> Tensor:
    """Token ids of documents in random order, end to end, cut into blocks: (number, length).

    Only as many documents are tokenised as the run will read.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(len(documents), generator=generator).tolist()
    chunks = (order[i : i + 256] for i in range(0, len(order), 256))
    rows = (e.ids for c in chunks for e in model.tokenizer.encode_batch([documents[i] for i in c]))
    limit = None if settings.epochs else settings.steps * settings.batch
    return cut_into_blocks(rows, settings.length, limit)


# --- Step 3: SimCSE ----------------------------------------------------------------------------


def train_simcse(
    model: LLM2Vec, documents: Sequence[str], settings: Settings, folder: Path
) -> None:
    """Teach a model that a sentence is like itself and unlike others.

    Equal sentences of the corpus count as one, so that no batch holds a sentence as its own
    negative.
    """
    split = str.splitlines if settings.split == "line" else sentences
    texts = dict.fromkeys(text.strip() for document in documents for text in split(document))
    texts = [text for text in texts if text]
    if len(texts) < 2:
        raise ValueError("the corpus has fewer than two different sentences: nothing to contrast")
    as_trained(model, settings)
    rows = model.rows(texts[:: math.ceil(len(texts) / 10_000)], max_length=2**31)
    lengths = sorted(len(ids) for ids, _ in rows)  # of ten thousand, at most
    cut = sum(n > settings.length for n in lengths) / len(lengths)
    say(
        f"{len(texts)} texts, of {lengths[len(lengths) // 2]} tokens in the median and at most "
        f"{lengths[-1]}; {cut:.1%} are cut at --length {settings.length}"
    )

    def loss_of(vectors: Tensor) -> Tensor:
        return contrastive_loss(*vectors.chunk(2), scale=settings.scale)

    def backward(batch: list[str]) -> tuple[float, int]:
        rows = 2 * model.rows(batch, max_length=settings.length)  # two dropout views
        return contrast(model, rows, loss_of, settings.max_tokens)

    fit(model, [texts], backward, settings, folder)


def as_trained(model: LLM2Vec, settings: Settings) -> None:
    """Pool as the settings say, and read at least as many tokens of a text as training does."""
    model.pooling, model.max_length = settings.pooling, max(model.max_length, settings.length)
    if settings.dev:
        benchmarks.read_sts(settings.dev)  # complain of it before training


def contrast(
    model: LLM2Vec, rows: list, loss_of: Callable[[Tensor], Tensor], max_tokens: int
) -> tuple[float, int]:
    """Gradients of a contrastive batch; this process's share of its loss, and its tokens.

    loss_of takes the vectors of all rows, (len(rows), d), in their order. Rows of like length are
    encoded together. A batch of more than max_tokens, or shared by processes, goes to `gradcache`.
    """
    lengths = [len(ids) for ids, _ in rows]
    mine = sorted(range(len(rows)), key=lambda i: -lengths[i])[RANK::WORLD_SIZE]
    least = llm2vec.least_tokens(model.decoder)
    by_length = llm2vec.batches_by_length([lengths[i] for i in mine], max_tokens, least)
    parts = [[mine[i] for i in part] for part in by_length]
    padded = sum(len(part) * lengths[part[0]] for part in parts)
    if WORLD_SIZE > 1 or padded > max_tokens:
        return gradcache(model, rows, loss_of, parts), sum(lengths)
    order = torch.tensor([i for part in parts for i in part])
    vectors = torch.cat([model.embed([rows[i] for i in part]) for part in parts])
    loss = loss_of(vectors[order.argsort()])
    loss.backward()
    return loss.item(), sum(lengths)


def gradcache(
    model: LLM2Vec, rows: list, loss_of: Callable[[Tensor], Tensor], parts: list[list[int]]
) -> float:
    """`contrast` in parts, with exact gradients and all candidates (GradCache, Gao et al. 2021).

    Encode the parts without keeping activations; take the gradient of the loss with respect to the
    vectors; encode each part again, with the same dropout, and pass the gradient of its vectors on.
    """
    seed = int(torch.randint(2**62, ()))

    def vectors_of(part: list[int]) -> Tensor:
        torch.manual_seed(seed + part[0])
        return model.embed([rows[i] for i in part])

    d = model.decoder.config.hidden_size
    vectors = torch.zeros(len(rows), d, device=model.decoder.device)
    with torch.no_grad():
        for part in parts:
            vectors[part] = vectors_of(part)
    if WORLD_SIZE > 1:
        torch.distributed.all_reduce(vectors)  # of zeros, and the vectors of one process each
    loss = loss_of(vectors.requires_grad_())
    loss.backward()
    for part in parts:
        vectors_of(part).backward(vectors.grad[part])
    return loss.item() / WORLD_SIZE


# --- The fourth stage: supervised contrastive learning -----------------------------------------


def train_supervised(
    model: LLM2Vec, datasets: Sequence[Sequence[dict]], settings: Settings, folder: Path
) -> None:
    """Teach a model that a query is like what answers it.

    datasets: of `read_pairs`. A batch comes from one of them; every positive and every hard
    negative of the batch is a candidate for each of its queries (section 4 of the paper), unless it
    has the text of the query's own positive: questions may share an answer.
    """
    as_trained(model, settings)
    for name, key in (("query", "instruction"), ("document", "answer_instruction")):
        said = {pair.get(key, "") for pairs in datasets for pair in pairs}
        if len(said) == 1:
            model.prompts[name] = lead_of(said.pop(), model.separator)

    def backward(pairs: list[dict]) -> tuple[float, int]:
        texts = [(p["query"], p["instruction"]) for p in pairs]
        texts += [(p["positive"], p.get("answer_instruction")) for p in pairs]
        texts += [(n, p.get("answer_instruction")) for p in pairs for n in p["negatives"]]
        rows = [model.rows([text], lead, settings.length)[0] for text, lead in texts]
        answers = [text for text, _ in texts[len(pairs) :]]
        copies = [[a == b for b in answers] for a in answers[: len(pairs)]]
        copies = torch.tensor(copies, device=model.decoder.device).fill_diagonal_(False)

        def loss_of(vectors: Tensor) -> Tensor:
            query, positive = vectors[: 2 * len(pairs)].chunk(2)
            negative = vectors[2 * len(pairs) :]
            return contrastive_loss(query, positive, negative, settings.scale, copies)

        return contrast(model, rows, loss_of, settings.max_tokens)

    fit(model, datasets, backward, settings, folder)


# --- All that the program knows of a stage -----------------------------------------------------


class Stage(NamedTuple):
    run: Callable[[LLM2Vec, Sequence, Settings, Path], None]
    help: str
    presets: dict[str, Settings]
    encoder: bool = True  # whether an encoder is written beside the adapter
    pairs: bool = False  # whether it learns from pairs instead of a corpus


# Each preset `paper` has the numbers of the paper's appendix. `tiny` is for the bundled model: so
# small a model needs high rates, and more dropout, or it solves the task of SimCSE at once.
# `laptop` is for SmolLM2-135M on two cores, and was chosen on STS-B dev. At a scale of 20 the loss
# of SimCSE is nothing within ten steps; at 10 there is something to learn for longer. `gpu` is for
# the same model and seven minutes of an H200, with the paper's steps and batches of MNTP.
STAGES = {
    "mntp": Stage(
        train_mntp,
        "Step 2: masked next-token prediction, on a model or on top of adapters.",
        {
            "paper": Settings(length=512, batch=32, lr=5e-5),
            "tiny": Settings(length=64, batch=16, steps=120, lr=2e-3, warm_up=10),
            "laptop": Settings(length=128, batch=8, steps=250, lr=2e-3, warm_up=20, dropout=0.0),
            "gpu": Settings(lr=1e-3, warm_up=50, dropout=0.0, max_tokens=32768),
        },
        encoder=False,
    ),
    "simcse": Stage(
        train_simcse,
        "Step 3: unsupervised contrastive learning; writes the encoder too.",
        {
            "paper": Settings(length=128, batch=128, lr=3e-5, attention_dropout=0.3),
            "tiny": Settings(
                length=24, batch=64, steps=40, lr=5e-3, warm_up=10, attention_dropout=0.6
            ),
            "laptop": Settings(
                length=32,
                batch=32,
                steps=80,
                lr=1e-3,
                warm_up=8,
                attention_dropout=0.3,
                dropout=0.0,
                scale=10.0,
            ),
            "gpu": Settings(
                length=64,
                batch=128,
                steps=400,
                lr=5e-4,
                warm_up=40,
                attention_dropout=0.3,
                dropout=0.0,
                scale=10.0,
                max_tokens=32768,
            ),
        },
    ),
    "supervised": Stage(
        train_supervised,
        "The fourth stage: contrastive learning on pairs; writes the encoder too.",
        {
            "paper": Settings(
                length=512, batch=512, lr=2e-4, warm_up=300, decay_epochs=3, scale=50.0
            ),
            "tiny": Settings(length=64, batch=32, steps=60, lr=2e-3, warm_up=10),
            "laptop": Settings(length=64, batch=32, steps=40, lr=5e-4, warm_up=5, dropout=0.0),
        },
        pairs=True,
    ),
}


# --- Many processes ----------------------------------------------------------------------------
# torchrun starts a process for each GPU. Each has the whole model and draws the whole batch, but
# computes on its share of it. Losses are divided by counts of the whole batch, never of a share, so
# the sum of the processes' gradients is the gradient; only adapters have any, so it is small.

RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Meet the other processes of torchrun; one that is silent for a minute ends the run."""
    if WORLD_SIZE == 1:
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    patience = datetime.timedelta(seconds=60)
    torch.distributed.init_process_group("nccl" if cuda else "gloo", timeout=patience)
    try:
        yield
    except RuntimeError as error:  # what the backends raise
        raise ValueError(f"process {RANK} of {WORLD_SIZE} stopped: {error}") from None
    finally:
        torch.distributed.destroy_process_group()


def sum_over_processes(parameters: list[nn.Parameter], loss: float) -> float:
    """Sum the gradients over all processes; returns the sum of the losses."""
    if WORLD_SIZE == 1:
        return loss
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    total = torch.tensor([loss], device=parameters[0].device)
    joined = torch.cat([*(grad.flatten() for grad in grads), total])
    torch.distributed.all_reduce(joined)
    sizes = [p.numel() for p in parameters]
    for p, grad in zip(parameters, joined[:-1].split(sizes), strict=True):
        p.grad = grad.view_as(p)
    return joined[-1].item()


def once(work: Callable[[], object]) -> None:
    """Do on process 0 what is done once; the others wait for it."""
    if RANK == 0:
        work()
    if WORLD_SIZE > 1:
        torch.distributed.barrier()


def say(text: str) -> None:
    if RANK == 0:
        print(text, flush=True)


# --- The run folder ----------------------------------------------------------------------------


def identity(model: LLM2Vec, datasets: Sequence[Sequence], settings: Settings) -> dict:
    """What a run must have in common with one that it goes on from, or is taken for."""
    decoder, here = model.decoder, Path(__file__).parent
    firsts = [p.detach().flatten()[:256].float().cpu() for p in decoder.parameters()]
    return asdict(settings) | {
        "quantize": "nf4" if lora.is_quantized(decoder) else None,
        "dtype": str(decoder.norm.weight.dtype),
        "processes": WORLD_SIZE,
        "code": digest((here / n).read_text() for n in ("llm2vec.py", "lora.py", "train.py")),
        "data": digest(item for items in datasets for item in items),
        "model": digest([torch.cat(firsts), decoder.config]),
        "tokenizer": digest([model.tokenizer.to_str()]),
    }


def digest(items: Iterable) -> str:
    """A short fingerprint of texts, blocks of tokens, or anything that prints itself."""
    sha = hashlib.sha256()
    for item in items:
        sha.update(item.numpy().tobytes() if isinstance(item, Tensor) else str(item).encode())
    return sha.hexdigest()[:16]


class Run:
    """What a stage leaves in its folder, and goes on from.

    settings.json, log.jsonl, the newest state while it runs, the adapter once it is done.
    Raises ValueError if the folder holds something else, or a run of other settings, data or code.
    """

    def __init__(self, folder: Path, settings: Settings, identity: dict):
        self.folder, self.settings, self.log_file = folder, settings, folder / "log.jsonl"
        once(lambda: self.open(identity))
        self.finished = (folder / "finished").exists()

    def open(self, identity: dict) -> None:
        file = self.folder / "settings.json"
        if not file.exists():
            if self.folder.exists() and any(self.folder.iterdir()):
                what = "is not empty and not a run folder; choose another --output"
                raise ValueError(f"{self.folder}: {what}")
            self.folder.mkdir(parents=True, exist_ok=True)
            lora.write_whole(file, (json.dumps(identity, indent=2) + "\n").encode())
        before = llm2vec.read_json(file)
        for key, value in identity.items():
            changes_the_result = key not in ("max_tokens", "recompute", "save_every")
            if changes_the_result and before.get(key) != value:
                change = f"{key} was {before.get(key)!r} and is {value!r}"
                what = f"a run with other settings, {change}; --overwrite trains it anew"
                raise ValueError(f"{self.folder}: {what}")

    def states(self) -> list[Path]:
        return sorted(self.folder.glob("state-*.safetensors"))

    def restore(self, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
        """Go back to the newest state; returns the number of steps done."""
        done = 0
        for file in self.states()[-1:]:
            with llm2vec.reading(file):
                tensors = load_file(file)
            done = int(file.stem.removeprefix("state-"))
            for i, p in enumerate(parameters):
                own = {k.partition(".")[2]: v for k, v in tensors.items() if k.startswith(f"{i}.")}
                p.data.copy_(own.pop("weight"))
                optimizer.state[p] = {k: v.to(p.device) for k, v in own.items()}
        lines = self.log_file.read_text().splitlines(True) if self.log_file.exists() else []
        lines = [x for x in lines if x.endswith("\n") and json.loads(x)["step"] <= done]
        once(lambda: lora.write_whole(self.log_file, "".join(lines).encode()))
        self.before = json.loads(lines[-1])["seconds"] if lines else 0.0
        self.best = max((json.loads(x).get("dev", -math.inf) for x in lines), default=-math.inf)
        self.first, self.start, self.losses, self.tokens = done, time.monotonic(), [], 0
        return done

    def save(self, step: int, parameters: list[nn.Parameter], optimizer) -> None:
        """Write parameters and Adam's moments after `step` steps, in the place of older ones."""
        if RANK > 0:
            return
        tensors = {}
        for i, p in enumerate(parameters):
            tensors |= {f"{i}.{name}": value for name, value in optimizer.state[p].items()}
            tensors[f"{i}.weight"] = p.detach()
        lora.write_whole(self.folder / f"state-{step:08d}.safetensors", save_bytes(tensors))
        for old in self.states()[:-1]:
            old.unlink()

    def score(self, step: int, model: LLM2Vec, parameters: list[nn.Parameter]) -> float | None:
        """With --dev, at every save and at the end: the score, whose weights are kept if best."""
        s = self.settings
        if s.dev is None or step % s.save_every and step < s.steps:
            return None
        score = next(iter(benchmarks.sts(model, s.dev).values()))
        model.decoder.train()
        if score > self.best:
            self.best = score
            best = save_bytes({str(i): p.detach() for i, p in enumerate(parameters)})
            if RANK == 0:  # whose score decides: others may round it otherwise
                lora.write_whole(self.folder / "best.safetensors", best)
        return score

    def take_best(self, parameters: list[nn.Parameter]) -> None:
        """With --dev, go back to the weights of the best step."""
        if self.settings.dev is not None:
            once(lambda: None)  # the others wait until it is written
            for i, weight in load_file(self.folder / "best.safetensors").items():
                parameters[int(i)].data.copy_(weight)
            say(f"the best step is kept, which scored {self.best:.4f} on {self.settings.dev}")

    def log(self, step: int, loss: float, lr: float, tokens: int, dev: float | None = None) -> None:
        """Loss (mean since the last line), learning rate, pace: a hundred lines, a fifth shown."""
        self.losses.append(loss)
        self.tokens += tokens
        steps, seconds = self.settings.steps, time.monotonic() - self.start
        if RANK > 0 or step % max(1, steps // 100) and step < steps and dev is None:
            return
        loss, pace = sum(self.losses) / len(self.losses), self.tokens / max(seconds, 1e-9)
        line = {"step": step, "steps": steps, "loss": loss, "lr": lr, "tokens_per_second": pace}
        line |= {} if dev is None else {"dev": dev}
        with self.log_file.open("a") as file:
            print(json.dumps(line | {"seconds": self.before + seconds}), file=file)
        self.losses = []
        if step % max(1, steps // 20) == 0 or step == steps or dev is not None:
            left = datetime.timedelta(seconds=round(seconds / (step - self.first) * (steps - step)))
            pace = f"lr {lr:.1e}  {pace:,.0f} tokens/s  {left} left"
            pace += "" if dev is None else f"  dev {dev:.4f}"
            print(f"step {step:4d} of {steps}  loss {loss:.3f}  {pace}", flush=True)

    def finish(self, model: LLM2Vec, trained: Trained) -> None:
        """Write what was trained, and the tokenizer that sentence-transformers needs beside it."""
        files = checkpoint_files(model)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            content = (json.dumps(files[name], indent=2) + "\n").encode()
            lora.write_whole(self.folder / name, content)
        trained.write(model.decoder, self.folder)
        (self.folder / "finished").touch()
        for file in (*self.states(), self.folder / "best.safetensors"):
            file.unlink(missing_ok=True)


# --- Commands ----------------------------------------------------------------------------------


def load_for_training(args: argparse.Namespace, is_causal: bool = False, **how) -> LLM2Vec:
    """The model that the flags name; in bfloat16 where the hardware has it, a CPU's too."""
    if args.dtype is None:
        fast = llm2vec.has_bfloat16(torch.device(args.device or llm2vec.default_device()))
        how["dtype"] = torch.bfloat16 if fast else torch.float32
    return llm2vec.load(args, is_causal=is_causal, **how)


def settings_of(stage: str, args: argparse.Namespace) -> Settings:
    """The preset, changed by the flags."""
    presets = STAGES[stage].presets
    if args.preset not in presets:
        raise ValueError(f"--preset {args.preset}: {stage} has {', '.join(presets)}")
    settings = presets[args.preset]
    given = {f.name: getattr(args, f.name, None) for f in fields(Settings)}
    if given["steps"] and given["epochs"]:
        raise ValueError("--steps and --epochs: give one of them")
    settings = with_steps(settings, given["steps"] or settings.steps)
    return replace(settings, **{name: v for name, v in given.items() if v is not None})


def run_stage(args: argparse.Namespace) -> None:
    stage, settings = STAGES[args.command], settings_of(args.command, args)
    output = Path(args.output)
    if args.quantize and args.compile:  # torch would keep decoded weights for the backward pass
        raise ValueError("--compile: not with --quantize nf4, whose 4 bits it would undo")
    if stage.pairs:
        data = read_pairs(args.pairs, args.instructions)
    else:
        data, _ = split_documents(read_documents(args.corpus, args.errors))
    how = {"separator": args.separator} if stage.pairs else {}
    how |= {"device": "cpu"} if args.quantize else {}  # what does not fit on a GPU as it is
    model = load_for_training(args, **how)
    if args.quantize:
        lora.quantize_nf4(model.decoder, args.device or llm2vec.default_device())
    once(lambda: clear(output, args.overwrite))
    stage.run(model, data, settings, output)
    say(f"The adapter is in {output}")
    if stage.encoder and RANK == 0:
        if args.quantize:  # merge into the weights as they were
            how = {"adapters": [*args.adapters, output], "device": "cpu"}
            model.decoder = load_for_training(args, **how).decoder
        save_encoder(model, output / "encoder")


# What SimCSE makes of a model that MNTP did not train, and of one that looks back only.
CONTROLS = [  # name, run folder, is_causal, pooling
    ("simcse alone", "simcse-alone", False, "mean"),
    ("causal + simcse", "simcse-causal", True, "mean"),
    ("causal + simcse, weighted mean", "simcse-causal-weighted", True, "weighted_mean"),
]


def run_everything(args: argparse.Namespace) -> None:
    """The stages in order, scored before and after each; by default on the bundled tiny Llama."""
    output, rows = Path(args.output), {}
    documents, held_out = split_documents(read_documents(args.corpus))

    def score(name: str, model: LLM2Vec, training: float = 0.0) -> None:
        start, which, files = time.monotonic(), ("sts", "masked"), benchmarks.STSB_TEST
        if args.compare:  # the states of words do not depend on how a text is pooled
            plain = type(model) is LLM2Vec and model.pooling == "mean"
            which = benchmarks.BENCHMARKS if plain else ("sts", "articles")
            files = benchmarks.STS_FILES
        scores = benchmarks.evaluate(model, held_out, which, files)
        scores["seconds"] = training + time.monotonic() - start
        rows.setdefault(name, []).append(scores)
        print(f"{name}: {json.dumps(scores)}", flush=True)

    def train(name: str, model: LLM2Vec, stage: str, folder: Path, **changes) -> None:
        settings = replace(settings_of(stage, args), **changes)
        say(f"{stage}: {settings.steps} steps of {settings.batch} x {settings.length} tokens")
        clear(folder, args.overwrite)
        data = read_pairs([PAIRS]) if STAGES[stage].pairs else documents
        STAGES[stage].run(model, data, settings, folder)
        last_line = (folder / "log.jsonl").read_text().splitlines()[-1]
        score(name, model, json.loads(last_line)["seconds"])

    model = load_for_training(args, is_causal=True)
    for name, baseline in benchmarks.baselines(model) if args.compare else [("causal", model)]:
        score(name, baseline)
    model.decoder.config.is_causal = False  # step 1
    score("bidirectional, untrained", model)
    for seed in args.seeds:
        args.seed, folder = seed, output if seed == args.seeds[0] else output / f"seed-{seed}"
        model = model or load_for_training(args)
        for stage in args.stages:
            train(f"+ {stage}", model, stage, folder / stage)
        if folder == output:
            save_encoder(model, output / "encoder")
        model = baseline = None  # room for another one
        for name, where, is_causal, pooling in CONTROLS if args.compare else ():
            control = load_for_training(args, is_causal=is_causal)
            train(name, control, "simcse", folder / where, pooling=pooling)
            del control
    results = rows if len(args.seeds) > 1 else {name: scores for name, [scores] in rows.items()}
    lora.write_whole(output / "results.json", (json.dumps(results, indent=2) + "\n").encode())
    print(f"\n{benchmarks.table(benchmarks.over_seeds(rows))}")


def clear(folder: Path, overwrite: bool) -> None:
    """With --overwrite, remove a run folder, and never any other."""
    if overwrite and (folder / "settings.json").exists():
        shutil.rmtree(folder)


def save_encoder(model: LLM2Vec, folder: Path) -> None:
    model.save(folder)
    print("The encoder is an ordinary checkpoint folder. Try it on your own sentences:")
    example = '"A man plays a guitar." "Someone makes music." "Stocks fell sharply."'
    print(f"  python llm2vec.py similar --model {folder} {example}")
    print(f"  python llm2vec.py encode --model {folder} --input texts.txt --output vectors.npy")


def add_settings(command: argparse.ArgumentParser, stage: Stage) -> None:
    """A flag for each field of Settings that the stage has, with the values of the presets."""
    for f in fields(Settings):
        if any(v not in (None, getattr(stage, key)) for key, v in f.metadata["only"].items()):
            continue
        values = {preset: getattr(s, f.name) for preset, s in stage.presets.items()}
        if len(set(values.values())) == 1:
            values = {"default": next(iter(values.values()))}
        shown = ", ".join(f"{name}: {v}" for name, v in values.items() if v is not None)
        about = f.metadata["help"] + (f" ({shown})" if shown else "")
        kind = next(kind for kind in (int, float, str) if f.type in (kind, kind | None))
        how = {"choices": f.metadata["choices"], "metavar": None if kind is str else "N"}
        command.add_argument("--" + f.name.replace("_", "-"), type=kind, help=about, **how)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python train.py",
        description="Turn a causal language model into a text encoder. Without a command: the "
        "stages in order, by default on the bundled tiny Llama, in minutes.",
    )
    corpus = "a document a line, .jsonl with `text`, a folder of such (default: bundled Wikipedia)"
    overwrite = {"action": "store_true", "help": "start anew instead of going on"}
    add = top.add_argument
    llm2vec.add_model_flags(top, default=TINY)
    add("--stages", nargs="+", choices=STAGES, default=["mntp", "simcse"], help="in this order")
    add("--preset", default="tiny", choices=STAGES["mntp"].presets, help="(default: %(default)s)")
    add("--corpus", default=WIKIPEDIA, help=corpus)
    add("--output", default="runs/tiny", help="run folder (default: %(default)s)")
    add("--steps", type=int, help="steps of each stage (default: its settings)")
    text = "train with each, later ones in folders of their own; print mean and range (default: 0)"
    add("--seeds", type=int, nargs="+", default=[0], metavar="N", help=text)
    add("--compare", action="store_true", help="with every benchmark, baseline and control")
    add("--overwrite", **overwrite)
    top.set_defaults(run=run_everything)
    commands = top.add_subparsers(dest="command", title="stages", metavar="STAGE")
    for name, stage in STAGES.items():
        usage = f"python train.py {name} --model MODEL --output RUN [options]"
        how = {"description": stage.help, "usage": usage, "allow_abbrev": False}
        command = commands.add_parser(name, help=stage.help, **how)
        command.set_defaults(run=run_stage)
        add = command.add_argument
        llm2vec.add_model_flags(command, required=True)
        if stage.pairs:
            text = "JSON lines with query, positive, perhaps negative and instruction, or a folder"
            add("--pairs", nargs="+", default=[PAIRS], metavar="FILE", help=text + " of such files")
            text = "in front of the queries: one for each of --pairs, or one for all"
            add("--instructions", nargs="+", default=[None], metavar="TEXT", help=text)
            text = "between instruction and text (default: as the folder says, else a line break)"
            add("--separator", help=text)
        else:
            add("--corpus", default=WIKIPEDIA, help=corpus)
            text = "what to do with lines that hold no text (default: %(default)s)"
            add("--errors", default="strict", choices=("strict", "skip"), help=text)
        text = "keep the frozen weights in 4 bits while training (nf4): for a small GPU"
        add("--quantize", choices=("nf4",), help=text)
        add("--output", required=True, help="run folder; a run that is there goes on")
        add("--overwrite", **overwrite)
        first = next(iter(stage.presets))
        add("--preset", default=first, choices=stage.presets, help="(default: %(default)s)")
        add_settings(command, stage)
    return top


def main() -> None:
    args = parser().parse_args()
    if WORLD_SIZE > 1 and args.command is None:
        raise ValueError(f"torchrun shares out a stage ({', '.join(STAGES)}), nothing else")
    with processes():
        args.run(args)


if __name__ == "__main__":
    llm2vec.run(main)
