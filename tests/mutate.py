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
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch._dynamo  # noqa: F401 (imported once, and not for every fault)

ROOT = Path(__file__).resolve().parent.parent
TESTS = {  # the quick ones first; of another file in data/: the last
    "llm2vec.py": "method golden checkpoints interop hostile parallel encoder device",
    "lora.py": "lora golden interop nf4 checkpoints hostile",
    "train.py": "loop supervised parallel people",
    "data/runs.py": "loop people resume",
    "data": "layouts data golden interop checkpoints hostile supervised encoder people",
}
PAIRS = "Lt LtE Gt GtE Eq NotEq Is IsNot In NotIn Add Sub Mult Div BitAnd BitOr And Or FloorDiv Mod"
PAIRS = f"{PAIRS} min max any all amin amax clamp_min clamp_max".split()
SWAPS = dict(zip(PAIRS[::2] + PAIRS[1::2], PAIRS[1::2] + PAIRS[::2], strict=True))
TEXTS = ("help", "metavar", "description", "usage", "prog", "title")  # arguments with messages


def others(node):
    """The faults of a node, as code: another operator, number or name, or something left out."""
    put = lambda **fields: ast.unparse(type(node)(**vars(node) | fields))  # noqa: E731
    swapped = lambda op: getattr(ast, SWAPS[type(op).__name__])()  # noqa: E731
    match node:
        case ast.AugAssign() | ast.Raise() | ast.Continue() | ast.Expr(value=ast.Call()):
            yield "pass"
        case ast.Assign(
            targets=[target], value=value
        ):  # of an item, or of what has a value already
            if type(target) is not ast.Name or target.id in map(ast.unparse, ast.walk(value)):
                yield "pass"
        case ast.Compare(ops=[op, *more]):
            yield put(ops=[swapped(op), *more])
        case ast.BinOp(op=op) | ast.BoolOp(op=op) if type(op).__name__ in SWAPS:
            yield f"({put(op=swapped(op))})"
        case ast.UnaryOp(operand=operand):
            yield ast.unparse(operand)
        case ast.Constant(value=bool() | int() | float() as value):
            yield repr(not value if type(value) is bool else 2 * value or 1)
        case ast.Name(id=name) | ast.Attribute(attr=name) if name in SWAPS:
            yield put(id=SWAPS[name], attr=SWAPS[name])
        case ast.Call(keywords=keywords):
            for gone in (keyword for keyword in keywords if keyword.arg not in TEXTS):
                yield put(keywords=[keyword for keyword in keywords if keyword is not gone])


def faults(node, function):
    """What may be replaced in a node, or in its function of that name, and by what; no messages."""
    function = None if getattr(node, "name", None) == function else function
    for child in ast.iter_child_nodes(node):
        of = next(
            f for f, v in ast.iter_fields(node) if child is v or type(v) is list and child in v
        )
        said = ast.unparse(child).startswith(("print(", "log("))
        if said or of in ("annotation", "returns") or getattr(child, "arg", None) in TEXTS:
            continue
        if function is None:
            yield from ((child, new) for new in others(child))
            if of in ("test", "ifs"):
                yield child, f"(not ({ast.unparse(child)}))"
        if not isinstance(child, (ast.Raise, ast.JoinedStr)):
            yield from faults(child, function)


def passes(folder, tests, file=None):
    """Whether tests of a checkout pass; in lines.json, which come to the lines of a file."""
    if child := os.fork():
        return os.waitpid(child, 0)[1] == 0
    lines, now = {}, ["import"]

    def trace(frame, *_):
        if frame.f_code.co_filename == file:
            lines.setdefault(frame.f_lineno, {})[now[0]] = None
            return trace

    def pytest_runtest_logstart(nodeid):
        now[0] = nodeid
        sys.settrace(trace)  # for each test, as deep recursion ends it

    signal.alarm(3600 if file else 120)
    os.chdir(folder)
    sys.path[:] = [path for path in sys.path if ROOT not in (Path(path).parent, Path(path))]
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    sys.settrace(trace if file else None)
    plugins = [SimpleNamespace(pytest_runtest_logstart=pytest_runtest_logstart)] if file else []
    how = ["-pno:cacheprovider", f"--basetemp={folder / 'tmp'}", "-q" if file else "-x"]
    status = pytest.main([*how, *tests], plugins)
    sys.settrace(None)
    (folder / "lines.json").write_text(json.dumps(lines))
    os._exit(status)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", help="such as lora.py or data/corpus.py")
    parser.add_argument("function", nargs="?", help="in it, or a class (default: all)")
    parser.add_argument("--sample", type=int, default=10**6, help="so many faults (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    args = parser.parse_args()
    sys.dont_write_bytecode = True  # two faults of one second may have one size
    tests = TESTS.get(args.file, TESTS["data"]).split()
    files, caught = [f"tests/test_{name}.py" for name in tests], 0
    with tempfile.TemporaryDirectory() as scratch:
        folder, source = Path(scratch, "copy"), (ROOT / args.file).read_bytes()
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", "runs", "models"))
        Path(scratch, "llm2vec_data").symlink_to(folder / "data")
        os.environ |= {"PYTHONPATH": f"{folder}:{scratch}", "PYTHONDONTWRITEBYTECODE": "1"}
        passes(folder, files, str(folder / args.file))
        lines, rows = json.loads((folder / "lines.json").read_text()), source.splitlines(True)
        found = list(faults(ast.parse(source), args.function))
        found = random.Random(args.seed).sample(found, min(args.sample, len(found)))
        for node, new in sorted(found, key=lambda fault: fault[0].lineno):
            first, last = node.lineno - 1, node.end_lineno - 1
            line = rows[first][: node.col_offset] + new.encode() + rows[last][node.end_col_offset :]
            faulty = b"".join([*rows[:first], line, *rows[last + 1 :]])
            (folder / args.file).write_bytes(faulty)
            come = dict.fromkeys(
                t for n in range(first, last + 1) for t in lines.get(str(n + 1), ())
            )
            if come and not passes(folder, [t for t in come if t != "import"] or files):
                caught += 1
            else:
                print(f"{args.file}:{first + 1}: {line.decode().strip()}", flush=True)
    print(f"{args.file}: {caught} of {len(found)} faults are caught, {caught / len(found):.1%}")


if __name__ == "__main__":
    main()
