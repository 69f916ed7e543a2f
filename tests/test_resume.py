"""A run that was stopped, however it was stopped, ends with the bits of one that was not."""

import errno
import os
import random
import shutil
import signal
import time
from pathlib import Path

import helpers
import pytest
from helpers import DOCUMENTS, adapter_bytes, log_of, refused, tiny
from safetensors.torch import load_file

import train
from llm2vec_data import runs
from llm2vec_data.processes import default_device
from train import STAGES

# With dropout, in every stage's tiny settings; and a batch is taken in parts: four and two blocks
# of masked tokens, whose gradients add up, and at least three parts of sentences (GradCache).
CHANGES = {"steps": 7, "batch": 6, "length": 16, "save_every": 2, "max_tokens": 64}


def go(stage: str, folder: Path, data: list | None = None, model=None, **changes) -> None:
    helpers.go(stage, folder, model, data, **CHANGES | changes)


class Killed(BaseException):
    """Ends a run as SIGKILL would: nothing in the project catches it."""


def stop(owner, name: str, n: int, stage: str, folder: Path, error=Killed, **how) -> None:
    """A run in which a function raises an error at its n-th call, from 0, and from there on."""
    left, call = iter(range(n)), getattr(owner, name)

    def fail(*args, **more):
        if next(left, None) is None:
            raise error
        return call(*args, **more)

    with pytest.MonkeyPatch.context() as patch, pytest.raises((Killed, OSError)) as raised:
        patch.setattr(owner, name, fail)
        go(stage, folder, **how)
    assert error in (raised.value, raised.type)


def assert_whole(folder: Path, adapter: bytes) -> None:
    assert adapter_bytes(folder) == adapter
    assert [line["step"] for line in log_of(folder)] == list(range(1, 8))
    assert not list(folder.glob("*.part")) and not list(folder.glob("state-*"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """The adapters of runs that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    for stage in STAGES:
        go(stage, folder / stage)
    return {stage: adapter_bytes(folder / stage) for stage in STAGES}


MOMENTS = (  # and how often a run comes there; files are settings, log, states, tokenizer, adapter
    (train.Batches, "__getitem__", 7),
    (train, "learning_rate", 7),
    (runs, "save_bytes", 3),
    (os, "replace", 15),
)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("trials", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_runs_end_with_the_same_bits(stage, trials, whole, tmp_path):
    """Before or in the middle of a step, of a write, or just before a rename."""
    draw = random.Random(f"{stage} {trials}")
    for trial in range(trials):
        folder, (owner, name, most) = tmp_path / str(trial), draw.choice(MOMENTS)
        stop(owner, name, draw.randrange(most), stage, folder)
        assert not (folder / "finished").exists()
        go(stage, folder)
        assert_whole(folder, whole[stage])


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork") or default_device() != "cpu", reason="needs fork")
def test_twenty_processes_killed_at_any_moment_end_with_the_same_bits(whole, tmp_path):
    """From a state of every step."""
    draw, stopped, deadline = random.Random(0), 0, time.monotonic() + 300
    for trial in range(20):
        stage, folder = ("mntp", "simcse")[trial % 2], tmp_path / str(trial)
        child, log, lines = os.fork(), folder / "log.jsonl", draw.randrange(7)
        if child == 0:
            try:
                go(stage, folder, save_every=1)
            finally:
                os._exit(0)
        while not log.exists() or log.read_text().count("\n") < lines:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.03))  # less than a step
        os.kill(child, signal.SIGKILL)
        stopped += os.waitpid(child, 0)[1] == signal.SIGKILL
        go(stage, folder, save_every=1)
        assert_whole(folder, whole[stage])
    assert stopped > 15, "a few may be done before"


def test_a_line_of_the_log_that_was_cut_off_is_passed_over(stopped, whole, tmp_path):
    """And a state that is spoiled, which a kill or a full disk can't do, is named."""
    folder = shutil.copytree(stopped, tmp_path / "run")
    (folder / "log.jsonl").write_bytes((folder / "log.jsonl").read_bytes()[:-9])
    [state] = folder.glob("state-*")
    content = state.read_bytes()
    state.write_bytes(content[:1000])
    refused("state-00000006.safetensors", go, "mntp", folder)
    state.write_bytes(content)
    go("mntp", folder)
    assert_whole(folder, whole["mntp"])


@pytest.mark.parametrize("writes", [0, 3, 11, 14])
def test_a_full_disk_loses_nothing_that_was_there(writes, whole, tmp_path):
    """At the settings, at an adapter beside a state, at the tokenizer, at the last file."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    stop(os, "fsync", writes, "mntp", tmp_path, full)
    assert not list(tmp_path.glob("*.part")) and not (tmp_path / "finished").exists()
    for file in tmp_path.glob("*.safetensors"):
        load_file(file)
    go("mntp", tmp_path)
    assert_whole(tmp_path, whole["mntp"])


# --- What is in the folder already -------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A run that was killed while it wrote its adapter, after three states."""
    folder = tmp_path_factory.mktemp("stopped")
    stop(os, "replace", 11, "mntp", folder)
    return folder


def write_code(folder: Path, more: str) -> list[Path]:
    """The project's code with other comments and docstrings, and perhaps a line more."""
    for file in train.CODE:
        text = Path(file).read_text().replace('"""', '"""Other words. ', 1)
        (folder / Path(file).name).write_text(f"{text}# a comment\n{more}\n")
    return [folder / Path(file).name for file in train.CODE]


@pytest.mark.parametrize(
    "name, changes",
    [
        ("lr", {"lr": 1e-4}),
        ("seed", {"seed": 3}),
        ("data", {"data": DOCUMENTS[1:]}),
        ("is_causal", {"is_causal": True}),
        ("tokenizer", {"token": "<|of no text|>"}),
        ("code", {"code": "changed = True"}),
    ],
)
def test_a_run_of_other_settings_data_or_code_is_refused_by_name(
    name, changes, stopped, tmp_path, monkeypatch
):
    given = {"code": "", "is_causal": False, "token": "<|endoftext|>"} | changes
    monkeypatch.setattr(train, "CODE", write_code(tmp_path, given.pop("code")))
    model = tiny(is_causal=given.pop("is_causal"))
    model.tokenizer.add_special_tokens([given.pop("token")])
    refused(f"{name} was", lambda: go("mntp", stopped, model=model, **given))


def test_what_changes_memory_or_words_alone_may_change(stopped, tmp_path, monkeypatch):
    folder = shutil.copytree(stopped, tmp_path / "run")
    monkeypatch.setattr(train, "CODE", write_code(tmp_path, ""))
    go("mntp", folder, max_tokens=48, recompute=1)
    assert_whole(folder, adapter_bytes(folder))
    refused("seed was", lambda: go("mntp", folder, seed=3))  # a run that is finished, as well


def test_a_run_that_has_no_state_yet_may_begin_with_other_settings(whole, tmp_path):
    stop(train, "learning_rate", 0, "mntp", tmp_path, seed=3)
    go("mntp", tmp_path)
    assert_whole(tmp_path, whole["mntp"])


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("three years of work")
    refused("not a run folder", go, "mntp", tmp_path)
    train.clear(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.txt").exists()
