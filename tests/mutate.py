"""Make small faults in a copy of a file, one by one; list those that no fast test of TESTS sees.

python tests/mutate.py llm2vec.py [FUNCTION] [--sample N] [--seed S]     (not on Windows)
"""

import argparse
import ast
import os
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest
import torch._dynamo  # noqa: F401 (imported once, and not for every fault)

TESTS = {  # the quick ones first; of another file in data/: the last
    "llm2vec.py": "method golden checkpoints interop hostile parallel encoder device",
    "lora.py": "lora golden interop nf4 checkpoints hostile",
    "train.py": "loop supervised parallel people",
    "data": "layouts data golden interop checkpoints hostile supervised encoder people loop resume",
}
ONE = "Lt Gt Eq Is In Add Mult BitAnd And FloorDiv min any amin clamp_min"
OTHER = "LtE GtE NotEq IsNot NotIn Sub Div BitOr Or Mod max all amax clamp_max"
SWAPS = dict(zip(f"{ONE} {OTHER}".split(), f"{OTHER} {ONE}".split(), strict=True))
TEXTS = {"help", "metavar", "description", "usage", "prog", "title", "annotation", "returns", "exc"}


def faults(node, field=None):
    """A node, or one in it, and other code: an operator, number or name, or something left out."""
    put = lambda **fields: (node, ast.unparse(type(node)(**vars(node) | fields)))  # noqa: E731
    swapped = lambda op: getattr(ast, SWAPS[type(op).__name__])()  # noqa: E731
    if {field, getattr(node, "arg", 0)} & TEXTS or ast.unparse(node).startswith(("print(", "log(")):
        return  # no messages
    match node:
        case ast.AugAssign() | ast.Raise() | ast.Continue() | ast.Expr(value=ast.Call()):
            yield node, "pass"
        case ast.Assign(targets=[ast.Subscript() | ast.Attribute() | ast.Tuple()]):
            yield node, "pass"
        case ast.Assign(targets=[ast.Name(id=x)], value=v) if x in map(ast.unparse, ast.walk(v)):
            yield node, "pass"
        case ast.Compare(ops=[op, *more]):
            yield put(ops=[swapped(op), *more])
        case ast.BinOp(op=op) | ast.BoolOp(op=op) if type(op).__name__ in SWAPS:
            yield node, f"({put(op=swapped(op))[1]})"
        case ast.UnaryOp(operand=operand):
            yield node, ast.unparse(operand)
        case ast.Constant(value=bool() | int() | float() as value):
            yield node, repr(not value if type(value) is bool else 2 * value or 1)
        case ast.Name(id=name) | ast.Attribute(attr=name) if name in SWAPS:
            yield put(id=SWAPS[name], attr=SWAPS[name])
        case ast.Call(keywords=words):
            for gone in (word for word in words if word.arg not in TEXTS):
                yield put(keywords=[word for word in words if word is not gone])
    if field in ("test", "ifs"):
        yield node, f"(not ({ast.unparse(node)}))"
    for field, value in ast.iter_fields(node):
        for child in value if type(value) is list else [value]:
            if isinstance(child, ast.AST) and type(node) is not ast.JoinedStr:
                yield from faults(child, field)


def passes(tests):
    """Whether tests pass, in a process of their own; those that failed before are run first."""
    if child := os.fork():
        return os.waitpid(child, 0)[1] == 0
    signal.alarm(600)
    os._exit(pytest.main(["-x", "--ff", "-pno:terminal", "--basetemp=../tmp", *tests]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", help="such as lora.py or data/corpus.py")
    parser.add_argument("function", nargs="?", help="in it, or a class (default: all)")
    parser.add_argument("--sample", type=int, default=10**6, help="so many faults (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    args, missed = parser.parse_args(), 0
    sys.dont_write_bytecode = True  # two faults of one second may have one size
    tests = [f"tests/test_{name}.py" for name in TESTS.get(args.file, TESTS["data"]).split()]
    with tempfile.TemporaryDirectory() as scratch:
        ignore = shutil.ignore_patterns(".*", "runs", "models")
        os.chdir(shutil.copytree(Path(__file__).parent.parent, f"{scratch}/copy", ignore=ignore))
        os.symlink("data", "llm2vec_data")
        os.environ |= {"PYTHONPATH": os.getcwd(), "PYTHONDONTWRITEBYTECODE": "1"}
        assert passes(tests), "without a fault"
        source = Path(args.file).read_bytes()
        nodes, rows = ast.walk(ast.parse(source)), source.splitlines(True)
        found = faults(next(x for x in nodes if args.function in (None, getattr(x, "name", 0))))
        found = list(found)
        found = random.Random(args.seed).sample(found, min(args.sample, len(found)))
        for node, new in sorted(found, key=lambda fault: fault[0].lineno):
            start = len(b"".join(rows[: node.lineno - 1])) + node.col_offset
            end = len(b"".join(rows[: node.end_lineno - 1])) + node.end_col_offset
            Path(args.file).write_bytes(source[:start] + new.encode() + source[end:])
            if passes(tests):
                missed += 1
                print(f"{args.file}:{node.lineno}: {ast.unparse(node)} -> {new}", flush=True)
    print(f"{args.file}: of {len(found)} faults, {1 - missed / len(found):.1%} are caught")
