"""Scores of an encoder: similar sentences, found articles, topics, words, masked tokens.

    python -m data.benchmarks --model MODEL [--adapters ...] [--baselines] [--output FILE]

    sts               Spearman's rho of cosines against human judgements, by task
    articles          Wikipedia: description to introduction, and topics
    words             a linear classifier on frozen word vectors: parts of speech, entities
    masked_accuracy   masked tokens predicted correctly
    evaluate          all of these, as scores by name

Nothing is chosen on a test set: the one free number of the probes, the strength of regularisation,
is chosen on a part of their training data.
"""

import argparse
import json
import re
import time
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm2vec import (
    POOLING,
    LLM2Vec,
    add_model_flags,
    cli,
    load,
    mask_tokens,
    word_states,
)
from llm2vec_data.compare import (
    add_results,
    baselines,
    check_weights,
    describe,
    settings_in,
    table,
)
from llm2vec_data.corpus import WIKIPEDIA, cut_into_blocks, read_documents, split_documents
from llm2vec_data.disk import lines_of
from llm2vec_data.metrics import entity_f1, ndcg, recall, spearman

STS = Path(__file__).parent / "sts"
STSB_DEV, STSB_TEST = STS / "stsb-dev.tsv", STS / "stsb-test.tsv"
STS_FILES = [*sorted(STS.glob("sts1*.tsv")), STSB_TEST]
WORDS = Path(__file__).parent / "words"
EWT = WORDS / "ewt-pos-dev.tsv", WORDS / "ewt-pos-test.tsv"
WNUT = WORDS / "wnut17-ner-train.tsv", WORDS / "wnut17-ner-dev.tsv"
COLUMNS = {"POS": EWT, "NER": WNUT}  # by score: training file, test file


def read_lines(path: str | Path, expected: str, parse: Callable[[str], Any]) -> list:
    """Call `parse` on each line of a file; an error names the file, the line and `expected`."""
    found = []
    for number, line in enumerate(lines_of(path), start=1):
        try:
            found.append(parse(line.decode("utf-8-sig").rstrip("\r\n")))
        except Exception:
            message = f"expected {expected}, got {line!r:.60}"
            raise ValueError(f"{path}, line {number}: {message}") from None
    return found


def unit_vectors(encoder: LLM2Vec, texts: Sequence[str]) -> np.ndarray:
    """Vectors of length 1, (N, d) float64. Raises ValueError if one is not finite."""
    vectors = encoder.encode(texts).astype(np.float64)
    finite = np.isfinite(vectors).all(1)
    if not finite.all():
        raise ValueError(f"NaN or infinity in the vector of {texts[finite.argmin()]!r:.60}")
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)


# --- Similar sentences -------------------------------------------------------------------------


def read_sts(path: str | Path) -> tuple[np.ndarray, list[str], list[str]]:
    """Gold scores and the two sides of a file of `score<TAB>sentence<TAB>sentence` lines."""

    def parse(line: str) -> tuple[float, str, str]:
        score, left, right, *_ = line.split("\t")
        if not np.isfinite(float(score)):
            raise ValueError
        return float(score), left, right

    pairs = read_lines(path, "score<TAB>sentence<TAB>sentence", parse)
    if len(pairs) < 2:
        raise ValueError(f"{path}: fewer than two pairs")
    gold, left, right = map(list, zip(*pairs, strict=True))
    return np.array(gold), left, right


def sts(encoder: LLM2Vec, files: str | Path | Sequence[str | Path] = STSB_TEST) -> dict[str, float]:
    """Score an encoder on files of sentence pairs.

    Files named sts12-*.tsv make one task, STS12, and so on; any other file is a task of its name.
    The score of a task is Spearman's rho of cosine against gold over all of its pairs together
    (`all` in the SimCSE paper, Gao et al. 2021, appendix B); `STS` is the mean of several tasks.
    Tasks named stsb also give `alignment`, the mean squared distance of pairs with a gold score of
    4 or more, and `uniformity`, the log of the mean of exp(-2 squared distance) over all pairs of
    sentences. Both are on unit vectors; lower is better (Wang & Isola 2020, arXiv 2005.10242).
    """
    tasks: dict[str, tuple[list, list, list]] = {}
    for file in [files] if isinstance(files, (str, Path)) else files:
        stem = Path(file).stem
        name = re.sub(r"^sts(\d\d)(-.*)?$", r"STS\1", stem)
        if name in tasks and name == stem:
            raise ValueError(f"{file}: a second file named {name}: two scores with one name")
        task = tasks.setdefault(name, ([], [], []))
        for all_of_it, more in zip(task, read_sts(file), strict=True):
            all_of_it.extend(more)
    texts = list(dict.fromkeys(t for _, a, b in tasks.values() for t in (*a, *b)))
    index = {text: i for i, text in enumerate(texts)}
    unit, scores = unit_vectors(encoder, texts), {}
    for name, (gold, *sides) in tasks.items():
        left, right = ([index[text] for text in side] for side in sides)
        a, b = unit[left], unit[right]
        scores[name] = spearman((a * b).sum(1), gold)
        if name.startswith("stsb"):
            close = np.array(gold) >= 4
            distance = ((a - b) ** 2).sum(1)[close]
            vectors = unit[np.union1d(left, right)]
            pairs = (vectors @ vectors.T)[np.triu_indices(len(vectors), 1)]
            scores["alignment"] = float(distance.mean()) if close.any() else float("nan")
            scores["uniformity"] = float(np.log(np.exp(-4 + 4 * pairs).mean()))
    if len(tasks) > 1:
        scores = {"STS": float(np.mean([scores[name] for name in tasks])), **scores}
    return scores


# --- Articles ----------------------------------------------------------------------------------


def read_articles(path: str | Path) -> list[dict[str, str]]:
    """The text, description and topic of each JSON line that has all three."""

    def parse(line: str) -> dict[str, str]:
        record = json.loads(line)
        return {key: record[key].strip() for key in ("text", "description", "topic")}

    expected = "a JSON object with the strings text, description and topic"
    return [record for record in read_lines(path, expected, parse) if all(record.values())]


def articles(
    encoder: LLM2Vec, path: str | Path = WIKIPEDIA, candidates: int = 1000
) -> dict[str, float]:
    """Score an encoder on encyclopaedia articles, see `read_articles`.

    Retrieval: the description of each held-out article (see `split_documents`) has to find its text
    among `candidates`; the other candidates are training articles. Recall@1, recall@10, nDCG@10.
    Topics: the accuracy, on held-out articles, of a linear probe that was trained on the other
    candidates.
    """
    records = read_articles(path)
    held_out = set(split_documents([record["text"] for record in records])[1])
    held = [record for record in records if record["text"] in held_out]
    rest = [record for record in records if record["text"] not in held_out]
    spread = np.linspace(0, len(rest), candidates - len(held), endpoint=False)
    chosen = held + [rest[int(i)] for i in spread]
    vectors = unit_vectors(encoder, [record["text"] for record in chosen])

    descriptions = [record["description"].lower() for record in chosen]
    queries = [i for i in range(len(held)) if descriptions.count(descriptions[i]) == 1]
    found = unit_vectors(encoder, [chosen[i]["description"] for i in queries]) @ vectors.T
    relevance = np.arange(len(chosen)) == np.array(queries)[:, None]
    scores = {f"recall@{k}": recall(relevance, found, k) for k in (1, 10)}
    scores["nDCG@10"] = ndcg(relevance, found, 10)

    topics = np.array([record["topic"] for record in chosen])
    named = np.flatnonzero(topics != "Uncategorized")
    kinds, labels = np.unique(topics[named], return_inverse=True)
    test, device = torch.from_numpy(named < len(held)), encoder.decoder.device
    x, y = torch.from_numpy(vectors[named]).float(), torch.from_numpy(labels)
    train = (side[~test].to(device) for side in (x, y))
    guess = linear_probe(*train, x[test].to(device), len(kinds)).cpu()
    scores["topics"] = float((guess == y[test]).float().mean())
    return scores


def linear_probe(x: Tensor, y: Tensor, x_test: Tensor, classes: int) -> Tensor:
    """Labels for x_test (M, d) by multinomial logistic regression on x (N, d), y (N,): (M,).

    Features are standardised. The weight of the squared norm is the best of four powers of ten, by
    cross-entropy on every fifth example of the training data.
    """
    mean, spread = x.mean(0), x.std(0).clamp_min(1e-6)
    x, x_test = (x - mean) / spread, (x_test - mean) / spread

    def train(x: Tensor, y: Tensor, weight: float) -> nn.Linear:
        linear = nn.Linear(x.shape[1], classes, device=x.device)
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        options = {"max_iter": 50, "history_size": 10, "line_search_fn": "strong_wolfe"}
        search = torch.optim.LBFGS(linear.parameters(), **options)

        def loss() -> Tensor:
            search.zero_grad()
            value = F.cross_entropy(linear(x), y) + weight * linear.weight.square().sum()
            value.backward()
            return value

        search.step(loss)
        return linear.requires_grad_(False)

    dev = torch.arange(len(x), device=x.device) % 5 == 0
    weights = (1e-4, 1e-3, 1e-2, 1e-1)
    tried = (train(x[~dev], y[~dev], weight) for weight in weights)
    losses = [F.cross_entropy(linear(x[dev]), y[dev]).item() for linear in tried]
    return train(x, y, weights[int(np.argmin(losses))])(x_test).argmax(1)


# --- Words -------------------------------------------------------------------------------------


def read_columns(path: str | Path) -> list[tuple[list[str], list[str]]]:
    """The words and labels of each sentence of a CoNLL-style file, first and last column.

    One word a line, columns separated by tabs (else by spaces), a blank line after each sentence.
    """
    widths = set()

    def parse(line: str) -> list[str]:
        if not line.strip() or line.startswith("-DOCSTART-"):
            return []
        columns = [c.strip() for c in (line.split("\t") if "\t" in line else line.split())]
        widths.add(len(columns))
        if len(widths) > 1 or len(columns) < 2 or not all(columns):
            raise ValueError
        return columns

    rows = read_lines(path, "two columns or more, as many as in the lines before", parse)
    sentences = [list(group) for is_sentence, group in groupby(rows, bool) if is_sentence]
    if not sentences:
        raise ValueError(f"{path}: no sentence in it")
    return [([row[0] for row in words], [row[-1] for row in words]) for words in sentences]


def words(
    encoder: LLM2Vec, train: str | Path, test: str | Path, name: str | None = None
) -> dict[str, float]:
    """Score frozen word states with a linear probe, trained on one column file, tested on another.

    See the paper's section 3.1. Labels that start with B- or I- are entities, scored by F1; others
    are tags, scored by accuracy. Two scores: `name`, at the tokens of a word, and `name, i-1`, at
    the tokens before them, which the paper uses after MNTP.
    """
    name, sides = name or Path(test).stem, [read_columns(file) for file in (train, test)]
    labels = [label for side in sides for _, labels in side for label in labels]
    kinds, labels = np.unique(labels, return_inverse=True)
    y = torch.from_numpy(labels).to(encoder.decoder.device)
    states = [word_states(encoder, [words for words, _ in side]) for side in sides]
    ends = np.cumsum([len(labels) for _, labels in sides[1]])[:-1]
    scores = {}
    for score, *x in zip((name, f"{name}, i-1"), *states, strict=True):
        x, x_test = (side.to(y.device) for side in x)
        guess = linear_probe(x, y[: len(x)], x_test, len(kinds)).cpu().numpy()
        gold, guess = kinds[labels[len(x) :]], kinds[guess]
        if any(kind.startswith(("B-", "I-")) for kind in kinds):
            scores[score] = entity_f1(np.split(gold, ends), np.split(guess, ends))
        else:
            scores[score] = float((gold == guess).mean())
    return scores


# --- Masked tokens -----------------------------------------------------------------------------


@torch.inference_mode()
def masked_accuracy(encoder: LLM2Vec, blocks: Tensor, mask_id: int) -> float:
    """Share of masked tokens that the model predicts, each from the state before it.

    blocks: (N, T) token ids. A fifth of them, the same in every call, becomes mask_id.
    """
    decoder, generator = encoder.decoder.eval(), torch.Generator().manual_seed(0)
    V, right = decoder.config.vocab_size, 0
    masked, chosen = mask_tokens(
        blocks, mask_id, V, rate=0.2, replace=(1.0, 0.0), generator=generator
    )
    batches = (side.to(decoder.device).split(16) for side in (masked, blocks, chosen))
    for ids, answer, target in zip(*batches, strict=True):
        hidden = decoder(ids)[:, :-1][target[:, 1:]]
        right += int((decoder.logits(hidden).argmax(-1) == answer[target]).sum())
    return right / int(chosen.sum())


# --- All of them -------------------------------------------------------------------------------

BENCHMARKS = ("sts", "articles", "words", "masked")


def evaluate(
    model: LLM2Vec,
    held_out: Sequence[str],
    benchmarks: Sequence[str] = ("sts", "masked"),
    sts_files: str | Path | Sequence[str | Path] = STSB_TEST,
    columns: dict[str, tuple] = COLUMNS,
) -> dict[str, float]:
    """Scores by name; masked tokens are those of the held-out documents."""
    scores, masked = {}, {}
    if "masked" in benchmarks and model.decoder.can_predict:  # first: its errors come early
        rows = (e.ids for e in model.tokenizer.encode_batch(list(held_out)))
        blocks = cut_into_blocks(rows, length=128, limit=256)
        masked["masked tokens"] = masked_accuracy(model, blocks, mask_id_of(model))
    if "sts" in benchmarks:
        scores |= sts(model, sts_files)
    if "articles" in benchmarks:
        scores |= articles(model)
    for name, files in columns.items() if "words" in benchmarks else ():
        scores |= words(model, *files, name)
    return scores | masked


def mask_id_of(model: LLM2Vec, token: str = "_") -> int:
    """The id of the mask token; the paper uses the plain token `_`."""
    mask_id = model.tokenizer.token_to_id(token)
    if mask_id is None:
        raise ValueError(f"the mask token {token!r} is not in the vocabulary of the tokenizer")
    return mask_id


def held_out_of(corpus: str | Path) -> list[str]:
    _, held_out = split_documents(read_documents(corpus))
    if not held_out:
        raise ValueError(f"{corpus}: none of its documents is held out (about one in fifty is)")
    return held_out


def main() -> None:
    about = "Score a checkpoint on sentences, articles, words and masked tokens."
    parser = argparse.ArgumentParser(prog="python -m data.benchmarks", description=about)
    add = parser.add_argument
    add_model_flags(parser, required=True)
    add("--benchmarks", nargs="+", choices=BENCHMARKS, default=BENCHMARKS, help="(default: all)")
    text = "score<TAB>a<TAB>b lines (default: STS12 without MSRvid, STS15 and STS-B test)"
    add("--sts", nargs="+", default=STS_FILES, metavar="FILE", help=text)
    text = "column files to probe words with (default: EWT tags and WNUT-17 entities)"
    add("--words", nargs=2, action="append", default=[], metavar=("TRAIN", "TEST"), help=text)
    text = "text to mask tokens in: its held-out documents (default: bundled Wikipedia)"
    add("--corpus", default=WIKIPEDIA, help=text)
    add("--pooling", choices=POOLING, help="(default: from the folder, else mean)")
    add("--baselines", action="store_true", help="score the baselines of the causal model too")
    text = "name of the row (default: + and the last adapter's folder, else the model's folder)"
    add("--name", help=text)
    text = "results file to write, or to add to; rows of the same names are replaced"
    add("--output", metavar="FILE", help=text)
    args = parser.parse_args()
    held_out, adapters = held_out_of(args.corpus), [Path(adapter) for adapter in args.adapters]
    default = f"+ {adapters[-1].name}" if adapters else Path(args.model).name
    name = args.name or default
    columns = {Path(test).stem: (train, test) for train, test in args.words}
    if len(columns) < len(args.words):
        raise ValueError("--words: two test files of one name, which is the name of their score")

    def score(encoder: LLM2Vec, which: Sequence[str]) -> dict[str, float]:
        start = time.monotonic()
        scores = evaluate(encoder, held_out, which, args.sts, columns or COLUMNS)
        return scores | {"seconds": time.monotonic() - start}

    model = load(args, pooling=args.pooling)
    if args.output:
        run = describe("python -m data.benchmarks", model)
        run["settings"] = {adapter.name: settings_in(adapter) for adapter in adapters}
        check_weights(args.output, run)  # before the long work
    rows = {name: score(model, args.benchmarks)}
    del model
    if args.baselines:
        which = [which for which in args.benchmarks if which in ("sts", "articles")]
        untrained = baselines(load(args, adapters=[], is_causal=True))
        rows = {name: score(baseline, which) for name, baseline in untrained} | rows
    print(table(rows))
    print(json.dumps(rows if args.baselines else rows[name]))
    if args.output:
        last = run["settings"][adapters[-1].name] if adapters else {}
        rows[name] = {key: last[key] for key in ("seed",) if key in last} | rows[name]
        add_results(args.output, run | {"rows": {name: [row] for name, row in rows.items()}})


if __name__ == "__main__":
    cli(main)
