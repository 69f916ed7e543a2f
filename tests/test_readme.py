"""What the README shows is what works."""

import argparse
import re
import runpy
import shlex
import shutil
import sys

import pytest
from helpers import ROOT, python

FILES = [ROOT / "README.md", ROOT / "data" / "README.md", ROOT / "tests" / "README.md"]
TEXT = "\n".join(file.read_text(encoding="utf-8") for file in FILES)
SHELL, PYTHON, DIFFS = (
    re.findall(rf"```{kind}\n(.*?)\n```", TEXT, re.DOTALL) for kind in ("bash", "python", "diff")
)
OURS = r"python (?:-m )?(?:train|llm2vec|data)[\w./]*.*|torchrun .*"
COMMANDS = re.findall(rf"^\s*({OURS})$", "\n".join(SHELL), re.MULTILINE)


class Parsed(BaseException):
    """Ends a command once its flags were understood."""


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_has_flags_that_are_there(line, monkeypatch):
    _, *words = shlex.split(line, comments=True)
    words = [word for word in words if not word.startswith("--nproc")]
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *args):
        parse(self, *args)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.chdir(ROOT)
    start = runpy.run_path
    if words[0] == "-m":
        start, words = runpy.run_module, words[1:]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(Parsed):
        start(words[0], run_name="__main__")


def test_every_python_example_runs():
    """One behind the other, in one process."""
    done = python("-c", "\n".join(PYTHON))
    assert PYTHON and done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("diff", DIFFS, ids=range(len(DIFFS)))
def test_every_hack_runs_as_it_stands(diff, tmp_path):
    """To the end of the table, on the bundled model."""
    for name in ("llm2vec.py", "lora.py", "train.py", "data"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name.replace("data", "llm2vec_data"))  # as when installed
    for part in re.split(r"^--- ", diff, flags=re.MULTILINE)[1:]:
        name, *lines = part.replace("data/", "llm2vec_data/", 1).splitlines()
        old = "\n".join(line[1:] for line in lines if line[0] != "+")
        new = "\n".join(line[1:] for line in lines if line[0] != "-")
        code = (tmp_path / name).read_text()
        assert code.count(old) == 1, "the place that it changes is there"
        (tmp_path / name).write_text(code.replace(old, new))
    done = python("train.py", "--steps", 2, "--dtype", "float32", cwd=tmp_path)
    assert done.returncode == 0 and "| + simcse" in done.stdout, done.stderr
