"""LLM2Vec in one file: a decoder-only language model becomes a text encoder.

The method (BehnamGhader et al. 2024, arXiv 2404.05961) has three steps. Read this file from the
top and you will have met all of them:

    Config             what config.json says of a Llama or Mistral checkpoint, or of a near relative
    attention_mask     who may look at whom; step 1 is its argument `is_causal`
    Decoder            RMSNorm, rotary positions, grouped-query attention, SwiGLU
    from_pretrained    safetensors into those modules, tensor by tensor
    tokenize           text to token ids, and which of them a text's vector averages
    pool               hidden states of a text to one vector
    mntp_loss          step 2: masked next-token prediction
    contrastive_loss   step 3: contrastive learning (SimCSE)
    LLM2Vec            all of it as an encoder: texts in, vectors out

The method ends there. What follows spares a GPU the padding, and turns an encoder into a folder
that other tools load, and into a command line. Steps 2 and 3 are run by train.py, on the adapters
of lora.py.

What is notable here: modules carry the names of Hugging Face checkpoints, so that loading needs no
table of names; every kind of attention is one boolean mask made by one function; there is no cache
of keys and values, because an encoder reads each text once.

Shapes: B batch, T tokens, d width, H heads, K key/value heads, D head width, V vocabulary, N texts.
"""

import argparse
import contextlib
import datetime
import itertools
import json
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

# --- Config ------------------------------------------------------------------------------------
# Field names are those of config.json. What this decoder can't compute is refused by name, never
# ignored: a checkpoint that loads is a checkpoint that gives the right numbers.


# The model types, and what transformers takes where their config.json is silent.
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 4096, "num_key_value_heads": 8},
    "qwen2": {"num_key_value_heads": 32},  # biases on q, k and v
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},  # a norm on every head of q and k
    # Layers without rotary positions.
    "smollm3": {"num_key_value_heads": 4, "rope_theta": 2e6, "tie_word_embeddings": True},
}
# The kinds of rotary scaling, and the numbers that each one needs.
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ROPE_SCALING = {"default": (), "linear": ("factor",), "llama3": LLAMA3}


@dataclass
class Config:
    """Shape and constants of a model, as transformers' config.json names them."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    model_type: str = "llama"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # {"rope_type": ...} and what ROPE_SCALING says it needs
    sliding_window: int | None = None
    no_rope_layers: list[int] | None = None  # 0 for each layer without rotary positions, else 1
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    is_causal: bool = True  # step 1 of LLM2Vec sets this to False
    attention_dropout: float = 0.0  # on the attention weights, in training only

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Config":
        """Read `folder`/config.json. Raises FileNotFoundError without one, ValueError by field."""
        why = "a Hugging Face checkpoint folder has one"
        file = inside(Path(folder), "config.json", why)
        raw = read_json(file)

        def expect(holds: bool, key: str, expected: str, value: object) -> None:
            if not holds:
                raise ValueError(f"{file}: {key} is {value!r}, expected {expected}")

        family = raw.get("model_type")
        known = isinstance(family, str) and family in FAMILIES
        expect(known, "model_type", " or ".join(FAMILIES), family)
        only = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
        for key, value in (only | {"use_sliding_window": False}).items():
            expect(raw.get(key, value) == value, key, repr(value), raw.get(key))
        # A key that is left out means transformers' default for the family; null means no window,
        # a key/value head for every head, and else what the fields above say.
        raw = FAMILIES[family] | raw
        given = {k: raw[k] for k in cls.__dataclass_fields__ if raw.get(k) is not None}
        if family != "mistral":
            given.pop("sliding_window", None)
        # Newer files hold in `rope_parameters` what used to be `rope_scaling` and `rope_theta`.
        rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        expect(isinstance(rope, dict), "rope_scaling", "an object", rope)
        rope = rope | {k: raw[k] for k in LLAMA3[3:] if k in raw}  # this one may stand outside
        kind = rope.get("rope_type", rope.get("type", "default"))
        known = isinstance(kind, str) and kind in ROPE_SCALING
        expect(known, "rope_type", " or ".join(ROPE_SCALING), kind)
        for key in ROPE_SCALING[kind]:
            value = rope.get(key)
            number = type(value) in (int, float) and 0 < value < 1e15
            expect(number, key, "a number above 0", value)
        given["rope_scaling"] = {k: rope[k] for k in ROPE_SCALING[kind]} | {"rope_type": kind}
        if "rope_theta" in rope:
            given["rope_theta"] = rope["rope_theta"]

        heads, width = given.get("num_attention_heads"), given.get("hidden_size")
        given.setdefault("num_key_value_heads", heads)
        if type(heads) is int and type(width) is int and heads > 0:
            given.setdefault("head_dim", width // heads)
        for key, field in cls.__dataclass_fields__.items():
            value = given.get(key, field.default)
            if field.type is int or key == "sliding_window" and value is not None:
                below = {"num_hidden_layers": 1000, "head_dim": 2**12}.get(key, 2**24)
                whole = type(value) is int and 0 < value < below
                shown = None if key not in given else value
                expect(whole, key, f"a positive whole number below {below}", shown)
            elif field.type is float:
                number = type(value) in (int, float) and 0 <= value < 1e15
                expect(number, key, "a number, 0 or more", value)
            elif field.type is bool:
                expect(type(value) is bool, key, "true or false", value)
        if family == "smollm3":
            layers, every = given["num_hidden_layers"], raw.get("no_rope_layer_interval", 4)
            expect(type(every) is int and every > 0, "no_rope_layer_interval", "1 or more", every)
            given.setdefault("no_rope_layers", [int((i + 1) % every > 0) for i in range(layers)])
            rotary = given["no_rope_layers"]
            whole = isinstance(rotary, list) and len(rotary) == layers
            expect(whole, "no_rope_layers", f"a list of {layers} numbers", rotary)
        else:
            given.pop("no_rope_layers", None)
        config = cls(**given)
        shared = config.num_attention_heads % config.num_key_value_heads == 0
        expect(shared, "num_attention_heads", "a multiple of num_key_value_heads", heads)
        expect(config.head_dim % 2 == 0, "head_dim", "an even number", config.head_dim)
        rows = max(config.vocab_size, config.intermediate_size, heads * config.head_dim)
        expect(rows * width < 2**40, "hidden_size", "matrices of fewer than 2^40 numbers", width)
        return config


def existing(file: Path, why: str) -> Path:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; {why}")
    return file


def inside(folder: Path, name: str, why: str) -> Path:
    """A file of a folder that may come from anywhere, so it must not be a link to elsewhere.

    The cache of the Hugging Face hub is known: its snapshots link to blobs of the same model.
    """
    file, home = existing(folder / name, why), folder.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not any(file.resolve().is_relative_to(place) for place in (home, blobs)):
        raise ValueError(f"{file}: a link out of its folder, to {file.resolve()}")
    return file


def read_json(file: Path) -> dict:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested without end
        raise ValueError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(raw).__name__}")
    return raw


# --- Attention mask ----------------------------------------------------------------------------
# The whole of step 1 (section 2.1 of the paper) is the argument `is_causal` below. A causal model
# lets token i see only tokens j <= i; an encoder wants every token to see the whole text. No weight
# changes; steps 2 and 3 teach the model to use what it can now see.


def attention_mask(segments: Tensor, is_causal: bool, window: int | None = None) -> Tensor | None:
    """Say which tokens may attend to which.

    Args:
        segments: (B, T) integers; 0 is padding, any other number names the text of a token.
            Several texts packed in a row have several numbers and do not see each other.
        is_causal: True for a language model, False for an encoder.
        window: sliding window (Mistral 7B, Jiang et al. 2023, section 2), as transformers counts
            it: i - j < window when causal, |i - j| <= window when not.

    Returns:
        (B, 1, T, T) booleans, True where query i may attend to key j (B is 1 when all rows are
        alike); None when nothing is masked. Padding attends to padding, so that no row is empty.
    """
    T = segments.shape[1]
    i = torch.arange(T, device=segments.device)[:, None]
    j = torch.arange(T, device=segments.device)[None, :]
    distance_limit = T if window is None else window
    one_text = bool((segments == segments[:, :1]).all())
    if one_text and T == 1 or one_text and not is_causal and distance_limit >= T - 1:
        return None
    if is_causal:
        near = (j <= i) & (i - j < distance_limit)
    else:
        near = (i - j).abs() <= distance_limit
    if one_text:
        return near[None, None]
    same_text = segments[:, :, None] == segments[:, None, :]
    return (same_text & near)[:, None]


# --- Decoder -----------------------------------------------------------------------------------
# Llama (Touvron et al. 2023) and Mistral are one architecture: a residual stream of width d, to
# which each layer adds attention, then a gated feed-forward network, each on a normalised copy.
# Matrices multiply in the weights' type, but the stream is float32: rounding it to bfloat16 at
# every layer costs more than all other roundings together.


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32, in the weight's type (Zhang & Sennrich 2019)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        return F.rms_norm(x.float(), weight.shape, weight.float(), self.eps).to(weight.dtype)


def rotary_table(config: Config, T: int, device: torch.device, dtype: torch.dtype):
    """Cosines and sines of the rotary position embedding (Su et al. 2021), (T, D) each.

    Pair m of a head turns by position * theta^(-2m/D), so that the product of a query and a key
    depends on their distance alone. Hence a text packed behind another, or shifted by padding,
    needs no positions of its own. `linear` stretches all wavelengths by `factor`; `llama3` (Llama
    3.1) only the long ones, with a smooth passage between, as in transformers' rope utilities.
    """
    D = config.head_dim
    frequency = 1 / config.rope_theta ** (torch.arange(0, D, 2, device=device).float() / D)
    scaling = config.rope_scaling or {"rope_type": "default"}
    if scaling["rope_type"] == "linear":
        frequency = frequency / scaling["factor"]
    elif scaling["rope_type"] == "llama3":
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 0 for long waves, 1 for short ones
        frequency = keep * frequency + (1 - keep) * frequency / scaling["factor"]
    angle = torch.outer(torch.arange(T, device=device).float(), frequency)
    angle = torch.cat([angle, angle], dim=-1)  # Hugging Face pairs dimension m with m + D/2
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of dimensions (m, m + D/2) of x, (B, heads, T, D), by its position's angle."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


# cuDNN's attention plans anew for each shape, for a third of a second, and batches differ in shape.
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for every head: (B, H, T, D), of k and v (B, K, T, D).

    On a GPU, and for long texts, by torch's kernel, which holds no T x T matrix (but on a CPU with
    dropout). For short texts on a CPU the formula as it stands is faster, several times so in the
    backward pass. The mask is that of `attention_mask`.
    """
    B, H, T, D = q.shape
    group = H // k.shape[1]  # query heads that share a key/value head
    if q.device.type != "cpu" or T > 128:
        # Repeating the heads costs little; not every kernel of every torch would do it by itself.
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        with sdpa_kernel(KERNELS):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    q = q.reshape(B, -1, group * T, D)  # rows of one key/value head: its queries, head by head
    scores = (q * D**-0.5) @ k.transpose(2, 3)
    if mask is not None:
        scores = scores.view(B, -1, group, T, T).masked_fill(~mask[:, None], float("-inf"))
    weights = F.dropout(scores.view(B, -1, group * T, T).softmax(dim=-1), dropout)
    return (weights @ v).view(B, H, T, D)


class Attention(nn.Module):
    """Grouped-query attention: H query heads share K key/value heads (Ainslie et al. 2023)."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.config = config
        d, D, bias = config.hidden_size, config.head_dim, config.model_type == "qwen2"
        self.q_proj = nn.Linear(d, config.num_attention_heads * D, bias=bias)
        self.k_proj = nn.Linear(d, config.num_key_value_heads * D, bias=bias)
        self.v_proj = nn.Linear(d, config.num_key_value_heads * D, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * D, d, bias=False)
        self.q_norm = self.k_norm = None
        if config.model_type == "qwen3":
            self.q_norm = RMSNorm(D, config.rms_norm_eps)
            self.k_norm = RMSNorm(D, config.rms_norm_eps)
        self.rotary = config.no_rope_layers is None or bool(config.no_rope_layers[layer])

    def forward(self, x: Tensor, mask: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, _ = x.shape
        D, c = self.config.head_dim, self.config
        q = self.q_proj(x).view(B, T, c.num_attention_heads, D).transpose(1, 2)  # (B, H, T, D)
        k = self.k_proj(x).view(B, T, c.num_key_value_heads, D).transpose(1, 2)  # (B, K, T, D)
        v = self.v_proj(x).view(B, T, c.num_key_value_heads, D).transpose(1, 2)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = attend(q, k, v, mask, c.attention_dropout if self.training else 0.0)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, config: Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One block of the decoder."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), mask, cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """A language model: token ids to hidden states, and hidden states to logits.

    `decoder.config.is_causal` decides the direction of attention, and nothing else does.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None  # tied to the embedding
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # Of so many layers, the first ones, training keeps the input alone and computes the rest
        # again in the backward pass: less memory for a third more time.
        self.recompute = 0

    def forward(self, input_ids: Tensor, segments: Tensor | None = None) -> Tensor:
        """Hidden states after the final norm, (B, T, d), of input_ids (B, T).

        segments (B, T): see `attention_mask`; None means that every row is one text, unpadded.
        """
        T = input_ids.shape[1]
        one_text = segments is None  # known without asking a GPU, which would have to be waited for
        segments = torch.ones(1, T) if one_text else segments
        mask = attention_mask(segments, self.config.is_causal, self.config.sliding_window)
        mask = None if mask is None else mask.to(input_ids.device)
        x = self.embed_tokens(input_ids)  # (B, T, d)
        cos, sin = rotary_table(self.config, T, x.device, x.dtype)
        x = x.float()
        for i, layer in enumerate(self.layers):
            if i < self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, mask, cos, sin, use_reentrant=False)
            else:
                x = layer(x, mask, cos, sin)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token, (..., V), of hidden states (..., d)."""
        if not self.can_predict:
            raise ValueError("this checkpoint has no lm_head.weight: it can encode, not predict")
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        return F.linear(hidden, head.weight)

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def least_tokens(self) -> int:
        """Tokens in a pass below which fewer would take as long.

        A GPU then waits for the next kernel to be launched, some hundred for each layer, not for
        arithmetic, of which each token brings as much as a layer has numbers.
        """
        if self.device.type == "cpu":
            return 256
        return 2**39 // sum(p.numel() for p in self.layers[0].parameters())

    @property
    def can_predict(self) -> bool:
        """False for a checkpoint of the inner model, which came without its output head."""
        return self.config.tie_word_embeddings or self.lm_head is not None

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> "Decoder":
        """Load a Hugging Face checkpoint folder: config.json and safetensors, whole or sharded.

        Names may have the prefix `model.` (a causal-LM checkpoint) or not (its inner model, which
        has no output head). Raises FileNotFoundError or ValueError, naming the file and tensor.
        """
        with torch.device("meta"):  # shapes only; memory comes with each tensor
            decoder = cls(Config.from_pretrained(folder))
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:  # safetensors would take the first GPU
            device = torch.device("cuda", torch.cuda.current_device())
        load_weights(decoder, Path(folder), dtype, device)
        return decoder.train(False)


# --- Weights -----------------------------------------------------------------------------------

# Types that are numbers by themselves; whole numbers and 8 bits mean a quantised checkpoint.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def load_weights(decoder: Decoder, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
    """Fill a decoder made on the meta device from safetensors, one tensor in memory at a time."""
    wanted = dict(decoder.named_parameters())
    known = set(wanted)
    size = sum(p.numel() for p in wanted.values()) * dtype.itemsize
    room = memory_of(device)
    if size > room:
        what = f"its weights take {size / 2**30:,.1f} GiB as {dtype}, {device} has"
        raise ValueError(f"{folder / 'config.json'}: {what} {room / 2**30:,.1f} GiB")
    inner = True  # no name starts with `model.`: a checkpoint of the inner model
    files, weight_map = _weight_files(folder)
    for file in files:
        try:
            with safe_open(file, framework="pt", device=str(device)) as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    inner = inner and not name.startswith("model.")
                    key = name.removeprefix("model.")
                    if key.endswith("rotary_emb.inv_freq") or (
                        key == "lm_head.weight" and decoder.config.tie_word_embeddings
                    ):
                        continue
                    if key not in wanted:
                        what = "is there twice" if key in known else "has no place in this model"
                        raise ValueError(f"{file}: tensor {name} {what}")
                    told = weight_map.get(name, file.name)
                    if told != file.name:
                        raise ValueError(f"{file}: tensor {name} is here, its index says {told}")
                    expected = list(wanted.pop(key).shape)
                    shape = tensors.get_slice(name).get_shape()
                    if shape != expected:
                        raise ValueError(f"{file}: tensor {name} is {shape}, expected {expected}")
                    module, _, leaf = key.rpartition(".")
                    weight = tensors.get_tensor(name)
                    if weight.dtype not in FLOATS:
                        raise ValueError(f"{file}: tensor {name} has type {weight.dtype}")
                    weight = weight.to(dtype)
                    if not weight.isfinite().all():
                        what = f"holds NaN or infinity as {dtype}"
                        raise ValueError(f"{file}: tensor {name} {what}")
                    weight = nn.Parameter(weight, requires_grad=False)
                    setattr(decoder.get_submodule(module), leaf, weight)
        except SafetensorError as error:
            raise ValueError(f"{file}: not a whole safetensors file: {error}") from None
        except RuntimeError as error:  # no memory to map the file, or to hold a tensor
            raise ValueError(f"{file}: can't be loaded: {error}") from None
    if inner and "lm_head.weight" in wanted:
        del wanted["lm_head.weight"]
        decoder.lm_head = None
    if wanted:
        name, more = next(iter(wanted)), len(wanted) - 1
        raise ValueError(
            f"{folder}: tensor {name} is missing" + (f", and {more} more" * (more > 0))
        )


def memory_of(device: torch.device) -> int:
    """Bytes of memory: all of the machine's; of a GPU, what is free or torch's own to reuse."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    if not hasattr(os, "sysconf"):  # Windows does not say
        return sys.maxsize
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it is one of the ways in which torch says that memory is short."""
    said = "can't allocate memory" in str(error) or "out of memory" in str(error)
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and said


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The files of a checkpoint, and which of them has which tensor, where an index says so."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        why = "neither it nor model.safetensors.index.json is there"
        return [inside(folder, "model.safetensors", why)], {}
    inside(folder, index.name, "the weights are read from it")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: no weight_map of tensor names to files")
    names = sorted(set(map(str, weight_map.values())))
    for name in names:
        if Path(name).name != name:  # a path could name any file of the machine
            raise ValueError(f"{index}: {name!r} is not the name of a file in this folder")
    return [inside(folder, name, f"{index.name} lists it") for name in names], weight_map


def compile_layers(decoder: Decoder) -> None:
    """Have torch.compile fuse what each layer does between its matrix products.

    Lengths are variables of the compiled code: batches differ in them. Dropout draws what it draws
    uncompiled, because torch.compile's own numbers could differ in the two passes of GradCache; a
    layer that is compiled too often is not compiled at all, hence the limit. How it rounds depends
    on the batch it is compiled at, so a run that was stopped does not go on to the same bits.
    """
    torch._dynamo.config.cache_size_limit = 64
    for layer in decoder.layers:
        layer.compile(dynamic=True, options={"fallback_random": True})


# --- Text to tokens ----------------------------------------------------------------------------
# tokenizer.json says itself whether a BOS token goes in front. A text's vector averages the text's
# own tokens: BOS and an instruction are attended to, but not averaged (section 3.2).


# What stands around a text: the markers that the authors' encoder writes for the instruct models
# that it was used with; or, for a tokenizer without BOS (SmolLM2, Qwen), the token that stood
# before each document in pre-training. A causal model parks attention that it has no use for on its
# first token (Xiao et al. 2023, arXiv 2309.17453), which should not be a word of the text.
TEMPLATES = {
    "endoftext": ("<|endoftext|>", ""),
    "mistral": ("[INST]", "[/INST]"),  # Mistral-Instruct, Llama-2-chat
    "llama-3": ("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
}


def load_tokenizer(folder: str | Path, template: str | None = None) -> Tokenizer:
    """The tokenizer of `folder`/tokenizer.json. Special tokens inside a text are plain text.

    With the name of a chat template, its markers stand around every text, however long; they become
    part of the tokenizer, and of what it saves.
    """
    file = inside(Path(folder), "tokenizer.json", "the tokenizer is read from it")
    try:
        tokenizer = Tokenizer.from_file(str(file))
        tokenizer.encode("a")  # some faults show only in use
    except BaseException as error:  # tokenizers raises plain Exception; or panics, in Rust
        if isinstance(error, KeyboardInterrupt):
            raise
        raise ValueError(f"{file}: not a tokenizer: {error}") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if template is not None:
        if template not in TEMPLATES:
            raise ValueError(f"template {template!r}: expected {' or '.join(TEMPLATES)}")
        if "[OPEN]" in tokenizer.to_str():
            raise ValueError(f"{file}: has a chat template already")
        opening, closing = TEMPLATES[template]
        for marker in re.findall(r"<\|\w+\|>", opening + closing):
            if tokenizer.token_to_id(marker) is None:
                raise ValueError(f"{file}: has no token {marker}, as template {template} needs")
        front = tokenizer.encode(opening)  # behind BOS, where the tokenizer has one
        back = tokenizer.encode(closing, add_special_tokens=False)
        markers = [
            {"id": name, "ids": e.ids, "tokens": e.tokens}
            for name, e in (("[OPEN]", front), ("[CLOSE]", back))
        ]
        tokenizer.post_processor = TemplateProcessing(
            single="[OPEN] $A [CLOSE]", pair="[OPEN] $A $B [CLOSE]", special_tokens=markers
        )
    tokenizer.encode_special_tokens = True
    return tokenizer


def tokenize(
    tokenizer: Tokenizer, texts: Sequence[str], max_length: int, instruction: str | None = None
) -> list[tuple[list[int], list[bool]]]:
    """Token ids of each text, and which of them are its own: no BOS, no instruction.

    Between an instruction and the text stands one line break, whatever white space it ended in.
    What stands behind a text (a template's closing marker, EOS) counts as its own, as it does in
    the authors' encoder and sentence-transformers. At most max_length tokens each: of a longer text
    the end is cut, never a marker. A text that has no token of its own is given all that stands
    there, or token 0 where nothing does, so that its vector is finite. Raises ValueError for what
    is not a string, and where an instruction or template leaves no room for text.
    """
    if isinstance(texts, str):
        raise ValueError("texts is one string, expected a list of strings: put it in brackets")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"text {i} is {type(text).__name__}, expected a string: {text!r:.60}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(f"text {i} holds half a surrogate pair: {text!r:.60}") from None
    # More than one line break or space would be cut differently in front of a text than alone.
    lead = (instruction or "").rstrip()
    if lead:
        lead += "\n"
    mask = tokenizer.encode(lead).special_tokens_mask
    before = max((i + 1 for i, special in enumerate(mask) if not special), default=0)
    if max_length <= tokenizer.num_special_tokens_to_add(False):
        raise ValueError(
            f"max_length {max_length} leaves no room beside the tokenizer's own tokens"
        )
    tokenizer.enable_truncation(max_length)
    try:
        encodings = tokenizer.encode_batch([lead + text for text in texts])
    except Exception as error:  # an unknown token, where the tokenizer has none for them
        raise ValueError(f"tokenizer.json: can't encode these texts: {error}") from None
    finally:
        tokenizer.no_truncation()
    rows = []
    for text, e in zip(texts, encodings, strict=True):
        mask = e.special_tokens_mask
        start = next((i for i, s in enumerate(mask) if i >= before and not s), 0)
        if start == 0 and lead and text.strip():
            raise ValueError(f"the instruction leaves no room in {max_length} tokens: {lead!r:.60}")
        own = [i >= start for i in range(len(mask))]
        rows.append((e.ids, own) if e.ids else ([0], [True]))
    return rows


def pad(rows: Sequence[Sequence[int]], device: str | torch.device = "cpu") -> Tensor:
    """Rows of different lengths as one (B, T) tensor, filled with 0 at the right."""
    T = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (T - len(row))] for row in rows], device=device)


# --- Pooling -----------------------------------------------------------------------------------


# The rules, and sentence-transformers' names for them.
POOLING = {"mean": "mean_tokens", "weighted_mean": "weightedmean_tokens"}
POOLING |= {"last": "lasttoken", "first": "cls_token"}


def pool(hidden: Tensor, weights: str | Tensor = "mean", own: Tensor | None = None) -> Tensor:
    """One vector a text, (B, d) float32, from hidden states (B, T, d).

    Args:
        weights: (B, T) non-negative numbers, or the name of a rule that makes them from `own`:
            `mean`, what the paper found best; `weighted_mean`, by place in the row, 1, 2, 3...
            (SGPT, Muennighoff 2022); `last`, the usual choice for a causal model; `first`.
        own: (B, T) booleans, the tokens that count; None for all of them.
    """
    if isinstance(weights, str):
        if own is None:
            own = torch.ones(hidden.shape[:2], device=hidden.device)
        own = own.float()
        order = torch.arange(1, own.shape[1] + 1, device=own.device) * own  # the own tokens' places
        if weights == "mean":
            weights = own
        elif weights == "weighted_mean":
            weights = order
        elif weights == "last":
            weights = (order == order.amax(1, keepdim=True)) * own
        elif weights == "first":
            weights = (own.cumsum(1) == 1) * own
        else:
            raise ValueError(f"pooling {weights!r}: expected {', '.join(POOLING)}")
    weights = weights.float()
    weights = weights / weights.sum(1, keepdim=True).clamp_min(1e-9)
    return (weights[:, None, :] @ hidden.float())[:, 0]


# --- Step 2: masked next-token prediction ------------------------------------------------------
# Some tokens are hidden, and the model, which now sees both sides, has to name them (section 2.1).
# The token at i is read off the state at i - 1, where a language model has always written its
# guess of token i: the output head keeps the meaning that it was pre-trained with.


def mask_tokens(
    input_ids: Tensor,
    mask_id: int,
    vocab_size: int,
    rate: float = 0.2,
    replace: tuple[float, float] = (0.8, 0.1),
    maskable: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Hide a share of the tokens.

    Args:
        input_ids: (B, T).
        mask_id: the token that hides another; the paper takes the plain token `_`.
        vocab_size: random tokens are below it.
        rate: the chance of each token to be chosen.
        replace: of the chosen, the share replaced by mask_id and the share replaced by a random
            token; the rest stays, and still has to be predicted. (0.8, 0.1) is BERT's rule
            (Devlin et al. 2019), used for Llama; (1, 0) with rate 0.8 is used for Mistral.
        maskable: (B, T) booleans, the tokens that may be chosen; None for all. The first token of
            a row never is: no state stands before it.
        generator: of the CPU, whatever the device of input_ids.

    Returns:
        The ids with chosen tokens hidden, (B, T), and which were chosen, (B, T) booleans.
    """

    def draw() -> Tensor:
        return torch.rand(input_ids.shape, generator=generator).to(input_ids.device)

    chosen = draw() < rate
    chosen[:, 0] = False
    if maskable is not None:
        chosen &= maskable
    fate = draw()
    noise = torch.randint(vocab_size, input_ids.shape, generator=generator).to(input_ids.device)
    hidden = torch.where(chosen & (fate < replace[0]), mask_id, input_ids)
    swapped = chosen & (fate >= replace[0]) & (fate < sum(replace))
    return torch.where(swapped, noise, hidden), chosen


CHUNK = 2**25  # logits that are in memory at once


def mntp_loss(
    decoder: Decoder,
    masked_ids: Tensor,
    input_ids: Tensor,
    chosen: Tensor,
    segments: Tensor | None = None,
    total: int | None = None,
) -> Tensor:
    """Mean cross-entropy, in nats, of the chosen tokens given the masked text (section 2.1).

    All four are (B, T); masked_ids and chosen come from `mask_tokens`. Only states in front of
    chosen tokens go through the vocabulary projection, as many at a time as make CHUNK logits; if
    there are more, the backward pass computes their logits again. `total` divides the sum
    instead of their number: the number in the whole batch, when this is a part of it.
    """
    hidden = decoder(masked_ids, segments)[:, :-1]  # state i - 1 ...
    target = chosen[:, 1:]  # ... predicts token i

    def loss_of(hidden: Tensor, token: Tensor) -> Tensor:
        return F.cross_entropy(decoder.logits(hidden).float(), token, reduction="sum")

    n = max(1, CHUNK // decoder.config.vocab_size)
    states, tokens = hidden[target].split(n), input_ids[:, 1:][target].split(n)
    if len(states) == 1:
        loss = loss_of(states[0], tokens[0])
    else:
        chunks = zip(states, tokens, strict=True)
        loss = sum(checkpoint(loss_of, *chunk, use_reentrant=False) for chunk in chunks)
    return loss / max(1, int(target.sum()) if total is None else total)


# --- Step 3: contrastive learning --------------------------------------------------------------
# The same sentence is encoded twice with different dropout; the two vectors must be closer to each
# other than to those of the other sentences of the batch (SimCSE, Gao et al. 2021; section 2.1).


def contrastive_loss(
    query: Tensor, positive: Tensor, negative: Tensor | None = None, scale: float = 20.0
) -> Tensor:
    """Cross-entropy, in nats, of picking each query's positive among all candidates by cosine.

    Args:
        query, positive: (B, d); row i of one belongs to row i of the other.
        negative: (any number, d), hard negatives: more candidates for every query.
        scale: inverse temperature, by which the cosine is multiplied.
    """
    candidates = positive if negative is None else torch.cat([positive, negative])
    scores = F.normalize(query.float(), dim=-1) @ F.normalize(candidates.float(), dim=-1).T
    return F.cross_entropy(scale * scores, torch.arange(len(query), device=query.device))


# --- The encoder -------------------------------------------------------------------------------


MTEB = {"task_metadata", "hf_split", "hf_subset", "prompt_type", "batch_size", "show_progress_bar"}


def default_device() -> str:
    """cuda, else mps (Apple's GPUs, on which this was never tried), else cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def has_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16; where it does not, float32 is faster.

    NVIDIA's GPUs do from Ampere on (not T4 and V100, of which standard error then says so), CPUs
    with AVX512-BF16 or AMX. Of Apple's it is not known here, so they count as if they did not.
    """
    if device.type == "cpu":
        names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # of torch 2.6 and later
        return any(getattr(torch.cpu, name, bool)() for name in names)
    if device.type != "cuda":
        return False
    able = torch.cuda.is_bf16_supported(including_emulation=False)
    if not able:
        name = torch.cuda.get_device_name(device)
        print(f"{name} has no bfloat16: computing in float32", file=sys.stderr)
    return able


class LLM2Vec:
    """A decoder, its tokenizer and a pooling rule: texts in, vectors out."""

    def __init__(
        self, decoder: Decoder, tokenizer: Tokenizer, pooling: str = "mean", max_length: int = 512
    ):
        self.decoder, self.tokenizer = decoder, tokenizer
        self.pooling, self.max_length = pooling, max_length
        if pooling not in POOLING:
            raise ValueError(f"pooling {pooling!r}: expected {', '.join(POOLING)}")
        ids, V = tokenizer.get_vocab().values(), decoder.config.vocab_size
        last = max(*ids, *tokenizer.encode("a").ids)  # of what stands around a text, too
        if last >= V:
            raise ValueError(f"tokenizer.json: has token ids up to {last}, the model embeds {V}")

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        adapters: Sequence[str | Path] = (),
        pooling: str = "mean",
        max_length: int = 512,
        is_causal: bool = False,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        template: str | None = None,
    ) -> "LLM2Vec":
        """Load a checkpoint folder and merge adapter folders into it, in the order given.

        template is the name of an instruct model's chat template, see TEMPLATES. device defaults to
        the first of cuda, mps and cpu that is there, dtype to
        bfloat16 on a GPU that has it, else float32.
        """
        device = torch.device(device or default_device())
        if dtype is None:
            fast = device.type != "cpu" and has_bfloat16(device)
            dtype = torch.bfloat16 if fast else torch.float32
        Config.from_pretrained(folder)  # complain of it and the tokenizer before reading weights
        tokenizer = load_tokenizer(folder, template)
        decoder = Decoder.from_pretrained(folder, dtype, device)
        decoder.config.is_causal = is_causal  # step 1 of the method, entire
        for adapter in adapters:
            from lora import load_adapter, merge_lora  # the one thing that this file borrows

            load_adapter(decoder, adapter)
            merge_lora(decoder)
        return cls(decoder, tokenizer, pooling, max_length)

    def embed(self, rows: Sequence[tuple[list[int], list[bool]]]) -> Tensor:
        """Vectors, (B, d) float32, of rows that `tokenize` made, as one padded batch."""
        device = self.decoder.device
        input_ids = pad([ids for ids, _ in rows], device)
        own = pad([own for _, own in rows], device)
        segments = None
        if len({len(ids) for ids, _ in rows}) > 1:
            segments = pad([[1] * len(ids) for ids, _ in rows], device)
        return pool(self.decoder(input_ids, segments), self.pooling, own)

    def encode(
        self,
        texts: Sequence[str],
        instruction: str | None = None,
        max_tokens: int = 8192,
        progress: bool = False,
        **mteb: object,
    ) -> np.ndarray:
        """Vectors of texts: a float32 array (N, d), not normalised, in the order of `texts`.

        Texts of like length share a batch of at most max_tokens tokens, padding included; a longer
        text has one for itself. The same text gets the same vector whatever it is batched with.
        Raises ValueError for a non-string. MTEB's encoder protocol passes batches that hold texts
        under "text", and what it knows of the task, which is not needed here.
        """
        if mteb.keys() - MTEB:
            raise TypeError(f"encode has no argument {min(mteb.keys() - MTEB)!r}")
        if not isinstance(texts, str):
            texts = list(texts)
            if texts and isinstance(texts[0], dict):
                texts = [text for batch in texts for text in batch["text"]]
        rows = tokenize(self.tokenizer, texts, self.max_length, instruction)
        return self.encode_rows(rows, max_tokens, progress)

    @torch.inference_mode()
    def encode_rows(self, rows: Sequence, max_tokens: int, progress: bool = False) -> np.ndarray:
        """`encode` of what `tokenize` made."""
        self.decoder.train(False)
        vectors = np.empty((len(rows), self.decoder.config.hidden_size), np.float32)
        done = 0
        lengths = [len(ids) for ids, _ in rows]
        for batch in batches_by_length(lengths, max_tokens, self.decoder.least_tokens):
            vectors[batch] = self.embed([rows[i] for i in batch]).cpu().numpy()
            done += len(batch)
            if progress:
                print(f"\r{done} of {len(rows)} texts", end="", file=sys.stderr, flush=True)
        if progress:
            print(file=sys.stderr)
        return vectors

    mteb_model_meta = None  # MTEB scores whatever has this, `encode` and `similarity`

    @staticmethod
    def similarity(a: np.ndarray, b: np.ndarray) -> Tensor:
        """Cosines of all rows of a (N, d) with all rows of b (M, d): (N, M)."""
        a, b = (torch.from_numpy(np.array(x, np.float32)) for x in (a, b))
        return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T

    @staticmethod
    def similarity_pairwise(a: np.ndarray, b: np.ndarray) -> Tensor:
        """Cosines of row i of a (N, d) with row i of b (N, d): (N,)."""
        a, b = (torch.from_numpy(np.array(x, np.float32)) for x in (a, b))
        return F.cosine_similarity(a, b, dim=-1)

    def save(self, folder: str | Path) -> None:
        """Write an ordinary checkpoint: a Hugging Face folder with sentence-transformers' files.

        transformers 5.2 and later honours its `"is_causal": false`; sentence-transformers gives the
        same vectors. The folder takes its name when it is whole; a checkpoint of that name is
        replaced. Raises ValueError if adapters are not merged, or the folder holds something else.
        """
        state = self.decoder.state_dict()
        if any("lora_" in name for name in state):
            raise ValueError("adapters are not merged: call merge_lora before save")
        if any(weight.dtype not in FLOATS for weight in state.values()):
            raise ValueError("4-bit weights are for training: save the weights as they were")
        with new_folder(Path(folder)) as new:
            for name, content in checkpoint_files(self).items():
                (new / name).parent.mkdir(exist_ok=True)
                (new / name).write_text(json.dumps(content, indent=2) + "\n")
            # With an output head it is a causal-LM checkpoint, whose inner model is `model`.
            prefix = "model." if self.decoder.can_predict else ""
            named = {n if n == "lm_head.weight" else prefix + n: w for n, w in state.items()}
            save_weights(named, new)


def batches_by_length(
    lengths: Sequence[int], max_tokens: int, least: int = 256
) -> Iterator[list[int]]:
    """Indices in batches of like length, longest first, each of at most max_tokens with padding.

    What is longer than that is a batch by itself. A text shorter than 7/8 of the longest starts a
    new batch, if this one has `least` tokens: smaller ones save less padding than they cost in
    speed (see `Decoder.least_tokens`).
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        longest = lengths[order[0]]
        most = max(1, max_tokens // longest)
        alike = sum(8 * lengths[i] >= 7 * longest for i in order[:most])
        n = max(alike, min(most, least // longest))
        yield order[:n]
        order = order[n:]


# --- Many processes ----------------------------------------------------------------------------
# Under torchrun, `python llm2vec.py encode` shares the texts out; train.py shares each batch out.

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def sum_of_ranks(vectors: np.ndarray) -> np.ndarray:
    """The sum of all processes' arrays, each of which is zero where another's is not."""
    if RANKS == 1:
        return vectors
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    joined = torch.from_numpy(vectors).to(device)
    torch.distributed.all_reduce(joined)
    return joined.cpu().numpy()


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Meet the other processes of torchrun; one that is silent for a minute ends the run."""
    if RANKS == 1:
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    patience = datetime.timedelta(seconds=60)
    torch.distributed.init_process_group("nccl" if cuda else "gloo", timeout=patience)
    try:
        yield
    except RuntimeError as error:  # what the backends raise
        raise ValueError(f"process {RANK} of {RANKS} stopped: {error}") from None
    finally:
        torch.distributed.destroy_process_group()


# --- An ordinary checkpoint --------------------------------------------------------------------

SHARD = 5 * 10**9  # bytes of weights in one file, at most, as on the Hugging Face hub
NOTHING = "\u2063"  # a character that an exported tokenizer drops


def save_weights(state: dict[str, Tensor], folder: Path) -> None:
    """model.safetensors; or shards with their index, if there is more than SHARD of it."""
    shards: list[dict[str, Tensor]] = [{}]
    room = SHARD
    for name, weight in state.items():
        room -= weight.nbytes
        if room < 0 and shards[-1]:
            shards.append({})
            room = SHARD - weight.nbytes
        shards[-1][name] = weight.contiguous()
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    names = names if len(shards) > 1 else ["model.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        try:
            save_file(shard, folder / name, metadata={"format": "pt"})
        except SafetensorError as error:  # of a full disk, too
            raise OSError(f"{folder / name}: {error}") from None
    if len(shards) > 1:
        total = sum(weight.nbytes for weight in state.values())
        weight_map = {k: name for name, shard in zip(names, shards, strict=True) for k in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def checkpoint_files(model: LLM2Vec) -> dict[str, object]:
    """Every JSON file of a checkpoint folder, by name.

    sentence-transformers averages all tokens, BOS included, but for those of a prompt. So where
    the tokenizer puts BOS in front, the default prompt is a character that the tokenizer drops:
    what is left of the prompt is BOS, which then is read and not averaged, as here. It allows for
    one token behind a prompt; with a template that closes with more, its files are left out.
    """
    config, tokenizer = model.decoder.config, json.loads(model.tokenizer.to_str())
    alone = model.tokenizer.encode("a")
    own = alone.special_tokens_mask.index(0)
    in_front = alone.ids[:own]
    behind = [i for i, s in zip(alone.ids, alone.special_tokens_mask, strict=True) if s][own:]
    drop = {"type": "Replace", "pattern": {"String": NOTHING}, "content": ""}
    pre = tokenizer["pre_tokenizer"] or {}
    if in_front and pre.get("prepend_scheme") == "first":  # with a prompt, it would not be first
        pre["prepend_scheme"] = "always"
    if in_front and NOTHING not in json.dumps(tokenizer["normalizer"], ensure_ascii=False):
        steps = [drop, tokenizer["normalizer"]] if tokenizer["normalizer"] else [drop]
        tokenizer["normalizer"] = {"type": "Sequence", "normalizers": steps}
    special = [t["content"] for t in tokenizer["added_tokens"] if t["id"] not in in_front]
    other = next(i for i in range(len(in_front) + 1) if i not in in_front)
    pad = (special or [model.tokenizer.id_to_token(other)])[0]
    kind = "ForCausalLM" if model.decoder.can_predict else "Model"
    family = {"smollm3": "SmolLM3"}.get(config.model_type, config.model_type.capitalize())
    module = "sentence_transformers.models."
    files = {
        "config.json": vars(config)
        | {
            "architectures": [family + kind],
            "hidden_act": "silu",
            "pad_token_id": model.tokenizer.token_to_id(pad),
            "torch_dtype": str(model.decoder.norm.weight.dtype).removeprefix("torch."),
        },
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": pad,
            "padding_side": "right",
            "split_special_tokens": True,
            "model_max_length": model.max_length,
        }
        | ({"eos_token": model.tokenizer.id_to_token(behind[0])} if len(behind) == 1 else {}),
    }
    if len(behind) > 1:
        return files
    return files | {
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": module + "Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": module + "Pooling"},
        ],
        "1_Pooling/config.json": {
            "word_embedding_dimension": config.hidden_size,
            **{f"pooling_mode_{n}": n == POOLING[model.pooling] for n in POOLING.values()},
            "include_prompt": False,
        },
        "sentence_bert_config.json": {"max_seq_length": model.max_length, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "prompts": {"default": NOTHING} if in_front else {},
            "default_prompt_name": "default" if in_front else None,
            "similarity_fn_name": "cosine",
        },
    }


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes the name `folder` at the end, if all went well.

    A checkpoint of that name is replaced, whole; a folder of anything else is refused.
    """
    known = (folder / "config.json").is_file() and any(folder.glob("model*.safetensors"))
    if folder.exists() and not known:
        raise ValueError(f"{folder}: exists and is not a checkpoint; remove it or choose another")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".new-") as scratch:
        new, old = Path(scratch) / "new", Path(scratch) / "old"
        new.mkdir()
        yield new
        if folder.exists():
            os.replace(folder, old)
        try:
            os.replace(new, folder)
        except OSError:
            if old.exists():
                os.replace(old, folder)
            raise


# --- Command line ------------------------------------------------------------------------------


def encode_file(model: LLM2Vec, source: str, target: str, instruction: str | None = None) -> int:
    """Write the vectors of a file's texts; returns their number. Memory is that of 8,192 texts.

    Args:
        source: a text a line, or JSON lines with a `text` field (.jsonl); `-` is standard input.
        target: NumPy's format, float32 (N, d); or JSON lines (.jsonl, or `-` for standard output),
            which repeat the fields of the input and add `vector`. It takes its name when whole.
    """
    as_json = target == "-" or target.endswith(".jsonl")
    part = Path(f"{target}.part")
    done, start = 0, time.monotonic()

    def write_header(out: BinaryIO) -> None:  # numpy leaves room in it for a larger N
        shape = (done, model.decoder.config.hidden_size)
        fields = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(out, fields)

    with contextlib.ExitStack() as stack:
        lines, out = sys.stdin.buffer, sys.stdout.buffer
        if source != "-":
            lines = stack.enter_context(existing(Path(source), "--input names it").open("rb"))
        if RANK > 0:  # takes part in the encoding; process 0 writes
            out = stack.enter_context(open(os.devnull, "wb"))
        elif target != "-":
            stack.callback(part.unlink, missing_ok=True)
            out = stack.enter_context(part.open("wb"))
        if not as_json:
            write_header(out)

        def prepare(chunk: list[tuple[int, bytes]]) -> tuple[list[dict], list]:
            records = [read_record(line, source, number) for number, line in chunk]
            texts = [record["text"] for record in records[RANK::RANKS]]
            return records, tokenize(model.tokenizer, texts, model.max_length, instruction)

        numbered = enumerate(lines, start=1)
        chunks = iter(lambda: list(itertools.islice(numbered, 4096)), [])
        for records, rows in ahead(prepare, chunks):
            vectors = np.zeros((len(records), model.decoder.config.hidden_size), np.float32)
            vectors[RANK::RANKS] = model.encode_rows(rows, max_tokens=8192)
            vectors = sum_of_ranks(vectors)
            if as_json:
                for record, vector in zip(records, vectors, strict=True):
                    record["vector"] = [round(float(x), 6) for x in vector]
                    line = json.dumps(record, ensure_ascii=False)
                    out.write(line.encode("utf-8", "backslashreplace") + b"\n")
            else:
                out.write(vectors.tobytes())
            done += len(records)
            pace = done / (time.monotonic() - start)
            if RANK == 0:
                print(f"\r{done} texts, {pace:.0f} a second", end="", file=sys.stderr, flush=True)
        if RANK == 0:
            print(file=sys.stderr)
        if RANK == 0 and target != "-":
            if not as_json:
                out.seek(0)
                write_header(out)
            out.flush()
            os.fsync(out.fileno())
            os.replace(part, target)
    return done


def ahead(function: Callable, items: Iterator) -> Iterator:
    """function of each item, on another thread, while the result before it is in use."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        coming = None
        for item in items:
            after = thread.submit(function, item)
            if coming:
                yield coming.result()
            coming = after
        if coming:
            yield coming.result()


def read_record(line: bytes, source: str, number: int) -> dict:
    """A line as {"text": ...} and whatever else its JSON object holds."""
    try:
        text = line.decode("utf-8").removeprefix("\ufeff").rstrip("\r\n")
        record = json.loads(text) if source.endswith(".jsonl") else {"text": text}
        record["text"].encode()  # half a surrogate pair is no text
        return record
    except UnicodeDecodeError:
        raise ValueError(f"{source}, line {number}: not UTF-8") from None
    except UnicodeEncodeError:
        raise ValueError(f"{source}, line {number}: half a surrogate pair") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise ValueError(f"{source}, line {number}: expected a JSON object with a string `text`")


def add_device(command: argparse.ArgumentParser) -> None:
    """The flags of everything that takes a model: where it computes, and whether compiled."""
    text = "cuda, mps or cpu (default: the first of them that is there)"
    command.add_argument("--device", choices=("cuda", "mps", "cpu"), metavar="NAME", help=text)
    text = "fuse each layer by torch.compile: it takes minutes, and pays on a GPU"
    command.add_argument("--compile", action="store_true", help=text)


def load(args: argparse.Namespace) -> LLM2Vec:
    model = LLM2Vec.from_pretrained(
        args.model, args.adapters, device=args.device, template=args.template
    )
    if args.compile:
        compile_layers(model.decoder)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python llm2vec.py", description="Turn texts into vectors."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    encode = commands.add_parser("encode", help="write the vectors of a file's texts")
    add = encode.add_argument
    add("--input", required=True, help="a text a line, or .jsonl with `text`; - is standard input")
    add("--output", required=True, help=".npy, or .jsonl with `vector`; - is standard output")
    similar = commands.add_parser("similar", help="print the cosines between a few sentences")
    similar.add_argument("texts", nargs="+", help="sentences, each in quotation marks")
    for command in (encode, similar):
        command.add_argument("--model", required=True, help="checkpoint folder")
        command.add_argument("--adapters", nargs="*", default=[], help="folders to merge, in order")
        command.add_argument("--instruction", help="read in front of each text, not averaged")
        command.add_argument("--template", help=f"of an instruct model: {', '.join(TEMPLATES)}")
        add_device(command)
    args = parser.parse_args()
    if args.command == "encode":
        if RANKS > 1 and args.input == "-":
            raise ValueError("--input - is for one process: give a file that each can read")
        with processes():  # each takes its GPU before it loads the model
            model = load(args)
            encode_file(model, args.input, args.output, args.instruction)
        return
    model = load(args)
    vectors = model.encode(args.texts, args.instruction)
    for row, text in zip(model.similarity(vectors, vectors), args.texts, strict=True):
        print("  ".join(f"{cosine:6.3f}" for cosine in row), "", text)


def run(main: Callable[[], None]) -> None:
    """Run a command line: a foreseen error is one line and exit status 2, Ctrl-C exits with 130."""
    try:
        main()
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        said = str(error) or "out of memory"
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            if not isinstance(error, torch._dynamo.exc.TorchDynamoException):
                raise
            said = "--compile: " + " ".join(said.partition("\n\n")[0].split())  # no C++ compiler
        print(f"error: {said}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    run(main)
