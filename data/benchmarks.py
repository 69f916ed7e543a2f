"""Scores of an encoder: semantic textual similarity, alignment and uniformity, masked tokens."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from llm2vec import LLM2Vec, mask_tokens

STSB_DEV = Path(__file__).parent / "sts" / "stsb-dev.tsv"
STSB_TEST = Path(__file__).parent / "sts" / "stsb-test.tsv"


def read_sts(path: str | Path) -> tuple[np.ndarray, list[str], list[str]]:
    """Gold scores and the two sides of a file of `score<TAB>sentence<TAB>sentence` lines.

    Raises FileNotFoundError, or ValueError naming the file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such benchmark file")
    gold, left, right = [], [], []
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8") from None
    for number, line in enumerate(lines, start=1):
        fields = line.split("\t")
        try:
            score, a, b = float(fields[0]), fields[1], fields[2]
        except (ValueError, IndexError):
            what = f"expected score<TAB>sentence<TAB>sentence, got {line!r:.60}"
            raise ValueError(f"{path}, line {number}: {what}") from None
        gold.append(score)
        left.append(a)
        right.append(b)
    if len(gold) < 2:
        raise ValueError(f"{path}: fewer than two pairs")
    return np.array(gold), left, right


def ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks from 1; equal values share the mean of the ranks that they take up."""
    values = np.asarray(values)
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[place]


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rho: Pearson's correlation of the ranks. NaN if either side is constant."""
    x, y = ranks(a), ranks(b)
    x, y = x - x.mean(), y - y.mean()
    norm = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / norm) if norm else float("nan")


def sts(encoder: LLM2Vec, path: str | Path = STSB_TEST) -> dict[str, float]:
    """Score an encoder on one file of sentence pairs.

    Returns `spearman` of cosine against gold; `alignment`, the mean squared distance of pairs with
    a gold score of 4 or more; and `uniformity`, the log of the mean of exp(-2 squared distance)
    over all pairs of sentences; both on unit vectors, lower is better (Wang & Isola 2020,
    arXiv 2005.10242; on STS-B as in the SimCSE paper).
    """
    gold, left, right = read_sts(path)
    unit = encoder.encode([*left, *right]).astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True).clip(1e-12)
    a, b = unit[: len(left)], unit[len(left) :]
    close = gold >= 4
    _, first = np.unique(np.array([*left, *right]), return_index=True)
    cosine = unit[first] @ unit[first].T
    pairs = cosine[np.triu_indices(len(first), 1)]
    return {
        "spearman": spearman((a * b).sum(1), gold),
        "alignment": float(((a - b) ** 2).sum(1)[close].mean()) if close.any() else float("nan"),
        "uniformity": float(np.log(np.exp(-4 + 4 * pairs).mean())),
    }


@torch.inference_mode()
def masked_accuracy(
    encoder: LLM2Vec, blocks: torch.Tensor, mask_id: int, rate: float = 0.2, seed: int = 0
) -> float:
    """Share of hidden tokens that the model names, reading each off the state in front of it.

    blocks: (N, T) token ids. A share `rate` of them, the same in every call, becomes mask_id.
    """
    decoder = encoder.decoder.eval()
    generator = torch.Generator().manual_seed(seed)
    V = decoder.config.vocab_size
    masked, chosen = mask_tokens(blocks, mask_id, V, rate, (1.0, 0.0), generator=generator)
    right, device = 0, decoder.embed_tokens.weight.device
    for ids, answer, target in zip(
        masked.split(16), blocks.split(16), chosen[:, 1:].split(16), strict=True
    ):
        hidden = decoder(ids.to(device))[:, :-1][target.to(device)]
        right += int((decoder.logits(hidden).argmax(-1).cpu() == answer[:, 1:][target]).sum())
    return right / int(chosen.sum())
