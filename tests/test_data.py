"""Reading, splitting and cutting text; Spearman's rho and the other scores."""

import numpy as np
import pytest
import torch

from data.benchmarks import STSB_DEV, STSB_TEST, read_sts
from data.corpus import WIKIPEDIA, cut_into_blocks, read_documents, sentences, split_documents
from data.metrics import ranks, spearman


def test_spearman_with_ties_by_hand():
    assert ranks([10, 20, 20, 30]).tolist() == [1, 2.5, 2.5, 4]
    assert ranks([3, 1, 3, 3, 2]).tolist() == [4, 1, 4, 4, 2]
    # Ranks (1, 2.5, 2.5, 4) and (1, 2, 3, 4): covariance 4.5, variances 4.5 and 5.
    assert spearman([10, 20, 20, 30], [1, 2, 3, 4]) == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    # Without ties it is 1 - 6 sum d^2 / (n (n^2 - 1)); here d is (-1, -2, 0, -1, 4) and n is 5.
    assert spearman([1, 2, 3, 4, 5], [1, 3, 2, 7, 0.5]) == pytest.approx(1 - 6 * 22 / 120)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert np.isnan(spearman([1, 1, 1], [1, 2, 3]))


def test_bundled_benchmarks_have_their_published_sizes():
    for file, pairs in ((STSB_DEV, 1500), (STSB_TEST, 1379)):
        gold, left, right = read_sts(file)
        assert len(gold) == len(left) == len(right) == pairs
        assert gold.min() == 0 and gold.max() == 5


@pytest.mark.parametrize("line", ["no score\ta\tb", "1.0\tonly one", "", "1.0"])
def test_a_bad_benchmark_line_is_named(tmp_path, line):
    file = tmp_path / "x.tsv"
    file.write_text(f"1.0\ta\tb\n2.0\tc\td\n{line}\n3.0\te\tf\n")
    with pytest.raises(ValueError, match="x.tsv, line 3"):
        read_sts(file)


def test_documents_of_both_kinds(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n  two  \r\nthree")
    assert read_documents(tmp_path / "a.txt") == ["one", "two", "three"]
    (tmp_path / "a.jsonl").write_text('{"text": "one\\ntwo", "title": "x"}\n\n{"text": " "}\n')
    assert read_documents(tmp_path / "a.jsonl") == ["one\ntwo"]
    assert len(read_documents(WIKIPEDIA)) == 10_033


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.txt", b"", "empty corpus"),
        ("a.txt", b"\n \n", "empty corpus"),
        ("a.txt", b"fine\n\xff\n", "a.txt, line 2: not UTF-8"),
        ("a.jsonl", b'{"text": "fine"}\nnot json\n', "a.jsonl, line 2"),
        ("a.jsonl", b'{"title": "no text"}\n', "a.jsonl, line 1"),
        ("a.jsonl", b'{"text": 3}\n', "line 1: text is int"),
        ("a.jsonl", b"[1]\n", "a.jsonl, line 1"),
    ],
)
def test_a_bad_corpus_is_named(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read_documents(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_documents(tmp_path / "nowhere.txt")


def test_the_split_never_leaks():
    documents = [f"Document {i} says something." for i in range(2000)]
    train, held_out = split_documents(documents)
    assert sorted(train + held_out) == sorted(documents)
    assert 20 < len(held_out) < 80
    # A copy, whatever its case and spacing, goes with the original; order and company do not count.
    copies = [text.upper().replace(" ", "\n  ") for text in documents[::-1]]
    train_copies, held_out_copies = split_documents(copies[:500])
    assert {" ".join(t.lower().split()) for t in held_out_copies} <= {t.lower() for t in held_out}
    assert {" ".join(t.lower().split()) for t in train_copies} <= {t.lower() for t in train}


@pytest.mark.parametrize(
    "text, expected",
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        (
            "Dr. Smith met J. R. R. Tolkien. They ate.",
            ["Dr. Smith met J. R. R. Tolkien.", "They ate."],
        ),
        ("It cost 3.5 dollars. 12 came.", ["It cost 3.5 dollars.", "12 came."]),
        ("The U.S. Army left. It won.", ["The U.S. Army left.", "It won."]),
        ('He said "Go." "No," she said.', ['He said "Go."', '"No," she said.']),
        ("He (b. 1900) sang. (Badly.) Then", ["He (b. 1900) sang.", "(Badly.)", "Then"]),
        ("e.g. this vs. That one.", ["e.g. this vs. That one."]),
        ("Line one\nline two.", ["Line one", "line two."]),
        ("", []),
        ("  \n ", []),
    ],
)
def test_sentences(text, expected):
    assert sentences(text) == expected


def test_sentences_lose_no_word():
    for document in read_documents(WIKIPEDIA)[:500]:
        assert " ".join(sentences(document)).split() == document.split()


def test_blocks_are_the_rows_end_to_end():
    rows = [[1, 2, 3], [4], [5, 6, 7, 8]]
    assert torch.equal(cut_into_blocks(rows, 3), torch.tensor([[1, 2, 3], [4, 5, 6]]))

    def endless():
        while True:
            yield [1, 2]

    assert cut_into_blocks(endless(), 3, limit=2).tolist() == [[1, 2, 1], [2, 1, 2]]
    with pytest.raises(ValueError, match="8 tokens, too few for one block of 9"):
        cut_into_blocks(rows, 9)
