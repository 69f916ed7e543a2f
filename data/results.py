"""Write measured numbers into the READMEs, so that none of them differs from its file.

    python -m data.results             rewrites the marked tables and numbers, and draws pictures
    python -m data.results --check     changes nothing; lists differences, with exit status 1

The files are data/results/NAME.json, in the format of data/compare.py. A mark is a comment, which
is not shown on the page. This one describes a table:

    <!-- table {"title": "SmolLM2-135M", "files": ["smollm2"],
                "columns": {"stsb-test": "STS-B", "STS": "three STS tasks"},
                "rows": ["causal, mean", "+ simcse"], "range": ["stsb-test"]} -->
    ... the table ...
    <!-- end -->

files      names of files; a row comes from the first file that has it
columns    scores, a list, or an object with a heading for each one
rows       the same for rows, in this order (default: all); "NAME | ROW" is the row of one file
range      columns that also show the lowest and the highest seed, after the mean; each cell is the
           mean over the seeds that have its score
title      heading of the rows
printed    true: the table as `python train.py` prints it, with all scores, instead of columns

And this one, in a sentence, describes the number after it. Of several seeds it is the mean, or
with `| lowest` or `| highest` that seed (not in a table: there, each `|` ends a cell):

    SimCSE ends at <!--= smollm2 | + simcse | stsb-test -->.714.

The third kind describes the picture after it. It has a bar for each row:

    <!-- bars {"file": "smollm2", "score": "stsb-test", "title": "STS-B", "rows": ["+ mntp"]} -->
    ![STS-B by step](data/pictures/results.svg)
"""

import argparse
import json
import math
import re
import sys
from itertools import zip_longest
from pathlib import Path

from llm2vec_data.commands import cli
from llm2vec_data.compare import over_seeds, read_results, row_of, spread, table
from llm2vec_data.disk import write_whole
from llm2vec_data.figures import bar_labels, draw_bars, svg

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "data/README.md", "tests/README.md")
MARK = re.compile(
    r"<!-- table\s(?P<table>.*?)-->\n(?P<lines>.*?)(?=<!-- end -->)"
    r"|<!--= (?P<number>[^\n]*?) -->(?P<digits>(?:-?\d*\.?\d+)?)"
    r"|<!-- bars\s(?P<bars>.*?)-->\n!\[[^\]]*\]\((?P<picture>[^)]+)\)",
    re.DOTALL,
)
KEYS = {"title", "files", "columns", "rows", "range", "printed"}


def shown(value: float, score: str) -> str:
    """A score with three digits and no zero before the point; seconds as a whole number."""
    if score == "seconds":
        return f"{value:.0f}"
    digits = 3 if abs(value) < 1 else max(0, 2 - int(math.log10(abs(value))))
    return re.sub(r"^(-?)0\.", r"\1.", f"{value:.{digits}f}")


def make_table(mark: dict, folder: Path) -> str:
    """The Markdown table for a mark."""
    if not {"files"} < mark.keys() <= KEYS or ("columns" in mark) == ("printed" in mark):
        raise ValueError("expected files, columns or printed, and perhaps rows, range, title")
    files = {name: read_results(folder / f"{name}.json") for name in mark["files"]}
    names = mark.get("rows") or [row for rows in files.values() for row in rows]
    names, columns = (
        each if isinstance(each, dict) else dict(zip(each, each, strict=True))
        for each in (names, mark.get("columns", {}))
    )
    rows = [(heading, row_of(files, name)) for name, heading in names.items()]
    ranges = mark.get("range", [])
    for score in (*columns, *ranges):
        if not any(score in one for _, seeds in rows for one in seeds):
            raise ValueError(f"{', '.join(files)}: no row of this table has the score {score!r}")

    def cell(seeds: list[dict[str, float]], score: str) -> str:
        seeds = [one for one in seeds if score in one]
        if not seeds:
            return ""
        mean, low, high = (shown(value, score) for value in spread(seeds, score))
        return f"{mean} ({low} to {high})" if score in ranges and len(seeds) > 1 else mean

    if mark.get("printed"):
        return f"```\n{table(over_seeds(dict(rows)))}\n```\n"
    lines = [[mark.get("title", ""), *columns.values()], ["---", *("--:" for _ in columns)]]
    lines += [[name, *(cell(seeds, score) for score in columns)] for name, seeds in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def make_number(mark: str, folder: Path) -> str:
    """The number for a mark in a sentence."""
    kinds, parts = ("mean", "lowest", "highest"), mark.split(" | ")
    parts += ["mean"] if len(parts) == 3 else []
    if len(parts) != 4 or parts[3] not in kinds:
        raise ValueError(f"{mark!r}: expected FILE | ROW | SCORE, perhaps | lowest or | highest")
    file, row, score, kind = parts
    seeds = row_of({file: read_results(folder / f"{file}.json")}, row)
    seeds = [one for one in seeds if score in one]
    if not seeds:
        raise ValueError(f"{file}: row {row!r} has no score {score!r}")
    return shown(spread(seeds, score)[kinds.index(kind)], score)


def rewrite(page: str, text: str, folder: Path, draw: bool = False) -> tuple[str, list[str]]:
    """The text of a page with the numbers from the files in `folder`; a line for each difference.

    draw: also draw the pictures that lack a number.
    Raises ValueError, which names page and line, for a mark that can't be read.
    """
    differences, marks = [], {mark.start() for mark in MARK.finditer(text)}
    for start in re.finditer(r"<!-- (?:table|bars)\s|<!--=", text):
        if start.start() not in marks:
            number = text.count("\n", 0, start.start()) + 1
            raise ValueError(f"{page}, line {number}: a mark without its end, or in another one")

    def replace(mark: re.Match) -> str:
        part = "lines" if mark["table"] else "digits" if mark["number"] else "picture"
        first, new = text.count("\n", 0, mark.start(part)) + 1, mark[part]
        try:
            if mark["bars"]:
                bars = argparse.Namespace(**json.loads(mark["bars"]))
                bars.table, picture = folder / f"{bars.file}.json", (ROOT / page).parent / new
                drawn = picture.read_text(encoding="utf-8") if picture.exists() else ""
                lacks = [label for label in bar_labels(bars) if f">{label}</text>" not in drawn]
                differences.extend(f"{page}, line {first}: {new} lacks {label}" for label in lacks)
                if lacks and draw:
                    write_whole(picture, svg(draw_bars(bars)).encode())
                return mark[0]
            if mark["table"]:
                new = make_table(json.loads(mark["table"]), folder)
            else:
                new = make_number(mark["number"], folder)
        except (ValueError, TypeError, AttributeError, FileNotFoundError) as error:
            raise ValueError(f"{page}, line {first}: {error}") from None
        lines = mark[part].splitlines(), new.splitlines()
        for number, (old, right) in enumerate(zip_longest(*lines, fillvalue=""), start=first):
            if old != right:
                message = f"{old or 'nothing'}; its file says {right or 'nothing'}"
                differences.append(f"{page}, line {number}: {message}")
        return text[mark.start() : mark.start(part)] + new

    return MARK.sub(replace, text), differences


def main() -> None:
    about = "Rewrite the marked tables and numbers in the READMEs from data/results/*.json."
    parser = argparse.ArgumentParser(prog="python -m data.results", description=about)
    text = "change nothing; list the lines that differ from their files, with exit status 1"
    parser.add_argument("--check", action="store_true", help=text)
    check = parser.parse_args().check
    texts = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
    files = ROOT / "data" / "results"
    done = {page: rewrite(page, text, files, not check) for page, text in texts.items()}
    for page, (text, differences) in done.items():
        print(*differences, sep="\n", end="\n" if differences else "")
        if text != texts[page] and not check:
            write_whole(ROOT / page, text.encode())
    sys.exit(1 if check and any(differences for _, differences in done.values()) else 0)


if __name__ == "__main__":
    cli(main)
