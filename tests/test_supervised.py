"""Supervised training: the loss of a batch of pairs, and what is a wrong answer in it."""

import json

import numpy as np
import pytest
import torch
from helpers import go, log_of, pair, tiny

import train
from llm2vec import LLM2Vec, contrastive_loss
from llm2vec_data.benchmarks import read_articles
from llm2vec_data.corpus import WIKIPEDIA, split_documents
from llm2vec_data.make_pairs import make_pairs
from llm2vec_data.pairs import PAIRS
from train import known_right

A, B = pair("a?", "a."), pair("b?", "b.", "not b.", instruction="Find b:")
C = pair("c?", "c.", "not c.", "nor this")


def test_the_bundled_pairs_hold_no_article_that_is_scored():
    pairs = [json.loads(line) for line in PAIRS.read_text().splitlines()]
    assert pairs == make_pairs()
    described = {record["text"]: record["description"] for record in read_articles(WIKIPEDIA)}
    held_out = split_documents(list(described))[1]
    queries = {pair["query"].lower() for pair in pairs}
    openings = tuple({pair[side] for pair in pairs for side in ("positive", "negative")})
    assert len(held_out) > 150 and not any(text.startswith(openings) for text in held_out)
    assert queries.isdisjoint(described[text].lower() for text in held_out)


# --- One batch ---------------------------------------------------------------------------------


def first_batch(model: LLM2Vec, pairs: list, folder, monkeypatch, **changes) -> float:
    """The loss of pairs as one batch; their gradients are left in the model."""
    found = []
    first = lambda _, data, backward, *__: found.append(backward(*data, 0)[0])  # noqa: E731
    monkeypatch.setattr(train, "fit", first)
    go("supervised", folder, model, [pairs], **changes)
    return found[0]


@pytest.mark.parametrize("max_tokens", [10_000, 40, 1])
def test_queries_choose_among_all_positives_and_hard_negatives(max_tokens, tmp_path, monkeypatch):
    """The loss and its gradient by hand, in one pass or in parts; negatives differ in number."""
    model, pairs = tiny(), [A, B, C, pair("a longer query?", "and a longer answer", "x")]
    weight = model.decoder.requires_grad_(True).layers[1].mlp.up_proj.weight
    found = first_batch(model, pairs, tmp_path, monkeypatch, max_tokens=max_tokens)
    queries = torch.cat([model.embed(model.rows([p["query"]], p["instruction"])) for p in pairs])
    positives = model.embed(model.rows([p["positive"] for p in pairs]))
    negatives = model.embed(model.rows([n for p in pairs for n in p["negatives"]]))
    loss = contrastive_loss(queries, positives, negatives)
    [gradient] = torch.autograd.grad(loss, weight)
    assert found == pytest.approx(loss.item(), abs=1e-5)
    torch.testing.assert_close(weight.grad, gradient, atol=1e-5, rtol=1e-4)


OWN = {"query": "Q: ", "document": "D: "}
BOTH = {"instruction": "Alike:", "answer_instruction": "Alike:"}
INSTRUCTIONS = {  # pairs, the prompts of the encoder before, and after
    "none: that of the encoder": ([A, C], OWN, OWN),
    "one for all queries": ([B, B], {"query": "Q: "}, {"query": "Find b:"}),
    "one for both sides": ([A | BOTH, C | BOTH], {}, {"query": "Alike:", "document": "Alike:"}),
    "two": ([A, B], {}, {}),
}


@pytest.mark.parametrize("pairs, before, after", INSTRUCTIONS.values(), ids=INSTRUCTIONS)
def test_instructions_stand_before_texts_and_go_with_the_encoder_if_all_have_one(
    pairs, before, after, tmp_path, monkeypatch
):
    model, seen = tiny(separator=""), []
    model.prompts = dict(before)
    watched = lambda _, rows, *__: seen.extend(rows) or (0.0, 1)  # noqa: E731
    monkeypatch.setattr(train, "backward_through_encoder", watched)
    first_batch(model, pairs, tmp_path, monkeypatch)
    expected = [after.get("query", p["instruction"]) + p["query"] for p in pairs]
    expected += [after.get("document", "") + p["positive"] for p in pairs]
    assert [model.tokenizer.decode(ids) for ids, _ in seen[:4]] == expected
    model.save(tmp_path / "out")
    assert model.prompts == LLM2Vec.from_pretrained(tmp_path / "out").prompts == after


def test_an_encoder_reads_as_much_of_a_text_as_it_was_trained_on(tmp_path):
    """Also in batches of one pair, which has a negative."""
    for length, expected in ((64, 512), (1024, 1024)):
        model, folder = tiny(1), tmp_path / str(length)
        go("supervised", folder, model, [[B, C]], length=length, batch=1, pooling="last")
        assert (model.max_length, model.pooling) == (expected, "last")


# --- Answers that are right --------------------------------------------------------------------


def test_what_is_known_to_be_right_is_no_wrong_answer():
    """By a brute-force loop over texts, of which two are equal once they are cut."""
    model = tiny()
    pairs = [pair("q", "a", "b"), pair("q", "b"), pair("a", "q"), pair("q", "c", instruction="is")]
    pairs += [pair("r", "long text, cut short here", "r"), pair("s", "long text, cut short there")]
    texts = [p[side] for side in ("query", "positive") for p in pairs] + ["b", "r"]
    leads = [p["instruction"] for p in pairs] + [""] * len(texts)
    rows = [model.rows([t], lead, 5)[0] for t, lead in zip(texts, leads, strict=False)]
    cut = ["long" if t.startswith("long") else t for t in texts]
    n, found = len(pairs), known_right(texts, rows, len(pairs))
    for i, j in np.ndindex(*found.shape):
        right = {cut[n + k] for k in range(n) if (texts[k], leads[k]) == (texts[i], leads[i])}
        assert found[i, j] == (cut[n + j] in right | {cut[i]} and i != j), (i, j)
    assert found.sum() > 6


def test_a_query_is_not_set_against_what_is_known_to_be_right():
    """The loss is that of a batch without them."""
    torch.manual_seed(0)
    query, candidates, known = torch.randn(3, 8), torch.randn(5, 8), torch.zeros(3, 5).bool()
    known[0, [2, 3]] = known[2, [0, 3]] = True
    scores = 20 * torch.cosine_similarity(query[:, None], candidates, dim=-1)
    left = [[0, 1, 4], [0, 1, 2, 3, 4], [1, 2, 4]]
    expected = [scores[i, kept].logsumexp(0) - scores[i, i] for i, kept in enumerate(left)]
    found = contrastive_loss(query, candidates[:3], candidates[3:], 20.0, known)
    torch.testing.assert_close(found, torch.stack(expected).mean())


def test_answers_that_are_right_for_all_leave_nothing_to_lose(tmp_path):
    """Several positives of a query, pairs in both directions, texts that a cut makes equal."""
    texts = [f"One and the same beginning of a text {end}." for end in ("here", "there", "now")]
    cases = [("supervised", [[pair("q", text) for text in "abcd"]], 4)]
    cases += [("supervised", [[pair("one", "two"), pair("two", "one")]], 2), ("simcse", texts, 3)]
    for i, (stage, data, n) in enumerate(cases):
        go(stage, tmp_path / str(i), tiny(1), data, batch=n, dropout=0.0, length=6)
        losses = [line["loss"] for line in log_of(tmp_path / str(i))]
        assert len(losses) == 3 and max(losses) < 1e-6
