"""GGUF files become checkpoint folders; numbers of the gguf package.

tests/golden/make_gguf.py made gguf.gguf and gguf.npz with that package.
"""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from llm2vec import Decoder
from llm2vec_data.gguf import dequantise, gguf_to_checkpoint, read_gguf

GOLDEN = Path(__file__).parent / "golden"


def test_tensors_equal_the_gguf_package_to_the_last_bit():
    data = (GOLDEN / "gguf.gguf").read_bytes()
    _, tensors = read_gguf(data)
    expected = np.load(GOLDEN / "gguf.npz")
    assert set(tensors) == set(expected) and len(expected) == 6
    for name, place in tensors.items():
        ours = dequantise(data, *place)
        assert ours.dtype == np.float32 and ours.shape == expected[name].shape
        assert ours.tobytes() == expected[name].tobytes(), name


def test_fields_of_every_type():
    fields, _ = read_gguf((GOLDEN / "gguf.gguf").read_bytes())
    assert fields == {
        "general.architecture": "llama",
        "general.alignment": 64,
        **{f"test.uint{bits}": 2**bits - 1 for bits in (8, 16, 32, 64)},
        **{f"test.int{bits}": -(2 ** (bits - 1)) for bits in (8, 16, 32, 64)},
        "test.float32": float(np.float32(0.1)),
        "test.float64": 0.1,
        "test.bool": True,
        "test.string": "Grüße 🙂",
        "test.strings": ["a", "", "Ġthe"],
        "test.integers": [3, -1, 2],
        "test.nested": [[1, 2], [3]],
    }


def gguf_file(fields: dict, tensors: dict[str, np.ndarray]) -> bytes:
    """A GGUF file of 32-bit integers, floats, strings, lists of these, and F32 tensors."""

    def string(text):
        return struct.pack("<Q", len(text.encode())) + text.encode()

    def typed(value):
        if isinstance(value, list):
            item = typed(value[0])[0]
            return 9, struct.pack("<IQ", item, len(value)) + b"".join(typed(v)[1] for v in value)
        if isinstance(value, str):
            return 8, string(value)
        code, letter = (4, "I") if isinstance(value, int) else (6, "f")
        return code, struct.pack("<" + letter, value)

    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields))
    for name, value in fields.items():
        code, data = typed(value)
        head += string(name) + struct.pack("<I", code) + data
    body = b""
    for name, x in tensors.items():
        shape = x.shape[::-1]
        head += string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        head += struct.pack("<IQ", 0, len(body))
        body += x.astype("<f4").tobytes() + bytes(-x.nbytes % 32)
    return head + bytes(-len(head) % 32) + body


STORED = [0, 4, 1, 5, 2, 6, 3, 7]  # where llama.cpp keeps the rows of a head of width 8
FIELDS = {
    "general.architecture": "llama",
    "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1,
    "llama.embedding_length": 16,
    "llama.feed_forward_length": 4,
    "llama.block_count": 1,
    "llama.context_length": 32,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 1e5,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": ["<|end|>", "a", "b", "ab"],
    "tokenizer.ggml.token_type": [3, 1, 1, 1],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 0,
}


def small_llama() -> dict[str, np.ndarray]:
    """A layer as llama.cpp stores it. Row r of the q and k that it was made from is 16 times r."""
    q = np.repeat(np.arange(16)[:, None], 16, axis=1)
    layer = {
        "attn_norm": np.ones(16),
        "attn_q": q[STORED + [8 + row for row in STORED]],  # two heads
        "attn_k": q[STORED],  # one
        "attn_v": q[:8],
        "attn_output": np.ones((16, 16)),
        "ffn_norm": np.ones(16),
        "ffn_gate": np.ones((4, 16)),
        "ffn_up": np.ones((4, 16)),
        "ffn_down": np.ones((16, 4)),
    }
    tensors = {f"blk.0.{name}.weight": x for name, x in layer.items()}
    tensors |= {"token_embd.weight": np.ones((4, 16)), "output_norm.weight": np.ones(16)}
    return {name: x.astype(np.float32) for name, x in tensors.items()}


def test_a_checkpoint_is_made_whose_rows_of_q_and_k_are_put_back(tmp_path):
    (tmp_path / "x.gguf").write_bytes(gguf_file(FIELDS, small_llama()))
    folder = tmp_path / "small"
    folder.mkdir()
    gguf_to_checkpoint(tmp_path / "x.gguf", folder)
    state = load_file(folder / "model.safetensors")
    for name, rows in (("q_proj", 16), ("k_proj", 8), ("v_proj", 8)):
        weight = state[f"model.layers.0.self_attn.{name}.weight"]
        assert weight.dtype == torch.bfloat16 and weight.shape == (rows, 16)
        assert weight[:, 0].tolist() == list(range(rows)), name
    config = json.loads((folder / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5  # the float32 of the file is 9.99999974e-06
    decoder = Decoder.from_pretrained(folder)
    assert decoder.config.rope_theta == 1e5 and decoder.config.tie_word_embeddings
    assert decoder(torch.tensor([[0, 1, 2]])).shape == (1, 3, 16)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode("abba<|end|>").ids == [3, 2, 1, 0]
    assert tokenizer.decode([3, 2, 1, 0]) == "abba"  # without what is special


def test_an_output_head_of_its_own_is_kept(tmp_path):
    head = np.full((4, 16), 7, np.float32)
    (tmp_path / "x.gguf").write_bytes(gguf_file(FIELDS, small_llama() | {"output.weight": head}))
    gguf_to_checkpoint(tmp_path / "x.gguf", tmp_path)
    assert Decoder.from_pretrained(tmp_path).lm_head.weight.eq(7).all()


def refused(file: Path, data: bytes) -> str:
    """What is wrong with a file that is named, and of which nothing is written."""
    file.write_bytes(data)
    with pytest.raises(ValueError) as error:
        gguf_to_checkpoint(file, file.parent)
    assert list(file.parent.iterdir()) == [file]
    said = str(error.value)
    assert said.startswith(f"{file}: ") and "\n" not in said
    return said


def test_a_file_that_ends_early_is_named(tmp_path):
    data = gguf_file(FIELDS, small_llama())
    for size in (0, 3, 20, *range(30, len(data) - 32, 97)):  # the last 32 may be padding
        refused(tmp_path / "x.gguf", data[:size])
    assert "not a GGUF file" in refused(tmp_path / "x.gguf", b"PK" + data[2:])


@pytest.mark.parametrize(
    "name, value",
    [
        ("general.architecture", "qwen2"),
        ("llama.rope.scaling.type", "yarn"),
        ("tokenizer.ggml.model", "llama"),
        ("tokenizer.ggml.pre", "llama-bpe"),
    ],
)
def test_a_model_that_would_come_out_wrong_is_refused(tmp_path, name, value):
    said = refused(tmp_path / "x.gguf", gguf_file(FIELDS | {name: value}, small_llama()))
    assert f"{name} is {value}, expected" in said


def test_what_is_missing_or_unknown_is_named(tmp_path):
    file, fields = tmp_path / "x.gguf", dict(FIELDS)
    del fields["llama.block_count"]
    assert "llama.block_count" in refused(file, gguf_file(fields, small_llama()))
    for name in ("rope_freqs.weight", "blk.0.attn_v.bias"):
        tensors = small_llama() | {name: np.ones(8, np.float32)}
        assert f"tensor {name} has no place" in refused(file, gguf_file(FIELDS, tensors))
    with pytest.raises(ValueError, match="a tensor of type 12, expected 0, 3 or 8"):
        dequantise(b"", 12, (32,), 0)
