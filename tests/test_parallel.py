"""Two processes do the work of one: the same adapters, the same vectors, and they end together."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import llm2vec
from llm2vec import Decoder, LLM2Vec

ROOT = Path(__file__).parent.parent
TINY = ROOT / "data" / "tiny-llama"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]

# Each stage a few steps without dropout, on batches that two processes can't share evenly.
DRIVER = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from dataclasses import replace
from pathlib import Path
import torch
import train
from data.corpus import WIKIPEDIA, read_documents
from data.pairs import PAIRS, read_pairs
from llm2vec import LLM2Vec, processes

torch.set_num_threads(1)
folder, stages, steps = Path(sys.argv[1]), sys.argv[2].split(","), int(sys.argv[3])
with processes():
    for stage in stages:
        data = read_pairs([PAIRS]) if stage == "supervised" else read_documents(WIKIPEDIA)[:150]
        settings = replace(
            train.SETTINGS[stage]["tiny"], steps=steps, batch=int(sys.argv[5]), length=24, lr=1e-4,
            dropout=0.0, attention_dropout=0.0, save_every=5, max_tokens=int(sys.argv[4]),
        )
        train.STAGES[stage](LLM2Vec.from_pretrained({str(TINY)!r}), data, settings, folder / stage)
"""
STAGES = ("mntp", "simcse", "supervised")


def command(ranks: int, *args: object) -> list[str]:
    start = [sys.executable] if ranks == 1 else TORCHRUN
    return [*start, *map(str, args)]


def quiet() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def run(ranks: int, *args: object) -> subprocess.CompletedProcess:
    how = {"capture_output": True, "text": True, "env": quiet(), "timeout": 240}
    return subprocess.run(command(ranks, *args), **how)


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("driver") / "driver.py"
    file.write_text(DRIVER)
    return file


@pytest.mark.parametrize("batch, stages", [(7, STAGES), (1, ("mntp",))])
def test_two_processes_reach_the_adapter_of_one(driver, tmp_path, batch, stages):
    """Shares are unequal, or the second process has none; in one pass, or in parts of 60 tokens."""
    for ranks, max_tokens in ((1, 8192), (2, 8192), (2, 60)):
        folder = tmp_path / f"{ranks}-{max_tokens}"
        done = run(ranks, driver, folder, ",".join(stages), 4, max_tokens, batch)
        assert done.returncode == 0, done.stderr[-2000:]
    for stage in stages:
        folders = [tmp_path / name / stage for name in ("1-8192", "2-8192", "2-60")]
        one, *two = (load_file(folder / "adapter_model.safetensors") for folder in folders)
        assert max(w.abs().max() for name, w in one.items() if "lora_B" in name) > 1e-5
        for adapter in two:
            for name, weight in one.items():
                torch.testing.assert_close(adapter[name], weight, atol=1e-6, rtol=0)
        losses = [
            [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
            for folder in folders
        ]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)
        assert losses[0] == pytest.approx(losses[2], abs=1e-5)


def test_a_process_that_dies_ends_the_others_and_the_run_goes_on(driver, tmp_path):
    args = (driver, tmp_path / "run", "mntp", 400, 8192, 7)
    job = subprocess.Popen(
        command(2, *args), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=quiet()
    )
    log = tmp_path / "run" / "mntp" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= 5) and time.monotonic() < deadline:
        time.sleep(0.1)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    workers = [c for c in children if b"driver.py" in Path(f"/proc/{c}/cmdline").read_bytes()]
    assert len(workers) == 2
    start = time.monotonic()
    os.kill(int(workers[-1]), signal.SIGKILL)
    _, errors = job.communicate(timeout=60)
    assert job.returncode != 0 and time.monotonic() - start < 60
    assert "SIGKILL" in errors or "Signal 9" in errors
    states = sorted((tmp_path / "run" / "mntp").glob("state-*.safetensors"))
    assert states
    saved = int(states[-1].stem.removeprefix("state-"))
    again = subprocess.Popen(command(2, *args), stdout=subprocess.PIPE, text=True, env=quiet())
    while time.monotonic() < deadline + 60:
        lines = log.read_text().splitlines()
        if lines and json.loads(lines[-1])["step"] > saved + 8:
            break
        time.sleep(0.1)
    again.terminate()
    again.communicate(timeout=60)
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] > saved + 8


def test_texts_are_shared_out_and_vectors_joined_in_order(tmp_path):
    texts = [f"Text number {i}" + " and so on" * (i % 7) for i in range(23)]
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n")
    args = ("--model", TINY, "--input", tmp_path / "texts.txt", "--output", tmp_path / "v.npy")
    done = run(2, ROOT / "llm2vec.py", "encode", *args)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = LLM2Vec.from_pretrained(TINY).encode(texts)
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), expected, atol=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["texts.txt", "v.npy"]


def test_a_process_takes_its_gpu_before_it_loads_the_model(monkeypatch):
    done = []

    @contextlib.contextmanager
    def processes():
        done.append("its GPU")
        yield

    monkeypatch.setattr(llm2vec, "processes", processes)
    monkeypatch.setattr(LLM2Vec, "from_pretrained", lambda *_, **__: done.append("the model"))
    monkeypatch.setattr(llm2vec, "encode_file", lambda *_: done.append("texts"))
    args = ["encode", "--model", "m", "--input", "a.txt", "--output", "v.npy"]
    monkeypatch.setattr(sys, "argv", ["llm2vec.py", *args])
    llm2vec.main()
    assert done == ["its GPU", "the model", "texts"]

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    loaded = []
    monkeypatch.setattr(llm2vec, "load_weights", lambda *args: loaded.append(args[-1]))
    for device in ("cuda", "cuda:1", "cpu"):
        Decoder.from_pretrained(TINY, device=device)
    assert loaded == [torch.device(name) for name in ("cuda:3", "cuda:1", "cpu")]


def test_only_stages_are_shared_out(tmp_path):
    how = {"capture_output": True, "text": True, "cwd": tmp_path, "timeout": 60}
    env = quiet() | {"RANK": "0", "WORLD_SIZE": "2"}
    done = subprocess.run([sys.executable, ROOT / "train.py"], env=env, **how)
    assert done.returncode == 2 and "torchrun shares out a stage (mntp" in done.stderr
