"""What the README shows is what works."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL))
def test_every_python_example_runs(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_masking_rate_example_runs(tmp_path):
    [command] = re.findall(r"^python (train.py mntp --model data/tiny-llama .*)$", TEXT, re.M)
    args = [tmp_path / "out" if a.startswith("runs/") else a for a in command.split()]
    done = subprocess.run([sys.executable, *args, "--steps", "2"], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr
