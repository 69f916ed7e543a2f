"""The measures against the libraries that define them, and what an evaluation reads and reports."""

import json
import math
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import GOLDEN, TINY, refused, tiny

from llm2vec import mask_tokens, pad, word_states
from llm2vec_data import benchmarks as bench
from llm2vec_data import compare
from llm2vec_data.checkpoints import START, TEMPLATES
from llm2vec_data.corpus import WIKIPEDIA, cut_into_blocks, read_documents, split_documents
from llm2vec_data.metrics import entity_f1, ndcg, recall, spearman

# --- Measures ----------------------------------------------------------------------------------

CASES = json.loads((GOLDEN / "metrics.json").read_text())
MEASURES = {
    "spearman": lambda case: spearman(case["a"], case["b"]),
    "ndcg": lambda case: ndcg(*(np.array(case[k]) for k in ("relevance", "scores")), case["k"]),
    "entity_f1": lambda case: entity_f1(case["gold"], case["guess"]),
}


@pytest.mark.parametrize("measure", MEASURES)
def test_measures_are_those_of_the_reference_libraries(measure):
    """scipy, scikit-learn and seqeval: see tests/golden/make_metrics.py."""
    assert len(CASES[measure]) > 10
    for case in CASES[measure]:
        expected = math.nan if case["score"] is None else case["score"]
        assert MEASURES[measure](case) == pytest.approx(expected, abs=1e-6, nan_ok=True), case


def test_vectors_that_are_not_numbers_have_no_score(encoder, monkeypatch):
    overflown = np.array([[1.0, 2.0], [np.inf, 0.0], [3.0, np.nan]])
    monkeypatch.setattr(encoder, "encode", lambda texts: overflown)
    refused("the vector of 'two'", bench.unit_vectors, encoder, ["one", "two", "three"])
    assert math.isnan(spearman([0.1, 0.2, math.nan, 0.5], [1, 2, 3, 5]))


def test_recall_by_hand():
    scores = np.array([[0.9, 0.1, 0.2], [0.5, 0.4, 0.1], [0.3, 0.3, 0.3]])
    found = [recall(np.eye(3, dtype=bool), scores, k) for k in (1, 2, 3)]
    assert found == pytest.approx([1 / 3, 2 / 3, 1]), "a tie counts against it"


def test_a_probe_learns_what_is_there_and_not_what_is_not():
    generator, y = torch.Generator().manual_seed(0), torch.arange(4).repeat(100)
    x = 6 * torch.eye(4, 8)[y] + torch.randn(len(y), 8, generator=generator)
    guess = bench.linear_probe(x[:200], y[:200], x[200:], 4)
    assert (guess == y[200:]).float().mean() > 0.97
    shuffled = y[:200][torch.randperm(200, generator=generator)]
    assert (bench.linear_probe(x[:200], shuffled, x[200:], 4) == y[200:]).float().mean() < 0.5
    again = bench.linear_probe(1000 * x[:200] + 5, y[:200], 1000 * x[200:] + 5, 4)
    assert torch.equal(again, guess), "features are standardised"


# --- Files -------------------------------------------------------------------------------------


def test_bundled_benchmarks_have_their_published_sizes():
    pairs = Counter()
    for file in (*bench.STS_FILES, bench.STSB_DEV):
        gold, _, _ = bench.read_sts(file)
        assert 0 <= gold.min() < gold.max() <= 5
        pairs[file.stem if "stsb" in file.stem else file.stem[:5]] += len(gold)
    assert pairs == {"sts12": 2358, "sts15": 3000, "stsb-test": 1379, "stsb-dev": 1500}
    columns = [bench.read_columns(file) for file in (*bench.EWT, *bench.WNUT)]
    sizes = [(len(file), sum(len(words) for words, _ in file)) for file in columns]
    assert sizes == [(2001, 25147), (2077, 25094), (3394, 62730), (1009, 15733)]


ARTICLE = b'{"text": "a", "description": "b", "topic": "c"}'
LINES = [
    (bench.read_sts, b"1\ta\tb", [b"x\ta\tb", b"1\ta", b"", b"nan\ta\tb", b"1\ta\t\xff"]),
    (bench.read_articles, ARTICLE, [b"{}", b"[]", b"no"]),
    (bench.read_columns, b"one\tNUM", [b"word", b"a\tb\tc", b"\tB-LOC", b"a\t"]),
]


@pytest.mark.parametrize("read, good, bad_lines", LINES)
def test_a_bad_line_is_named(read, good, bad_lines, tmp_path):
    for bad in bad_lines:
        (tmp_path / "a.tsv").write_bytes(b"\n".join([good, good, bad, good]))
        refused("a.tsv, line 3", read, tmp_path / "a.tsv")


def test_columns_of_all_kinds(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("-DOCSTART- -X- O\n\nEU NNP B-ORG\nrejects VBZ O\r\n\n\n\nPeter NNP B-PER\n")
    assert bench.read_columns(file) == [(["EU", "rejects"], ["B-ORG", "O"]), (["Peter"], ["B-PER"])]
    file.write_bytes(b"\xef\xbb\xbfNew York\tB-LOC\r\n")
    assert bench.read_columns(file) == [(["New York"], ["B-LOC"])]
    for read, nothing_to_score in ((bench.read_columns, "\n"), (bench.read_sts, "1\ta\tb\n")):
        file.write_text(nothing_to_score)
        refused("a.txt: ", read, file)


# --- Sentence pairs, articles, words -----------------------------------------------------------


def test_files_of_a_year_are_one_task_with_all_of_its_pairs_together(encoder, tmp_path):
    lines = bench.STS_FILES[-1].read_text().splitlines(keepends=True)[:60]
    parts = {"sts12-a": lines[:15], "sts12-b": lines[15:30], "sts15": lines[30:45]}
    for name, part in (parts | {"stsb-mine": lines[45:], "both": lines[:30]}).items():
        (tmp_path / f"{name}.tsv").write_text("".join(part))
    files = [tmp_path / f"{name}.tsv" for name in (*parts, "stsb-mine")]
    scores = bench.sts(encoder, files)
    assert list(scores) == ["STS", "STS12", "STS15", "stsb-mine", "alignment", "uniformity"]
    assert scores["STS12"] == pytest.approx(bench.sts(encoder, tmp_path / "both.tsv")["both"])
    assert scores["STS"] == pytest.approx(np.mean([*scores.values()][1:4]))
    refused("a second file named stsb-mine", bench.sts, encoder, [*files, files[-1]])


def test_articles_are_found_by_their_descriptions_and_none_is_trained_on(tmp_path):
    topics, asked = ["animals", "rivers", "kings"], []
    described = {f"{topics[i % 3]} {i}": f"Article {i} tells of them." for i in range(399)}

    def encode(texts: list[str]) -> np.ndarray:
        """What an oracle knows: which article is meant, and its topic."""
        asked.extend(texts)
        numbers = np.array([int(re.search(r"\d+", text)[0]) for text in texts])
        return np.eye(402)[numbers] + 2 * np.eye(402)[399 + numbers % 3] + 1e-3

    oracle = SimpleNamespace(decoder=SimpleNamespace(device="cpu"), encode=encode)
    records = (dict(text=t, description=d, topic=d.split()[0]) for d, t in described.items())
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    scores = bench.articles(oracle, tmp_path / "a.jsonl", candidates=60)
    assert scores == pytest.approx(dict.fromkeys(scores, 1.0)) and len(scores) == 4
    queries = [described[text] for text in asked if text in described]
    assert sorted(queries) == sorted(split_documents(list(described.values()))[1])


@pytest.mark.parametrize("template", [None, "endoftext"])
def test_a_word_averages_the_states_of_its_own_tokens(template):
    encoder, at, before = tiny(template=template), [], []
    sentences = [["Antidisestablishmentarianism", "is", "naïve", "日本", "!"], ["Yes"]]
    for sentence in sentences:
        ids = encoder.tokenizer.encode(" ".join(sentence)).ids
        hidden, start = encoder.decoder(pad([ids]))[0].detach(), int(template is not None)
        for k, word in enumerate(sentence):
            spelled = word if k == 0 else " " + word
            n = len(encoder.tokenizer.encode(spelled, add_special_tokens=False).ids)
            place = torch.arange(start, start := start + n)
            at.append(hidden[place].mean(0))
            before.append(hidden[(place - 1).clamp_min(0)].mean(0))
    expected = torch.stack([torch.stack(at), torch.stack(before)])
    found = torch.stack(word_states(encoder, sentences))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    np.testing.assert_allclose(encoder.encode_words(sentences[0]), expected[0, :5], atol=1e-5)


KINDS = {"dog": "NOUN", "cat": "NOUN", "runs": "VERB", "sings": "VERB", "the": "DET"}
SAID = ["the dog runs", "the cat sings", "the cat runs", "the dog sings"] * 5
TAGS = "\n\n".join("\n".join(f"{w}\t{KINDS[w]}" for w in said.split()) for said in SAID)


def test_words_are_scored_by_what_their_labels_are(encoder, tmp_path):
    tags, names = tmp_path / "tags.tsv", tmp_path / "names.tsv"
    tags.write_text(TAGS)
    names.write_text(TAGS.replace("NOUN", "B-PET").replace("VERB", "O").replace("DET", "O"))
    for file in (tags, names):
        scores = bench.words(encoder, file, file, "mine")
        assert scores["mine"] == 1 and scores.keys() == {"mine", "mine, i-1"}


def test_hidden_tokens_are_read_off_the_states_in_front_of_them(encoder):
    decoder, V = encoder.decoder, encoder.decoder.config.vocab_size
    rows = encoder.tokenizer.encode_batch(read_documents(WIKIPEDIA)[:99])
    blocks, mask_id = cut_into_blocks((row.ids for row in rows), 30, 20), bench.mask_id_of(encoder)
    generator = torch.Generator().manual_seed(0)
    masked, chosen = mask_tokens(blocks, mask_id, V, 0.2, (1.0, 0.0), generator=generator)
    guess = decoder.logits(decoder(masked)).argmax(-1)
    right = [guess[b, i - 1] == blocks[b, i] for b, i in chosen.nonzero().tolist()]
    assert bench.masked_accuracy(encoder, blocks, mask_id) == pytest.approx(np.mean(right))
    assert np.mean(right) > 0.05


# --- Baselines, and all of them ----------------------------------------------------------------


def test_baselines_are_what_they_are_called():
    """The prompts of one word stand instead of the template that a model has."""
    text, longer = "An echo answers.", "And a longer text stands beside it, padded or not."
    plain = tiny(is_causal=True)
    ids, decoder = plain.tokenizer.encode(text).ids, plain.decoder
    expected = {
        "input embeddings": decoder.embed_tokens.weight[ids].mean(0),
        "causal, echo": decoder(pad([[0, *ids, *ids]]))[0, 1 + len(ids) :].mean(0),
    }
    for name in ("one-word", "one-word-example"):
        before, after = TEMPLATES[name]
        parts = (before.removeprefix(START), text, after)
        prompt = [0] + [i for part in parts for i in plain.tokenizer.encode(part).ids]
        expected[f"causal, {name}"] = decoder(pad([prompt]))[0, -1]
    for template in ("endoftext", "mistral"):
        found = dict(compare.baselines(tiny(is_causal=True, template=template)))
        for name, vector in expected.items():
            if template == "endoftext" or "one-word" in name:
                vectors = found[name].encode([text, longer])
                np.testing.assert_allclose(vectors[0], vector.detach(), atol=1e-5)


def test_what_can_not_be_scored_is_said_before_the_long_work(encoder, monkeypatch):
    monkeypatch.setattr(bench, "sts", lambda *_: pytest.fail("it was scored"))
    refused("0 tokens, too few for one block of 128", bench.evaluate, encoder, [])


def test_a_table_has_a_column_a_score_and_a_row_a_model_with_its_range_over_seeds():
    both = [{"seed": 0, "STS": -0.25, "seconds": 77.4}, {"seed": 8, "STS": 0.75, "seconds": 3}]
    rows = compare.over_seeds({"+ mntp": both, "mean": [{"STS": 0.5, "masked tokens": 0.1}]})
    assert compare.table(rows).splitlines() == [
        "|                 |    STS | masked tokens | seconds |",
        "| --------------- | -----: | ------------: | ------: |",
        "| + mntp          |  0.250 |               |      40 |",
        "| + mntp, lowest  | -0.250 |               |       3 |",
        "| + mntp, highest |  0.750 |               |      77 |",
        "| mean            |  0.500 |         0.100 |         |",
    ]


def test_the_command_scores_a_checkpoint_and_the_baselines(encoder, monkeypatch, command):
    mine, tags = Path("mine.tsv"), Path("tags.tsv")
    mine.write_text("\n".join(bench.STS_FILES[-1].read_text().splitlines()[:40]))
    tags.write_text(TAGS)
    monkeypatch.setattr(bench, "masked_accuracy", lambda *_: 0.25)
    args = ["--model", TINY, "--dtype", "float32", "--baselines", "--sts", mine]
    args += ["--benchmarks", "sts", "masked", "words", "--words", tags, tags]
    *shown, last = command(*args, main=bench.main)[1].splitlines()
    rows = json.loads(last)
    assert list(rows) == [*(name for name, _ in compare.baselines(encoder)), "tiny-llama"]
    assert "\n".join(shown) == compare.table(rows)
    assert rows["tiny-llama"]["mine"] == pytest.approx(bench.sts(encoder, mine)["mine"])
    masked = [name for name, scores in rows.items() if scores.get("masked tokens") == 0.25]
    assert masked == ["tiny-llama"], "a baseline has no guesses of its own"
    assert rows["tiny-llama"]["tags"] == 1 and "tags" not in rows["causal, echo"]
    _, _, errors = command(*args, *args[-3:], main=bench.main)
    assert "--words: two test files of one name" in errors
