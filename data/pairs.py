"""Pairs for supervised contrastive training: a query, what answers it, and what does not."""

import json
from collections.abc import Sequence
from pathlib import Path

PAIRS = Path(__file__).parent / "pairs" / "wikipedia.jsonl"


def read_pairs(
    paths: Sequence[str | Path], instructions: Sequence[str | None] = (None,)
) -> list[list[str]]:
    """Datasets of pairs, one a file, each pair as a line of JSON with all of its fields.

    A file holds JSON lines with `query`, `positive`, and optionally `negative` (a string or a list
    of them) and `instruction`: the layout of the public E5 data as the Echo embeddings' authors
    released it (Springer et al. 2024), a folder of such files, of which all are taken. A pair
    without an instruction has that of its file: one of `instructions` for each path, or one for
    all. Raises FileNotFoundError, or ValueError naming file and line.
    """
    if len(instructions) not in (1, len(paths)):
        what = f"{len(instructions)} instructions for {len(paths)} paths of pairs"
        raise ValueError(f"{what}: give one for each, or one for all")
    datasets = []
    for i, path in enumerate(map(Path, paths)):
        instruction = instructions[i % len(instructions)]
        files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not files:
            raise FileNotFoundError(f"{path}: no .jsonl file in it")
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(f"{file}: no such file of pairs")
            with file.open("rb") as lines:
                pairs = [
                    as_pair(line, f"{file}, line {number}", instruction)
                    for number, line in enumerate(lines, start=1)
                    if line.strip()
                ]
            if len(pairs) < 2:
                raise ValueError(f"{file}: fewer than two pairs, there is nothing to contrast")
            datasets.append(pairs)
    return datasets


def as_pair(line: bytes, where: str, instruction: str | None) -> str:
    try:
        raw = json.loads(line.decode("utf-8-sig"))
        negatives = raw.get("negative") or []
        if not isinstance(negatives, (str, list)):
            raise TypeError
        pair = {
            "query": raw["query"],
            "positive": raw["positive"],
            "negatives": [negatives] if isinstance(negatives, str) else negatives,
            "instruction": raw.get("instruction") or instruction or "",
        }
        texts = [pair["query"], pair["positive"], pair["instruction"], *pair["negatives"]]
        for text in texts:
            text.encode("utf-8")  # half a surrogate pair is no text
    except UnicodeDecodeError:
        raise ValueError(f"{where}: not UTF-8") from None
    except UnicodeEncodeError:
        raise ValueError(f"{where}: half a surrogate pair") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        what = "expected an object with strings: query, positive, perhaps negative, instruction"
        raise ValueError(f"{where}: {what}") from None
    return json.dumps(pair)
