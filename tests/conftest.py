"""One thread: two are no faster on tensors as small as here, and ten times slower when busy."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the commands that tests run, too

import pytest
from helpers import INTEROP, TINY

import train
from llm2vec import LLM2Vec
from llm2vec_data.commands import cli

pytest_plugins = ["local_hub"]


@pytest.fixture(scope="session")
def encoder() -> LLM2Vec:
    """The bundled model, for tests that leave it as it is."""
    return LLM2Vec.from_pretrained(TINY)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A very small Mistral, whose tokenizer puts a BOS in front."""
    return Path(shutil.copytree(INTEROP / "base", tmp_path / "model"))


@pytest.fixture
def command(monkeypatch, capsys, tmp_path) -> Callable:
    """Run a command in this process, in an empty folder: its exit status, output and errors."""
    monkeypatch.chdir(tmp_path)

    def run(*args: object, main: Callable = train.main) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["program", *map(str, args)])
        status = 0
        try:
            cli(main)
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run
