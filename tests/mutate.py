# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "numpy", "safetensors", "tokenizers", "huggingface_hub", "pytest"]
# ///
"""Make small faults in a file, one at a time, and list those that no fast test of TESTS sees.

    python tests/mutate.py llm2vec.py [FUNCTION] [--sample N] [--seed S]     (not on Windows)

Each is made in a copy of the checkout, and run by the tests that come to its line until one fails.
"""

import argparse
import ast
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from itertools import accumulate
from pathlib import Path

import pytest
import torch._dynamo  # noqa: F401 (imported once, and not for every fault)

ROOT = Path(__file__).resolve().parent.parent
TESTS = {  # the quick ones first; of another file in data/: the last
    "llm2vec.py": "method golden checkpoints interop hostile encoder device",
    "lora.py": "lora golden interop nf4 checkpoints hostile",
    "train.py": "loop supervised parallel people",
    "data/runs.py": "loop people resume",
    "data": "layouts data golden interop checkpoints hostile supervised",
}
SWAPS = {ast.Lt: ast.LtE, ast.Gt: ast.GtE, ast.Eq: ast.NotEq, ast.Is: ast.IsNot, ast.In: ast.NotIn}
SWAPS |= {ast.Add: ast.Sub, ast.Mult: ast.Div, ast.BitAnd: ast.BitOr, ast.And: ast.Or}
SWAPS |= {ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult} | {new: old for old, new in SWAPS.items()}
NAMES = {"min": "max", "any": "all", "amin": "amax", "clamp_min": "clamp_max"}
NAMES |= {new: old for old, new in NAMES.items()}
TEXTS = {"help", "metavar", "description", "usage", "prog", "title"}  # arguments that are messages


def others(node):
    """The faults of one node, as code: an operator, number or name that differs, or one less."""
    put = lambda **fields: ast.unparse(type(node)(**vars(node) | fields))  # noqa: E731
    match node:
        case ast.AugAssign() | ast.Raise() | ast.Continue() | ast.Expr(value=ast.Call()):
            yield "pass"
        case ast.Assign(
            targets=[target], value=value
        ):  # of an item, or of what has a value already
            if type(target) is not ast.Name or target.id in map(ast.unparse, ast.walk(value)):
                yield "pass"
        case ast.Compare(ops=[op, *more]) if type(op) in SWAPS:
            yield put(ops=[SWAPS[type(op)](), *more])
        case ast.BinOp(op=op) | ast.BoolOp(op=op) if type(op) in SWAPS:
            yield f"({put(op=SWAPS[type(op)]())})"
        case ast.UnaryOp(operand=operand):
            yield ast.unparse(operand)
        case ast.Constant(value=bool() | int() | float() as value):
            yield repr(not value if value is True or value is False else 2 * value or 1)
        case ast.Name(id=name) | ast.Attribute(attr=name) if name in NAMES:
            yield put(id=NAMES[name], attr=NAMES[name])
        case ast.Call(keywords=keywords):
            for gone in keywords:
                yield put(keywords=[keyword for keyword in keywords if keyword is not gone])


def faults(node, function):
    """What may be replaced in a node, or in its function of that name, and by what; no messages."""
    function = None if getattr(node, "name", None) == function else function
    for field, child in [
        (f, c) for f, v in ast.iter_fields(node) for c in (v if isinstance(v, list) else [v])
    ]:
        said = type(child) is ast.Expr and ast.unparse(child).startswith(("print(", "log("))
        said |= type(child) is ast.JoinedStr or getattr(child, "arg", None) in TEXTS
        if said or field in ("annotation", "returns") or not isinstance(child, ast.AST):
            continue
        if function is None:
            yield from ((child, new) for new in others(child))
            if field in ("test", "ifs"):
                yield child, f"(not ({ast.unparse(child)}))"
        if type(child) is not ast.Raise:
            yield from faults(child, function)


class Watch:
    """A plugin of pytest that notes which tests come to the lines of a file."""

    def __init__(self, file):
        self.file, self.lines, self.test = file, {}, "import"

    def pytest_runtest_logstart(self, nodeid):
        self.test = nodeid
        sys.settrace(self.trace)  # anew, as an error in deep recursion ends it

    def trace(self, frame, *_):
        if frame.f_code.co_filename == self.file:
            self.lines.setdefault(frame.f_lineno, {})[self.test] = None
            return self.trace


def passes(folder, tests, file=None):
    """Whether tests of a checkout pass; in lines.json, which come to the lines of a file."""
    if child := os.fork():
        return os.waitpid(child, 0)[1] == 0
    signal.alarm(3600 if file else 120)
    os.chdir(folder)
    sys.path[:] = [path for path in sys.path if ROOT not in (Path(path).parent, Path(path))]
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    watch, how = Watch(file), ["-pno:cacheprovider", f"--basetemp={folder / 'tmp'}"]
    sys.settrace(watch.trace if file else None)  # for the time of import, too
    status = pytest.main([*how, *tests] if file else [*how, "-x", *tests], [watch] if file else [])
    sys.settrace(None)
    if file:
        Path("lines.json").write_text(json.dumps(watch.lines))
    os._exit(status)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", help="such as lora.py or data/corpus.py")
    parser.add_argument("function", nargs="?", help="in it, or a class (default: all)")
    parser.add_argument("--sample", type=int, default=10**6, help="so many faults (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder, source, caught = Path(scratch, "copy"), (ROOT / args.file).read_bytes(), 0
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", "runs", "models"))
        Path(scratch, "llm2vec_data").symlink_to(folder / "data")
        os.environ |= {"PYTHONPATH": f"{folder}:{scratch}", "PYTHONDONTWRITEBYTECODE": "1"}
        sys.dont_write_bytecode = True  # two faults of one second may have one size
        names = TESTS.get(args.file, TESTS["data"]).split()
        files = [f"tests/test_{name}.py" for name in names]
        passes(folder, files, str(folder / args.file))
        lines = json.loads((folder / "lines.json").read_text())
        starts = [0, *accumulate(map(len, source.splitlines(True)))]
        found = list(faults(ast.parse(source), args.function))
        found = random.Random(args.seed).sample(found, min(args.sample, len(found)))
        for node, new in sorted(found, key=lambda fault: fault[0].lineno):
            head = source[: starts[node.lineno - 1] + node.col_offset]
            faulty = (
                head + new.encode() + source[starts[node.end_lineno - 1] + node.end_col_offset :]
            )
            (folder / args.file).write_bytes(faulty)
            come = [lines.get(str(n), {}) for n in range(node.lineno, node.end_lineno + 1)]
            tests = list({test: 1 for tests in come for test in tests})
            tests = files if tests == ["import"] else [test for test in tests if "::" in test]
            if tests and not passes(folder, tests):
                caught += 1
            else:
                line = faulty.decode().splitlines()[node.lineno - 1].strip()
                print(f"{args.file}:{node.lineno}: {line}", flush=True)
    print(f"{args.file}: {caught} of {len(found)} faults are caught, {caught / len(found):.1%}")


if __name__ == "__main__":
    main()
