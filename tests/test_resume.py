"""A run that was stopped, however it was stopped, ends with the bits of one that was not."""

import errno
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import helpers
import pytest
from helpers import DOCUMENTS, adapter_bytes, log_of, python, refused, tiny
from safetensors.torch import load_file

import train
from llm2vec_data import runs
from train import STAGES

# With dropout, in every stage's tiny settings; and a batch is taken in parts: four and two blocks
# of masked tokens, whose gradients add up, and at least three parts of sentences (GradCache).
CHANGES = {"steps": 7, "batch": 6, "length": 16, "save_every": 2, "max_tokens": 64}


def go(stage: str, folder: Path, data: list | None = None, model=None, **changes) -> None:
    helpers.go(stage, folder, model, data, **CHANGES | changes)


class Killed(BaseException):
    """Ends a run as SIGKILL would: nothing in the project catches it."""


def die(*_, **__):
    raise Killed


def after(n: int, call: Callable, then: Callable = die) -> Callable:
    """`call` for n times, and `then` from there on."""
    left = iter(range(n))
    return lambda *args, **how: (then if next(left, None) is None else call)(*args, **how)


def killed(monkeypatch, owner, name: str, n: int, stage: str, folder: Path, **how) -> None:
    """A run that ends when a function is called for the n-th time, from 0."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, name, after(n, getattr(owner, name)))
        go(stage, folder, **how)


def steps(folder: Path) -> list[int]:
    return [line["step"] for line in log_of(folder)]


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
def test_killed_runs_end_with_the_same_bits(stage, trials, whole, tmp_path, monkeypatch):
    """Before or in the middle of a step, of a write, or just before a rename."""
    draw = random.Random(f"{stage} {trials}")
    for trial in range(trials):
        folder, (owner, name, most) = tmp_path / str(trial), draw.choice(MOMENTS)
        killed(monkeypatch, owner, name, draw.randrange(most), stage, folder)
        assert not (folder / "finished").exists()
        go(stage, folder)
        assert adapter_bytes(folder) == whole[stage] and steps(folder) == list(range(1, 8))
        assert not list(folder.glob("*.part")) and not list(folder.glob("state-*"))


def test_a_line_of_the_log_that_was_cut_off_is_passed_over(whole, tmp_path, monkeypatch):
    """And a state that is spoiled, which a kill or a full disk can't do, is named."""
    killed(monkeypatch, os, "replace", 11, "mntp", tmp_path)  # with three states behind it
    (tmp_path / "log.jsonl").write_bytes((tmp_path / "log.jsonl").read_bytes()[:-9])
    [state] = tmp_path.glob("state-*")
    content = state.read_bytes()
    state.write_bytes(content[:1000])
    refused("state-00000006.safetensors: ", lambda: go("mntp", tmp_path))
    state.write_bytes(content)
    go("mntp", tmp_path)
    assert adapter_bytes(tmp_path) == whole["mntp"] and steps(tmp_path) == list(range(1, 8))


@pytest.mark.parametrize("writes", [0, 3, 11, 14])
def test_a_full_disk_loses_nothing_that_was_there(writes, whole, tmp_path, monkeypatch):
    """At the settings, at an adapter beside a state, at the tokenizer, at the last file."""

    def full(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, "fsync", after(writes, os.fsync, full))
        go("mntp", tmp_path)
    assert not list(tmp_path.glob("*.part")) and not (tmp_path / "finished").exists()
    for file in tmp_path.glob("*.safetensors"):
        load_file(file)
    go("mntp", tmp_path)
    assert adapter_bytes(tmp_path) == whole["mntp"]


# --- What is in the folder already -------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A run that was killed while it wrote its adapter."""
    folder = tmp_path_factory.mktemp("stopped")
    killed(pytest.MonkeyPatch, os, "replace", 11, "mntp", folder)
    return folder


@pytest.mark.parametrize(
    "name, changes",
    [
        ("lr", {"lr": 1e-4}),
        ("seed", {"seed": 3}),
        ("data", {"data": DOCUMENTS[1:]}),
        ("is_causal", {"is_causal": True}),
        ("code", {"code": "changed = True"}),
    ],
)
def test_a_run_of_other_settings_data_or_code_is_refused_by_name(
    name, changes, stopped, tmp_path, monkeypatch
):
    given = {"code": "", "is_causal": False} | changes
    monkeypatch.setattr(train, "CODE", write_code(tmp_path, given.pop("code")))
    model = tiny(is_causal=given.pop("is_causal"))
    refused(f"{name} was", lambda: go("mntp", stopped, model=model, **given))


def write_code(folder: Path, more: str) -> list[Path]:
    """The project's code with other comments and docstrings, and perhaps a line more."""
    for file in train.CODE:
        text = Path(file).read_text().replace('"""', '"""Other words. ', 1)
        (folder / Path(file).name).write_text(f"{text}# a comment\n{more}\n")
    return [folder / Path(file).name for file in train.CODE]


def test_what_changes_memory_or_words_alone_may_change(stopped, whole, tmp_path, monkeypatch):
    folder = shutil.copytree(stopped, tmp_path / "run")
    monkeypatch.setattr(train, "CODE", write_code(tmp_path, ""))
    go("mntp", folder, max_tokens=48, recompute=1)
    assert steps(folder) == list(range(1, 8))
    refused("seed was", lambda: go("mntp", folder, seed=3))  # a run that is finished, as well


def test_a_run_that_has_no_state_yet_may_begin_with_other_settings(whole, tmp_path, monkeypatch):
    killed(monkeypatch, train, "learning_rate", 0, "mntp", tmp_path, seed=3)
    go("mntp", tmp_path)
    assert adapter_bytes(tmp_path) == whole["mntp"] and steps(tmp_path) == list(range(1, 8))


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("three years of work")
    refused("not a run folder", lambda: go("mntp", tmp_path))
    train.clear(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.txt").exists()


# --- Real processes ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_twenty_processes_killed_at_any_moment_end_with_the_same_bits(tmp_path):
    """With dropout, in several parts a step, from a state of every step."""
    done = python(__file__, tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    same, stopped = map(int, done.stdout.split())
    assert same == 20 and stopped > 15, "a few may be done before"


def kill_twenty(root: Path) -> None:
    import torch._dynamo  # noqa: F401 (the optimiser imports it: once here, not in every child)

    def start(stage: str, folder: Path) -> int:
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            go(stage, folder, save_every=1)
            os._exit(0)
        return child

    draw, same, stopped = random.Random(0), 0, 0
    for trial in range(-2, 20):  # at first, one of each stage that is not killed
        stage = ("mntp", "simcse")[trial % 2]
        folder, lines = root / (stage if trial < 0 else str(trial)), draw.randrange(7)
        child, log = start(stage, folder), folder / "log.jsonl"
        if trial >= 0:
            while not log.exists() or log.read_text().count("\n") < lines:
                time.sleep(0.001)
            time.sleep(draw.uniform(0, 0.03))  # less than a step
            os.kill(child, signal.SIGKILL)
            stopped += os.waitpid(child, 0)[1] == signal.SIGKILL
            child = start(stage, folder)
        assert os.waitpid(child, 0)[1] == 0
        same += trial >= 0 and adapter_bytes(folder) == adapter_bytes(root / stage)
    print(same, stopped)


if __name__ == "__main__":
    kill_twenty(Path(sys.argv[1]))
