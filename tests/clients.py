# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "transformers==5.23.*", "sentence-transformers[train]==6.2.*", "mteb==2.*", "sentencepiece",
#     "pytest", "torch", "numpy", "safetensors", "tokenizers", "pip", "cmake",
# ]
# ///
"""Exported folders, taken to the clients that read them, run live.

    uv run tests/clients.py [MODEL ...]     (or python, with the packages above)

The bundled model and each MODEL, a folder of SmolLM2's kind, become encoders with the template
`endoftext` whose vectors are the mean of all states, that of BOS included: what every server can
compute. One line a check, with the lowest cosine to the vectors that this project computes, or with
the largest difference of what is no vector; exit status 1 if any is worse than it may be.

    sentence-transformers    vectors; three steps of training there, and back
    mteb                     STS-B, of the files that are bundled
    llama.cpp                its converter and its llama-embedding, in float32

llama.cpp's source comes out of the package llama-cpp-python on PyPI. It is built once, in
runs/llama.cpp, by cmake and a C++ compiler: ten minutes of a processor.
"""

import argparse
import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
import mteb
import numpy as np
from datasets import Dataset
from helpers import ROOT, finish, report
from mteb.abstasks import AbsTaskSTS
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.training_args import (
    SentenceTransformerTrainingArguments,
)
from transformers.utils.logging import disable_progress_bar

from llm2vec import LLM2Vec
from llm2vec_data.benchmarks import STSB_DEV, STSB_TEST, read_sts, sts
from llm2vec_data.checkpoints import TINY
from llm2vec_data.corpus import WIKIPEDIA, read_documents

LLAMA = ROOT / "runs" / "llama.cpp"
PACKAGE = "llama-cpp-python==0.3.36"
# Whitespace, numbers, scripts, and signs of several bytes: where tokenizers may disagree.
ODD = [
    "  two spaces  in   front, \tand a tab ",
    "1,234.5 or 007",
    "It's, I'M, we'Ll",
    "«Été» — 100 €",
    "Привет, мир",
    "日本語の文章",
    "🦙🦙 and 👩‍👩‍👧",
    "def f(x):return x**2#!?",
    "ALLCAPS camelCase",
    ".",
]


def same(name: str, ours: np.ndarray, theirs: np.ndarray, lowest: float = 0.9999) -> None:
    """Check the lowest cosine of any text's two vectors."""
    ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
    ours, theirs = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (ours, theirs))
    cosine = (ours * theirs).sum(-1).min()
    report(f"{name}, cosine", cosine, cosine >= lowest)


def some_texts() -> list[str]:
    """Sixty: odd ones, sentences, and openings of articles."""
    sentences = list(dict.fromkeys(read_sts(STSB_TEST)[1]))
    articles = [" ".join(text.split())[:600] for text in read_documents(WIKIPEDIA)[:20]]
    return ODD + sentences[: 60 - len(ODD) - len(articles)] + articles


# --- sentence-transformers and MTEB --------------------------------------------------------------


class BundledSTS(AbsTaskSTS):
    """STS-B as mteb has it, but of the bundled file."""

    metadata = mteb.get_task("STSBenchmark").metadata.model_copy(update={"name": "BundledSTS"})
    min_score, max_score = 0, 5

    def load_data(self, **_) -> None:
        scores, first, second = read_sts(STSB_TEST)
        columns = {"sentence1": first, "sentence2": second, "score": scores.tolist()}
        self.dataset, self.data_loaded = {"test": Dataset.from_dict(columns)}, True


def scored_by_mteb(name: str, model: LLM2Vec, folder: Path) -> None:
    theirs = SentenceTransformer(str(folder), device="cpu").float()
    result = mteb.evaluate(theirs, BundledSTS(), cache=None, show_progress_bar=False)
    found, expected = result.task_results[0].get_score(), list(sts(model).values())[0]
    report(f"mteb, {name}, Spearman of STS-B", found, abs(found - expected) < 1e-4)


def trained_there(name: str, folder: Path, scratch: Path) -> None:
    """Three steps by sentence-transformers' trainer; what it saves gives the same vectors here."""
    theirs = SentenceTransformer(str(folder), device="cpu").float()
    before = theirs.encode(some_texts())
    _, first, second = read_sts(STSB_DEV)
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    arguments = SentenceTransformerTrainingArguments(
        str(scratch / "trainer"), max_steps=3, learning_rate=1e-4, use_cpu=True, **quiet
    )
    pairs = Dataset.from_dict({"anchor": first[:24], "positive": second[:24]})
    loss = MultipleNegativesRankingLoss(theirs)
    with contextlib.redirect_stdout(sys.stderr):
        SentenceTransformerTrainer(theirs, arguments, pairs, loss=loss).train()
    theirs.save(str(scratch / "trained"))
    found = theirs.encode(some_texts())
    moved = np.abs(found - before).max()
    report(f"sentence-transformers, {name}, three steps move a vector", moved, moved > 1e-3)
    ours = LLM2Vec.from_pretrained(scratch / "trained").encode(some_texts())
    same(f"sentence-transformers, {name}, trained there, read here", ours, found)


# --- llama.cpp -----------------------------------------------------------------------------------

# Its converter knows a tokenizer by a hash of what it makes of a text, BOS of a template included,
# so this one has to be told. For a vocabulary of SmolLM2's size it writes that no BOS is added.
CONVERT = """
import runpy
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda *_: "smollm"
runpy.run_path("convert_hf_to_gguf.py", run_name="__main__")
"""
HOW = ["--pooling", "mean", "--override-kv", "tokenizer.ggml.add_bos_token=bool:true"]
# By default keys, values and attention are in half precision, to which SmolLM2's BOS is large.
HOW += ["-ctk", "f32", "-ctv", "f32", "-fa", "off", "-c", "2048", "--embd-output-format", "json"]


def run(*command, cwd: Path | None = None) -> str:
    """What a command prints; what it says of its work is shown if it fails."""
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stderr[-3000:]}")
    return done.stdout


def llama_cpp() -> tuple[Path, Path]:
    """llama.cpp's source and its program llama-embedding, built where it is not yet."""
    source, program = LLAMA / "source", LLAMA / "build" / "bin" / "llama-embedding"
    if not source.exists():
        with tempfile.TemporaryDirectory() as scratch:
            get = ("-m", "pip", "download", "-q", "--no-deps", "--no-binary", "llama-cpp-python")
            run(sys.executable, *get, "-d", scratch, PACKAGE)
            [package] = Path(scratch).glob("*.tar.gz")
            with tarfile.open(package) as tar:
                tar.extractall(scratch, [m for m in tar if "/vendor/llama.cpp/" in m.name])
            [inside] = Path(scratch).glob("*/vendor/llama.cpp")
            shutil.copytree(inside, source)
    if not program.exists():
        print("building llama.cpp", file=sys.stderr)
        off = ("SERVER", "TOOLS", "TESTS", "APP")
        flags = [f"-DLLAMA_BUILD_{part}=OFF" for part in off] + ["-DLLAMA_OPENSSL=OFF"]
        flags += ["-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=OFF"]
        run("cmake", "-S", source, "-B", LLAMA / "build", *flags)
        jobs = str(len(os.sched_getaffinity(0)) if sys.platform == "linux" else 2)
        run("cmake", "--build", LLAMA / "build", "--target", "llama-embedding", "-j", jobs)
    return source, program


def in_llama_cpp(name: str, model: LLM2Vec, folder: Path) -> None:
    source, program = llama_cpp()
    gguf, texts = folder / "model.gguf", folder / "texts.txt"
    arguments = (folder, "--outtype", "f32", "--outfile", gguf)
    run(sys.executable, "-c", CONVERT, *arguments, cwd=source)
    texts.write_text("\n".join(some_texts()), encoding="utf-8")
    printed = run(program, "-m", gguf, "-f", texts, *HOW)
    data = json.loads(printed[printed.index("{") : printed.rindex("}") + 1])["data"]
    theirs = np.array([row["embedding"] for row in data])
    same(f"llama.cpp, {name}", model.encode(some_texts()), theirs)


# --- All of it -----------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL", help="like SmolLM2")
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    disable_progress_bar()
    for source in (TINY, *parser.parse_args().models):
        with tempfile.TemporaryDirectory() as scratch:
            name, folder = source.name, Path(scratch) / "exported"
            model = LLM2Vec.from_pretrained(source, template="endoftext")
            model.include_prompt = True  # average BOS, too
            model.save(folder)
            again = LLM2Vec.from_pretrained(folder).encode(some_texts())
            same(f"here, {name}, saved and read again", model.encode(some_texts()), again, 1 - 1e-6)
            theirs = SentenceTransformer(str(folder), device="cpu").float().encode(some_texts())
            same(f"sentence-transformers, {name}", again, theirs, 1 - 1e-6)
            scored_by_mteb(name, model, folder)
            trained_there(name, folder, Path(scratch))
            in_llama_cpp(name, model, folder)
    finish()


if __name__ == "__main__":
    main()
