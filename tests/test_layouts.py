"""Texts and pairs in the layouts of others: each is that of the plain one, or refused by name."""

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import pair, refused

import llm2vec_data.encode as files
from llm2vec_data.corpus import read_documents
from llm2vec_data.encode import read_records
from llm2vec_data.pairs import read_pairs

TEXTS = ['One, "quoted".', "Two\nlines.", "Ünïcödé\tand a tab", "x" * 200_000, "[1] {a}", "last"]


def table(rows: list[dict], delimiter: str) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, rows[0], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def json_lines(rows: list) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


WRITERS = {
    "a.jsonl": json_lines,
    "a.jsonl.gz": json_lines,
    "a.ndjson": lambda rows: "\ufeff" + json_lines(rows),
    "a.json": lambda rows: "\n" + json_lines(rows),
    "array.json": lambda rows: json.dumps(rows, indent=1),
    "array.jsonl.gz": lambda rows: "\ufeff " + json.dumps(rows),
    "a.csv": lambda rows: table(rows, ","),
    "A.CSV.gz": lambda rows: "\ufeff" + table(rows, ","),
    "a.tsv": lambda rows: table(rows, "\t"),
}


def write(folder: Path, name: str, content: str | bytes) -> Path:
    """A file with these bytes; or with this text, compressed if its name says so."""
    if isinstance(content, str):
        content = content.encode()
        content = gzip.compress(content) if name.endswith(".gz") else content
    (folder / name).write_bytes(content)
    return folder / name


# --- Texts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
def test_a_corpus_of_each_kind_is_that_of_json_lines(name, tmp_path, monkeypatch):
    """Of a file, of its folder, and of one or several processes that share its records."""
    records = [{"id": str(i), "text": text} for i, text in enumerate(TEXTS)]
    file = write(tmp_path, name, WRITERS[name](records))
    assert read_documents(file) == read_documents(tmp_path) == TEXTS
    for processes in (1, 4):
        monkeypatch.setattr(files, "WORLD_SIZE", processes)
        joined = []
        for rank in range(processes):
            monkeypatch.setattr(files, "RANK", rank)
            joined += read_records(str(file))
        assert joined == records


def test_strings_are_records_too_and_blank_ones_no_documents(tmp_path):
    for name in ("array.json", "a.jsonl"):
        file = write(tmp_path, name, WRITERS[name]([*TEXTS, "", " "]))
        assert read_documents(file) == TEXTS


def test_a_folder_is_its_corpora_in_the_order_of_their_names(tmp_path):
    for name, content in (("b.txt", "two"), ("a.txt.gz", "one"), ("notes.md", "no corpus")):
        write(tmp_path, name, content)
    assert read_documents(tmp_path) == ["one", "two"]
    (tmp_path / "empty").mkdir()
    refused("empty: an empty corpus", read_documents, tmp_path / "empty")


def test_other_files_hold_a_text_a_line(tmp_path):
    lines = ["[1] a note", "{braces} and", '{"a"', "", "text,label"]
    for name in ("a.txt", "a.md", "a"):
        file = write(tmp_path, name, "\n".join(lines))
        assert read_documents(file) == [line for line in lines if line]
        assert [record["text"] for record in read_records(str(file))] == lines


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.csv", "sent0,sent1\na,b\n", "line 2: .*sent0, sent1"),
        ("a.csv", "text\nHello, world\n", "line 2: 2 columns"),
        ("a.csv", "text,text\na,b\n", "line 1: 2 columns"),
        ("a.tsv", 'id\ttext\n1\t"a\n2\tb\n', "line 3"),
        ("a.csv", b"text\nfine\nlatin \xe9\n", "line 3: .*utf-8"),
        ("a.txt", b"fine\n\xff\n", "line 2: .*utf-8"),
        ("a.json", '[{"text": "a"}, {"title": "b"}]', "item 2: .*`text`; it has title"),
        ("a.json", '{\n "text": "a"\n}', "line 1"),
        ("a.json", '[{"text": "a"},', "one array"),
        ("a.txt", '\n {"text": "a"}\n', ".jsonl"),
        ("corpus", '[\n {"text": "a"}\n]', "JSON lines"),
        ("a.md", b"PK\x03\x04\0\0", "not text"),
        ("a.jsonl", b"a stray NUL\0 is dirt in .txt alone", "not text"),
        ("a.pdf", b"%PDF-1.7\n1 0 obj\n", "not text"),
        ("a.txt", "UTF-16".encode("utf-16-le"), "not text"),
        ("a.jsonl", '\ufeff{"text": "one"}\n'.encode("utf-16-le"), "UTF-16"),
        ("a.jsonl", '\ufeff{"text": "one"}\n'.encode("utf-16-be"), "UTF-16"),
        ("a.txt.gz", b"not compressed", ""),
        ("a.parquet", b"PAR1\xff", r"import pandas.*a.jsonl"),
        ("a.arrow", b"ARROW1\0", r"datasets.Dataset.from_file\('"),
        ("a.parquet", None, "no such file"),
    ],
)
def test_what_is_no_text_is_refused_by_name(name, content, said, tmp_path):
    file = tmp_path / name if content is None else write(tmp_path, name, content)
    refused(f"{name}.*{said}", read_documents, file)
    refused(f"{name}.*{said}", lambda: list(read_records(str(file))))


def test_records_without_text_are_skipped_in_tables_and_arrays_too(tmp_path, capsys):
    for name, content in (("a.csv", b"text\na\n\xff\n"), ("a.json", b'["a", 1]')):
        assert read_documents(write(tmp_path, name, content), errors="skip") == ["a"]
        assert f"{name}: skipped 1 lines" in capsys.readouterr().err


# --- Pairs -------------------------------------------------------------------------------------

PLAIN = [pair("a?", "a.", "not a.", "nor, this"), pair("b\nb?", 'b "b".', "not b.", "x")]
GOOD = {"query": "q", "positive": "p"}


def passages(*texts: str) -> list[dict]:
    return [{"docid": str(i), "title": "", "text": text} for i, text in enumerate(texts)]


def numbered(*names: str, **more) -> Callable:
    """A row whose query, positive and two negatives are fields of these names."""
    return lambda q, p, n: dict(zip(names, (q, p, *n), strict=True)) | more


LAYOUTS = {  # what makes a row of a query, a positive and two negatives
    "ours": lambda q, p, n: {"query": q, "positive": p, "negative": n},
    "plural": lambda q, p, n: {"query": q, "positive": [p], "negatives": n, "instruction": None},
    "FlagEmbedding": lambda q, p, n: {"query": q, "pos": [p], "neg": n, "prompt": ""},
    "Tevatron": lambda q, p, n: (
        {"query": q, "positive_passages": passages(p), "negative_passages": passages(*n)}
    ),
    "sentence-transformers": numbered("anchor", "positive", "negative_1", "negative_2", label=1),
    "SimCSE": numbered("sent0", "sent1", "hard_neg", "hard_neg2"),
    "paraphrases": numbered("sentence1", "sentence2", "neg_1", "neg_2", score=1.0),
}
CASES = [(layout, "a.jsonl") for layout in LAYOUTS] + [("ours", name) for name in WRITERS][1:6]
CASES += [("sentence-transformers", "a.csv"), ("SimCSE", "a.tsv"), ("SimCSE", "A.CSV.gz")]


@pytest.mark.parametrize("layout, name", CASES)
def test_pairs_in_each_layout_are_those_of_ours(layout, name, tmp_path, capsys):
    rows = [LAYOUTS[layout](p["query"], p["positive"], p["negatives"]) for p in PLAIN]
    file = write(tmp_path, name, WRITERS[name](rows))
    assert read_pairs([file]) == read_pairs([tmp_path]) == [PLAIN]
    said = f"{file}: 2 pairs, 4 negatives, 0 with an instruction\n"
    assert capsys.readouterr().err == 2 * said


def test_each_of_several_positives_makes_a_pair_with_all_negatives(tmp_path, capsys):
    titled = {"docid": "7", "title": "Title", "text": "a"}
    row = {"query": "q", "pos": ["a", " ", titled], "neg": ["n"], "prompt": "Find:", "id": 1}
    [pairs] = read_pairs([write(tmp_path, "a.jsonl", json_lines([row, row | {"instructon": "x"}]))])
    assert [p["positive"] for p in pairs] == 2 * ["a", "Title a"]
    assert {(p["query"], *p["negatives"], p["instruction"]) for p in pairs} == {("q", "n", "Find:")}
    said = capsys.readouterr().err
    assert "id, instructon" in said and "left out 2 pairs" in said


def test_blanks_are_left_out_and_counted(tmp_path, capsys):
    changes = [{}, {"query": "", "positive": ""}, {"query": "  "}, {"positive": []}]
    changes += [{"negative": x} for x in (["", ""], None, "", ["n", " "])]
    rows = json_lines([GOOD | change for change in changes])
    [pairs] = read_pairs([write(tmp_path, "a.jsonl", rows)])
    assert [p["negatives"] for p in pairs] == [[], [], [], [], ["n"]]
    said = capsys.readouterr().err
    for words in ("5 pairs, 1 negatives", "left out 3 pairs", "line 2", "4 blank", "line 5"):
        assert words in said


def test_a_pair_has_its_own_instruction_or_else_that_of_its_path(tmp_path):
    led = GOOD | {"prompt": "Own:"}
    one = write(tmp_path, "one.jsonl", json_lines([GOOD, led]))
    two = write(tmp_path, "two.jsonl", json_lines([led, GOOD]))
    for paths, instructions, expected in (
        ([tmp_path], ["All:"], [["All:", "Own:"], ["Own:", "All:"]]),
        ([two, one], ["2:", "1:"], [["Own:", "2:"], ["1:", "Own:"]]),
    ):
        found = read_pairs(paths, instructions)
        assert [[pair["instruction"] for pair in pairs] for pairs in found] == expected


@pytest.mark.parametrize(
    "row, said",
    [
        ({"label": 0}, "`label` is 0"),
        ({"score": 3.8}, "`score` is 3.8"),
        ({"anchor": "q"}, "`anchor` is a second query"),
        ({"query": ["Find:", "q"]}, "`query`"),
        ({"query": None}, "query"),
        ({"query": "\ud800"}, ""),
        ({"prompt": {"role": "user"}}, "`prompt`"),
        ({"positive": 3}, "`positive`"),
        ({"pos_passages": ["p"], "positive": None}, "expected a positive, .*pos_passages"),
        ({"negative_passages": [{"docid": "3"}]}, "`negative_passages`"),
        ({"negatives": [None]}, "`negatives`"),
        ({"negative": {"c": 1}}, "`negative`"),
        (["a", "b"], ""),
    ],
)
def test_a_row_that_is_no_pair_is_named(row, said, tmp_path):
    row = GOOD | row if isinstance(row, dict) else row
    file = write(tmp_path, "a.jsonl", json_lines([GOOD, row]))
    refused(f"a.jsonl, line 2: .*{said}", read_pairs, [file])


def test_files_without_pairs_are_named(tmp_path):
    refused(tmp_path.name, read_pairs, [tmp_path])
    file = write(tmp_path, "a.jsonl", json_lines([GOOD]))
    refused("a.jsonl: fewer than two pairs", read_pairs, [file])
    file = write(tmp_path, "a.csv", "query,pos\nq,\"['p', 'x']\"\n")
    refused("a.csv, line 2: .*JSON lines", read_pairs, [file])
