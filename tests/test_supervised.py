"""The fourth stage: pairs as they are read, batches as they are drawn, and what is learned."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train
from data.benchmarks import read_articles
from data.corpus import WIKIPEDIA, split_documents
from data.make_pairs import make_pairs
from data.pairs import PAIRS, read_pairs
from llm2vec import LLM2Vec, contrastive_loss, tokenize
from train import SETTINGS, batch_at, contrast, train_supervised

TINY = Path(__file__).parent.parent / "data" / "tiny-llama"


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
    one, two = ([json.loads(pair) for pair in d] for d in read_pairs([folder], ["Answer:"]))
    assert [p["instruction"] for p in one + two] == ["Answer:", "Find b:", "Answer:", "Answer:"]
    assert [p["negatives"] for p in one + two] == [[], ["not b."], ["not c.", "nor this"], []]
    both = read_pairs([folder / "two.jsonl", folder / "one.jsonl"], ["1:", "2:"])
    assert [json.loads(d[-1])["instruction"] for d in both] == ["1:", "Find b:"]
    assert json.loads(read_pairs([folder])[0][0])["instruction"] == ""


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
    with pytest.raises(ValueError, match="line 1: not UTF-8"):
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


def test_a_batch_comes_from_one_dataset_and_an_epoch_from_all():
    datasets = [[f"{d}{i}" for i in range(n)] for d, n in (("a", 23), ("b", 9), ("c", 3))]
    slots = 5 + 2 + 1  # of 4, and all of c
    for epoch in range(2):
        batches = [batch_at(epoch * slots + i, datasets, 4, seed=1) for i in range(slots)]
        assert all(len({item[0] for item in batch}) == 1 for batch in batches)
        seen = [item for batch in batches for item in batch]
        assert len(seen) == len(set(seen)) == 20 + 8 + 3
        kinds = [batch[0][0] for batch in batches]
        assert kinds != sorted(kinds), "datasets take turns"
    assert batch_at(0, datasets, 4, 1) == batch_at(0, datasets, 4, 1)
    assert batch_at(0, datasets, 4, 1) != batch_at(slots, datasets, 4, 1)


@pytest.mark.parametrize("max_tokens", [10_000, 40])
def test_queries_choose_among_all_positives_and_hard_negatives(max_tokens, tmp_path, monkeypatch):
    """The loss and its gradient by hand; instructions stand before queries alone."""
    model = LLM2Vec.from_pretrained(TINY)
    model.decoder.requires_grad_(True)
    pairs = [
        A,
        B,
        C,
        {"query": "a longer query?", "positive": "and a longer answer", "negative": "x"},
    ]
    dataset = read_pairs([write(tmp_path / "a.jsonl", *pairs)])
    step = {}

    def once(model, datasets, backward, settings, folder, texts):
        step["loss"], step["tokens"] = backward(datasets[0], 8192)

    monkeypatch.setattr(train, "fit", once)
    settings = replace(SETTINGS["supervised"]["tiny"], max_tokens=max_tokens)
    train_supervised(model, dataset, settings, tmp_path)
    weight = model.decoder.layers[2].mlp.up_proj.weight
    gradient = weight.grad.clone()
    model.decoder.zero_grad()

    def vectors(texts, instruction=None):
        return model.embed(tokenize(model.tokenizer, texts, 64, instruction))

    queries = torch.cat([vectors([p["query"]], p.get("instruction")) for p in pairs])
    positives = vectors([p["positive"] for p in pairs])
    loss = contrastive_loss(queries, positives, vectors(["not b.", "not c.", "nor this", "x"]))
    loss.backward()
    assert step["loss"] == pytest.approx(loss.item(), abs=1e-5)
    torch.testing.assert_close(gradient, weight.grad, atol=1e-5, rtol=1e-4)


def test_contrast_keeps_the_dropout_of_each_part():
    """In parts, the second pass repeats the first: with dropout too, the gradient is that of
    the loss that was reported."""
    model = LLM2Vec.from_pretrained(TINY)
    model.decoder.train()
    model.decoder.config.attention_dropout = 0.5
    rows = 2 * tokenize(model.tokenizer, ["one text", "and a second text", "the third is long"], 64)
    weight = model.decoder.layers[5].mlp.down_proj.weight.requires_grad_(True)

    def loss_of(vectors):
        return contrastive_loss(*vectors.chunk(2))

    def step() -> float:
        torch.manual_seed(7)
        return contrast(model, rows, loss_of, max_tokens=8)[0]

    step()
    gradient, weight.grad = weight.grad, None
    direction = gradient / gradient.norm()
    with torch.no_grad():
        weight.add_(direction, alpha=1e-2)
    up = step()
    with torch.no_grad():
        weight.sub_(direction, alpha=2e-2)
    down = step()
    assert (up - down) / 2e-2 == pytest.approx(gradient.norm().item(), rel=0.02)
