"""The house: imports only go down, and what was installed works in every folder."""

import ast
import graphlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers import ROOT

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


KINDS = ("a folder", "a package", "a module")


def use(python: Path | str, folder: Path, kinds: Sequence[str] = KINDS) -> Path:
    """Run EVERYTHING in folders that have a `data` of their own; where llm2vec.py was found."""
    for kind in kinds:
        (folder / kind / "data").mkdir(parents=True)
        if kind == "a package":
            (folder / kind / "data" / "__init__.py").touch()
        if kind == "a module":
            (folder / kind / "data").rmdir()
            (folder / kind / "data.py").touch()
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        how = {"cwd": folder / kind, "env": env, "capture_output": True, "text": True}
        done = subprocess.run([python, "-c", EVERYTHING], **how)
        assert done.returncode == 0, done.stderr
    scores = subprocess.run([python, "-m", "llm2vec_data.benchmarks", "--help"], **how)
    assert scores.returncode == 0, scores.stderr
    return Path(done.stdout.strip())


@pytest.mark.slow
def test_an_installed_checkout_works_where_other_data_lie(tmp_path):
    assert use(sys.executable, tmp_path, ["a package"]) == ROOT / "llm2vec.py"


@pytest.mark.slow
@pytest.mark.parametrize("editable", [False, True])
def test_a_fresh_install_works_where_other_data_lie(editable, tmp_path):
    """A new environment that borrows the packages of this one."""
    copy = tmp_path / "checkout"
    unwanted = shutil.ignore_patterns(".*", "runs", "models", "build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=unwanted)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    paths = {"base": str(tmp_path / "venv"), "platbase": str(tmp_path / "venv")}
    scripts, site = (Path(sysconfig.get_path(n, vars=paths)) for n in ("scripts", "purelib"))
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    how = ["-e"] if editable else []
    command = [scripts / "python", "-m", "pip", "install", "--quiet", "--no-deps", *how, copy]
    subprocess.run(command, check=True)
    found = use(scripts / "python", tmp_path / "elsewhere")
    assert found.parent == (copy if editable else site)
