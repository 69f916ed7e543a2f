"""Pairs for supervised contrastive training: a query, what answers it, and what does not."""

import json
from collections.abc import Sequence
from pathlib import Path

from llm2vec_data.disk import lines_of, reading

PAIRS = Path(__file__).parent / "pairs" / "wikipedia.jsonl"


def read_pairs(
    paths: Sequence[str | Path], instructions: Sequence[str | None] = (None,)
) -> list[list[dict]]:
    """Datasets, one a file, of pairs: dicts with the fields of a line, and what they leave out.

    A file holds JSON lines with `query`, `positive`, and optionally `negative` (a string or a list
    of them) and `instruction`: the layout of the public E5 data as the Echo embeddings' authors
    released it (Springer et al. 2024), a folder of such files, of which all are taken. Symmetric
    data (paraphrases, entailment) has an `answer_instruction` too, for positive and negatives. A
    pair without an instruction has that of its file: one of `instructions` for each path, or one
    for all. Raises FileNotFoundError, or ValueError naming file and line.
    """
    if len(instructions) not in (1, len(paths)):
        what = f"{len(instructions)} instructions for {len(paths)} paths of pairs"
        raise ValueError(f"{what}: give one for each, or one for all")
    datasets = []
    for i, path in enumerate(map(Path, paths)):
        instruction = instructions[i % len(instructions)]
        files = sorted(path.glob("*.jsonl*")) if path.is_dir() else [path]
        if not files:
            raise FileNotFoundError(f"{path}: no .jsonl file in it")
        for file in files:
            pairs = [
                as_pair(line, f"{file}, line {number}", instruction)
                for number, line in enumerate(lines_of(file), start=1)
                if line.strip()
            ]
            if len(pairs) < 2:
                raise ValueError(f"{file}: fewer than two pairs, there is nothing to contrast")
            datasets.append(pairs)
    return datasets


def as_pair(line: bytes, where: str, instruction: str | None) -> dict:
    with reading(where):
        raw = json.loads(line.decode("utf-8-sig"))
        if not isinstance(raw, dict):
            raise ValueError("expected a JSON object")
        negatives = raw.get("negative") or []
        pair = {
            "query": raw["query"],
            "positive": raw["positive"],
            "negatives": negatives if isinstance(negatives, list) else [negatives],
            "instruction": raw.get("instruction") or instruction or "",
        }
        if raw.get("answer_instruction"):
            pair["answer_instruction"] = raw["answer_instruction"]
        texts = [*pair["negatives"], *(v for k, v in pair.items() if k != "negatives")]
        if not all(isinstance(text, str) for text in texts):
            what = "query, positive, perhaps negative, instruction and answer_instruction"
            raise ValueError(f"expected an object with strings: {what}")
        "".join(texts).encode()  # half a surrogate pair is no text
        return pair
