"""Splitting and cutting text."""

import hashlib
import time

import pytest
import torch

from llm2vec_data.corpus import (
    WIKIPEDIA,
    cut_into_blocks,
    read_documents,
    sentences,
    split_documents,
)


def test_the_split_never_leaks():
    documents = [f"Document {i} says something." for i in range(2000)]
    train, held_out = split_documents(documents)
    assert sorted(train + held_out) == sorted(documents)
    assert 20 < len(held_out) < 80
    # A copy, whatever its case and spacing, goes with the original; order and company do not count.
    copies = [text.upper().replace(" ", "\n  ") for text in documents[::-1]]
    for side, originals in zip(split_documents(copies[:500]), (train, held_out), strict=True):
        assert {" ".join(t.lower().split()) for t in side} <= {t.lower() for t in originals}


@pytest.mark.parametrize(
    "between, expected",  # joined, and cut again
    [
        (" ", ["One.", "Two!", "Three?", "Four"]),
        (" ", ["Dr. Smith met J. R. R. Tolkien.", "They ate."]),
        (" ", ["It cost 3.5 dollars.", "12 came."]),
        (" ", ["The U.S. Army left.", "It won."]),
        (" ", ['He said "Go."', '"No," she said.']),
        (" ", ["He (b. 1900) sang.", "(Badly.)", "Then"]),
        (" ", ["e.g. this vs. That one."]),
        (" ", []),
        (" ", ["Он родился в 1812 г. в Москве.", "А. С. Пушкин писал.", "«Да!» — сказал он."]),
        (" ", ["Τι είναι αυτό;", "Είναι ένα βιβλίο.", "Όχι!"]),
        (" ", ["यह पहला वाक्य है।", "यह दूसरा है।", "क्या?"]),
        (" ", ["هذا أول.", "هل هذا ثان؟", "نعم."]),
        (" ", ["یہ ایک ہے۔", "یہ دو ہے۔"]),
        (" ", ["זה משפט.", "וזה עוד."]),
        (" ", ["საქართველო არის.", "ქალაქი თბილისი."]),
        (" ", ["¿Qué es?", "¡Hola!", "Sí."]),
        (" ", ["Er ging z. B. weg.", "„Ja.“", "Sie blieb."]),
        (" ", ["Ձմեռ է։", "Գարուն։"]),
        (" ", ["한국어 문장이다.", "두 번째 문장이다."]),
        ("", ["这是第一句。", "这是第二句！", "“真的吗？”", "好。"]),
        ("", ["これは文です。", "本当？", "（はい。）", "そうです。"]),
        ("", ["ဤသည်မှာ ဝါကျ။", "နောက်တစ်ခု။"]),
    ],
)
def test_sentences_of_all_scripts(between, expected):
    assert sentences(between.join(expected)) == expected
    assert sentences(f"  \n{between.join(expected)}\nline two.") == [*expected, "line two."]


@pytest.mark.parametrize(
    "unit",
    [".", "A. ", "a.b.c.", '"', "?!", "It is. ", '." ', ".)", '. "(', "α;", "。", "这是。」"],
)
def test_a_long_line_takes_linear_time(unit):
    """Four times the length takes some four times as long, not sixteen."""

    def seconds(length: int) -> float:
        line, start = (unit * length)[:length], time.process_time()
        assert "".join(sentences(line)).replace(" ", "") == line.replace(" ", "")
        return time.process_time() - start

    seconds(1000)
    assert seconds(400_000) < 8 * min(seconds(100_000) for _ in range(2)) + 0.05


def test_sentences_lose_no_word():
    for document in read_documents(WIKIPEDIA)[:500]:
        assert " ".join(sentences(document)).split() == document.split()


def test_who_is_held_out_never_changes():
    """By the hash of its words, of which the first 32 bits are a multiple of 50."""
    documents = [f"Document  {i} says\nsomething." for i in range(500)]
    words = [f"document {i} says something.".encode() for i in range(500)]
    draws = [int.from_bytes(hashlib.sha256(text).digest()[:4], "big") for text in words]
    held_out = [text for text, draw in zip(documents, draws, strict=True) if draw % 50 == 0]
    assert split_documents(documents)[1] == held_out and held_out


def test_blocks_are_the_rows_end_to_end():
    rows = [[1, 2, 3], [4], [5, 6, 7, 8]]
    assert torch.equal(cut_into_blocks(rows, 3), torch.tensor([[1, 2, 3], [4, 5, 6]]))

    def endless():
        while True:
            yield [1, 2]

    assert cut_into_blocks(endless(), 3, limit=2).tolist() == [[1, 2, 1], [2, 1, 2]]
    numbered = iter([[1, 2], [3, 4], [5, 6], [7, 8]])
    assert len(cut_into_blocks(numbered, 3, limit=2)) == 2 and next(numbered) == [7, 8]
    with pytest.raises(ValueError, match="8 tokens, too few for one block of 9"):
        cut_into_blocks(rows, 9)


def test_a_stray_nul_is_dirt_in_a_text_file_and_elsewhere_a_sign_of_no_text(tmp_path):
    for name in ("a.txt", "a.md", "a.jsonl"):
        (tmp_path / name).write_bytes(b"one\0\ntwo and three\n")
    assert read_documents(tmp_path / "a.txt") == ["one\0", "two and three"]
    for name in ("a.md", "a.jsonl"):
        with pytest.raises(ValueError, match=f"{name}: is not text"):
            read_documents(tmp_path / name)
