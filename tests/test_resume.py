"""A run that was stopped, however it was stopped, ends with the bits of one that was not."""

import errno
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import helpers
import pytest
import torch
from helpers import DOCUMENTS, ROOT, TINY, adapter_bytes, log_of, python
from safetensors.torch import load_file

import train
from llm2vec import LLM2Vec
from llm2vec_data import runs
from llm2vec_data.commands import cli
from train import STAGES

# With dropout, in every stage's tiny settings; and a batch is taken in parts: four and two blocks
# of masked tokens, whose gradients add up, and at least three parts of sentences (GradCache).
CHANGES = {"steps": 7, "batch": 6, "length": 16, "save_every": 2, "max_tokens": 64}


def go(stage: str, folder: Path, data: list | None = None, **changes) -> LLM2Vec:
    return helpers.go(stage, folder, None, data, **CHANGES | changes)


class Killed(BaseException):
    """Ends a run as SIGKILL would: nothing in the project catches it."""


def die(*_, **__):
    raise Killed


def after(n: int, call: Callable, then: Callable = die) -> Callable:
    """`call` for n times, and `then` from there on."""
    left = iter(range(n))
    return lambda *args, **how: (then if next(left, None) is None else call)(*args, **how)


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
        n = draw.randrange(most)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(owner, name, after(n, getattr(owner, name)))
            go(stage, folder)
        assert not (folder / "finished").exists()
        go(stage, folder)
        assert adapter_bytes(folder) == whole[stage], (name, n)
        assert steps(folder) == list(range(1, 8))
        assert not list(folder.glob("*.part")) and not list(folder.glob("state-*"))


def test_a_line_of_the_log_that_was_cut_off_is_passed_over(whole, tmp_path, monkeypatch):
    """And a state that is spoiled, which a kill or a full disk can't do, is named."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        # Behind the settings, the log and three states, each with its adapter.
        patch.setattr(os, "replace", after(11, os.replace))
        go("mntp", tmp_path)
    (tmp_path / "log.jsonl").write_bytes((tmp_path / "log.jsonl").read_bytes()[:-9])
    [state] = tmp_path.glob("state-*")
    content = state.read_bytes()
    state.write_bytes(content[:1000])
    with pytest.raises(ValueError, match="state-00000006.safetensors: "):
        go("mntp", tmp_path)
    state.write_bytes(content)
    go("mntp", tmp_path)
    assert adapter_bytes(tmp_path) == whole["mntp"] and steps(tmp_path) == list(range(1, 8))


@pytest.mark.parametrize("writes", [0, 1, 2, 4, 8, 11, 13, 14])
def test_a_full_disk_loses_nothing_that_was_there(writes, whole, tmp_path, monkeypatch):
    """Of settings, log, three times state and adapter, the tokenizer's and the adapter's two."""

    def full(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, "fsync", after(writes, os.fsync, full))
        go("mntp", tmp_path)
    assert not list(tmp_path.glob("*.part"))
    for file in tmp_path.glob("*.safetensors"):
        load_file(file)
    assert not (tmp_path / "finished").exists()
    go("mntp", tmp_path)
    assert adapter_bytes(tmp_path) == whole["mntp"]


def test_out_of_memory_names_the_flag_and_leaves_a_state(whole, tmp_path, monkeypatch):
    """All layers are recomputed already: there is nothing left to try."""

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    with monkeypatch.context() as patch:
        patch.setattr(
            train, "backward_through_encoder", after(3, train.backward_through_encoder, full)
        )
        said = r"step 4: out of memory; lower --max-tokens \(64\) or --length \(16\): CUDA out"
        with pytest.raises(ValueError, match=said):
            go("simcse", tmp_path, recompute=2)
    assert [file.name for file in tmp_path.glob("state-*")] == ["state-00000002.safetensors"]
    go("simcse", tmp_path)
    assert adapter_bytes(tmp_path) == whole["simcse"]


def test_out_of_memory_elsewhere_is_one_line_and_other_errors_are_not(capsys):
    with pytest.raises(SystemExit) as status:
        cli(lambda: torch.empty(2**50))
    said = capsys.readouterr().err
    assert status.value.code == 2 and said.count("\n") == 1 and "can't allocate memory" in said
    with pytest.raises(RuntimeError):
        cli(lambda: torch.ones(2) @ torch.ones(3))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_state_before_it(
    tmp_path, monkeypatch
):
    spoiled = after(5, train.backward_through_encoder, lambda *_: (float("nan"), 1))
    monkeypatch.setattr(train, "backward_through_encoder", spoiled)
    with pytest.raises(ValueError, match="step 6: the loss is nan"):
        go("simcse", tmp_path)
    assert max(tmp_path.glob("state-*")).name == "state-00000005.safetensors"


def test_an_encoder_for_which_there_is_no_room_is_one_error_and_leaves_nothing(tmp_path):
    """A limit on the size of files stands in for a disk that is full."""
    model, limit = LLM2Vec.from_pretrained(TINY), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**7, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            model.save(tmp_path / "encoder")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not list(tmp_path.iterdir())


# --- What is in the folder already -------------------------------------------------------------


def test_other_settings_data_or_code_are_refused_by_name(tmp_path, monkeypatch):
    """What changes memory alone, and not the result, may be another."""
    run, code = tmp_path / "run", ("llm2vec.py", "lora.py", "train.py")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", after(11, os.replace))
        go("mntp", run)
    for changes, said in (
        ({"lr": 1e-4}, "lr was 0.002 and is 0.0001; --overwrite trains it anew"),
        ({"seed": 3}, "seed was 0"),
        ({"data": DOCUMENTS[1:]}, "data was"),
    ):
        with pytest.raises(ValueError, match=said):
            go("mntp", run, **changes)
    for changed in code:
        for name in code:
            line = "\nchanged = True\n" if name == changed else "# a comment\n"
            (tmp_path / name).write_text((ROOT / name).read_text() + line)
        with monkeypatch.context() as patch, pytest.raises(ValueError, match="code was"):
            patch.setattr(train, "CODE", [tmp_path / name for name in code])
            go("mntp", run)
    for name in code:
        text = (ROOT / name).read_text().replace('"""', '"""Other words. ', 1)
        (tmp_path / name).write_text(text + "# a comment\n")
    monkeypatch.setattr(train, "CODE", [tmp_path / name for name in code])
    go("mntp", run, max_tokens=48, recompute=1)
    assert steps(run) == list(range(1, 8))
    with pytest.raises(ValueError, match="seed was 0"):  # a run that is finished, as well
        go("mntp", run, seed=3)


def test_a_run_that_has_no_state_yet_may_begin_with_other_settings(whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "learning_rate", die)
        go("mntp", tmp_path, seed=3)
    go("mntp", tmp_path)
    assert adapter_bytes(tmp_path) == whole["mntp"] and steps(tmp_path) == list(range(1, 8))


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("three years of work")
    with pytest.raises(ValueError, match="not a run folder"):
        go("mntp", tmp_path)
    train.clear(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.txt").exists()


# --- Real processes ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_twenty_processes_killed_at_any_moment_end_with_the_same_bits(tmp_path):
    """With dropout, in several parts a step, from a state of every step."""
    done = python(__file__, tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    same, killed = map(int, done.stdout.split())
    assert same == 20 and killed > 15, "a few may be done before"


def kill_twenty(root: Path) -> None:
    import torch._dynamo  # noqa: F401 (the optimiser imports it: once here, not in every child)

    def start(stage: str, folder: Path) -> int:
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            go(stage, folder, save_every=1)
            os._exit(0)
        return child

    draw, same, killed = random.Random(0), 0, 0
    for stage in ("mntp", "simcse"):
        assert os.waitpid(start(stage, root / stage), 0)[1] == 0
        for trial in range(10):
            folder, lines = root / f"{stage}-{trial}", draw.randrange(7)
            child, log = start(stage, folder), folder / "log.jsonl"
            while not log.exists() or log.read_text().count("\n") < lines:
                time.sleep(0.001)
            time.sleep(draw.uniform(0, 0.03))  # less than a step
            os.kill(child, signal.SIGKILL)
            killed += os.waitpid(child, 0)[1] == signal.SIGKILL
            assert os.waitpid(start(stage, folder), 0)[1] == 0
            same += adapter_bytes(folder) == adapter_bytes(root / stage)
    print(same, killed)


if __name__ == "__main__":
    kill_twenty(Path(sys.argv[1]))
