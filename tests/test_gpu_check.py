"""The check for a GPU, as a dry run on small layers."""

import json
import os

import pytest
from helpers import python


@pytest.mark.skipif("CUDA_VISIBLE_DEVICES" in os.environ, reason="would not be a dry run")
@pytest.mark.slow
def test_every_step_runs_and_its_facts_are_kept(tmp_path):
    """`right` also holds its limits: a resumed run, and a second pass, have the same bits."""
    done = python("tests/gpu_check.py", env=os.environ | {"OUT": str(tmp_path)})
    assert done.returncode == 0 and "a dry run" in done.stdout, done.stdout + done.stderr
    facts = [json.loads(line) for line in (tmp_path / "facts.jsonl").open()]
    steps = {"machine", "right", "training", "encoding", "nf4", "small", "compiled"}
    assert {fact["step"] for fact in facts} == steps
    assert {"step", "fact", "value", "at_most"} == facts[0].keys()
