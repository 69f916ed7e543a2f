"""Texts and pairs in the layouts of others: each is that of the plain one, or refused by name."""

import csv
import gzip
import io
import json
from pathlib import Path

import pytest

import llm2vec_data.encode as files
from llm2vec_data.corpus import read_documents
from llm2vec_data.encode import read_records

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
        ("a.csv", "sent0,sent1\na,b\n", "a.csv, line 2: .*`text`; it has sent0, sent1"),
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
    for read in (read_documents, lambda f: list(read_records(str(f)))):
        with pytest.raises((ValueError, FileNotFoundError), match=said) as error:
            read(file)
        assert "\n" not in str(error.value)


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
