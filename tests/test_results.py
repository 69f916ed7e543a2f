"""The numbers of the READMEs are those of the results files, and the files say what made them."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from helpers import DOCUMENTS, ROOT, TINY, refused

from llm2vec_data import benchmarks, compare, results

UNTRAINED = "both ways, untrained"
SEEDS = [{"seed": 0, "stsb-test": 0.714, "seconds": 60.4}, {"seed": 1, "stsb-test": 0.7086}]
ROWS = {"causal, mean": [{"stsb-test": -0.25, "POS": 0.9}], "+ simcse": SEEDS}
PAGE = """Before.
<!-- table {"title": "Tiny", "files": ["tiny"], "columns": {"stsb-test": "STS-B", "POS": "POS"},
            "rows": ["+ simcse", "causal, mean"], "range": ["stsb-test"]} -->
| Tiny | STS-B | POS |
| --- | --: | --: |
| + simcse | .711 (.709 to .714) |  |
| causal, mean | -.250 | .900 |
<!-- end -->
It ends at <!--= tiny | + simcse | stsb-test -->.711, at most <!--= tiny | + simcse | stsb-test | highest -->.714.
"""  # noqa: E501


def write_results(file: Path, rows: dict) -> None:
    file.write_text(json.dumps({"runs": [{"command": "", "weights": {}, "rows": rows}]}))


@pytest.fixture
def measured(tmp_path):
    """A folder with a results file."""
    write_results(tmp_path / "tiny.json", ROWS)
    return tmp_path


def test_the_readmes_are_what_the_files_say():
    for page in results.PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        assert results.rewrite(page, text, ROOT / "data" / "results") == (text, [])


@pytest.mark.parametrize(
    "right, wrong, line, differs",
    [
        (".709 to", ".708 to", 6, "| + simcse | .711 (.708 to .714) |  |; its file says"),
        (".711,", ".710,", 9, ".710; its file says .711"),
        ("t -->.711", "t -->", 9, "nothing; its file says .711"),
        ("| causal, mean | -.250 | .900 |\n", "", 7, "nothing; its file says | causal, mean |"),
    ],
)
def test_a_changed_digit_is_found_and_mended(measured, right, wrong, line, differs):
    assert results.rewrite("page", PAGE, measured) == (PAGE, [])
    text, [found] = results.rewrite("page", PAGE.replace(right, wrong), measured)
    assert text == PAGE and found.startswith(f"page, line {line}: {differs}")


def test_the_table_as_it_is_printed_and_rows_of_one_file(measured):
    write_results(measured / "other.json", {"+ simcse": [{"stsb-test": 0.5}]})
    mark = {"files": ["tiny", "other"], "printed": True, "rows": ["+ simcse"]}
    printed = compare.table(compare.over_seeds({"+ simcse": SEEDS}))
    assert results.make_table(mark, measured) == f"```\n{printed}\n```\n"
    mark = {"files": ["tiny", "other"], "columns": ["stsb-test"], "rows": {"other | + simcse": "b"}}
    assert results.make_table(mark, measured).splitlines()[2:] == ["| b | .500 |"]


def test_a_picture_that_lacks_a_number_is_told_and_drawn(measured, monkeypatch):
    monkeypatch.setattr(results, "ROOT", measured)
    mark = {"file": "tiny", "score": "stsb-test", "title": "", "rows": ["+ simcse"]}
    page = f"<!-- bars {json.dumps(mark)} -->\n![Bars](tiny.svg)\n"
    picture = measured / "tiny.svg"
    picture.write_text("<text>+ simcse</text><text>0.712 (0.709 to 0.714)</text>")
    _, [lacks] = results.rewrite("README.md", page, measured)
    assert lacks == "README.md, line 2: tiny.svg lacks 0.711 (0.709 to 0.714)"
    pytest.importorskip("matplotlib")
    assert results.rewrite("README.md", page, measured, draw=True) == (page, [lacks])
    assert results.rewrite("README.md", page, measured) == (page, [])


@pytest.mark.parametrize(
    "old, new, said",
    [
        ('"tiny"', '"none"', "line 4: .*none.json"),
        ('["+ simcse",', '["+ mntp",', r"line 4: tiny: no row '\+ mntp'"),
        ('"POS":', '"NER":', "line 4: tiny: .*'NER'"),
        ('"columns"', '"column"', "line 4: .*columns"),
        ('"Tiny",', '"Tiny"', "line 4: "),
        ("<!-- end -->", "", "line 2: "),
        ("tiny | + simcse | stsb-test -->", "tiny | + simcse -->", "line 9: "),
        ("| highest", "| most", "line 9: .*highest"),
        ("| stsb-test -->", "| POS -->", "line 9: .*'POS'"),
    ],
)
def test_a_mark_that_names_nothing_is_told_with_its_line(measured, old, new, said):
    refused(f"page, {said}", results.rewrite, "page", PAGE.replace(old, new, 1), measured)


def test_check_lists_and_changes_nothing(tmp_path, monkeypatch, command):
    folder = tmp_path / "data" / "results"
    folder.mkdir(parents=True)
    write_results(folder / "tiny.json", ROWS)
    page, wrong = tmp_path / "README.md", PAGE.replace(".711,", ".811,")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "PAGES", [page.name])
    page.write_text(wrong)
    status, out, _ = command("--check", main=results.main)
    assert (status, out) == (1, "README.md, line 9: .811; its file says .711\n")
    assert page.read_text() == wrong
    assert command(main=results.main)[0] == 0 and page.read_text() == PAGE
    assert command("--check", main=results.main)[:2] == (0, "")


def test_what_a_command_measured_is_read_back_and_added_to(monkeypatch, command, folder):
    """Train and score as users do; only the scores are made up."""
    scores = iter(x / 100 for x in range(100))
    monkeypatch.setattr(benchmarks, "evaluate", lambda *_: {"STS": next(scores)})
    monkeypatch.setattr(benchmarks, "held_out_of", lambda _: [])
    Path("corpus.txt").write_text("\n".join(DOCUMENTS))
    small = ["--model", TINY, "--dtype", "float32", "--corpus", "corpus.txt"]
    assert command(*small, "--steps", 1, "--stages", "mntp", "--seeds", 3, 4)[0] == 0
    file, whole = "runs/tiny/results.json", (TINY / "model.safetensors").read_bytes()
    [run] = compare.read_runs(file)
    assert run["weights"] == {"model.safetensors": hashlib.sha256(whole).hexdigest()}
    assert run["command"].startswith("python train.py --model ") and run["dtype"] == "float32"
    assert run["torch"] == torch.__version__ and run["threads"] == torch.get_num_threads()
    settings = compare.settings_in("runs/tiny/mntp")
    assert run["settings"] == {"mntp": settings} and settings["code"] == run["code"]

    def score(*flags: str, model: Path = TINY) -> tuple[int, str, str]:
        return command("--model", model, *flags, "--output", file, main=benchmarks.main)

    def found() -> dict[str, list]:
        rows = compare.read_results(file)
        return {name: [(s.get("seed"), s["STS"]) for s in seeds] for name, seeds in rows.items()}

    plain = {"causal, mean": [(None, 0)], UNTRAINED: [(None, 0.01)]}
    assert found() == plain | {"+ mntp": [(3, 0.02), (4, 0.03)]}
    for flags in (["--adapters", "runs/tiny/seed-4/mntp"], ["--name", UNTRAINED], ["--name", "x"]):
        assert score(*flags)[0] == 0
    added = {"+ mntp": [(3, 0.02), (4, 0.04)], UNTRAINED: [(None, 0.05)], "x": [(None, 0.06)]}
    assert found() == plain | added
    before = Path(file).read_text()
    status, _, errors = score(model=folder)
    assert status == 2 and file in errors and Path(file).read_text() == before


def test_another_file_is_refused(tmp_path):
    for content in ({}, {"runs": 3}, {"runs": [{"rows": {}}]}, {"causal": {"STS": 1}}):
        (tmp_path / "a.json").write_text(json.dumps(content))
        refused("a.json", compare.read_results, tmp_path / "a.json")
