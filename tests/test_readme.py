"""What the README shows is what works."""

import argparse
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL = "\n".join(re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)).replace("\\\n", " ")
OURS = r"python (?:-m )?(?:train|llm2vec|data|tests)[\w./]*.*|torchrun .*"
COMMANDS = [line.strip() for line in re.findall(rf"^\s*({OURS})$", SHELL, re.MULTILINE)]
HERE = [line for line in COMMANDS if "train.py" in line and "--model data/tiny-llama" in line]


class Parsed(BaseException):
    """Ends a command once its flags were understood."""


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_has_flags_that_are_there(line, monkeypatch):
    words = shlex.split(line, comments=True)
    words = [word for word in words[1:] if not word.startswith("--nproc")]
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *args):
        parse(self, *args)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    as_module = words[0] == "-m"
    start = runpy.run_module if as_module else runpy.run_path
    name, *args = words[as_module:]
    monkeypatch.setattr(sys, "argv", [name, *args])
    with pytest.raises(Parsed):
        start(name if as_module else str(ROOT / name), run_name="__main__")


def test_every_python_example_runs():
    """One behind the other, in one process."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert code and done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("line", HERE)
def test_every_command_that_trains_the_bundled_model_runs(line, tmp_path):
    args = [tmp_path / "out" if word.startswith("runs/") else word for word in shlex.split(line)]
    command = [sys.executable, *args[1:], "--steps", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
