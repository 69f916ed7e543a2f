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
TEXT, *OTHERS = (file.read_text(encoding="utf-8") for file in FILES)
SHELL = "\n".join(re.findall(r"```bash\n(.*?)```", "\n".join([TEXT, *OTHERS]), re.DOTALL))
OURS = r"python (?:-m )?(?:train|llm2vec|data)[\w./]*.*|torchrun .*"
COMMANDS = [line.strip() for line in re.findall(rf"^\s*({OURS})$", SHELL, re.MULTILINE)]
DIFFS = re.findall(r"```diff\n(.*?)\n```", "\n".join([TEXT, *OTHERS]), re.DOTALL)


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
    monkeypatch.syspath_prepend(ROOT)
    as_module = words[0] == "-m"
    start = runpy.run_module if as_module else runpy.run_path
    name, *args = words[as_module:]
    monkeypatch.setattr(sys, "argv", [name, *args])
    with pytest.raises(Parsed):
        start(name if as_module else str(ROOT / name), run_name="__main__")


def test_every_python_example_runs():
    """One behind the other, in one process."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL))
    done = python("-c", code)
    assert code and done.returncode == 0, done.stderr


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
    args = ["--steps", 2, "--dtype", "float32", "--output", "out"]
    done = python("train.py", *args, cwd=tmp_path)
    assert done.returncode == 0 and "| + simcse" in done.stdout, done.stderr
