"""Checkpoint folders from anywhere, text with every kind of dirt, and runs that go wrong."""

import errno
import json
import os
import re
import resource
import shutil
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import llm2vec
import lora
import train
from data.corpus import WIKIPEDIA, read_documents, sentences
from llm2vec import Config, Decoder, LLM2Vec, load_tokenizer, read_record
from lora import load_adapter
from train import SETTINGS, STAGES

ROOT = Path(__file__).parent.parent
TINY = ROOT / "data" / "tiny-llama"
GOLDEN = Path(__file__).parent / "golden"


# --- Folders -----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(GOLDEN / "llama-grouped", tmp_path / "home" / "model"))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_link_out_of_the_folder_is_refused(folder, name, tmp_path):
    shutil.copy(TINY / "tokenizer.json", folder / "tokenizer.json")
    shutil.move(folder / name, tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"{re.escape(name)}: a link out of its folder, to .*else"):
        load_tokenizer(folder)
        Decoder.from_pretrained(folder)
    shutil.move(tmp_path / "elsewhere", folder / "other-name")
    (folder / name).unlink()
    (folder / name).symlink_to("other-name")  # inside, it is welcome
    load_tokenizer(folder)
    Decoder.from_pretrained(folder)


def test_a_link_out_of_an_adapter_folder_is_refused(tmp_path):
    adapter = Path(shutil.copytree(GOLDEN / "llama-grouped-adapter", tmp_path / "a" / "adapter"))
    shutil.move(adapter / "adapter_model.safetensors", tmp_path / "elsewhere")
    (adapter / "adapter_model.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="a link out of its folder"):
        load_adapter(Decoder.from_pretrained(GOLDEN / "llama-grouped"), adapter)


def test_the_cache_of_the_hub_is_made_of_links_and_loads(tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b/snapshots/rev"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, file in enumerate((GOLDEN / "llama-grouped").iterdir()):
        shutil.copy(file, blobs / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    Decoder.from_pretrained(snapshot)
    linked = tmp_path / "linked"
    linked.symlink_to(snapshot)  # the folder itself may be one
    Decoder.from_pretrained(linked)
    # A folder that happens to be called snapshots opens nothing but blobs beside it.
    shutil.copy(snapshot / "config.json", tmp_path / "models--a--b" / "secret")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../secret")
    with pytest.raises(ValueError, match="config.json: a link out of its folder"):
        Decoder.from_pretrained(snapshot)


def change(file: Path, **tensors: torch.Tensor) -> None:
    save_file(load_file(file) | {n.replace("__", "."): w for n, w in tensors.items()}, file)


QUANTISED = [torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", QUANTISED)
def test_types_that_are_no_numbers_by_themselves_are_refused(dtype, folder):
    file = folder / "model.safetensors"
    change(file, model__norm__weight=load_file(file)["model.norm.weight"].to(dtype))
    with pytest.raises(ValueError, match=f"{file}: tensor model.norm.weight has type {dtype}"):
        Decoder.from_pretrained(folder)


def test_a_number_that_is_too_large_for_the_type_is_refused(folder):
    file = folder / "model.safetensors"
    weight = load_file(file)["model.norm.weight"].double()
    change(file, model__norm__weight=weight)
    whole = Decoder.from_pretrained(folder)
    assert torch.equal(whole.norm.weight, weight.float())
    change(file, model__norm__weight=weight * 1e300)  # finite in 64 bits
    with pytest.raises(ValueError, match="model.norm.weight holds NaN or infinity as torch.float3"):
        Decoder.from_pretrained(folder)


def test_an_index_that_contradicts_its_shards_is_refused(tmp_path):
    folder = Path(shutil.copytree(GOLDEN / "llama-llama3-sharded", tmp_path / "model"))
    index = folder / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    first, second = sorted(set(raw["weight_map"].values()))[:2]
    name = next(name for name, file in raw["weight_map"].items() if file == second)
    raw["weight_map"][name] = first
    index.write_text(json.dumps(raw))
    with pytest.raises(
        ValueError, match=f"{second}: tensor {name} is here, its index says {first}"
    ):
        Decoder.from_pretrained(folder)


def test_a_tensor_in_two_shards_is_named(tmp_path):
    folder = Path(shutil.copytree(GOLDEN / "llama-llama3-sharded", tmp_path / "model"))
    first, second = sorted(folder.glob("model-*.safetensors"))[:2]
    state = load_file(second)
    name, weight = next(iter(load_file(first).items()))
    save_file(state | {name: weight}, second)
    with pytest.raises(ValueError, match=f"{second.name}: tensor {re.escape(name)} is there twice"):
        Decoder.from_pretrained(folder)


def test_a_model_larger_than_the_memory_is_refused_before_it_is_read(folder, monkeypatch):
    """A file of 2 TiB that takes no space on disk, with a header that fits its config."""
    original = folder / "config.json"
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": 2**20, "vocab_size": 2**19, "head_dim": 64, "num_attention_heads": 4}
    config |= {"intermediate_size": 64, "num_key_value_heads": 4, "tie_word_embeddings": True}
    original.write_text(json.dumps(config))
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in Decoder(Config.from_pretrained(folder)).named_parameters()}
    sparse(folder / "model.safetensors", {f"model.{n}": list(s) for n, s in shapes.items()})
    before = resource.getrusage(resource.RUSAGE_SELF)
    with monkeypatch.context() as patch:
        patch.setattr(llm2vec, "memory_of", lambda device: 2**40)
        said = (
            r"config.json: its weights take 2,\d\d\d.\d GiB as torch.float32, cpu has 1,024.0 GiB"
        )
        with pytest.raises(ValueError, match=said):
            Decoder.from_pretrained(folder)
    shutil.copy(GOLDEN / "llama-grouped" / "config.json", folder)
    with pytest.raises(ValueError, match="model.safetensors: "):  # its tensors have other shapes
        Decoder.from_pretrained(folder)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime - before.ru_utime < 5 and after.ru_maxrss - before.ru_maxrss < 200 * 1024
    shutil.copy(GOLDEN / "llama-grouped" / "model.safetensors", folder)
    Decoder.from_pretrained(folder)
    monkeypatch.setattr(llm2vec, "memory_of", lambda device: 1000)
    with pytest.raises(ValueError, match="its weights take 0.0 GiB as torch.float32, cpu has 0.0"):
        Decoder.from_pretrained(folder)


def sparse(file: Path, shapes: dict[str, list[int]]) -> None:
    """A safetensors file of float32 zeros, which the file system does not store."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape, dtype=object))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(file, 8 + len(text) + end)


@pytest.fixture
def adapter(tmp_path) -> Path:
    return Path(shutil.copytree(GOLDEN / "llama-grouped-adapter", tmp_path / "home" / "adapter"))


def load_adapted(adapter: Path) -> None:
    load_adapter(Decoder.from_pretrained(GOLDEN / "llama-grouped"), adapter)


def test_an_adapter_larger_than_the_memory_is_refused_before_it_is_read(adapter):
    """One of 1.6 TiB, of a rank that its config gives."""
    file, rank = adapter / "adapter_model.safetensors", 2**30
    shapes = {n: list(w.shape) for n, w in load_file(file).items() if "layers.0.mlp.up_proj" in n}
    for name, shape in shapes.items():
        shape["lora_B" in name] = rank
    sparse(file, shapes)
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"r": rank}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"adapter_model.safetensors: takes [\d,]+ bytes, this ma"):
        load_adapted(adapter)


UP_A = "base_model.model.layers.0.mlp.up_proj.lora_A.weight"


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda s: s[UP_A].fill_(float("nan")), "up_proj.lora_A holds NaN or infinity"),
        (lambda s: s.update({UP_A: s[UP_A].int()}), "up_proj.lora_A has type torch.int32"),
        (lambda s: s.clear(), "holds no adapter"),
        (
            lambda s: s.update({k.replace("model.l", "model.model.l"): s[k] + 1 for k in [*s]}),
            "is there twice, once as model.layers.0",
        ),
    ],
)
def test_a_wrong_tensor_of_an_adapter_is_named(spoil, said, adapter):
    file = adapter / "adapter_model.safetensors"
    state = load_file(file)
    spoil(state)
    save_file(state, file)
    with pytest.raises(ValueError, match=f"{file}: .*{said}"):
        load_adapted(adapter)


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_alpha": float("inf")},
        {"alpha_pattern": {"q_proj": 1e308}},
        {"rank_pattern": {r"([\w.]+)+!": 8}},  # tried on a name, it would not come back
        {"rank_pattern": {".*" * 12 + "!": 8}},
        {"rank_pattern": {"(?i)q_proj": 8}},  # a flag in the middle of an expression
        {"rank_pattern": {"(" * 5000 + ")" * 5000: 8}},
    ],
)
def test_numbers_and_patterns_of_an_adapter_are_held_in_bounds(changes, adapter):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=f"{file}: {next(iter(changes))} "):
        load_adapted(adapter)


@pytest.mark.parametrize("ids", [[10**6], [-1], None])
def test_a_template_of_tokens_that_are_not_there_is_refused(ids, tmp_path):
    """Without an entry for its token, the library panics, which is no Exception."""
    folder = Path(shutil.copytree(GOLDEN / "interop" / "base", tmp_path / "model"))
    raw = json.loads((folder / "tokenizer.json").read_text())
    [template] = raw["post_processor"]["processors"]
    if ids is None:
        template["special_tokens"] = {}
    else:
        template["special_tokens"]["<s>"]["ids"] = ids
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="tokenizer.json: "):
        LLM2Vec.from_pretrained(folder)


def test_a_token_that_the_tokenizer_has_no_word_for_is_one_clear_error(tmp_path):
    folder = Path(shutil.copytree(GOLDEN / "interop" / "base", tmp_path / "model"))
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["model"] = {"type": "WordLevel", "vocab": {"a": 3}, "unk_token": "[UNK]"}
    raw["normalizer"] = None
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    encoder = LLM2Vec.from_pretrained(folder)
    with pytest.raises(ValueError, match="tokenizer.json: can't encode these texts: .*UNK"):
        encoder.encode(["b"])


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 2**23, "intermediate_size": 2**23},
        {"hidden_size": 2**22, "num_attention_heads": 2**22, "head_dim": 2**11},
        {"vocab_size": 2**23, "hidden_size": 2**23, "num_hidden_layers": 999},
    ],
)
def test_shapes_that_overflow_are_refused(folder, changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 1} | changes))
    with pytest.raises(ValueError, match="config.json: hidden_size is .*fewer than 2\\^40"):
        Config.from_pretrained(folder)


def test_many_layers_are_refused_in_seconds(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 999}))
    start = time.monotonic()
    with pytest.raises(ValueError, match="is missing"):
        Decoder.from_pretrained(folder)
    assert time.monotonic() - start < 20


def test_nothing_here_can_execute_what_it_reads():
    words = ["pick" + "le", "torch" + ".load", "eva" + "l(", "exe" + "c("]
    for file in [*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("tests/**/*.py")]:
        for number, line in enumerate(file.read_text().splitlines(), start=1):
            code = line.partition("#")[0]
            assert not any(word in code for word in words), f"{file}, line {number}"


# --- Dirty text --------------------------------------------------------------------------------


DIRT = {
    "nul": "before\0after",
    "right to left": "שלום עולם, مرحبا بالعالم",
    "combining": "e\u0301 a\u0308\u0323 " + "o" + "\u0301" * 500,
    "special tokens": "<|endoftext|> <|im_start|>user [INST] <s> </s>",
    "ten megabytes": "All work and no play makes a dull text. " * 260_000,
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈",
    "controls": "\x01\x02\x7f\u200b\u2028 x",
}


@pytest.mark.parametrize("kind", DIRT)
def test_dirt_goes_from_a_corpus_to_finite_vectors(kind, tmp_path):
    text = DIRT[kind]
    (tmp_path / "a.txt").write_bytes(f"\ufeffone\r\n{text}\r\n\r\nlast".encode())
    documents = read_documents(tmp_path / "a.txt")
    assert documents == ["one", text.strip(), "last"]
    found = [s for document in documents for s in sentences(document)]
    encoder = LLM2Vec.from_pretrained(TINY, max_length=64)
    many = [*found[:62], text]
    vectors = encoder.encode(many)
    assert np.isfinite(vectors).all()
    alone = encoder.encode([text[:10_000]])[0]  # 64 tokens are read of either
    np.testing.assert_allclose(vectors[-1], alone, atol=1e-5)


def test_special_tokens_in_a_text_are_text(tmp_path):
    encoder = LLM2Vec.from_pretrained(TINY, template="endoftext")
    ids = encoder.tokenizer.encode("a <|endoftext|> b").ids
    assert ids[0] == 0 and 0 not in ids[1:]


BAD = [
    b"\xff\xfe",
    b"{",
    b"[]",
    b'{"title": "x"}',
    b'{"text": 5}',
    b'{"text": "\\ud800"}',
    b"[" * 9999,
]


@pytest.mark.parametrize("bad", BAD)
def test_a_line_without_text_is_named_or_skipped_and_counted(bad, tmp_path, capsys):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "good"}\r\n' + bad + b'\n{"text": "too"}\n' + bad)
    with pytest.raises(ValueError, match="a.jsonl, line 2: "):
        read_documents(file)
    assert read_documents(file, errors="skip") == ["good", "too"]
    assert capsys.readouterr().err == f"{file}: skipped 2 lines, the first of them line 2\n"
    file.write_bytes(bad)
    with pytest.raises(ValueError, match="empty corpus"):
        read_documents(file, errors="skip")
    with pytest.raises(ValueError, match="a.jsonl, line 7: "):
        read_record(bad, "a.jsonl", 7)


def test_a_byte_order_mark_is_no_text(tmp_path):
    for name, line in (("a.txt", "\ufeffgood\n"), ("a.jsonl", '\ufeff{"text": "good"}\n')):
        (tmp_path / name).write_text(line, encoding="utf-8")
        assert read_documents(tmp_path / name) == ["good"]
        assert read_record(line.encode(), name, 1)["text"] == "good"


def test_half_a_surrogate_pair_in_another_field_is_passed_through(tmp_path):
    line = '{"text": "good", "id": "\\ud800"}\n'
    (tmp_path / "a.jsonl").write_text(line)
    encoder = LLM2Vec.from_pretrained(TINY)
    llm2vec.encode_file(encoder, str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"))
    [again] = (tmp_path / "b.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(again)["id"] == "\ud800"


# --- Runs --------------------------------------------------------------------------------------

QUICK = replace(SETTINGS["simcse"]["tiny"], steps=6, batch=4, length=16, save_every=2)


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return read_documents(WIKIPEDIA)[:60]


def go(documents: list[str], folder: Path, **changes) -> LLM2Vec:
    model = LLM2Vec.from_pretrained(TINY)
    STAGES["simcse"](model, documents, replace(QUICK, **changes), folder)
    return model


@pytest.fixture(scope="module")
def whole(documents, tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("whole") / "run"
    go(documents, folder)
    return (folder / "adapter_model.safetensors").read_bytes()


def test_a_batch_larger_than_the_corpus_is_the_corpus(documents, tmp_path):
    model = go(["One sentence here. And another one."], tmp_path / "run", batch=64)
    assert np.isfinite(model.encode(["x"])).all()
    with pytest.raises(ValueError, match="fewer than two different sentences"):
        go(["One sentence here."], tmp_path / "other")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError("9 bytes"),
    ],
)
def test_out_of_memory_names_the_flag_and_keeps_the_state(
    error, documents, whole, tmp_path, monkeypatch
):
    original, calls = train.contrast, []

    def full(*args):
        calls.append(1)
        if len(calls) == 4:
            raise error
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "contrast", full)
        said = r"step 4 \(batch 4 of epoch 1\): out of memory; lower --max-tokens \(8192\)"
        with pytest.raises(ValueError, match=said):
            go(documents, tmp_path, recompute=6)  # all layers: there is nothing left to try
    assert (tmp_path / "state-00000003.safetensors").exists()
    go(documents, tmp_path, max_tokens=4096)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == whole


def test_out_of_memory_elsewhere_is_one_line_and_other_errors_are_not(capsys):
    def no_room():
        torch.empty(2**50)

    with pytest.raises(SystemExit) as status:
        llm2vec.run(no_room)
    said = capsys.readouterr().err
    assert status.value.code == 2 and said.count("\n") == 1 and "can't allocate memory" in said

    def broken():
        torch.ones(2) @ torch.ones(3)

    with pytest.raises(RuntimeError):
        llm2vec.run(broken)


@pytest.mark.parametrize("writes", range(1, 8))
def test_a_full_disk_loses_nothing_that_was_there(writes, documents, whole, tmp_path, monkeypatch):
    """The settings, the log, three states, the adapter's two: each write meets a full disk."""
    original, calls = os.fsync, []

    def full(number):
        calls.append(1)
        if len(calls) == writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(number)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, "fsync", full)
        go(documents, tmp_path)
    assert not list(tmp_path.glob("*.part"))
    for file in tmp_path.glob("*.safetensors"):
        load_file(file)
    assert not (tmp_path / "adapter_config.json").exists()
    go(documents, tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == whole


@pytest.mark.parametrize("limit, left", [(300_000, []), (20_000_000, ["adapter_config.json"])])
def test_a_file_that_cannot_grow_ends_a_real_run_in_one_line(limit, left, tmp_path):
    """A limit on the size of files stands in for a disk that is full: of the adapter, the encoder.

    The same command, with room again, finishes what it had begun.
    """
    code = (
        "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "limit = int(sys.argv.pop(1));"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY));"
        f"sys.argv = ['train.py', *sys.argv[1:]]; sys.path.insert(0, {str(ROOT)!r});"
        f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')"
    )
    run = tmp_path / "run"
    args = ["simcse", "--model", str(TINY), "--preset", "tiny", "--steps", "3", "--batch", "4"]
    args += ["--dtype", "float32"]  # as large on every machine

    def go_on(limit: int) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", code, str(limit), *args, "--output", str(run)]
        return subprocess.run(command, capture_output=True, text=True)

    done = go_on(limit)
    assert done.returncode == 2 and "File too large" in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1
    assert [file.name for file in run.glob("adapter_config*")] == left
    assert not (run / "encoder").exists() and not list(tmp_path.rglob("*.part"))
    assert not list(run.glob(".new-*"))
    if left:
        assert go_on(10**9).returncode == 0
        assert np.isfinite(LLM2Vec.from_pretrained(run / "encoder").encode(["x"])).all()


def test_a_log_whose_last_line_was_cut_off_goes_on(documents, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="cut"):

        def die(*_):
            raise RuntimeError("cut")

        patch.setattr(lora, "write_whole", die)
        go(documents, tmp_path)
    log = tmp_path / "log.jsonl"
    log.write_text(log.read_text()[:-9])
    (tmp_path / "state-00000006.safetensors").unlink()  # a step's state is written behind its line
    go(documents, tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == whole
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]
