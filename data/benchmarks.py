"""Scores of an encoder: similar sentences, found articles, topics, words, hidden tokens.

    python -m data.benchmarks --model MODEL [--adapters ...] [--baselines]

    sts               Spearman's rho of cosines against human judgements, by task
    articles          Wikipedia: description to introduction; topics, by probe and by clusters
    words             a linear classifier on frozen word vectors: parts of speech, entities
    masked_accuracy   hidden tokens named rightly
    BASELINES         the encoders that a trained one has to beat
    evaluate          all of these

Each returns a dictionary of scores by name. Nothing here is chosen by looking at a test set: the
probes' one free number, how strongly they are regularised, is chosen on a part of their own
training data.
"""

import argparse
import json
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data.corpus import WIKIPEDIA, cut_into_blocks, read_documents, split_documents
from data.metrics import entity_f1, ndcg, recall, spearman, v_measure
from llm2vec import (
    POOLING,
    LLM2Vec,
    add_model_flags,
    batches_by_length,
    load,
    mask_tokens,
    pad,
    pool,
    reading,
    run,
)

STS = Path(__file__).parent / "sts"
STSB_DEV, STSB_TEST = STS / "stsb-dev.tsv", STS / "stsb-test.tsv"
STS_FILES = [*sorted(STS.glob("sts1*.tsv")), STSB_TEST]
WORDS = Path(__file__).parent / "words"
EWT = WORDS / "ewt-pos-dev.tsv", WORDS / "ewt-pos-test.tsv"  # trained on, tested on
WNUT = WORDS / "wnut17-ner-train.tsv", WORDS / "wnut17-ner-dev.tsv"


def read_lines(path: Path) -> list[str]:
    with reading(path):
        return path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")


def unit_vectors(encoder: LLM2Vec, texts: Sequence[str]) -> np.ndarray:
    """Vectors of length 1, (N, d) float64. Raises ValueError if one is not finite."""
    vectors = encoder.encode(texts).astype(np.float64)
    broken = np.flatnonzero(~np.isfinite(vectors).all(1))
    if len(broken):
        what = f"NaN or infinity in the vectors of {len(broken)} of {len(texts)} texts"
        raise ValueError(f"{what}, such as {texts[broken[0]]!r:.60}")
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)


# --- Similar sentences -------------------------------------------------------------------------


def read_sts(path: str | Path) -> tuple[np.ndarray, list[str], list[str]]:
    """Gold scores and the two sides of a file of `score<TAB>sentence<TAB>sentence` lines.

    Raises FileNotFoundError, or ValueError naming the file and line.
    """
    path = Path(path)
    gold, left, right = [], [], []
    for number, line in enumerate(read_lines(path), start=1):
        fields = line.rstrip("\r").split("\t")
        try:
            score, a, b = float(fields[0]), fields[1], fields[2]
            if not np.isfinite(score):
                raise ValueError
        except (ValueError, IndexError):
            what = f"expected score<TAB>sentence<TAB>sentence, got {line!r:.60}"
            raise ValueError(f"{path}, line {number}: {what}") from None
        gold.append(score)
        left.append(a)
        right.append(b)
    if len(gold) < 2:
        raise ValueError(f"{path}: fewer than two pairs")
    return np.array(gold), left, right


def sts(encoder: LLM2Vec, files: str | Path | Sequence[str | Path] = STSB_TEST) -> dict[str, float]:
    """Score an encoder on files of sentence pairs.

    Files named sts12-*.tsv make one task, STS12, and so on; any other file is a task, and no two of
    them may have one name, whatever their folders (ValueError). Each task's score is Spearman's rho
    of cosine against gold over all of its pairs together (`all` in the SimCSE paper, Gao et al.
    2021, appendix B); `STS` is the mean of several tasks. For tasks named
    stsb also `alignment`, the mean squared distance of pairs with a gold score of 4 or more, and
    `uniformity`, the log of the mean of exp(-2 squared distance) over all pairs of sentences, both
    on unit vectors, lower is better (Wang & Isola 2020, arXiv 2005.10242).
    """
    tasks: dict[str, tuple[list, list, list]] = {}
    for file in [files] if isinstance(files, (str, Path)) else files:
        of_a_year = re.match(r"sts\d\d(?=-|$)", Path(file).stem)
        name = of_a_year[0].upper() if of_a_year else Path(file).stem
        if name in tasks and not of_a_year:
            raise ValueError(f"{file}: a second file named {name}: its score would take its name")
        task = tasks.setdefault(name, ([], [], []))
        for all_of_it, more in zip(task, read_sts(file), strict=True):
            all_of_it.extend(more)
    texts = list(dict.fromkeys(t for _, a, b in tasks.values() for t in (*a, *b)))
    place = {text: i for i, text in enumerate(texts)}
    unit = unit_vectors(encoder, texts)
    scores = {}
    for task, (gold, left, right) in tasks.items():
        a, b = (unit[[place[text] for text in side]] for side in (left, right))
        scores[task] = spearman((a * b).sum(1), gold)
        if task.startswith("stsb"):
            close = np.array(gold) >= 4
            own = unit[sorted({place[text] for text in (*left, *right)})]
            pairs = (own @ own.T)[np.triu_indices(len(own), 1)]
            distance = ((a - b) ** 2).sum(1)[close]
            scores["alignment"] = float(distance.mean()) if close.any() else float("nan")
            scores["uniformity"] = float(np.log(np.exp(-4 + 4 * pairs).mean()))
    if len(tasks) > 1:
        scores = {"STS": float(np.mean([scores[task] for task in tasks])), **scores}
    return scores


# --- Articles ----------------------------------------------------------------------------------


def read_articles(path: str | Path) -> list[dict]:
    """Records that have a text, a description and a topic; ValueError names a line without."""
    records = []
    for number, line in enumerate(read_lines(Path(path)), start=1):
        try:
            record = json.loads(line)
            fields = [record[key] for key in ("text", "description", "topic")]
            if not all(isinstance(field, str) for field in fields):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            what = "expected a JSON object with text, description and topic"
            raise ValueError(f"{path}, line {number}: {what}") from None
        if all(fields):
            records.append(record)
    return records


def articles(
    encoder: LLM2Vec, path: str | Path = WIKIPEDIA, candidates: int = 1000
) -> dict[str, float]:
    """Score an encoder on encyclopaedia articles: JSON lines with text, description and topic.

    Retrieval: the short description of each held-out article (see `split_documents`) has to find
    the introduction that it belongs to among `candidates`, the rest of which are articles trained
    on: recall@1, recall@10, nDCG@10. Topics: the accuracy, on held-out articles, of a linear probe
    that was trained on the other candidates; and the V-measure of k-means clusters, as many as
    there are topics, over all of them.
    """
    records = read_articles(path)
    texts = [record["text"].strip() for record in records]
    held_out = set(split_documents(texts)[1])
    held = [i for i, text in enumerate(texts) if text in held_out]
    rest = [i for i, text in enumerate(texts) if text not in held_out]
    rest = [rest[int(j)] for j in np.linspace(0, len(rest), candidates - len(held), endpoint=False)]
    chosen = held + rest
    vectors = unit_vectors(encoder, [texts[i] for i in chosen])

    said = [records[i]["description"].lower() for i in chosen]
    queries = [i for i in range(len(held)) if said.count(said[i]) == 1]
    asked = unit_vectors(encoder, [records[chosen[i]]["description"] for i in queries])
    relevance = np.arange(len(chosen)) == np.array(queries)[:, None]
    found = asked @ vectors.T
    scores = {f"recall@{k}": recall(relevance, found, k) for k in (1, 10)}
    scores["nDCG@10"] = ndcg(relevance, found, 10)

    topics = [records[i]["topic"] for i in chosen]
    named = [i for i, topic in enumerate(topics) if topic != "Uncategorized"]
    kinds, labels = np.unique([topics[i] for i in named], return_inverse=True)
    split = sum(i < len(held) for i in named)  # held-out articles come first
    x, y = torch.from_numpy(vectors[named]).float(), torch.from_numpy(labels)
    far_x, far_y = x.to(encoder.decoder.device), y.to(encoder.decoder.device)
    guess = linear_probe(far_x[split:], far_y[split:], far_x[:split], len(kinds)).cpu()
    scores["topics"] = float((guess == y[:split]).float().mean())
    scores["clusters"] = v_measure(labels, k_means(x, len(kinds)).numpy())
    return scores


def linear_probe(x: Tensor, y: Tensor, x_test: Tensor, classes: int) -> Tensor:
    """Labels for x_test (M, d) by multinomial logistic regression on x (N, d), y (N,): (M,).

    On standardised features. The weight of the squared norm is the one of four powers of ten that
    predicts every fifth example of the training data best, by cross-entropy.
    """
    mean, spread = x.mean(0), x.std(0).clamp_min(1e-6)
    x, x_test = (x - mean) / spread, (x_test - mean) / spread

    def train(x: Tensor, y: Tensor, weight: float) -> nn.Linear:
        linear = nn.Linear(x.shape[1], classes, device=x.device)
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        search = torch.optim.LBFGS(
            linear.parameters(), max_iter=50, history_size=10, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            search.zero_grad()
            value = nn.functional.cross_entropy(linear(x), y)
            value = value + weight * linear.weight.square().sum()
            value.backward()
            return value

        search.step(loss)
        return linear.requires_grad_(False)

    dev = torch.arange(len(x), device=x.device) % 5 == 0
    weights = [1e-4, 1e-3, 1e-2, 1e-1]
    losses = [
        nn.functional.cross_entropy(train(x[~dev], y[~dev], weight)(x[dev]), y[dev]).item()
        for weight in weights
    ]
    return train(x, y, weights[int(np.argmin(losses))])(x_test).argmax(1)


def k_means(x: Tensor, k: int, restarts: int = 10, seed: int = 0) -> Tensor:
    """Cluster numbers (N,) of x (N, d): the tightest of several k-means++ runs (Lloyd 1982)."""
    generator = torch.Generator().manual_seed(seed)
    best, best_cost = torch.zeros(len(x), dtype=torch.long), float("inf")
    for _ in range(restarts):
        centres = x[torch.randint(len(x), (1,), generator=generator)]
        while len(centres) < k:  # far points are likely to become the next centre
            far = torch.cdist(x, centres).amin(1).square() + 1e-12
            centres = torch.cat([centres, x[torch.multinomial(far, 1, generator=generator)]])
        for _ in range(100):
            distance, cluster = torch.cdist(x, centres).min(1)
            belongs = nn.functional.one_hot(cluster, k).float()
            means = belongs.T @ x / belongs.sum(0)[:, None].clamp_min(1)
            if torch.equal(means, centres):
                break
            centres = means
        cost = float(distance.square().sum())
        if cost < best_cost:
            best, best_cost = cluster, cost
    return best


# --- Words -------------------------------------------------------------------------------------


def read_columns(path: str | Path) -> list[tuple[list[str], list[str]]]:
    """The words and labels of each sentence of a CoNLL-style file, first and last column.

    A word a line, columns set apart by tabs (else by spaces), a blank line behind each sentence.
    Raises FileNotFoundError, or ValueError naming file and line: every line has as many columns as
    the first.
    """
    path = Path(path)
    found: list[tuple[list[str], list[str]]] = [([], [])]
    width = 0
    for number, line in enumerate(read_lines(path), start=1):
        line = line.rstrip("\r")
        if not line.strip() or line.startswith("-DOCSTART-"):
            found.append(([], []))
            continue
        columns = line.split("\t") if "\t" in line else line.split()
        width = width or len(columns)
        if len(columns) != width or width < 2 or not all(c.strip() for c in columns):
            what = f"expected {max(width, 2)} columns as in the lines before, got {line!r:.60}"
            raise ValueError(f"{path}, line {number}: {what}")
        found[-1][0].append(columns[0].strip())
        found[-1][1].append(columns[-1].strip())
    found = [sentence for sentence in found if sentence[0]]
    if not found:
        raise ValueError(f"{path}: no sentence in it")
    return found


@torch.no_grad()
def word_states(
    encoder: LLM2Vec, sentences: Sequence[Sequence[str]], max_tokens: int = 8192
) -> tuple[Tensor, Tensor]:
    """States of all words, (words, d) float32: at a word's tokens, and one token before each.

    A word's vector averages those of its tokens. The state before a token is where the model
    predicts it; the first token of a row has none before, and gives its own.
    """
    decoder = encoder.decoder.train(False)
    device = decoder.device
    encodings = encoder.tokenizer.encode_batch([" ".join(words) for words in sentences])
    firsts = np.cumsum([0] + [len(words) for words in sentences])
    at, before = (torch.zeros(int(firsts[-1]), decoder.config.hidden_size) for _ in range(2))
    count = torch.zeros(int(firsts[-1]), 1)
    for batch in batches_by_length([len(e.ids) for e in encodings], max_tokens):
        ids = pad([encodings[i].ids for i in batch], device)
        segments = pad([[1] * len(encodings[i].ids) for i in batch], device)
        hidden = decoder(ids, segments).float().cpu()
        for row, i in zip(hidden, batch, strict=True):
            # The word that each character is in; a space goes with the word behind it.
            sizes = [len(word) + 1 for word in sentences[i]]
            inside = firsts[i] + np.repeat(np.arange(len(sizes)), sizes)[1:]
            spans = zip(encodings[i].offsets, encodings[i].special_tokens_mask, strict=True)
            ends = {t: end for t, ((start, end), s) in enumerate(spans) if end > start and not s}
            t = torch.tensor(list(ends))
            word = torch.from_numpy(inside[np.array(list(ends.values())) - 1])
            at.index_add_(0, word, row[t])
            before.index_add_(0, word, row[(t - 1).clamp_min(0)])
            count.index_add_(0, word, torch.ones(len(t), 1))
    return at / count.clamp_min(1), before / count.clamp_min(1)


def words(
    encoder: LLM2Vec, train: str | Path, test: str | Path, name: str | None = None
) -> dict[str, float]:
    """Score frozen word states with a linear probe, trained on one column file, tested on another.

    The paper's section 3.1. Labels that start with B- or I- are entities, scored by F1; others are
    tags, scored by accuracy. Two scores: `name`, at a word's own tokens, and `name, i-1`, at the
    tokens before, which the paper reads after MNTP.
    """
    sides = read_columns(train), read_columns(test)
    kinds = sorted({label for side in sides for _, labels in side for label in labels})
    number = {kind: i for i, kind in enumerate(kinds)}
    y = [number[label] for _, labels in sides[0] for label in labels]
    y = torch.tensor(y, device=encoder.decoder.device)
    gold = [labels for _, labels in sides[1]]
    name = name or Path(test).stem
    scores = {}
    states = [word_states(encoder, [words for words, _ in side]) for side in sides]
    for place, *x in zip((name, f"{name}, i-1"), *states, strict=True):
        x, x_test = (side.to(y.device) for side in x)
        guess = iter(kinds[i] for i in linear_probe(x, y, x_test, len(kinds)).tolist())
        said = [[next(guess) for _ in labels] for labels in gold]
        if any(kind.startswith(("B-", "I-")) for kind in kinds):
            scores[place] = entity_f1(gold, said)
        else:
            pairs = [(a, b) for g, s in zip(gold, said, strict=True) for a, b in zip(g, s)]  # noqa: B905
            scores[place] = sum(a == b for a, b in pairs) / len(pairs)
    return scores


# --- Hidden tokens -----------------------------------------------------------------------------


@torch.inference_mode()
def masked_accuracy(
    encoder: LLM2Vec, blocks: Tensor, mask_id: int, rate: float = 0.2, seed: int = 0
) -> float:
    """Share of hidden tokens that the model names, reading each off the state in front of it.

    blocks: (N, T) token ids. A share `rate` of them, the same in every call, becomes mask_id.
    """
    decoder = encoder.decoder.train(False)
    generator = torch.Generator().manual_seed(seed)
    V = decoder.config.vocab_size
    masked, chosen = mask_tokens(blocks, mask_id, V, rate, (1.0, 0.0), generator=generator)
    right, device = 0, decoder.device
    for ids, answer, target in zip(
        masked.split(16), blocks.split(16), chosen[:, 1:].split(16), strict=True
    ):
        hidden = decoder(ids.to(device))[:, :-1][target.to(device)]
        right += int((decoder.logits(hidden).argmax(-1).cpu() == answer[:, 1:][target]).sum())
    return right / int(chosen.sum())


# --- Baselines ---------------------------------------------------------------------------------


class Echo(LLM2Vec):
    """Each text twice, pooled over the second copy: a causal model has then read all of it.

    Springer et al. 2024, arXiv 2402.15449.
    """

    def embed(self, rows: Sequence[tuple[list[int], list[bool]]]) -> Tensor:
        twice = []
        for ids, own in rows:
            again = ids[own.index(True) :]
            twice.append((ids + again, [False] * len(ids) + [True] * len(again)))
        return super().embed(twice)


class InputEmbeddings(LLM2Vec):
    """The mean of the tokens' input embeddings: what is known without reading."""

    def embed(self, rows: Sequence[tuple[list[int], list[bool]]]) -> Tensor:
        device = self.decoder.device
        ids, own = pad([ids for ids, _ in rows], device), pad([own for _, own in rows], device)
        return pool(self.decoder.embed_tokens(ids), "mean", own)


# Of a causal model: a name, the kind of encoder, and its pooling.
BASELINES = {
    "input embeddings": (InputEmbeddings, "mean"),
    "causal, mean": (LLM2Vec, "mean"),
    "causal, weighted mean": (LLM2Vec, "weighted_mean"),
    "causal, last token": (LLM2Vec, "last"),
    "causal, echo": (Echo, "mean"),
}


def baselines(model: LLM2Vec) -> Iterator[tuple[str, LLM2Vec]]:
    """The encoders that a causal model is without training, by name."""
    for name, (kind, pooling) in BASELINES.items():
        yield name, kind(model.decoder, model.tokenizer, pooling, model.max_length)


# --- All of them -------------------------------------------------------------------------------

BENCHMARKS = ("sts", "articles", "words", "masked")


def evaluate(
    model: LLM2Vec,
    held_out: Sequence[str],
    benchmarks: Sequence[str] = ("sts", "masked"),
    sts_files: str | Path | Sequence[str | Path] = STSB_TEST,
    columns: Sequence[Sequence[str | Path]] = (EWT, WNUT),
) -> dict[str, float]:
    """Scores by name; masked tokens are those of the held-out documents."""
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


def mask_id_of(model: LLM2Vec, token: str = "_") -> int:
    """The id of the token that hides others; the paper takes the plain token `_`."""
    mask_id = model.tokenizer.token_to_id(token)
    if mask_id is None:
        raise ValueError(f"the mask token {token!r} is not in the vocabulary of the tokenizer")
    return mask_id


def held_out_of(corpus: str | Path) -> list[str]:
    _, held_out = split_documents(read_documents(corpus))
    if not held_out:
        raise ValueError(f"{corpus}: none of its documents is held out, which is one in fifty")
    return held_out


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


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data.benchmarks",
        description="Score a checkpoint on sentences, articles, words and masked tokens.",
    )
    add = parser.add_argument
    add_model_flags(parser, required=True)
    text = f"any of {', '.join(BENCHMARKS)} (default: all)"
    add("--benchmarks", nargs="+", choices=BENCHMARKS, default=BENCHMARKS, help=text)
    text = "score<TAB>a<TAB>b lines (default: STS12, STS15 and STS-B test)"
    add("--sts", nargs="+", default=STS_FILES, metavar="FILE", help=text)
    text = "column files to probe words with (default: EWT tags and WNUT-17 entities)"
    add("--words", nargs=2, action="append", metavar=("TRAIN", "TEST"), help=text)
    add("--corpus", default=WIKIPEDIA, help="of whose held-out documents tokens are masked")
    add("--pooling", default="mean", choices=POOLING, help="(default: %(default)s)")
    add("--causal", action="store_true", help="leave out step 1: attend to the left only")
    add("--baselines", action="store_true", help="score the baselines of the causal model too")
    args = parser.parse_args()
    held_out = held_out_of(args.corpus)
    names = [Path(test).stem for _, test in args.words or ()]
    if len(set(names)) < len(names):
        raise ValueError(f"--words: test files of one name ({', '.join(names)}) have one score")

    def score(encoder: LLM2Vec, which: Sequence[str]) -> dict[str, float]:
        start = time.monotonic()
        scores = evaluate(encoder, held_out, which, args.sts, args.words or (EWT, WNUT))
        return scores | {"seconds": time.monotonic() - start}

    name = Path(args.model).name
    rows = {name: score(load(args, pooling=args.pooling, is_causal=args.causal), args.benchmarks)}
    if args.baselines:
        which = [which for which in args.benchmarks if which in ("sts", "articles")]
        untrained = baselines(load(args, adapters=[], is_causal=True))
        rows = {name: score(baseline, which) for name, baseline in untrained} | rows
    print(table(rows))
    print(json.dumps(rows[name] if len(rows) == 1 else rows))


if __name__ == "__main__":
    run(main)
