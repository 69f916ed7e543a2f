"""The check for a GPU, as a dry run on small layers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECK = Path(__file__).parent / "gpu_check.py"


@pytest.mark.skipif("CUDA_VISIBLE_DEVICES" in os.environ, reason="would not be a dry run")
@pytest.mark.slow
@pytest.mark.parametrize("steps", [("nf4",), ("right", "training")])
def test_every_step_that_needs_no_compiler_runs(steps):
    """`right` also holds its limits: a resumed run, and a second pass, have the same bits."""
    command = [sys.executable, CHECK, *steps]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "a dry run" in done.stdout, done.stdout + done.stderr
