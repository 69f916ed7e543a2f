"""The measures against the libraries that define them, and what an evaluation reads and reports."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from data.benchmarks import (
    BASELINES,
    EWT,
    STS_FILES,
    WNUT,
    Echo,
    InputEmbeddings,
    articles,
    k_means,
    linear_probe,
    read_articles,
    read_columns,
    read_sts,
    sts,
    unit_vectors,
    word_states,
    words,
)
from data.metrics import entities, entity_f1, ndcg, recall, spearman, v_measure
from llm2vec import LLM2Vec, pad, tokenize

TINY = Path(__file__).parent.parent / "data" / "tiny-llama"
GOLDEN = json.loads((Path(__file__).parent / "golden" / "metrics.json").read_text())


@pytest.fixture(scope="module")
def encoder() -> LLM2Vec:
    return LLM2Vec.from_pretrained(TINY)


# --- Measures ----------------------------------------------------------------------------------


def of(case: dict, measure: str) -> float:
    if measure == "spearman":
        return spearman(case["a"], case["b"])
    if measure == "ndcg":
        return ndcg(np.array(case["relevance"]), np.array(case["scores"]), case["k"])
    if measure == "v_measure":
        return v_measure(case["a"], case["b"])
    return entity_f1(case["gold"], case["guess"])


@pytest.mark.parametrize("measure", GOLDEN)
def test_measures_are_those_of_the_reference_libraries(measure):
    assert len(GOLDEN[measure]) > 10
    for case in GOLDEN[measure]:
        score = of(case, measure)
        expected = case["score"]
        if expected is None:
            assert math.isnan(score), case
        else:
            assert score == pytest.approx(expected, abs=1e-6), case


def test_vectors_that_are_not_numbers_have_no_score():
    assert math.isnan(spearman([0.1, 0.2, float("nan"), 0.5], [1, 2, 3, 5]))

    class Overflown:
        def encode(self, texts):
            return np.array([[1.0, 2.0], [np.inf, 0.0], [3.0, np.nan]])

    with pytest.raises(ValueError, match="the vectors of 2 of 3 texts, such as 'two'"):
        unit_vectors(Overflown(), ["one", "two", "three"])


def test_entities_by_hand():
    labels = ["B-PER", "I-PER", "O", "I-LOC", "I-LOC", "B-LOC", "I-PER"]
    assert entities(labels) == {(0, 2, "PER"), (3, 5, "LOC"), (5, 6, "LOC"), (6, 7, "PER")}
    assert entities([]) == entities(["O"]) == set()


def test_recall_by_hand():
    relevance = np.eye(3, dtype=bool)
    scores = np.array([[0.9, 0.1, 0.2], [0.5, 0.4, 0.1], [0.3, 0.3, 0.3]])
    assert recall(relevance, scores, 1) == pytest.approx(1 / 3)
    assert recall(relevance, scores, 2) == pytest.approx(2 / 3)  # a tie counts against it
    assert recall(relevance, scores, 3) == 1


# --- Probe and clusters ------------------------------------------------------------------------


def blobs(per_kind: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(4).repeat(per_kind)
    centres = 6 * torch.eye(4, 8)
    return centres[y] + torch.randn(len(y), 8, generator=generator), y


def test_a_probe_learns_what_is_there_and_not_what_is_not():
    x, y = blobs(50, 0)
    x_test, y_test = blobs(50, 1)
    assert (linear_probe(x, y, x_test, 4) == y_test).float().mean() > 0.97
    shuffled = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(2))]
    assert (linear_probe(x, shuffled, x_test, 4) == y_test).float().mean() < 0.5
    again = linear_probe(1000 * x + 5, y, 1000 * x_test + 5, 4)
    assert torch.equal(again, linear_probe(x, y, x_test, 4)), "features are standardised"


def test_k_means_finds_clusters_and_outlives_equal_points():
    x, y = blobs(30, 0)
    assert v_measure(y.numpy(), k_means(x, 4).numpy()) > 0.95
    assert torch.equal(k_means(x, 4), k_means(x, 4))
    assert len(k_means(torch.ones(5, 3), 3)) == 5


# --- Sentence pairs ----------------------------------------------------------------------------


def test_files_of_a_year_are_one_task_with_all_of_its_pairs_together(encoder, tmp_path):
    lines = STS_FILES[-1].read_text().splitlines()[:60]
    names = ["sts12-a", "sts12-b", "sts15", "stsb-mine"]
    for i, name in enumerate(names):
        (tmp_path / f"{name}.tsv").write_text("\n".join(lines[15 * i : 15 * i + 15]) + "\n")
    (tmp_path / "both.tsv").write_text("\n".join(lines[:30]))
    scores = sts(encoder, [tmp_path / f"{name}.tsv" for name in names])
    assert list(scores)[:4] == ["STS", "STS12", "STS15", "stsb-mine"]
    assert scores["STS12"] == pytest.approx(sts(encoder, tmp_path / "both.tsv")["both"])
    tasks = [scores[task] for task in ("STS12", "STS15", "stsb-mine")]
    assert scores["STS"] == pytest.approx(np.mean(tasks))
    assert {"alignment", "uniformity"} < scores.keys()
    assert "uniformity" not in sts(encoder, tmp_path / "sts15.tsv")


def test_two_files_of_one_name_are_not_one_task(encoder, tmp_path):
    files = [tmp_path / folder / "test.tsv" for folder in ("stsb", "sick")]
    for file in files:
        file.parent.mkdir()
        file.write_text("5\ta\ta\n1\ta\tb\n")
    with pytest.raises(ValueError, match="sick/test.tsv: a second file named test"):
        sts(encoder, files)


def test_bundled_tasks_have_their_published_sizes():
    pairs = {}
    for file in STS_FILES:
        task = file.stem.partition("-")[0]
        pairs[task] = pairs.get(task, 0) + len(read_sts(file)[0])
    assert pairs == {"sts12": 2358, "sts15": 3000, "stsb": 1379}


# --- Articles ----------------------------------------------------------------------------------


def write_articles(path: Path, records: list[dict]) -> Path:
    path.write_text("\n".join(map(json.dumps, records)) + "\n")
    return path


def test_articles_are_found_by_their_descriptions_and_none_is_trained_on(tmp_path):
    from data.corpus import split_documents

    topics = ["animals", "rivers", "kings"]
    records = [
        {"text": f"Article {i} tells of {topics[i % 3]}.", "description": f"{topics[i % 3]} {i}"}
        | {"topic": topics[i % 3]}
        for i in range(400)
    ]
    held_out = set(split_documents([r["text"] for r in records])[1])

    class Oracle:
        """Knows what belongs together, and remembers what it was asked."""

        seen: list[str] = []

        def encode(self, texts):
            self.seen += texts
            vectors = np.full((len(texts), 403), 1e-3)
            for row, text in zip(vectors, texts, strict=True):
                topic = next(i for i, name in enumerate(topics) if name in text)
                number = int("".join(c for c in text if c.isdigit()))
                row[number], row[400 + topic] = 1, 2
            return vectors

    oracle = Oracle()
    scores = articles(oracle, write_articles(tmp_path / "a.jsonl", records), candidates=60)
    assert scores == pytest.approx(dict.fromkeys(scores, 1.0))
    described = {r["description"]: r["text"] for r in records}
    queries = [text for text in oracle.seen if text in described]
    assert len(queries) == len(held_out) and {described[q] for q in queries} == held_out


@pytest.mark.parametrize("line", ["{}", "[]", "no", '{"text": "a", "description": 3, "topic": ""}'])
def test_a_bad_article_is_named(tmp_path, line):
    good = json.dumps({"text": "a", "description": "b", "topic": "c"})
    (tmp_path / "a.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(ValueError, match="a.jsonl, line 2"):
        read_articles(tmp_path / "a.jsonl")


# --- Words -------------------------------------------------------------------------------------


def test_bundled_columns_are_whole():
    expected = {EWT[0]: (2001, 25147), EWT[1]: (2077, 25094), WNUT[0]: (3394, 62730)}
    expected |= {WNUT[1]: (1009, 15733)}
    for file, sizes in expected.items():
        sentences = read_columns(file)
        assert (len(sentences), sum(len(words) for words, _ in sentences)) == sizes


def test_columns_of_all_kinds(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("-DOCSTART- -X- O\n\nEU NNP B-ORG\nrejects VBZ O\r\n\n\n\nPeter NNP B-PER\n")
    both = [(["EU", "rejects"], ["B-ORG", "O"]), (["Peter"], ["B-PER"])]
    assert read_columns(file) == both
    file.write_text("New York\tB-LOC\n")
    assert read_columns(file) == [(["New York"], ["B-LOC"])]


@pytest.mark.parametrize("line", ["word", "a\tb\tc", "\tB-LOC", "a\t"])
def test_ragged_columns_are_named(tmp_path, line):
    (tmp_path / "a.tsv").write_text(f"one\tNUM\ntwo\tNUM\n{line}\n")
    with pytest.raises(ValueError, match="a.tsv, line 3: expected 2 columns"):
        read_columns(tmp_path / "a.tsv")


def test_columns_without_a_sentence_or_file_or_utf8(tmp_path):
    (tmp_path / "a.tsv").write_text("\n\n")
    with pytest.raises(ValueError, match="no sentence"):
        read_columns(tmp_path / "a.tsv")
    (tmp_path / "a.tsv").write_bytes(b"\xff\tO\n")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_columns(tmp_path / "a.tsv")
    with pytest.raises(FileNotFoundError, match=r"b\.tsv"):
        read_columns(tmp_path / "b.tsv")


@pytest.mark.parametrize("template", [None, "endoftext"])
def test_a_word_averages_the_states_of_its_own_tokens(template):
    encoder = LLM2Vec.from_pretrained(TINY, template=template)
    sentences = [["Antidisestablishmentarianism", "is", "naïve", "日本", "!"], ["Yes"]]
    at, before = word_states(encoder, sentences)
    assert at.shape == before.shape == (6, encoder.decoder.config.hidden_size)
    ids = [encoder.tokenizer.encode(" ".join(words)).ids for words in sentences]
    row = 0
    for words_, row_ids in zip(sentences, ids, strict=True):
        hidden = encoder.decoder(pad([row_ids]))[0].detach()
        start = int(template is not None)
        for k, word in enumerate(words_):
            spelled = word if k == 0 else " " + word
            n = len(encoder.tokenizer.encode(spelled, add_special_tokens=False).ids)
            place = torch.arange(start, start + n)
            torch.testing.assert_close(at[row], hidden[place].mean(0), atol=1e-5, rtol=0)
            earlier = hidden[(place - 1).clamp_min(0)].mean(0)
            torch.testing.assert_close(before[row], earlier, atol=1e-5, rtol=0)
            start, row = start + n, row + 1


def test_words_are_scored_by_what_their_labels_are(encoder, tmp_path):
    kinds = {"dog": "NOUN", "cat": "NOUN", "runs": "VERB", "sings": "VERB", "the": "DET"}
    lines = ["the dog runs", "the cat sings", "the cat runs", "the dog sings"] * 5
    tags = "\n\n".join("\n".join(f"{w}\t{kinds[w]}" for w in line.split()) for line in lines)
    (tmp_path / "tags.tsv").write_text(tags)
    scores = words(encoder, tmp_path / "tags.tsv", tmp_path / "tags.tsv")
    assert scores["tags"] == 1 and scores.keys() == {"tags", "tags, i-1"}
    named = tags.replace("NOUN", "B-PET").replace("VERB", "O").replace("DET", "O")
    (tmp_path / "names.tsv").write_text(named)
    assert words(encoder, tmp_path / "names.tsv", tmp_path / "names.tsv", "NER")["NER"] == 1


# --- Baselines ---------------------------------------------------------------------------------


def test_echo_pools_the_second_copy_of_each_text():
    causal = LLM2Vec.from_pretrained(TINY, is_causal=True, template="endoftext")
    echo = Echo(causal.decoder, causal.tokenizer)
    [(ids, _)] = tokenize(causal.tokenizer, ["An echo answers."], 512)
    hidden = causal.decoder(pad([ids + ids[1:]]))[0, len(ids) :].detach()
    expected = hidden.mean(0).numpy()
    np.testing.assert_allclose(echo.encode(["An echo answers."])[0], expected, atol=1e-5)
    both = echo.encode(["An echo answers.", "And a longer text stands beside it, padded or not."])
    np.testing.assert_allclose(both[0], expected, atol=1e-5)


def test_input_embeddings_are_read_off_the_table(encoder):
    bag = InputEmbeddings(encoder.decoder, encoder.tokenizer)
    ids = encoder.tokenizer.encode("Words alone.").ids
    expected = encoder.decoder.embed_tokens.weight[ids].mean(0).detach().numpy()
    found = bag.encode(["Words alone.", "Words alone. And more of them."])
    np.testing.assert_allclose(found[0], expected, atol=1e-6)


def test_every_baseline_encodes(encoder):
    for kind, pooling in BASELINES.values():
        baseline = kind(encoder.decoder, encoder.tokenizer, pooling)
        assert unit_vectors(baseline, ["one", "two words"]).shape == (2, 256)
