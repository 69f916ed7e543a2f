"""Two processes do the work of one: the same adapters, the same vectors, and they end together."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from helpers import TINY, log_of, refused
from safetensors.torch import load_file

import llm2vec
import train
from llm2vec import LLM2Vec
from llm2vec_data import encode as files
from train import STAGES

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def go(folder: Path, stage: str, steps: int, max_tokens: int, batch: int) -> None:
    """A stage without dropout, whose random numbers differ with the number of processes."""
    how = {"steps": steps, "max_tokens": max_tokens, "batch": batch, "length": 24, "lr": 1e-4}
    how |= {"dropout": 0.0, "attention_dropout": 0.0, "save_every": 5, "warm_up": 10}
    helpers.go(stage, folder, **how)


# Shares are unequal, or the second process has none; in one pass, or in parts of 60 tokens.
RUNS = [(stage, 4, n, 7) for stage in STAGES for n in (8192, 60)] + [("mntp", 4, 8192, 1)]


def torchrun(*args: object) -> subprocess.Popen:
    env = os.environ | {"TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONPATH": os.pathsep.join(sys.path)}
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    return subprocess.Popen([*TORCHRUN, *map(str, args)], **how)


def wait_for(job: subprocess.Popen, folder: Path, step: int) -> int:
    """Wait until a job has saved a state of that step or a later one; returns the step."""
    deadline, saved = time.monotonic() + 240, -1
    while saved < step and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
        saved = max((int(file.stem[6:]) for file in folder.glob("state-*.safetensors")), default=-1)
    assert saved >= step, job.communicate(timeout=60)
    return saved


@pytest.mark.slow
def test_two_processes_reach_the_adapters_of_one(tmp_path):
    job = torchrun(__file__, tmp_path, json.dumps(RUNS))
    for stage, steps, _, batch in RUNS[::2]:
        go(tmp_path / f"{stage}-{batch}", stage, steps, 8192, batch)
    _, errors = job.communicate(timeout=240)
    assert job.returncode == 0, errors[-2000:]
    for run in RUNS:
        stage, steps, _, batch = run
        folders = tmp_path / f"{stage}-{batch}", tmp_path / f"both-{tuple(run)}"
        one, two = (load_file(folder / "adapter_model.safetensors") for folder in folders)
        assert max(w.abs().max() for name, w in one.items() if "lora_B" in name) > 1e-5
        torch.testing.assert_close(two, one, atol=1e-6, rtol=0)
        losses = [[line["loss"] for line in log_of(folder)] for folder in folders]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5) and len(losses[0]) == steps


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_and_the_run_goes_on(tmp_path):
    run = ("mntp", 4000, 8192, 7)
    folder, args = tmp_path / f"both-{run}", (__file__, tmp_path, json.dumps([run]))
    job = torchrun(*args)
    saved = wait_for(job, folder, 0)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    workers = [c for c in children if b"parallel.py" in Path(f"/proc/{c}/cmdline").read_bytes()]
    assert len(workers) == 2
    os.kill(int(workers[-1]), signal.SIGKILL)
    _, errors = job.communicate(timeout=60)
    assert job.returncode != 0 and ("SIGKILL" in errors or "Signal 9" in errors)
    again = torchrun(*args)
    wait_for(again, folder, saved + 100)
    again.terminate()
    again.communicate(timeout=60)
    steps = [line["step"] for line in log_of(folder)]
    assert steps == list(range(40, steps[-1] + 1, 40))


def test_parts_of_a_file_joined_are_the_file_of_one_process(encoder, tmp_path, monkeypatch):
    """Even where there are more processes than texts."""
    texts, parts = ["Text one.", "And a second one."], []
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    monkeypatch.setattr(files, "WORLD_SIZE", 3)
    for rank in range(3):
        monkeypatch.setattr(files, "RANK", rank)
        files.encode_file(encoder, str(tmp_path / "texts.txt"), str(tmp_path / "v.npy"))
        parts.append(np.load(tmp_path / f"v-0000{rank}-of-00003.npy"))
    assert len(list(tmp_path.iterdir())) == 1 + 3
    np.testing.assert_allclose(np.concatenate(parts), encoder.encode(texts), atol=1e-5)


def test_a_part_with_a_bad_line_is_named_and_not_written(encoder, tmp_path, monkeypatch):
    (tmp_path / "texts.txt").write_bytes(b"one\ntwo\nthree\n\xff\n")
    args = encoder, str(tmp_path / "texts.txt"), str(tmp_path / "v.npy")
    monkeypatch.setattr(files, "WORLD_SIZE", 2)
    files.encode_file(*args)
    monkeypatch.setattr(files, "RANK", 1)
    refused("texts.txt, line 4: .*utf-8", files.encode_file, *args)
    refused("- is for one process", files.encode_file, encoder, "-", "v.npy")
    assert {file.name for file in tmp_path.iterdir()} == {"texts.txt", "v-00000-of-00002.npy"}


def test_each_process_loads_its_model_onto_its_own_gpu(monkeypatch):
    """Also where the flag says cuda, which safetensors takes for the first one."""
    loaded = []
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(llm2vec, "load_weights", lambda *args: loaded.append(str(args[-1])))
    monkeypatch.setattr(LLM2Vec, "to", lambda model, device: model)
    for device in (None, "cuda", "cuda:1", "cpu"):
        LLM2Vec.from_pretrained(TINY, device=device, dtype=torch.bfloat16)
    monkeypatch.delenv("LOCAL_RANK")
    LLM2Vec.from_pretrained(TINY, device="cuda", dtype=torch.bfloat16)
    assert loaded == ["cuda:3", "cuda:3", "cuda:1", "cpu", "cuda:0"]


def test_only_stages_are_shared_out(command, monkeypatch):
    monkeypatch.setattr(train, "WORLD_SIZE", 2)
    status, _, errors = command()
    assert status == 2 and "torchrun shares out a stage (mntp" in errors


if __name__ == "__main__":  # of torchrun
    with train.processes():
        for run in json.loads(sys.argv[2]):
            go(Path(sys.argv[1]) / f"both-{tuple(run)}", *run)
