"""The stages of LLM2Vec, from a causal checkpoint to a text encoder.

    python train.py                    all three steps on the bundled tiny Llama, in minutes
    python train.py mntp ...           step 2 on your own model
    python train.py simcse ...         step 3, on top of the adapter of step 2
    python train.py supervised ...     supervised training, on pairs of texts

A stage is a function. It takes a model and data; it returns datasets, and a function for the
gradients of one batch. The loop `fit` adds fresh adapters to frozen weights, trains them and writes
them; the next stage merges them first. To add a stage, write its settings, its function and its
entry in STAGES. `python -m data.benchmarks` scores encoders, and `python -m data.figures` draws the
loss of a run.
"""

import argparse
import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

# Batches differ in length, which leaves gaps in memory; with this setting torch can join them.
# Torch reads it once, when it is imported.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from torch import Tensor, nn

import llm2vec
import lora
from llm2vec import LLM2Vec, contrastive_loss, mask_tokens, mntp_loss, prompt_prefix
from llm2vec_data import benchmarks, compare
from llm2vec_data.checkpoints import TINY
from llm2vec_data.commands import add_settings, check_settings, cli, setting
from llm2vec_data.corpus import WIKIPEDIA, cut_into_blocks, sentences, training_documents
from llm2vec_data.disk import write_json
from llm2vec_data.pairs import PAIRS, read_pairs
from llm2vec_data.processes import RANK, WORLD_SIZE, log, on_main, processes, sum_over_processes
from llm2vec_data.runs import RunFolder, fingerprint

Task = tuple[Sequence[Sequence], Callable[[list, int], tuple[float, int]]]  # datasets, backward
CODE = [llm2vec.__file__, lora.__file__, __file__]  # a run is resumed only with the same code

# --- Settings ----------------------------------------------------------------------------------
# Each field is a flag of the command line. A subclass adds the settings of a stage.


@dataclass
class Settings:
    """The settings of every stage."""

    length: int = setting("tokens in a block (mntp), or in the longest text", 512)
    batch: int = setting("blocks, sentences or pairs in one optimiser step", 32)
    steps: int = setting("optimiser steps", 1000)
    epochs: int | None = setting("passes through the data, instead of --steps", None)
    lr: float = setting("learning rate at its peak", 5e-5)
    warm_up: float = setting(
        "steps of linear warm-up before the linear decay to zero; below 1: a share of --steps", 0.0
    )
    decay_epochs: float | None = setting(
        "passes through the data until the rate is zero, if longer than --steps", None
    )
    rank: int = setting("rank of the adapters", 16)
    alpha: float | None = setting("scaling of the adapters times rank; default: twice rank", None)
    targets: list[str] = setting(
        "projections to adapt and norms to train, by the ends of their names; "
        "default: all seven projections",
        [],
    )
    dropout: float = setting("dropout on the input of the adapters", 0.05)
    attention_dropout: float = setting("dropout on the attention weights", 0.0)
    dev: str | None = setting(
        "STS file, scored every --save-every steps; the best step is kept", None
    )
    patience: int | None = setting("stop after N scores in turn without a new best one", None)
    max_tokens: int = setting(
        "tokens in one forward pass; lower it to save memory", 8192, same_result=True
    )
    recompute: int = setting(
        "layers computed twice to save memory; rises when GPU memory is full", 0, same_result=True
    )
    save_every: int = setting("steps between two saved states", 50, same_result=True)
    seed: int = setting("seed of everything random", 0)

    def __post_init__(self) -> None:
        check_settings(self)

    def for_model(self, model: LLM2Vec) -> "Settings":
        """A copy, with the defaults that depend on the model filled in."""
        return replace(self)


# --- The loop ----------------------------------------------------------------------------------


def fit(
    model: LLM2Vec,
    datasets: Sequence[Sequence],
    backward: Callable[[list, int], tuple[float, int]],
    settings: Settings,
    folder: Path,
) -> None:
    """Train fresh adapters, or other parameters with gradients; write them to `folder`, and merge.

    AdamW without weight decay, linear warm-up and decay, gradients clipped to norm 1. `backward`
    takes a batch and the step number, from 0. It computes this process's part of the gradients,
    and returns its part of the loss and the number of tokens in the batch. With settings.epochs,
    settings.steps is set before the first step.

    Everything random in a step follows from the seed and the step number. So a run that was stopped
    resumes from its newest state, and ends with the same bits as a run that was not.
    """
    batches = Batches(datasets, settings)
    fingerprints = fingerprint(model, datasets, settings, CODE)
    run = RunFolder(folder, settings, fingerprints, lambda: dev_score(model, settings))
    if run.finished:
        log(f"{folder}: finished before; --overwrite trains it anew")
        lora.remove_lora(model)
        lora.load_adapter(model, folder)
        return merge(model, folder)
    if settings.warm_up > settings.steps:
        log(f"--warm-up {settings.warm_up:g} is longer than the run: the rate never reaches --lr")
    torch.manual_seed(settings.seed)
    if not lora.adapted(model):  # --train-adapter loads an adapter before
        options = {"dropout": settings.dropout, "targets": settings.targets or None}
        lora.add_lora(model.decoder, settings.rank, settings.alpha, **options)
    trained = lora.trained(model)  # by name: adapters, and the parameters of other modules
    parameters = list(trained.values())
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0, fused=True)
    with training(model, settings):
        if any(p.dtype != torch.float32 for p in parameters):
            raise ValueError("weights below float32 are too coarse to train: use --dtype float32")
        for step in range(run.restore(trained, optimizer), settings.steps):
            if not run.patient:
                break
            loss, tokens = within_memory(model, settings, step, backward, batches[step])
            loss = sum_over_processes(parameters, loss)
            norm = nn.utils.clip_grad_norm_(parameters, 1.0).item()
            if not math.isfinite(loss + norm):
                run.save(step, model, trained, optimizer)
                message = f"step {step + 1}: the loss is {loss}, the norm of the gradient {norm}"
                raise ValueError(f"{message}; the state before this step is in {folder}")
            lr = learning_rate(step, settings, len(batches.slots))
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
            run.log(step + 1, loss, lr, tokens, run.score(step + 1, trained))
            if (step + 1) % settings.save_every == 0:
                run.save(step + 1, model, trained, optimizer)
        run.finish(model, trained)
    merge(model, folder)


def merge(model: LLM2Vec, folder: Path) -> None:
    """Merge the adapters, and freeze the decoder; adapters of 4-bit weights are not merged."""
    if not lora.is_quantized(model):
        lora.merge_lora(model)
    model.decoder.requires_grad_(False).name_or_path = None  # no checkpoint has these weights
    model.made_of.append(folder)


def dev_score(model: LLM2Vec, settings: Settings) -> float:
    return next(iter(benchmarks.sts(model, settings.dev).values()))


@contextlib.contextmanager
def training(model: LLM2Vec, settings: Settings) -> Iterator[None]:
    """Set up a model for training, and restore it after; an error removes its adapters."""
    decoder, was_training, recompute = model.decoder, model.training, model.decoder.recompute
    before = dict(vars(decoder.config))
    decoder.config.attention_dropout = settings.attention_dropout
    decoder.recompute = min(settings.recompute, len(decoder.layers))
    try:
        yield
    except BaseException:
        lora.remove_lora(model)
        decoder.requires_grad_(False)
        raise
    finally:
        model.train(was_training)
        vars(decoder.config).update(before)
        decoder.recompute = recompute


def within_memory(
    model: LLM2Vec, settings: Settings, step: int, backward: Callable, batch: list
) -> tuple[float, int]:
    """Call `backward` on a batch; if GPU memory runs out, again with more layers recomputed.

    Each try adds an eighth of the layers, and draws the same random numbers. So the result has the
    same bits as with enough layers recomputed from the start.
    """
    decoder, layers = model.decoder, len(model.decoder.layers)
    while True:
        torch.manual_seed(seed_of(step, settings))
        model.train()
        try:
            return backward(batch, step)
        except torch.OutOfMemoryError as error:
            if WORLD_SIZE > 1 or decoder.recompute >= layers:  # other processes would wait
                message = f"step {step + 1}: out of memory"
                message += f"; lower --max-tokens ({settings.max_tokens})"
                raise ValueError(f"{message} or --length ({settings.length}): {error}") from None
        model.zero_grad()
        torch.cuda.empty_cache()
        decoder.recompute = min(layers, decoder.recompute + math.ceil(layers / 8))
        log(f"memory is short: from here on as with --recompute {decoder.recompute}")


def seed_of(step: int, settings: Settings) -> int:
    return settings.seed + 1_000_003 * (step + 1)


def learning_rate(step: int, settings: Settings, epoch: int = 0) -> float:
    """Linear from 0 to `lr` in warm_up steps, then linear to 0; step counts from 0.

    It is 0 at the end of the run, or after decay_epochs epochs of `epoch` steps, if that is later.
    """
    end = max(settings.steps, round((settings.decay_epochs or 0) * epoch))
    warm_up = settings.warm_up * (1 if settings.warm_up >= 1 else settings.steps)
    rise = (step + 1) / max(1, round(warm_up))
    fall = (end - step) / max(1, end - round(warm_up))
    return settings.lr * min(rise, fall)


class Batches:
    """The batch of each step, from one dataset; no item comes twice in an epoch.

    The order follows from seed and epoch. The last items of a dataset, too few for a batch, are
    left out of that epoch. A dataset smaller than a batch is one batch.
    """

    def __init__(self, datasets: Sequence[Sequence], settings: Settings):
        self.datasets, self.slots = datasets, []  # of an epoch: dataset, first item, end
        for d, items in enumerate(datasets):
            n = min(settings.batch, len(items))
            self.slots += [(d, i, i + n) for i in range(0, len(items) - n + 1, n or 1) if n]
        if not self.slots:
            raise ValueError("nothing to train on: no item in any dataset")
        if settings.epochs:
            settings.steps = settings.epochs * len(self.slots)
            left = sum(len(items) for items in datasets) - sum(j - i for _, i, j in self.slots)
            log(f"{settings.steps} steps; each epoch leaves out {left} items, other ones each time")
        self.settings = settings

    def __getitem__(self, step: int) -> list:
        epoch, slot = divmod(step, len(self.slots))
        generator = torch.Generator().manual_seed(self.settings.seed + 1_000_003 * epoch)
        orders = [torch.randperm(len(items), generator=generator) for items in self.datasets]
        if len(orders) > 1:  # the batches of several datasets take turns at random
            slot = int(torch.randperm(len(self.slots), generator=generator)[slot])
        d, first, end = self.slots[slot]
        return [self.datasets[d][i] for i in orders[d][first:end].tolist()]


# --- Step 2: masked next-token prediction ------------------------------------------------------


CORPUS = "text file, one document a line; JSON lines, .json or .csv with `text`; or a folder of "
CORPUS += "such files; all may be .gz (default: bundled Wikipedia)"


@dataclass
class CorpusSettings(Settings):
    """The settings of a stage that learns from text."""

    corpus: str | None = setting(
        CORPUS,
        None,
        same_result=True,  # the fingerprint has the text itself
    )
    errors: str = setting(
        "stop at a line without text, or skip it", "strict", ("strict", "skip"), same_result=True
    )


def read_corpus(settings: CorpusSettings) -> list[str]:
    """The documents to train on, without the held-out ones."""
    return training_documents(settings.corpus or WIKIPEDIA, settings.errors)


@dataclass
class MNTPSettings(CorpusSettings):
    mask_rate: float | None = setting(
        "share of tokens to predict; default: 0.8 for mistral, else 0.2", None
    )
    mask_share: float | None = setting(
        "share of these that becomes the mask token; default: 1 for mistral, else 0.8", None
    )
    swap_share: float | None = setting(
        "share of these that becomes random tokens; default: 0 for mistral, else 0.1", None
    )
    mask_token: str = setting("the plain token that replaces masked tokens", "_")

    def for_model(self, model: LLM2Vec) -> "MNTPSettings":
        """The paper masks more of Mistral's tokens, all with the mask token (its appendix)."""
        mistral = model.decoder.config.model_type == "mistral"
        rates = {"mask_rate": 0.8, "mask_share": 1.0, "swap_share": 0.0}
        rates = rates if mistral else {"mask_rate": 0.2, "mask_share": 0.8, "swap_share": 0.1}
        missing = {k: v for k, v in rates.items() if getattr(self, k) is None}
        return replace(super().for_model(model), **missing)


def mntp(model: LLM2Vec, documents: Sequence[str], settings: MNTPSettings) -> Task:
    """Teach a model, now bidirectional, to use the text on both sides of a token."""
    mask_id, V = benchmarks.mask_id_of(model, settings.mask_token), model.decoder.config.vocab_size
    added = model.tokenizer.get_added_tokens_decoder()
    special = torch.tensor([i for i, token in added.items() if token.special] or [-1])

    def backward(batch: list[Tensor], step: int) -> tuple[float, int]:
        ids, seed = torch.stack(batch), seed_of(step, settings)
        generator = torch.Generator().manual_seed(seed)  # the same masks in all processes
        rates = {"rate": settings.mask_rate, "replace": (settings.mask_share, settings.swap_share)}
        masked, chosen = mask_tokens(
            ids, mask_id, V, **rates, maskable=~torch.isin(ids, special), generator=generator
        )
        total, loss = int(chosen.sum()), 0.0  # total: in all processes
        torch.manual_seed(seed + 1 + RANK)  # another dropout in each process
        n = max(1, settings.max_tokens // settings.length)
        shares = (t[RANK::WORLD_SIZE].to(model.decoder.device) for t in (masked, ids, chosen))
        for part in zip(*(share.split(n) for share in shares), strict=True):
            if len(part[0]):  # there may be more processes than blocks
                part_loss = mntp_loss(model.decoder, *part, total=total)
                part_loss.backward()
                loss += part_loss.item()
        return loss, ids.numel()

    return [blocks_of(model, documents, settings)], backward


def blocks_of(model: LLM2Vec, documents: Sequence[str], settings: Settings) -> Tensor:
    """Token ids of documents in random order, end to end, cut into blocks: (number, length).

    Only the documents that the run will read are tokenised.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(len(documents), generator=generator).tolist()
    chunks = (order[i : i + 256] for i in range(0, len(order), 256))
    rows = (e.ids for c in chunks for e in model.tokenizer.encode_batch([documents[i] for i in c]))
    limit = None if settings.epochs else settings.steps * settings.batch
    return cut_into_blocks(rows, settings.length, limit)


# --- Step 3: SimCSE ----------------------------------------------------------------------------


@dataclass
class EncoderSettings(Settings):
    pooling: str | None = setting(
        "pooling of states to a vector; default: from the folder, else mean", None, llm2vec.POOLING
    )
    include_prompt: bool | None = setting(
        "pool BOS, template and instruction too, as all servers do; default: from the folder",
        None,
    )

    def for_model(self, model: LLM2Vec) -> "EncoderSettings":
        whole = model.include_prompt if self.include_prompt is None else self.include_prompt
        options = {"pooling": self.pooling or model.pooling, "include_prompt": whole}
        return replace(super().for_model(model), **options)


@dataclass
class ContrastiveSettings(EncoderSettings):
    scale: float = setting("inverse temperature of the loss", 20.0)


@dataclass
class SimCSESettings(ContrastiveSettings, CorpusSettings):
    split: str = setting("take each sentence or line as a text", "sentence", ("sentence", "line"))


def simcse(model: LLM2Vec, documents: Sequence[str], settings: SimCSESettings) -> Task:
    """Teach a model that a sentence is like itself and unlike others.

    Equal sentences of the corpus count as one, so that no sentence of a batch is its own negative.
    """
    split = str.splitlines if settings.split == "line" else sentences
    texts = dict.fromkeys(text.strip() for document in documents for text in split(document))
    texts = [text for text in texts if text]
    if len(texts) < 2:
        raise ValueError("the corpus has fewer than two different sentences: nothing to contrast")
    if settings.batch < 2:
        raise ValueError(f"--batch {settings.batch}: a sentence needs others as its negatives")
    apply_settings(model, texts, settings)

    def backward(batch: list[str], step: int) -> tuple[float, int]:
        rows = 2 * model.rows(batch, max_length=settings.length)  # two dropout views
        same = known_right(2 * batch, rows, len(batch)).to(model.decoder.device)

        def loss_of(vectors: Tensor) -> Tensor:
            return contrastive_loss(*vectors.chunk(2), scale=settings.scale, duplicates=same)

        return backward_through_encoder(model, rows, loss_of, settings.max_tokens)

    return [texts], backward


def apply_settings(model: LLM2Vec, texts: Sequence[str], settings: EncoderSettings) -> None:
    """Set the pooling of a model, and its max_length to at least that of training."""
    model.pooling, model.include_prompt = settings.pooling, settings.include_prompt
    model.max_length = max(model.max_length, settings.length)
    rows = model.rows(texts[:: math.ceil(len(texts) / 10_000)], max_length=2**31)
    lengths = sorted(len(ids) for ids, _ in rows)  # at most ten thousand texts
    cut = sum(n > settings.length for n in lengths) / len(lengths)
    summary = f"of {lengths[len(lengths) // 2]} tokens in the median and at most {lengths[-1]}"
    log(f"{len(texts)} texts, {summary}; {cut:.1%} are cut at --length {settings.length}")


def known_right(texts: Sequence[str], rows: Sequence[tuple[list, list]], n: int) -> Tensor:
    """Right answers to a query besides its positive: (n, candidates) booleans.

    texts and rows hold n queries, their n positives and any number of negatives, in this order.
    The right answers are the text of the query itself, whole or cut, and the positives of pairs
    with the same query.
    """
    seen, names, right = {}, [], {}
    for text, (ids, pooled) in zip(texts, rows, strict=True):
        cut = tuple(i for i, is_pooled in zip(ids, pooled, strict=True) if is_pooled)
        names.append({seen.setdefault(name, len(seen)) for name in (text, cut)})
    queries = [tuple(ids) for ids, _ in rows[:n]]
    for i, query in enumerate(queries):
        right.setdefault(query, set()).update(names[i] | names[n + i])
    table = [[not right[query].isdisjoint(name) for name in names[n:]] for query in queries]
    return torch.tensor(table).fill_diagonal_(False)


def backward_through_encoder(
    model: LLM2Vec, rows: list, loss_of: Callable[[Tensor], Tensor], max_tokens: int
) -> tuple[float, int]:
    """Compute the gradients of a contrastive batch.

    Returns this process's share of the loss, and the number of tokens in the batch. loss_of takes
    the vectors of all rows, (len(rows), d), in their order. Rows of similar length are encoded
    together. A batch of more than max_tokens, or shared by processes, goes to `gradcache`.
    """
    lengths = [len(ids) for ids, _ in rows]
    mine = sorted(range(len(rows)), key=lambda i: -lengths[i])[RANK::WORLD_SIZE]
    min_tokens = llm2vec.min_batch_tokens(model.decoder)
    by_length = llm2vec.batches_by_length([lengths[i] for i in mine], max_tokens, min_tokens)
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
    """The same in parts, with exact gradients and all candidates (GradCache, Gao et al. 2021).

    Encode the parts without keeping activations; take the gradient of the loss with respect to the
    vectors; encode each part again, with the same dropout, and pass the gradient of its vectors on.
    """
    seed = int(torch.randint(2**62, ()))

    def vectors_of(part: list[int]) -> Tensor:
        torch.manual_seed(seed + part[0])
        return model.embed([rows[i] for i in part])

    vectors = torch.zeros(len(rows), model.width, device=model.decoder.device)
    with torch.no_grad():
        for part in parts:
            vectors[part] = vectors_of(part)
    if WORLD_SIZE > 1:
        torch.distributed.all_reduce(vectors)  # in each process, the others' vectors are zeros
    loss = loss_of(vectors.requires_grad_()) / WORLD_SIZE  # the same in all processes
    loss.backward()
    for part in parts:
        vectors_of(part).backward(WORLD_SIZE * vectors.grad[part])
    return loss.item()


# --- Supervised contrastive learning -----------------------------------------------------------


@dataclass
class SupervisedSettings(ContrastiveSettings):
    pairs: list[str] = setting(
        "JSON lines or .csv with query, positive, perhaps negative and instruction (or the names "
        "that other trainers use), or a folder of such files (default: bundled pairs)",
        [],
        same_result=True,
    )
    instructions: list[str] = setting(
        "text before the queries: one for each of --pairs, or one for all", [], same_result=True
    )


def supervised(
    model: LLM2Vec, datasets: Sequence[Sequence[dict]], settings: SupervisedSettings
) -> Task:
    """Teach a model that a query is like its answer.

    datasets: from `read_pairs`. A batch comes from one of them. All positives and hard negatives
    of the batch are candidates for each of its queries (section 4 of the paper), except other right
    answers to the query. A pair without an instruction gets the encoder's prompt.
    """
    sides = [[p["query"], p["positive"], *p["negatives"]] for pairs in datasets for p in pairs]
    if settings.batch < 2 and max(map(len, sides)) == 2:
        raise ValueError(f"--batch {settings.batch}: a pair without negatives needs another")
    apply_settings(model, [text for side in sides for text in side], settings)
    for name, key in (("query", "instruction"), ("document", "answer_instruction")):
        instructions = {pair.get(key) or "" for pairs in datasets for pair in pairs}
        if len(instructions) == 1 and instructions != {""}:
            model.prompts[name] = prompt_prefix(instructions.pop(), model.separator)
    prompts = {name: model.prompts.get(name) for name in ("query", "document")}

    def backward(pairs: list[dict], step: int) -> tuple[float, int]:
        texts = [(p["query"], p["instruction"] or prompts["query"]) for p in pairs]
        answers = [(p["positive"], p.get("answer_instruction")) for p in pairs]
        answers += [(n, p.get("answer_instruction")) for p in pairs for n in p["negatives"]]
        texts += [(text, prompt or prompts["document"]) for text, prompt in answers]
        rows = [model.rows([text], prompt, settings.length)[0] for text, prompt in texts]
        right = known_right([text for text, _ in texts], rows, len(pairs)).to(model.decoder.device)

        def loss_of(vectors: Tensor) -> Tensor:
            query, positive = vectors[: 2 * len(pairs)].chunk(2)
            negative = vectors[2 * len(pairs) :]
            return contrastive_loss(query, positive, negative, settings.scale, right)

        return backward_through_encoder(model, rows, loss_of, settings.max_tokens)

    return datasets, backward


# --- The table of stages -----------------------------------------------------------------------


class Stage(NamedTuple):
    task: Callable[[LLM2Vec, Any, Any], Task]  # from a model, its data and the settings
    help: str
    read: Callable[[Any], Any]  # the data that the settings name
    presets: dict[str, Settings]  # the first is the default; `train.py` without a stage: `tiny`
    encoder: bool = True  # write an encoder, too, not only the adapter

    def run(self, model: LLM2Vec, data: Any, settings: Settings, folder: Path) -> None:
        """Train the adapter of the stage on a model, write it to `folder`, and merge it."""
        settings = settings.for_model(model)
        if settings.dev and len(set(benchmarks.read_sts(settings.dev)[0])) == 1:
            raise ValueError(f"{settings.dev}: all scores are equal, nothing to rank")
        torch.manual_seed(settings.seed)  # for modules that the task adds
        datasets, backward = self.task(model, data, settings)
        fit(model, datasets, backward, settings, folder)
        model.heads.clear()


# `paper` has the numbers of the paper's appendix. `tiny` is for the bundled model: such a small
# model needs high learning rates, and more dropout, or it solves the task of SimCSE at once.
# `laptop` is for SmolLM2-135M on two cores, and was chosen on STS-B dev. With a scale of 20 the
# loss of SimCSE is near zero in ten steps; with 10 the model learns for longer. `gpu` trains the
# same model for seven minutes on an H200, with the paper's steps and batches of MNTP. `one-word` is
# for a causal instruct model with the template one-word-example. It trains only the last norm, a
# number for each dimension: the few dimensions in which all answers are alike then count for less.
# Adapters at the rates above lose the effect of the prompt.
SMOLLM2 = {"attention_dropout": 0.3, "dropout": 0.0, "scale": 10.0}
ONE_WORD = {"pooling": "last", "targets": ["norm"], "attention_dropout": 0.1, "dropout": 0.0}
STAGES = {
    "mntp": Stage(
        mntp,
        "Step 2: masked next-token prediction, on a model or on top of adapters.",
        read_corpus,
        {
            "paper": MNTPSettings(512, 32, lr=5e-5),
            "tiny": MNTPSettings(64, 16, 120, lr=2e-3, warm_up=0.08),
            "laptop": MNTPSettings(128, 8, 250, lr=2e-3, warm_up=0.08, dropout=0.0),
            "gpu": MNTPSettings(512, lr=1e-3, warm_up=0.05, dropout=0.0, max_tokens=32768),
        },
        encoder=False,
    ),
    "simcse": Stage(
        simcse,
        "Step 3: unsupervised contrastive learning; also writes the encoder.",
        read_corpus,
        {
            "paper": SimCSESettings(128, 128, lr=3e-5, attention_dropout=0.3),
            "tiny": SimCSESettings(24, 64, 40, lr=5e-3, warm_up=0.25, attention_dropout=0.6),
            "laptop": SimCSESettings(32, 32, 80, lr=1e-3, warm_up=0.1, **SMOLLM2),
            "gpu": SimCSESettings(64, 128, 400, lr=5e-4, warm_up=0.1, max_tokens=32768, **SMOLLM2),
            "one-word": SimCSESettings(80, 32, 50, lr=0.1, warm_up=0.1, **ONE_WORD),
        },
    ),
    "supervised": Stage(
        supervised,
        "The fourth stage: contrastive learning on pairs; also writes the encoder.",
        lambda settings: read_pairs(settings.pairs or [PAIRS], settings.instructions or [None]),
        {
            "paper": SupervisedSettings(512, 512, lr=2e-4, warm_up=0.3, decay_epochs=3, scale=50.0),
            "tiny": SupervisedSettings(64, 32, 60, lr=2e-3, warm_up=0.17),
            "laptop": SupervisedSettings(64, 32, 40, lr=5e-4, warm_up=0.125, dropout=0.0),
        },
    ),
}


# --- Commands ----------------------------------------------------------------------------------


def load_for_training(args: argparse.Namespace, **options) -> LLM2Vec:
    """The model that the flags name, in bfloat16 if the hardware (also a CPU) has it."""
    if args.dtype is None and llm2vec.has_bfloat16(args.device or llm2vec.default_device()):
        options["dtype"] = torch.bfloat16
    return llm2vec.load(args, **options)


def settings_of(stage: str, args: argparse.Namespace) -> Settings:
    """The preset, changed by the flags."""
    presets = STAGES[stage].presets
    if args.preset not in presets:
        raise ValueError(f"--preset {args.preset}: {stage} has {', '.join(presets)}")
    settings = presets[args.preset]
    given = {f.name: getattr(args, f.name, None) for f in fields(settings)}
    if given["steps"] and given["epochs"]:
        raise ValueError("--steps and --epochs: give one of them")
    return replace(settings, **{name: v for name, v in given.items() if v is not None})


def run_stage(args: argparse.Namespace) -> None:
    stage, settings = STAGES[args.command], settings_of(args.command, args)
    output = Path(args.output)
    if args.quantize and args.compile:  # torch would keep decoded weights for the backward pass
        raise ValueError("--compile: not with --quantize nf4: decoded weights would stay in memory")
    data = stage.read(settings)
    model = load_for_training(args, **({"device": "cpu"} if args.quantize else {}))
    if args.quantize:  # the whole model may not fit on the GPU
        lora.quantize_nf4(model, args.device or llm2vec.default_device())
    if args.train_adapter:
        lora.load_adapter(model, args.train_adapter)
    on_main(lambda: clear(output, args.overwrite))
    stage.run(model, data, settings, output)
    log(f"The trained weights are in {output}")
    if stage.encoder and RANK == 0:
        if args.quantize:  # merge into the original weights
            options = {"adapters": [*args.adapters, output], "device": "cpu"}
            model.cpu().decoder = load_for_training(args, **options).decoder
        save_encoder(model, output / "encoder")


def run_everything(args: argparse.Namespace) -> None:
    """Train the stages in order, with scores before and after each; default: the bundled Llama."""
    output, held_out = Path(args.output), benchmarks.held_out_of(args.corpus or WIKIPEDIA)

    def score(name: str, model: LLM2Vec, training: float = 0.0, **seed: int) -> None:
        start, which, files = time.monotonic(), ("sts", "masked"), benchmarks.STSB_TEST
        if args.compare:  # the states of words do not depend on the pooling
            plain = type(model) is LLM2Vec and model.pooling == "mean"
            which = benchmarks.BENCHMARKS if plain else ("sts", "articles")
            files = benchmarks.STS_FILES
        scores = seed | benchmarks.evaluate(model, held_out, which, files)
        scores["seconds"] = training + time.monotonic() - start
        run["rows"].setdefault(name, []).append(scores)
        print(f"{name}: {json.dumps(scores)}", flush=True)

    def train(name: str, model: LLM2Vec, stage: str, folder: Path, **changes) -> None:
        settings = replace(settings_of(stage, args), **changes)
        log(f"{stage}: {settings.steps} steps of {settings.batch} x {settings.length} tokens")
        clear(folder, args.overwrite)
        STAGES[stage].run(model, STAGES[stage].read(settings), settings, folder)
        last_line = (folder / "log.jsonl").read_text().splitlines()[-1]
        run["settings"].setdefault(folder.name, compare.settings_in(folder))
        score(name, model, json.loads(last_line)["seconds"], seed=settings.seed)

    model = load_for_training(args, is_causal=True)
    run = compare.describe("python train.py", model)
    plain = compare.causal_row(model)
    for name, baseline in compare.baselines(model) if args.compare else [(plain, model)]:
        score(name, baseline)
    if not args.is_causal:
        model.decoder.config.is_causal = False  # step 1
        score(compare.UNTRAINED, model)
    for seed in args.seeds:
        args.seed, folder = seed, output if seed == args.seeds[0] else output / f"seed-{seed}"
        model = model or load_for_training(args)
        for stage in args.stages:
            train(f"+ {stage}", model, stage, folder / stage)
        if folder == output:
            save_encoder(model, output / "encoder")
        model = baseline = None  # free the memory for the next model
        for name, is_causal, pooling in compare.CONTROLS if args.compare else ():
            control = load_for_training(args, is_causal=is_causal)
            control_folder = folder / compare.folder_name(name)
            train(name, control, "simcse", control_folder, pooling=pooling)
            del control
    write_json(output / "results.json", {"runs": [run]})
    print(f"\n{compare.table(compare.over_seeds(run['rows']))}")


def clear(folder: Path, overwrite: bool) -> None:
    """With --overwrite, remove a folder, if it is a run folder."""
    if overwrite and (folder / "settings.json").exists():
        shutil.rmtree(folder)


def save_encoder(model: LLM2Vec, folder: Path) -> None:
    model.save(folder)
    print("The encoder is an ordinary checkpoint folder. Try it on your own sentences:")
    example = '"A man plays a guitar." "Someone makes music." "Stocks fell sharply."'
    print(f"  python llm2vec.py similar --model {folder} {example}")
    print(f"  python llm2vec.py encode --model {folder} --input texts.txt --output vectors.npy")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python train.py",
        description="Turn a causal language model into a text encoder. Without a stage: MNTP and "
        "SimCSE, or --stages, by default on the bundled tiny Llama, in minutes.",
    )
    overwrite = {"action": "store_true", "help": "delete the run folder and start again"}
    add = top.add_argument
    llm2vec.add_model_flags(top, default=TINY)
    text = "stages in order (default: mntp simcse)"
    add("--stages", nargs="+", choices=STAGES, default=["mntp", "simcse"], help=text)
    add("--preset", default="tiny", choices=STAGES["mntp"].presets, help="(default: %(default)s)")
    add("--corpus", help=CORPUS)
    add("--output", default="runs/tiny", help="run folder (default: %(default)s)")
    add("--steps", type=int, help="steps of each stage (default: its settings)")
    text = "train with each seed, each in its folder; print mean and range (default: 0)"
    add("--seeds", type=int, nargs="+", default=[0], metavar="N", help=text)
    add("--compare", action="store_true", help="add all benchmarks, baselines and controls")
    add("--overwrite", **overwrite)
    top.set_defaults(run=run_everything)
    commands = top.add_subparsers(dest="command", title="stages", metavar="STAGE")
    for name, stage in STAGES.items():
        usage = f"python train.py {name} --model MODEL --output RUN [options]"
        options = {"description": stage.help, "usage": usage, "allow_abbrev": False}
        command = commands.add_parser(name, help=stage.help, **options)
        command.set_defaults(run=run_stage)
        add = command.add_argument
        llm2vec.add_model_flags(command, required=True)
        text = "adapter to train further, with its rank and dropout, instead of a fresh one"
        add("--train-adapter", metavar="ADAPTER", help=text)
        text = "keep the frozen weights in 4 bits while training (nf4): for a small GPU"
        add("--quantize", choices=("nf4",), help=text)
        add("--output", required=True, help="run folder; an unfinished run in it is resumed")
        add("--overwrite", **overwrite)
        first = next(iter(stage.presets))
        add("--preset", default=first, choices=stage.presets, help="(default: %(default)s)")
        add_settings(command, stage.presets)
    return top


def main() -> None:
    args = parser().parse_args()
    if WORLD_SIZE > 1 and args.command is None:
        raise ValueError(f"torchrun shares out a stage ({', '.join(STAGES)}), nothing else")
    with processes():
        args.run(args)


if __name__ == "__main__":
    cli(main)
