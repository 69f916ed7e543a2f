"""Texts and pairs in the layouts of others: each is that of the plain one, or refused by name."""

import csv
import gzip
import io
import json
from pathlib import Path

import pytest
from helpers import refused

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
    "a.ndjson": lambda rows: "\ufeff" + json_lines(rows),
    "a.json": lambda rows: "\n" + json_lines(rows),
    "array.json": lambda rows: json.dumps(rows, indent=1),
    "array.jsonl": lambda rows: "\ufeff " + json.dumps(rows),
    "a.csv": lambda rows: table(rows, ","),
    "A.CSV": lambda rows: "\ufeff" + table(rows, ","),
    "a.tsv": lambda rows: table(rows, "\t"),
}


def write(folder: Path, name: str, content: str | bytes) -> Path:
    content = content.encode() if isinstance(content, str) else content
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return folder / name


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_corpus_in_each_kind_is_that_of_json_lines(name, gz, tmp_path, monkeypatch):
    records = [{"id": str(i), "text": text} for i, text in enumerate(TEXTS)]
    file = write(tmp_path, name + gz, WRITERS[name](records))
    assert read_documents(file) == read_documents(tmp_path) == TEXTS
    assert list(read_records(str(file))) == records
    monkeypatch.setattr(files, "WORLD_SIZE", 4)
    joined = []
    for rank in range(4):
        monkeypatch.setattr(files, "RANK", rank)
        joined += read_records(str(file))
    assert joined == records


def test_strings_are_records_too(tmp_path):
    for name, content in (("a.json", json.dumps(TEXTS)), ("a.jsonl", json_lines(TEXTS))):
        assert read_documents(write(tmp_path, name, content)) == TEXTS


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.csv", "sent0,sent1\na,b\n", "a.csv, line 2: .*sent0, sent1"),
        ("a.csv", "text\nHello, world\n", "a.csv, line 2: 2 columns, where the header names 1"),
        ("a.csv", "text,text\na,b\n", "a.csv, line 1: 2 columns, where the header names 1"),
        ("a.tsv", 'id\ttext\n1\t"a\n2\tb\n', "a.tsv, line 3: unexpected end"),
        ("a.csv", b"text\nfine\nlatin \xe9\n", "a.csv, line 3: .*utf-8"),
        ("a.json", '[{"text": "a"}, {"title": "b"}]', "a.json, item 2: .*`text`; it has title"),
        ("a.json", '{\n "text": "a"\n}', "a.json, line 1: expected a JSON object on each line"),
        ("a.json", '[{"text": "a"},', "a.json: expected .* one array"),
        ("a.txt", '\n {"text": "a"}\n', "a.txt: looks like JSON lines: rename it to .jsonl"),
        ("corpus", '[\n {"text": "a"}\n]', "corpus: looks like JSON lines"),
        ("a.md", b"PK\x03\x04\0\0", "a.md: is not text"),
        ("a.pdf", b"%PDF-1.7\n1 0 obj\n", "a.pdf: is not text"),
        ("a.txt", "UTF-16".encode("utf-16-le"), "a.txt: is not text"),
        ("a.parquet", b"PAR1\xff", r"a.parquet: .*\"import pandas; pandas.*to_json\('.*a.jsonl"),
        ("a.arrow", b"ARROW1\0", r"a.arrow: .* datasets.Dataset.from_file\('"),
        ("a.parquet", None, "a.parquet: no such file"),
    ],
)
def test_what_is_no_text_is_refused_by_name(name, content, said, tmp_path):
    file = tmp_path / name if content is None else write(tmp_path, name, content)
    refused(said, read_documents, file)
    refused(said, lambda: list(read_records(str(file))))


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a"])
def test_other_files_hold_a_text_a_line(name, tmp_path):
    lines = ["[1] a note", "{braces} and", '{"a"', "", "text,label"]
    file = write(tmp_path, name, "\n".join(lines))
    assert read_documents(file) == [line for line in lines if line]
    assert [record["text"] for record in read_records(str(file))] == lines


def test_records_without_text_are_skipped_in_tables_and_arrays_too(tmp_path, capsys):
    for name, content in (("a.csv", b"text\na\n\xff\n"), ("a.json", b'["a", {}]')):
        assert read_documents(write(tmp_path, name, content), errors="skip") == ["a"]
        place = "line 3" if name == "a.csv" else "item 2"
        assert f"{name}: skipped 1 lines, the first of them {place}" in capsys.readouterr().err


# --- Pairs -------------------------------------------------------------------------------------

PLAIN = [
    {"query": "a?", "positive": "a.", "negatives": ["not a.", "nor, this"], "instruction": ""},
    {"query": "b\nb?", "positive": 'b "b".', "negatives": ["not b.", "x"], "instruction": ""},
]


def passages(texts: list[str]) -> list[dict]:
    return [{"docid": str(i), "title": "", "text": text} for i, text in enumerate(texts)]


LAYOUTS = {  # what makes a row of a query, a positive and two negatives
    "ours": lambda q, p, n: {"query": q, "positive": p, "negative": n},
    "plural": lambda q, p, n: {"query": q, "positive": [p], "negatives": n, "instruction": None},
    "sentence-transformers": lambda q, p, n: dict(
        anchor=q, positive=p, negative_1=n[0], negative_2=n[1], label=1
    ),
    "FlagEmbedding": lambda q, p, n: {"query": q, "pos": [p], "neg": n, "prompt": ""},
    "Tevatron": lambda q, p, n: (
        {"query": q, "positive_passages": passages([p]), "negative_passages": passages(n)}
    ),
    "SimCSE": lambda q, p, n: {"sent0": q, "sent1": p, "hard_neg": n[0], "hard_neg2": n[1]},
    "paraphrases": lambda q, p, n: (
        {"sentence1": q, "sentence2": p, "neg_1": n[0], "neg_2": n[1], "score": 1.0}
    ),
}
TABLES = [("sentence-transformers", "a.csv"), ("SimCSE", "a.csv"), ("SimCSE", "a.tsv.gz")]
KINDS = ["a.jsonl", "a.json", "array.json", "a.ndjson.gz"]


@pytest.mark.parametrize("layout, name", [(x, name) for x in LAYOUTS for name in KINDS] + TABLES)
def test_pairs_in_each_layout_are_those_of_ours(layout, name, tmp_path, capsys):
    rows = [LAYOUTS[layout](p["query"], p["positive"], p["negatives"]) for p in PLAIN]
    file = write(tmp_path, name, WRITERS[name.removesuffix(".gz")](rows))
    assert read_pairs([file]) == read_pairs([tmp_path]) == [PLAIN]
    said = f"{file}: 2 pairs, 4 negatives, 0 with an instruction\n"
    assert capsys.readouterr().err == 2 * said


def test_each_of_several_positives_makes_a_pair_with_all_negatives(tmp_path, capsys):
    titled = {"docid": "7", "title": "Title", "text": "a"}
    row = {"query": "q", "pos": ["a", " ", titled], "neg": ["n"], "prompt": "Find:", "id": 1}
    row |= {"pos_scores": [1, 1, 1], "instructon": "x"}
    [pairs] = read_pairs([write(tmp_path, "a.jsonl", json_lines([row, row]))])
    assert [p["positive"] for p in pairs] == 2 * ["a", "Title a"]
    assert {(p["query"], *p["negatives"], p["instruction"]) for p in pairs} == {("q", "n", "Find:")}
    said = capsys.readouterr().err
    for words in ("4 pairs, 4 negatives, 4 with", "id, pos_scores, instructon", "left out 2 pairs"):
        assert words in said


def test_blanks_are_left_out_and_counted(tmp_path, capsys):
    changes = [{}, {"query": "", "positive": ""}, {"query": "  "}, {"positive": ""}]
    changes += [{"positive": []}]
    changes += [{"negative": x} for x in (["", ""], [], None, "", ["n", " "])]
    rows = [{"query": "q", "positive": "p"} | change for change in changes]
    [pairs] = read_pairs([write(tmp_path, "a.jsonl", json_lines(rows))])
    assert [p["negatives"] for p in pairs] == [[], [], [], [], [], ["n"]]
    said = capsys.readouterr().err
    for words in ("6 pairs, 1 negatives", "left out 4 pairs", "line 2", "4 blank", "line 6"):
        assert words in said


@pytest.mark.parametrize(
    "row, said",
    [
        ({"label": 0}, "`label` is 0, .*leave such rows out"),
        ({"label": False}, "`label` is False"),
        ({"label": "neutral"}, "`label` is 'neutral'"),
        ({"score": 3.8}, "`score` is 3.8"),
        ({"anchor": "q"}, "`anchor` is a second query"),
        ({"query": ["Find:", "q"]}, "`query`: expected a string"),
        ({"prompt": {"role": "user"}}, "`prompt`: expected a string"),
        ({"pos_passages": ["p"], "positive": None}, "expected a positive, named .*pos_passages"),
        ({"negative_passages": [{"docid": "3"}]}, "`negative_passages`: expected a string"),
        ({"negatives": [None]}, "`negatives`: expected a string"),
    ],
)
def test_a_row_that_is_no_pair_is_named(row, said, tmp_path):
    good = {"query": "q", "positive": "p"}
    file = write(tmp_path, "a.jsonl", json_lines([good, good | row]))
    refused(f"a.jsonl, line 2: .*{said}", read_pairs, [file])


def test_lists_in_a_table_are_named(tmp_path):
    file = write(tmp_path, "a.csv", "query,pos\nq,\"['p', 'x']\"\n")
    refused("a.csv, line 2: .*JSON lines", read_pairs, [file])
