"""A GGUF file of SmolLM2 becomes a Hugging Face checkpoint folder.

A GGUF file is a header of typed key-value pairs, a table of tensors, and the tensors' bytes:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. It holds the tokenizer too.
"""

import io
import json
import math
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors.torch import save
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from llm2vec_data.disk import reading

SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # in struct's letters
STRING, ARRAY = 8, 9  # types of fields
F32, Q4_1, Q8_0 = 0, 3, 8  # types of tensors
BLOCKS = {  # a quantised block stores 32 numbers
    F32: "<f4",
    Q4_1: [("scale", "<f2"), ("minimum", "<f2"), ("q", "u1", 16)],
    Q8_0: [("scale", "<f2"), ("q", "i1", 32)],
}
SPECIAL = 3  # a type of token
NAMES = {  # llama.cpp's names of modules, and those in transformers' LlamaForCausalLM
    "token_embd": "model.embed_tokens",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "output_norm": "model.norm",
    "output": "lm_head",
}


def gguf_to_checkpoint(file: Path, folder: Path) -> None:
    """Write config.json, tokenizer.json and model.safetensors (bfloat16) of `file` into `folder`.

    `folder` must exist. `file` must hold a Llama without rope scaling, with SmolLM2's tokenizer.
    Raises ValueError, which names `file`, if it does not, or can't be read.
    """
    with reading(file):
        data = file.read_bytes()
        fields, tensors = read_gguf(data)
        config = llama_config(fields, tied="output.weight" not in tensors)
        heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
        state = {}
        for name, place in tensors.items():
            weight = torch.from_numpy(dequantise(data, *place).copy())
            *layer, module = name.removesuffix(".weight").split(".")  # blk.0.attn_q, output_norm
            if module not in NAMES:
                raise ValueError(f"tensor {name} has no place in this model")
            if module in heads:
                # RoPE rotates pairs of rows. Hugging Face pairs row i of a head with row i + D/2;
                # llama.cpp pairs neighbours: it stores the rows of the two halves in turn.
                pairs = weight.unflatten(0, (heads[module], -1, 2))  # (heads, D/2, 2, d)
                weight = pairs.transpose(1, 2).flatten(0, 2)
            prefix = f"model.layers.{layer[1]}." if layer else ""
            state[f"{prefix}{NAMES[module]}.weight"] = weight.bfloat16().contiguous()
        tokenizer = byte_level_bpe(fields)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    (folder / "model.safetensors").write_bytes(save(state, metadata={"format": "pt"}))


def read_gguf(data: bytes) -> tuple[dict[str, Any], dict[str, tuple]]:
    """The fields of a GGUF file, and where its tensors are: type, shape and offset in `data`."""
    stream = io.BytesIO(data)
    if stream.read(4) != b"GGUF" or number(stream, "I") not in (2, 3):
        raise ValueError("not a GGUF file of version 2 or 3")
    n_tensors, n_fields = number(stream, "Q"), number(stream, "Q")
    fields = {value(stream, STRING): value(stream, number(stream, "I")) for _ in range(n_fields)}
    table = {}
    for _ in range(n_tensors):
        name, n_axes = value(stream, STRING), number(stream, "I")
        shape = tuple(number(stream, "Q") for _ in range(n_axes))[::-1]  # ggml: fastest axis first
        table[name] = number(stream, "I"), shape, number(stream, "Q")
    alignment = fields.get("general.alignment", 32)
    start = -(-stream.tell() // alignment) * alignment
    return fields, {name: (kind, shape, start + at) for name, (kind, shape, at) in table.items()}


def number(stream: BinaryIO, code: str) -> Any:
    return struct.unpack("<" + code, stream.read(struct.calcsize("<" + code)))[0]


def value(stream: BinaryIO, kind: int) -> Any:
    if kind == STRING:
        return stream.read(number(stream, "Q")).decode()
    if kind == ARRAY:
        item, length = number(stream, "I"), number(stream, "Q")
        return [value(stream, item) for _ in range(length)]
    return number(stream, SCALARS[kind])


def dequantise(data: bytes, kind: int, shape: tuple[int, ...], offset: int) -> np.ndarray:
    """One tensor of type F32, Q4_1 or Q8_0 in float32, with the same bits as the gguf package.

    Q8_0: x = scale * q, with q of 8 bits. Q4_1: x = scale * q + minimum, with q of 4 bits; the low
    halves of a block's 16 bytes are its first 16 numbers.
    """
    if kind not in BLOCKS:
        raise ValueError(f"a tensor of type {kind}, expected {F32}, {Q4_1} or {Q8_0}")
    count = math.prod(shape) // (1 if kind == F32 else 32)
    block = np.frombuffer(data, BLOCKS[kind], count, offset)
    if kind == F32:
        return block.reshape(shape)
    q, scale = block["q"], block["scale"].astype(np.float32)[:, None]
    if kind == Q8_0:
        return (q * scale).reshape(shape)
    q, minimum = np.hstack([q & 15, q >> 4]), block["minimum"].astype(np.float32)[:, None]
    return (q * scale + minimum).reshape(shape)


def llama_config(fields: dict[str, Any], tied: bool) -> dict[str, Any]:
    """Hugging Face's config.json. Raises ValueError for a model that comes out wrong."""
    wanted = {"general.architecture": "llama", "llama.rope.scaling.type": "none"}
    wanted |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm"}
    for name, expected in wanted.items():
        if fields.get(name, "none") != expected:
            raise ValueError(f"{name} is {fields.get(name, 'none')}, expected {expected}")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "hidden_act": "silu",
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": fields["llama.rope.freq_base"],
        "tie_word_embeddings": tied,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "torch_dtype": "bfloat16",
    }


def byte_level_bpe(fields: dict[str, Any]) -> Tokenizer:
    """SmolLM2's tokenizer: digits one by one, GPT-2's split and byte alphabet, then BPE merges."""
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, split])
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == SPECIAL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return tokenizer
