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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    seconds = 60 * parser.parse_args().minutes
    draw, encoder = random.Random(0), LLM2Vec.from_pretrained(TINY)
    texts = draw.sample(read_documents(WIKIPEDIA), 500)
    alone = np.concatenate([encoder.encode([text]) for text in texts])
    start, minutes, worst, early = time.monotonic(), 0, 0.0, 0.0
    while (passed := time.monotonic() - start) < seconds:
        chosen = draw.sample(range(len(texts)), draw.randrange(1, 200))
        vectors = encoder.encode([texts[i] for i in chosen], max_tokens=draw.randrange(64, 16384))
        worst = max(worst, float(np.abs(vectors - alone[chosen]).max()))
        now = int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20  # MiB, on Linux
        early = max(early, now) if not early or passed < seconds / 10 else early
        if passed // 60 > minutes:
            minutes = passed // 60
            print(f"{minutes:.0f} min: {now:.0f} MiB, {worst:.1e}", flush=True)
    flat, equal = now < 1.05 * early + 50, worst <= 1e-5
    print(f"memory {early:.0f} MiB early, {now:.0f} MiB late: {flat=}; {worst:.1e}: {equal=}")
    sys.exit(not (flat and equal))


if __name__ == "__main__":
    main()
