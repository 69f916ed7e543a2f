# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "transformers==5.23.*", "sentencepiece",
#     "pytest", "torch", "numpy", "safetensors", "tokenizers", "pip", "cmake",
# ]
# ///
"""Exported folders, taken to llama.cpp, run live.

    uv run tests/clients.py [MODEL ...]     (or python, with the packages above)

The bundled model and each MODEL, a folder of SmolLM2's kind, become encoders with the template
`endoftext` whose vectors are the mean of all states, that of BOS included: what every server can
compute. llama.cpp's converter and its llama-embedding, in float32, get the same texts. One line a
model, with the lowest cosine of any text's two vectors; exit status 1 if one is below 0.9999.

llama.cpp's source comes out of the package llama-cpp-python on PyPI. It is built once, in
runs/llama.cpp, by cmake and a C++ compiler: ten minutes of a processor.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from helpers import ROOT, TINY, finish, report

from llm2vec import LLM2Vec
from llm2vec_data.benchmarks import STSB_TEST, read_sts
from llm2vec_data.corpus import WIKIPEDIA, read_documents

LLAMA = ROOT / "runs" / "llama.cpp"
PACKAGE = "llama-cpp-python==0.3.36"
# Whitespace, numbers, scripts, and signs of several bytes: where tokenizers may disagree.
ODD = [
    "  two spaces  in   front, \tand a tab ",
    "1,234.5 or 007",
    "It's, I'M, we'Ll",
    "Привет, мир",
]
ODD += [
    "«Été» — 100 €",
    "日本語の文章",
    "🦙🦙 and 👩‍👩‍👧",
    "def f(x):return x**2#!?",
    "ALLCAPS camelCase",
    ".",
]


def some_texts() -> list[str]:
    """Sixty: odd ones, sentences, and openings of articles."""
    articles = [" ".join(text.split())[:600] for text in read_documents(WIKIPEDIA)[:20]]
    return ODD + list(dict.fromkeys(read_sts(STSB_TEST)[1]))[:30] + articles


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
            get = ("pip", "download", "-q", "--no-deps", "--no-binary", "llama-cpp-python")
            run(sys.executable, "-m", *get, "-d", scratch, PACKAGE)
            [package] = Path(scratch).glob("*.tar.gz")
            with tarfile.open(package) as tar:
                tar.extractall(scratch, [m for m in tar if "/vendor/llama.cpp/" in m.name])
            [inside] = Path(scratch).glob("*/vendor/llama.cpp")
            shutil.copytree(inside, source)
    if not program.exists():
        print("building llama.cpp", file=sys.stderr)
        off = ("LLAMA_BUILD_SERVER", "LLAMA_BUILD_TOOLS", "LLAMA_BUILD_TESTS", "LLAMA_BUILD_APP")
        flags = [f"-D{part}=OFF" for part in (*off, "LLAMA_OPENSSL", "BUILD_SHARED_LIBS")]
        run("cmake", "-S", source, "-B", LLAMA / "build", "-DCMAKE_BUILD_TYPE=Release", *flags)
        run("cmake", "--build", LLAMA / "build", "--target", "llama-embedding", "-j", "2")
    return source, program


def in_llama_cpp(folder: Path) -> np.ndarray:
    """Vectors of the texts, at unit length."""
    (source, program), gguf, texts = llama_cpp(), folder / "model.gguf", folder / "texts.txt"
    arguments = (folder, "--outtype", "f32", "--outfile", gguf)
    run(sys.executable, "-c", CONVERT, *arguments, cwd=source)
    texts.write_text("\n".join(some_texts()), encoding="utf-8")
    printed = run(program, "-m", gguf, "-f", texts, *HOW)
    data = json.loads(printed[printed.index("{") : printed.rindex("}") + 1])["data"]
    vectors = np.array([row["embedding"] for row in data])
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL", help="like SmolLM2")
    for source in (TINY, *parser.parse_args().models):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "exported"
            model = LLM2Vec.from_pretrained(source, template="endoftext", include_prompt=True)
            model.save(folder)  # BOS is averaged, too
            ours = model.encode(some_texts(), normalize=True)
            cosine = (ours * in_llama_cpp(folder)).sum(1).min()
            report(f"llama.cpp, {source.name}, cosine", cosine, cosine >= 0.9999)
    finish()
