# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "numpy", "safetensors", "tokenizers", "huggingface_hub", "pytest"]
# ///
"""Make small faults in a file, one at a time, and list those that no test sees (not on Windows).

    python tests/mutate.py llm2vec.py [FUNCTION] [--sample N] [--seed S]

A fault is another operator, number or condition; or a statement, a `not` or an argument left out.
Messages and help texts have none. In a copy of the checkout, the fast tests that come to its line
run until one fails. A line for each survivor, as it is with the fault, and then the score.
"""

import argparse, ast, itertools, json, math, os, random, shutil, signal, sys, tempfile, time  # noqa: E401
from collections import defaultdict
from pathlib import Path

import pytest
import torch._dynamo  # noqa: F401 (imported once, and not again for every fault)

ROOT = Path(__file__).resolve().parent.parent
BUDGET = 20  # seconds of tests for one fault, at most; the quickest come first
TESTS = {
    "llm2vec.py": "method golden checkpoints encoder interop hostile",
    "lora.py": "lora golden interop nf4 checkpoints hostile",
    "train.py": "loop supervised people parallel train",
    "data/checkpoints.py": "golden checkpoints encoder interop hostile people",
    "data/corpus.py": "data layouts hostile",
    "data/pairs.py": "layouts supervised",
    "data/disk.py": "data layouts hostile encoder",
    "data/export.py": "interop encoder checkpoints people",
    "data/runs.py": "loop people resume",
}
SWAPS = {ast.Lt: ast.LtE, ast.Gt: ast.GtE, ast.Eq: ast.NotEq, ast.Is: ast.IsNot, ast.In: ast.NotIn}
SWAPS |= {ast.Add: ast.Sub, ast.Mult: ast.Div, ast.BitAnd: ast.BitOr, ast.And: ast.Or}
SWAPS |= {there: here for here, there in SWAPS.items()} | {ast.FloorDiv: ast.Mult}
SWAPS |= {ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult}
NAMES = {"min": "max", "any": "all", "amin": "amax", "clamp_min": "clamp_max"}
NAMES |= {there: here for here, there in NAMES.items()}
TEXTS = {"help", "metavar", "description", "usage", "prog", "title"}  # arguments that are messages


def others(node):
    """The faults of one node, as code."""
    put = lambda **fields: ast.unparse(type(node)(**vars(node) | fields))  # noqa: E731
    kind, value = type(node), getattr(node, "value", None)
    rebinds = kind is ast.Assign and {ast.unparse(x) for x in ast.walk(value)}
    if kind in (ast.AugAssign, ast.Raise, ast.Continue) or kind is ast.Expr and type(value) is ast.Call:
        yield "pass"
    elif kind is ast.Assign and (type(node.targets[0]) is not ast.Name or node.targets[0].id in rebinds):
        yield "pass"
    elif kind is ast.Compare and type(node.ops[0]) in SWAPS:
        yield put(ops=[SWAPS[type(node.ops[0])](), *node.ops[1:]])
    elif kind in (ast.BinOp, ast.BoolOp) and type(node.op) in SWAPS:
        yield f"({put(op=SWAPS[type(node.op)]())})"
    elif kind is ast.UnaryOp:
        yield ast.unparse(node.operand)
    elif kind is ast.Constant and type(value) in (bool, int, float):
        yield repr(not value if type(value) is bool else 2 * value if value > 1e-6 else 1)
    elif kind is ast.Name and node.id in NAMES:
        yield NAMES[node.id]
    elif kind is ast.Attribute and node.attr in NAMES:
        yield put(attr=NAMES[node.attr])
    elif kind is ast.Call:
        for gone in (keyword for keyword in node.keywords if keyword.arg not in TEXTS):
            yield put(keywords=[keyword for keyword in node.keywords if keyword is not gone])


def faults(node, function):
    """What may be replaced inside a node, or in the function of that name in it, and by what."""
    function = None if getattr(node, "name", None) == function else function
    hints = getattr(node, "annotation", None), getattr(node, "returns", None)
    for child in ast.iter_child_nodes(node):
        said = isinstance(child, ast.Expr) and ast.unparse(child).startswith(("print(", "log("))
        if said or child in hints or type(child) is ast.JoinedStr or getattr(child, "arg", 0) in TEXTS:
            continue
        if function is None:
            yield from ((child, new) for new in others(child))
            if child in (getattr(node, "test", None), *getattr(node, "ifs", ())):
                yield child, f"(not ({ast.unparse(child)}))"
        if not isinstance(child, ast.Raise):
            yield from faults(child, function)


class Plugin:
    """Of pytest: notes which tests come to which lines of a file, or runs the chosen ones."""

    def __init__(self, file, chosen=()):
        self.file, self.chosen, self.lines, self.seconds = file, chosen, {}, {}

    def pytest_collection_modifyitems(self, items):
        known = {item.nodeid: item for item in items}
        items[:] = [known[name] for name in self.chosen or known if name in known]

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item):
        def trace(frame, *_):
            if frame.f_code.co_filename == self.file:
                self.lines.setdefault(frame.f_lineno, set()).add(item.nodeid)
                return trace

        start = time.monotonic()
        sys.settrace(trace if self.file else None)
        yield
        sys.settrace(None)
        self.seconds.setdefault(item.nodeid, time.monotonic() - start)

    def pytest_runtest_logreport(self, report):
        if report.failed:  # as some that measure time do, when they are watched
            self.seconds[report.nodeid] = math.inf


def passes(folder, tests, plugin, report=None):
    """Whether tests of a checkout pass; a report says which lines they come to."""
    if child := os.fork():
        return os.waitpid(child, 0)[1] == 0
    signal.alarm(1200 if report else 3 * BUDGET)
    os.chdir(folder)
    os.environ |= {"PYTHONPATH": f"{folder}:{folder / 'packages'}", "OMP_NUM_THREADS": "1"}
    sys.path[:] = [p for p in sys.path if ROOT not in (Path(p).parent, Path(p))]
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    how = ["-x", "-q", "--tb=no", "-pno:cacheprovider", f"--basetemp={folder / 'tmp'}"]
    status = pytest.main([*how[bool(report) :], *tests], [plugin])
    if report:
        lines = {place: list(names) for place, names in plugin.lines.items()}
        report.write_text(json.dumps([plugin.seconds, lines]))
    os._exit(status)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", choices=TESTS)
    parser.add_argument("function", nargs="?", help="in it, or a class (default: all)")
    parser.add_argument("--sample", type=int, default=10**6, help="so many faults (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    args = parser.parse_args()
    sys.dont_write_bytecode, os.environ["PYTHONDONTWRITEBYTECODE"] = True, "1"  # it may be stale
    with tempfile.TemporaryDirectory() as scratch:
        folder, report, caught = Path(scratch, "copy"), Path(scratch, "report.json"), 0
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", "runs", "models"))
        (folder / "packages").mkdir()
        (folder / "packages" / "llm2vec_data").symlink_to(folder / "data")
        file, files = folder / args.file, {f"tests/test_{x}.py" for x in TESTS[args.file].split()}
        passes(folder, files, Plugin(str(file)), report)
        seconds, lines = json.loads(report.read_text())
        source = file.read_bytes()
        starts = [0, *itertools.accumulate(map(len, source.splitlines(True)))]
        found = list(faults(ast.parse(source), args.function))
        found = random.Random(args.seed).sample(found, min(args.sample, len(found)))
        for node, new in sorted(found, key=lambda fault: fault[0].lineno):
            first, last = starts[node.lineno - 1], starts[node.end_lineno - 1]
            head, tail = source[: first + node.col_offset], source[last + node.end_col_offset :]
            file.write_bytes(changed := head + new.encode() + tail)
            places = map(str, range(node.lineno, node.end_lineno + 1))
            come = {name for place in places for name in lines.get(place, ())} or seconds
            tests = sorted(come, key=seconds.get)
            ends = itertools.accumulate(map(seconds.get, tests))
            tests = [name for name, end in zip(tests, ends) if end < BUDGET] or tests[:1]
            if passes(folder, {name.partition("::")[0] for name in tests}, Plugin("", tests)):
                line = changed[first:].decode().partition("\n")[0].strip()
                print(f"{args.file}:{node.lineno}: {line}", flush=True)
            else:
                caught += 1
    print(f"{args.file}: {caught} of {len(found)} faults are caught, {caught / len(found):.1%}")


if __name__ == "__main__":
    main()
