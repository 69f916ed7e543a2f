"""The check for a GPU, as a dry run on small layers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SLOW = pytest.param(("right", "training", "kernels"), marks=pytest.mark.slow)


@pytest.mark.skipif("CUDA_VISIBLE_DEVICES" in os.environ, reason="would not be a dry run")
@pytest.mark.parametrize("steps", [("nf4",), SLOW])
def test_every_step_that_needs_no_compiler_runs(steps, tmp_path):
    command = [sys.executable, ROOT / "tests" / "gpu_check.py", *steps]
    env = os.environ | {"OUT": str(tmp_path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    facts = [json.loads(line) for line in (tmp_path / "gpu_check.jsonl").open()]
    assert [f["step"] for f in facts if f["name"] == "done"] == list(steps)
    found = {f["name"]: f["value"] for f in facts}
    exact = ("mntp, stopped and resumed: adapters", "one seed, two passes: vectors")
    assert [found[name] for name in exact] == [0, 0] if "right" in steps else found
