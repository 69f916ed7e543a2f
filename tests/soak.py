"""Half an hour of encoding: vectors stay equal, memory stays flat.

    python tests/soak.py --minutes 30

Encodes random slices of the bundled corpus in random order under changing token budgets, and
holds each vector against the one that its text had alone. Once a minute it prints what it has done
and the process's memory. It fails if a vector differs by more than 1e-5 (float32), or if memory at
the end is more than 5% and 50 MiB above its most in the first tenth of the time.
"""

import argparse
import random
import sys
import time
from pathlib import Path

import checkout  # noqa: F401
import numpy as np

from llm2vec import LLM2Vec
from llm2vec_data.checkpoints import TINY
from llm2vec_data.corpus import WIKIPEDIA, read_documents


def resident() -> float:
    """MiB of memory that the process holds now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    args = parser.parse_args()
    draw = random.Random(0)
    encoder = LLM2Vec.from_pretrained(TINY)
    texts = draw.sample(read_documents(WIKIPEDIA), 500)
    alone = np.concatenate([encoder.encode([text]) for text in texts])
    start = said = time.monotonic()
    rounds, worst, early, now = 0, 0.0, 0.0, resident()
    while time.monotonic() - start < 60 * args.minutes:
        chosen = draw.sample(range(len(texts)), draw.randrange(1, 200))
        vectors = encoder.encode([texts[i] for i in chosen], max_tokens=draw.randrange(64, 16384))
        worst = max(worst, float(np.abs(vectors - alone[chosen]).max()))
        rounds, now = rounds + 1, resident()
        if rounds == 1 or time.monotonic() - start < 6 * args.minutes:
            early = max(early, now)
        if time.monotonic() - said > 60:
            said = time.monotonic()
            minutes = (said - start) / 60
            print(f"{minutes:5.1f} min  {rounds} rounds  {now:.0f} MiB  {worst:.1e}", flush=True)
    flat, equal = now < 1.05 * early + 50, worst <= 1e-5
    print(f"{rounds} rounds; memory {early:.0f} MiB early, {now:.0f} MiB late: {flat=}")
    print(f"largest difference of a vector from the one of its text alone {worst:.1e}: {equal=}")
    sys.exit(0 if flat and equal else 1)


if __name__ == "__main__":
    main()
