"""Splitting and cutting text."""

import hashlib
import time

import pytest
from helpers import DOCUMENTS, refused

from llm2vec_data.corpus import cut_into_blocks, sentences, split_documents


def test_who_is_held_out_never_changes():
    """By the hash of its words, of which the first 32 bits are a multiple of 50.

    So a copy, whatever its case and spacing, goes with the original.
    """
    plain = [f"document {i} says something." for i in range(500)]
    draws = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") for text in plain]
    for copies in (plain, [text.upper().replace(" ", "\n  ") for text in plain]):
        sides = [], []
        for text, draw in zip(copies, draws, strict=True):
            sides[draw % 50 == 0].append(text)
        assert split_documents(copies) == sides and len(sides[1]) > 5


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


UNITS = [".", "A. ", "a.b.c.", '"', "?!", "It is. ", '." ', ".)", '. "(', "α;", "。", "这是。」"]


@pytest.mark.parametrize("unit", UNITS)
def test_a_long_line_takes_linear_time(unit):
    """Four times the length takes some four times as long, not sixteen."""

    def seconds(length: int) -> float:
        line, start = (unit * length)[:length], time.process_time()
        assert "".join(sentences(line)).replace(" ", "") == line.replace(" ", "")
        return time.process_time() - start

    seconds(1000)
    assert seconds(400_000) < 8 * min(seconds(100_000) for _ in range(2)) + 0.05


def test_sentences_lose_no_word():
    for document in DOCUMENTS:
        assert " ".join(sentences(document)).split() == document.split()


def test_blocks_are_the_rows_end_to_end():
    """And no more of them are read than the limit needs."""
    rows = [[1, 2, 3], [4], [5, 6, 7, 8]]
    assert cut_into_blocks(rows, 3).tolist() == [[1, 2, 3], [4, 5, 6]]
    numbered = iter([[1, 2], [3, 4], [5, 6], [7, 8]])
    assert cut_into_blocks(numbered, 3, limit=2).tolist() == [[1, 2, 3], [4, 5, 6]]
    assert next(numbered) == [7, 8]
    refused("8 tokens", cut_into_blocks, rows, 9)
