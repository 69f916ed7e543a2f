"""The fourth stage: pairs as they are read, and the loss of a batch of them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import go, log_of, tiny

import train
from llm2vec import LLM2Vec, contrastive_loss, tokenize
from llm2vec_data.benchmarks import read_articles
from llm2vec_data.corpus import WIKIPEDIA, split_documents
from llm2vec_data.make_pairs import make_pairs
from llm2vec_data.pairs import PAIRS, read_pairs
from train import STAGES


def write(path: Path, *records: object) -> Path:
    path.write_text("\n".join(map(json.dumps, records)) + "\n\n")
    return path


A = {"query": "a?", "positive": "a."}
B = {"query": "b?", "positive": "b.", "negative": "not b.", "instruction": "Find b:"}
C = {"query": "c?", "positive": "c.", "negative": ["not c.", "nor this"]}


def test_pairs_of_a_file_and_of_a_folder(tmp_path):
    folder = tmp_path / "e5"
    folder.mkdir()
    write(folder / "one.jsonl", A, B)
    write(folder / "two.jsonl", C, A)
    one, two = read_pairs([folder], ["Answer:"])
    assert [p["instruction"] for p in one + two] == ["Answer:", "Find b:", "Answer:", "Answer:"]
    assert [p["negatives"] for p in one + two] == [[], ["not b."], ["not c.", "nor this"], []]
    both = read_pairs([folder / "two.jsonl", folder / "one.jsonl"], ["1:", "2:"])
    assert [pairs[-1]["instruction"] for pairs in both] == ["1:", "Find b:"]
    assert read_pairs([folder])[0][0] == A | {"negatives": [], "instruction": ""}


@pytest.mark.parametrize(
    "line", ["no", "[]", '{"query": "a"}', '{"query": "a", "positive": 3}', '"a"']
    + ['{"query": "a", "positive": "b", "negative": [1]}', '{"query": "\\ud800", "positive": "b"}']
    + ['{"query": "a", "positive": "b", "negative": {"c": 1}}', '{"query": null, "positive": "b"}'],
)  # fmt: skip
def test_a_bad_pair_is_named(tmp_path, line):
    file = write(tmp_path / "a.jsonl", A, B)
    file.write_text(file.read_text().strip() + f"\n{line}\n")
    with pytest.raises(ValueError, match="a.jsonl, line 3"):
        read_pairs([file])


def test_files_without_pairs(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_pairs([tmp_path / "nowhere.jsonl"])
    with pytest.raises(FileNotFoundError, match=r"no \.jsonl"):
        read_pairs([tmp_path])
    with pytest.raises(ValueError, match="fewer than two pairs"):
        read_pairs([write(tmp_path / "a.jsonl", A)])
    (tmp_path / "a.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(ValueError, match="a.jsonl, line 1: .*utf-8"):
        read_pairs([tmp_path / "a.jsonl"])
    with pytest.raises(ValueError, match="2 instructions for 1 paths"):
        read_pairs([tmp_path / "a.jsonl"], ["one", "two"])


def test_the_bundled_pairs_hold_no_article_that_is_scored():
    pairs = [json.loads(line) for line in PAIRS.read_text().splitlines()]
    assert pairs == make_pairs() and len(pairs) == 3000
    records = {r["text"].strip(): r for r in read_articles(WIKIPEDIA)}
    held_out = split_documents(list(records))[1]
    queries = {pair["query"].lower() for pair in pairs}
    texts = {pair[side] for pair in pairs for side in ("positive", "negative")}
    assert len(held_out) > 150
    for text in held_out:
        assert records[text]["description"].lower() not in queries
        assert not any(text.startswith(opening) for opening in texts)


@pytest.mark.parametrize("max_tokens", [10_000, 40])
def test_queries_choose_among_all_positives_and_hard_negatives(max_tokens, tmp_path, monkeypatch):
    """The loss and its gradient by hand; instructions stand before queries alone."""
    model = tiny()
    model.decoder.requires_grad_(True)
    longer = {"query": "a longer query?", "positive": "and a longer answer", "negative": "x"}
    pairs, found = [A, B, C, longer], []
    dataset = read_pairs([write(tmp_path / "a.jsonl", *pairs)])
    monkeypatch.setattr(
        train, "fit", lambda _, data, backward, *__: found.append(backward(*data, 0))
    )
    go("supervised", tmp_path, model, dataset, max_tokens=max_tokens)
    weight = model.decoder.layers[1].mlp.up_proj.weight
    gradient = weight.grad.clone()
    model.decoder.zero_grad()

    def vectors(texts, instruction=None):
        return model.embed(tokenize(model.tokenizer, texts, 64, instruction))

    queries = torch.cat([vectors([p["query"]], p.get("instruction")) for p in pairs])
    positives = vectors([p["positive"] for p in pairs])
    loss = contrastive_loss(queries, positives, vectors(["not b.", "not c.", "nor this", "x"]))
    loss.backward()
    [(said, _)] = found
    assert said == pytest.approx(loss.item(), abs=1e-5)
    torch.testing.assert_close(gradient, weight.grad, atol=1e-5, rtol=1e-4)


def test_instructions_stand_where_the_pairs_say_and_go_with_the_encoder(tmp_path, monkeypatch):
    """Symmetric data has them on both sides; one of all queries is the prompt of an export."""
    both = {"instruction": "Find alike:", "answer_instruction": "Find alike:"}
    pairs = read_pairs([write(tmp_path / "a.jsonl", A | both, C | both)])
    model, seen = tiny(), []
    seen_by = lambda _, rows, *__: seen.append(rows) or (0.0, 1)  # noqa: E731
    monkeypatch.setattr(train, "backward_through_encoder", seen_by)
    monkeypatch.setattr(train, "fit", lambda _, data, backward, *__: backward(data[0], 0))
    go("supervised", tmp_path, model, pairs)
    texts = ["a?", "c?", "a.", "c.", "not c.", "nor this"]
    assert seen[0] == tokenize(model.tokenizer, texts, 64, "Find alike:")
    assert model.prompts == {"query": "Find alike:\n", "document": "Find alike:\n"}
    model.save(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config_sentence_transformers.json").read_text())
    assert written["prompts"] == model.prompts and written["default_prompt_name"] is None
    assert LLM2Vec.from_pretrained(tmp_path / "out").prompts == model.prompts
    other = tiny()
    pairs = read_pairs([write(tmp_path / "b.jsonl", A, B)])
    go("supervised", tmp_path, other, pairs)
    assert other.prompts == {}, "two instructions are none"


def test_the_rate_may_fall_over_several_epochs():
    """As in the authors' supervised training: over three epochs, of which it ran a part."""
    settings = replace(STAGES["supervised"].presets["paper"], steps=1000)
    assert (settings.decay_epochs, settings.scale, settings.warm_up) == (3, 50, 0.3)
    rates = [train.learning_rate(step, settings, epoch=2000) for step in (299, 300, 999)]
    assert rates == pytest.approx([2e-4, 2e-4, 2e-4 * (6000 - 999) / (6000 - 300)])
    short = [train.learning_rate(999, settings, epoch) for epoch in (0, 5)]
    assert short == pytest.approx([2e-4 / 700] * 2), "never before the end"


def test_an_encoder_reads_as_much_of_a_text_as_it_was_trained_on(tmp_path):
    model, pairs = tiny(), read_pairs([write(tmp_path / "a.jsonl", A, C)])
    for length, expected in ((64, 512), (1024, 1024)):
        go(
            "supervised",
            tmp_path / str(length),
            model,
            pairs,
            steps=1,
            length=length,
            pooling="last",
        )
        assert (model.max_length, model.pooling) == (expected, "last")


def test_queries_that_share_an_answer_are_not_set_against_it(tmp_path):
    """The loss is that of a batch without the copies; where all are copies, there is none."""
    query, candidates = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    query, positive, negative = query[:3], candidates[:3], candidates[3:]
    positive[2] = negative[0] = positive[0]  # one answer of two queries, and again as a negative
    copies = torch.zeros(3, 5, dtype=torch.bool)
    copies[0, [2, 3]] = copies[2, [0, 3]] = True
    scores = 20 * torch.cosine_similarity(query[:, None], candidates, dim=-1)
    left = [[0, 1, 4], [0, 1, 2, 3, 4], [1, 2, 4]]
    expected = [scores[i, kept].logsumexp(0) - scores[i, i] for i, kept in enumerate(left)]
    found = contrastive_loss(query, positive, negative, 20.0, copies)
    torch.testing.assert_close(found, torch.stack(expected).mean())

    same = {"positive": "Yes.", "negatives": ["Yes."], "instruction": ""}
    pairs = [{"query": f"Question {i}?"} | same for i in range(8)]
    go("supervised", tmp_path, None, [pairs], steps=2)
    assert max(line["loss"] for line in log_of(tmp_path)) < 1e-6, "nothing is to be told apart"
