"""Make pairs/wikipedia.jsonl from wikipedia.jsonl: `python data/make_pairs.py`.

The query is an article's short description, the positive the first two sentences of its
introduction, the negative those of another article of the same topic. Held-out articles are
not used, because they score retrieval; nor is a description that two articles share.
"""

import json
import random
from collections import Counter

from llm2vec_data.benchmarks import read_articles
from llm2vec_data.corpus import WIKIPEDIA, sentences, split_documents
from llm2vec_data.pairs import PAIRS


def make_pairs(count: int = 3000, seed: int = 0) -> list[dict[str, str]]:
    records = read_articles(WIKIPEDIA)
    training = set(split_documents([record["text"] for record in records])[0])
    counts = Counter(record["description"].lower() for record in records)
    by_topic: dict[str, list[tuple[str, str]]] = {}
    for record in records:
        if record["text"] in training and record["topic"] != "Uncategorized":
            opening = " ".join(sentences(record["text"])[:2])
            by_topic.setdefault(record["topic"], []).append((record["description"], opening))
    draw, pairs = random.Random(seed), []
    for articles in by_topic.values():
        for i, (description, opening) in enumerate(articles):
            other = draw.randrange(len(articles) - 1)
            negative = articles[other + (other >= i)][1]
            if counts[description.lower()] == 1:
                pairs.append({"query": description, "positive": opening, "negative": negative})
    draw.shuffle(pairs)
    return pairs[:count]


if __name__ == "__main__":
    lines = [json.dumps(pair, ensure_ascii=False) for pair in make_pairs()]
    PAIRS.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{PAIRS}: {len(lines)} pairs, {PAIRS.stat().st_size / 1e6:.1f} MB")
