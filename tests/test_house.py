"""The house: imports only go down, and what was installed works in every folder."""

import ast
import graphlib
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from helpers import ROOT, python

FILES = {file.stem: file for file in [*ROOT.glob("*.py"), *ROOT.glob("data/*.py")]}


def imports_of(file: Path) -> list[tuple[str, int]]:
    """The files of the project that a file imports, and how deep in it each import stands."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for package, _, name in (n.rpartition(".") for n in names):
            if name in FILES and package in ("", "llm2vec_data"):
                found.append((name, node.col_offset))
    return found


def test_imports_only_go_down():
    graph = {name: imports_of(file) for name, file in FILES.items()}
    assert {name for name, _ in graph["train"]} > {"llm2vec", "lora", "runs"}, "they are seen"
    hidden = [name for name, found in graph.items() if any(column for _, column in found)]
    assert not hidden, "the project's imports stand at the top of a file"
    floors = {name: {other for other, _ in found} for name, found in graph.items()}
    list(graphlib.TopologicalSorter(floors).static_order())  # a circle raises CycleError


EVERYTHING = """
import llm2vec, lora, train
from llm2vec_data import benchmarks, checkpoints, corpus, pairs
model = llm2vec.LLM2Vec.from_pretrained(checkpoints.TINY)
model.save("encoder")
again = llm2vec.LLM2Vec.from_pretrained("encoder")
assert (model.encode(["A text."]) == again.encode(["A text."])).all()
assert corpus.read_documents(corpus.WIKIPEDIA) and pairs.read_pairs([pairs.PAIRS])
assert all(file.exists() for file in (*benchmarks.STS_FILES, *benchmarks.EWT))
print(llm2vec.__file__)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [[], ["-e"]])
def test_a_fresh_install_works_where_other_data_lie(how, tmp_path):
    """A new environment that borrows the packages of this one; `data` is a package or a module."""
    copy, venv = tmp_path / "checkout", str(tmp_path / "venv")
    unwanted = shutil.ignore_patterns(".*", "runs", "models", "build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=unwanted)
    python("-m", "venv", venv)
    paths = {"base": venv, "platbase": venv}
    scripts, site = (Path(sysconfig.get_path(n, vars=paths)) for n in ("scripts", "purelib"))
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(folder: Path, *args: object) -> str:
        how = {"cwd": folder, "env": env, "check": True, "stdout": subprocess.PIPE, "text": True}
        return subprocess.run([scripts / "python", *args], **how).stdout

    run(tmp_path, "-m", "pip", "install", "--quiet", "--no-deps", *how, copy)
    for i, other in enumerate(("data/__init__.py", "data.py")):
        file = tmp_path / f"beside {i}" / other
        file.parent.mkdir(parents=True)
        file.touch()
        run(tmp_path / f"beside {i}", "-m", "llm2vec_data.benchmarks", "--help")
        found = Path(run(tmp_path / f"beside {i}", "-c", EVERYTHING).strip())
        assert found.parent == (copy if how else site)
