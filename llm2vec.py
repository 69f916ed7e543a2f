"""LLM2Vec in one file: a decoder-only language model becomes a text encoder.

The method (BehnamGhader et al. 2024, arXiv 2404.05961) has three steps: let attention look both
ways, train briefly to predict masked tokens, train briefly with contrastive learning. This file
explains them in order:

    Config             the shape of a Llama, a Mistral or a near relative
    attention_mask     which token may attend to which; step 1 is its argument `is_causal`
    Decoder            RMSNorm, rotary positions, grouped-query attention, SwiGLU
    load_weights       config.json and safetensors into those modules, tensor by tensor
    tokenize           text to token ids, and a mask of the tokens to pool
    pool               the hidden states of a text to one vector
    mntp_loss          step 2: masked next-token prediction
    contrastive_loss   step 3: contrastive learning (SimCSE)
    LLM2Vec            all of it as an encoder: texts in, vectors out

train.py runs steps 2 and 3, on the adapters of lora.py.

Notable features: modules have the names that Hugging Face checkpoints use, so weights load without
a table of names. One function makes every mask. Keys and values are not cached, because an encoder
reads each text once.

Shapes: B batch, T tokens, d width, H heads, K key/value heads, D head width, V vocabulary, N texts.
"""

import argparse
import functools
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from llm2vec_data import checkpoints
from llm2vec_data.batches import batches_by_length, compile_layers, min_batch_tokens, pad
from llm2vec_data.checkpoints import (
    PREFIX,
    TEMPLATES,
    UNUSED,
    Template,
    check_tensor,
    find_checkpoint,
    load_tokenizer,
)
from llm2vec_data.commands import cli
from llm2vec_data.disk import read_json, reading
from llm2vec_data.encode import count_cut, encode_file, report_cut, word_states
from llm2vec_data.export import save_encoder
from llm2vec_data.processes import default_device, has_bfloat16
from lora import load_adapter, load_extra, merge_lora


@dataclass
class Config:
    """Shape and constants of a model, named as in transformers' config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    model_type: str = "llama"  # for exported folders; the decoder reads only the other fields
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # {"rope_type": ...} and the numbers in ROPE_SCALING
    sliding_window: int | None = None
    layer_types: list[str] | None = None  # full_attention or sliding_attention; None: all sliding
    no_rope_layers: list[int] | None = None  # 0 for each layer without rotary positions, else 1
    attention_bias: bool = False  # on q, k, v and o
    qkv_bias: bool = False  # on q, k and v (Qwen2)
    qk_norm: bool = False  # a norm on every head of q and k (Qwen3)
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    is_causal: bool = True  # step 1 of LLM2Vec sets this to False
    attention_dropout: float = 0.0  # on the attention weights, in training only

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Config":
        """Read `folder`/config.json. Raises FileNotFoundError, or ValueError naming the field."""
        return cls(**checkpoints.read_config(Path(folder) / "config.json", fields(cls)))


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
    window = T if window is None else window
    near = (j <= i) & (i - j < window) if is_causal else (i - j).abs() <= window  # (T, T)
    if (segments == segments[:, :1]).all():  # each row is one text
        return None if near.all() else near[None, None]
    same_text = segments[:, :, None] == segments[:, None, :]
    return (same_text & near)[:, None]


# --- Decoder -----------------------------------------------------------------------------------
# Llama (Touvron et al. 2023) and Mistral are one architecture: a residual stream of width d, to
# which each layer adds attention, then a gated feed-forward network, each on a normalised copy.
# Matrices multiply in the type of the weights, but the stream is float32: rounding it to bfloat16
# at every layer costs more accuracy than all other roundings together.


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32, in the type of the weight (Zhang & Sennrich)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        return F.rms_norm(x.float(), weight.shape, weight.float(), self.eps).to(weight.dtype)


def rotary_table(config: Config, T: int, device: torch.device, dtype: torch.dtype):
    """Cosines and sines of the rotary position embedding (Su et al. 2021), (T, D) each.

    Pair m of a head turns by position * theta^(-2m/D), so the product of a query and a key depends
    on their distance alone. So a text packed after another, or shifted by padding, keeps its
    positions. `linear` stretches all wavelengths by `factor`; `llama3` (Llama 3.1) stretches
    only the long ones, with a smooth change, as in transformers' rope utilities; `dynamic`
    stretches none up to max_position_embeddings, and raises ValueError for a longer text.
    """
    D = config.head_dim
    frequency = 1 / config.rope_theta ** (torch.arange(0, D, 2, device=device).float() / D)
    scaling = config.rope_scaling or {"rope_type": "default"}
    if scaling["rope_type"] == "dynamic" and config.max_position_embeddings < T:
        longest = config.max_position_embeddings
        raise ValueError(f"rope_type dynamic: a text of {T} tokens, expected at most {longest}")
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


# Not cuDNN's kernel: with a mask, it plans for about a second for each new shape.
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for every head: q is (B, H, T, D), k and v are (B, K, T, D)."""
    group = q.shape[1] // k.shape[1]  # query heads that share a key/value head
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    with sdpa_kernel(KERNELS):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


class Attention(nn.Module):
    """Grouped-query attention: H query heads share K key/value heads (Ainslie et al. 2023)."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.config = config
        d, D = config.hidden_size, config.head_dim
        bias = config.attention_bias or config.qkv_bias
        self.q_proj = nn.Linear(d, config.num_attention_heads * D, bias=bias)
        self.k_proj = nn.Linear(d, config.num_key_value_heads * D, bias=bias)
        self.v_proj = nn.Linear(d, config.num_key_value_heads * D, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * D, d, bias=config.attention_bias)
        self.q_norm = self.k_norm = nn.Identity()
        if config.qk_norm:
            self.q_norm = RMSNorm(D, config.rms_norm_eps)
            self.k_norm = RMSNorm(D, config.rms_norm_eps)
        self.rotary = config.no_rope_layers is None or bool(config.no_rope_layers[layer])

    def forward(self, x: Tensor, mask: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, _ = x.shape
        heads = (B, T, -1, self.config.head_dim)
        q = self.q_norm(self.q_proj(x).view(heads)).transpose(1, 2)  # (B, H, T, D)
        k = self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2)  # (B, K, T, D)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        if self.rotary:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = attend(q, k, v, mask, self.config.attention_dropout if self.training else 0.0)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, config: Config):
        super().__init__()
        d, wide, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(d, wide, bias=bias)
        self.up_proj = nn.Linear(d, wide, bias=bias)
        self.down_proj = nn.Linear(wide, d, bias=bias)

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
        # In training, this many layers keep only their input, and are computed again in the
        # backward pass: less memory, for up to a third more time.
        self.recompute = 0
        self.name_or_path: str | None = None  # the checkpoint with exactly these weights

    def forward(
        self, input_ids: Tensor, segments: Tensor | None = None, last: int | None = None
    ) -> Tensor:
        """Hidden states after the final norm, (B, T, d), of input_ids (B, T).

        Args:
            segments: (B, T), see `attention_mask`; None means that every row is one whole text.
            last: give the states after each of the last `last` layers instead, before the final
                norm: (last, B, T, d).
        """
        c, T, device = self.config, input_ids.shape[1], input_ids.device
        segments = torch.ones(1, T) if segments is None else segments

        @functools.cache
        def mask(is_causal: bool, window: int | None) -> Tensor | None:
            made = attention_mask(segments, is_causal, window)
            return None if made is None else made.to(device)

        x = self.embed_tokens(input_ids)  # (B, T, d)
        cos, sin = rotary_table(c, T, device, x.dtype)
        x, states = x.float(), []
        for i, layer in enumerate(self.layers):
            full = c.layer_types is not None and c.layer_types[i] == "full_attention"
            masked = mask(c.is_causal, None if full else c.sliding_window)  # may differ by layer
            if i < self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, masked, cos, sin, use_reentrant=False)
            else:
                x = layer(x, masked, cos, sin)
            if last is not None and i >= len(self.layers) - last:
                states.append(x)
        return self.norm(x) if last is None else torch.stack(states)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token, (..., V), of hidden states (..., d)."""
        if not self.can_predict:
            raise ValueError("this checkpoint has no lm_head.weight: it can encode, not predict")
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        return F.linear(hidden.to(head.weight.dtype), head.weight)

    @property
    def can_predict(self) -> bool:
        """False for a checkpoint of the inner model, which has no output head."""
        return self.config.tie_word_embeddings or self.lm_head is not None

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @classmethod
    def from_pretrained(
        cls,
        path_or_name: str | Path,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> "Decoder":
        """Load a Hugging Face checkpoint: a folder, or a name on the hub such as "owner/model".

        Its weights are safetensors, whole or sharded, of a causal LM or of its inner model, which
        has no output head. Raises FileNotFoundError or ValueError, naming the file and tensor.
        """
        folder = find_checkpoint(path_or_name)
        config = Config.from_pretrained(folder)
        with reading(folder / "config.json"), torch.device("meta"):  # shapes, no memory yet
            decoder = cls(config)
        load_weights(decoder, folder, dtype, torch.device(device))
        local = Path(path_or_name).is_dir()
        decoder.name_or_path = str(folder.resolve() if local else path_or_name)
        return decoder.eval()


# --- From disk ---------------------------------------------------------------------------------
# A feature that this decoder can't compute raises an error that names it, so a checkpoint that
# loads gives the right numbers. Only JSON and safetensors are read.


def load_weights(decoder: Decoder, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
    """Load safetensors into a decoder on the meta device, one tensor in memory at a time."""
    wanted, unused, hint = dict(decoder.named_parameters()), [], ""
    if quantised := read_json(folder / "config.json").get("quantization_config"):
        method = quantised.get("quant_method")
        hint = f"; the weights are quantised ({method}): use the checkpoint before quantisation"
    for file in checkpoints.weight_files(folder):
        with reading(file, hint), safe_open(file, framework="pt", device=str(device)) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                key = PREFIX.sub("", name)
                if UNUSED.match(key):
                    unused.append(name)
                elif key in wanted:
                    shape, weight = wanted.pop(key).shape, tensors.get_tensor(name)
                    weight = check_tensor(weight, name, shape, dtype)
                    module, _, leaf = key.rpartition(".")
                    weight = nn.Parameter(weight, requires_grad=False)
                    setattr(decoder.get_submodule(module), leaf, weight)
                elif key != "lm_head.weight":  # a file may hold it although it is tied
                    raise ValueError(f"tensor {name} has no place in this model")
    if wanted.pop("lm_head.weight", None) is not None:
        decoder.lm_head = None
        print(f"{folder}: has no lm_head.weight: it can encode, not predict", file=sys.stderr)
    if wanted:
        raise ValueError(f"{folder}: tensor {next(iter(wanted))} is missing, one of {len(wanted)}")
    checkpoints.report_unused(folder, unused)


# --- Text to tokens ----------------------------------------------------------------------------
# tokenizer.json decides whether a row starts with BOS. The vector of a text averages the tokens of
# the text alone: the model reads BOS and the instruction, but they are not averaged (section 3.2).


def prompt_prefix(instruction: str | None, separator: str = "\n") -> str:
    """The instruction and the separator, to put before a text; "" without an instruction."""
    prefix = instruction or ""
    if separator:  # white space at the end becomes other tokens before a text than alone
        prefix = prefix.rstrip()
    return prefix + separator if prefix else ""


def tokenize(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    max_length: int,
    instruction: str | None = None,
    separator: str = "\n",
) -> list[tuple[list[int], list[bool]]]:
    """Token ids of each text, and a mask of the tokens to pool: no BOS, no instruction.

    On data/tiny-llama, the text "A cat sat." with the instruction "find:" gives this row:

        tokens  f      ind    :      \\n     A     cat   sat   .
        ids     86     526    42     198    49    2644  2643  30
        mask    False  False  False  False  True  True  True  True

    The end of a text is cut at max_length tokens. Tokens appended after the text (EOS, the end of a
    template) are pooled, as in the authors' encoder and in sentence-transformers. For an empty text
    the whole row is pooled; if the row is empty, too, its vector is 0, as in sentence-transformers.
    Raises ValueError for a text that is not a string, and for an instruction or template that
    leaves no room for the text.
    """
    if isinstance(texts, str):
        raise ValueError("texts is one string, expected a list of strings: put it in brackets")
    texts = list(texts)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"text {i} is {type(text).__name__}, expected a string: {text!r:.60}")
        if re.search("[\ud800-\udfff]", text):
            raise ValueError(f"text {i} holds half a surrogate pair: {text!r:.60}")
    prefix = prompt_prefix(instruction, separator)
    special = tokenizer.encode(prefix.rstrip(" ")).special_tokens_mask  # " " joins the text's token
    before = max((i + 1 for i, s in enumerate(special) if not s), default=0)  # BOS and the prefix
    if max_length <= tokenizer.num_special_tokens_to_add(False):
        raise ValueError(f"max_length {max_length} leaves no room beside the template's tokens")
    tokenizer.enable_truncation(max_length)
    try:
        with reading("tokenizer.json"):  # a tokenizer without <unk> raises for unknown words
            encodings = tokenizer.encode_batch([prefix + text for text in texts])
    finally:
        tokenizer.no_truncation()
    rows = []
    for text, e in zip(texts, encodings, strict=True):
        start = next((i for i, s in enumerate(e.special_tokens_mask) if i >= before and not s), 0)
        if start == 0 and prefix and text.strip():
            message = f"the instruction leaves no room in {max_length} tokens"
            raise ValueError(f"{message}: {prefix!r:.60}")
        pooled = [i >= start for i in range(len(e.ids))]
        rows.append((e.ids, pooled) if e.ids else ([0], [False]))
    return rows


# --- Pooling -----------------------------------------------------------------------------------


def positions(pooled: Tensor) -> Tensor:
    """The position in the row, from 1, of each pooled token; 0 for the others."""
    return torch.arange(1, pooled.shape[1] + 1, device=pooled.device) * pooled


# Each rule makes weights (B, T) from `pooled` (B, T): 1 for pooled tokens, 0 for the others.
POOLING: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda pooled: pooled,  # the best one in the paper
    "weighted_mean": positions,  # SGPT, Muennighoff 2022
    "last": lambda pooled: pooled * (positions(pooled) == positions(pooled).amax(1, True)),
    "first": lambda pooled: pooled * (pooled.cumsum(1) == 1),
}


def pool(hidden: Tensor, weights: str | Tensor = "mean", pooled: Tensor | None = None) -> Tensor:
    """One vector for each text, (B, d) float32, from hidden states (B, T, d).

    Args:
        weights: (B, T) non-negative numbers, or the name of a rule in POOLING that makes them.
        pooled: (B, T) booleans, True for the tokens to pool; None for all.
    """
    if isinstance(weights, str):
        if weights not in POOLING:
            raise ValueError(f"pooling {weights!r}: expected {', '.join(POOLING)}")
        pooled = hidden.new_ones(hidden.shape[:2]) if pooled is None else pooled
        weights = POOLING[weights](pooled.float())
    weights = weights.float() / weights.float().sum(1, keepdim=True).clamp_min(1e-9)
    return (weights[:, None, :] @ hidden.float())[:, 0]


# --- Step 2: masked next-token prediction ------------------------------------------------------
# Some tokens are masked, and the model, which now sees both sides, has to predict them (section
# 2.1). Token i is predicted from the state at i - 1, as in pre-training: the output head keeps its
# meaning.


def mask_tokens(
    input_ids: Tensor,
    mask_id: int,
    vocab_size: int,
    rate: float = 0.2,
    replace: tuple[float, float] = (0.8, 0.1),
    maskable: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose some tokens of input_ids (B, T) at random, and mask them.

    Args:
        rate: the chance of each token to be chosen, or (B, 1), a chance for each row. The first
            token of a row is never chosen: no state comes before it.
        replace: shares of the chosen tokens. The share replace[0] becomes mask_id (the paper uses
            the plain token `_`), the share replace[1] becomes random tokens below vocab_size. The
            rest is not changed, but predicted too. (0.8, 0.1) is BERT's rule (Devlin et al. 2019),
            used for Llama; (1, 0) is used for Mistral.
        maskable: (B, T) booleans, the tokens that may be chosen; None for all.
        generator: a generator on the CPU.

    Returns the masked ids, (B, T), and the chosen tokens, (B, T) booleans.
    """
    shape, device = input_ids.shape, input_ids.device
    chosen = torch.rand(shape, generator=generator).to(device) < rate
    chosen[:, 0] = False
    chosen = chosen if maskable is None else chosen & maskable
    draw = torch.rand(shape, generator=generator).to(device)
    noise = torch.randint(vocab_size, shape, generator=generator).to(device)
    masked = torch.where(chosen & (draw < replace[0]), mask_id, input_ids)
    swapped = chosen & (draw >= replace[0]) & (draw < sum(replace))
    return torch.where(swapped, noise, masked), chosen


def mntp_loss(
    decoder: Decoder,
    masked_ids: Tensor,
    input_ids: Tensor,
    chosen: Tensor,
    segments: Tensor | None = None,
    total: int | None = None,
) -> Tensor:
    """Mean cross-entropy, in nats, of the chosen tokens given the masked text (section 2.1).

    All four are (B, T); masked_ids and chosen come from `mask_tokens`. Only the states before
    chosen tokens go through the vocabulary projection. `total` is the number of chosen tokens in
    the whole batch, if this is a part of one.
    """
    hidden = decoder(masked_ids, segments)[:, :-1]  # the state at i - 1 ...
    target = chosen[:, 1:]  # ... predicts the token at i
    losses = cross_entropy(decoder, hidden[target], input_ids[:, 1:][target])
    return losses.sum() / max(1, int(target.sum()) if total is None else total)


CHUNK = 2**25  # logits in memory at once


def cross_entropy(decoder: Decoder, states: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy of each of the tokens (n,) given states (n, d): (n,) float32.

    To save memory, many logits are computed in chunks, and again in the backward pass.
    """

    def loss_of(states: Tensor, tokens: Tensor) -> Tensor:
        return F.cross_entropy(decoder.logits(states).float(), tokens, reduction="none")

    n = max(1, CHUNK // decoder.config.vocab_size)
    if len(states) <= n:
        return loss_of(states, tokens)
    chunks = zip(states.split(n), tokens.split(n), strict=True)
    return torch.cat([checkpoint(loss_of, *chunk, use_reentrant=False) for chunk in chunks])


# --- Step 3: contrastive learning --------------------------------------------------------------
# The same sentence is encoded twice with different dropout; the two vectors must be closer to each
# other than to the vectors of other sentences in the batch (SimCSE, Gao et al. 2021; section 2.1).


def contrastive_loss(
    query: Tensor,
    positive: Tensor,
    negative: Tensor | None = None,
    scale: float = 20.0,
    duplicates: Tensor | None = None,
) -> Tensor:
    """Cross-entropy, in nats, of picking the positive of each query among all candidates.

    Args:
        query, positive: (B, d); row i of one belongs to row i of the other.
        negative: (any number, d), hard negatives: more candidates for every query.
        scale: inverse temperature: the cosine is multiplied by it.
        duplicates: (B, candidates) booleans, other copies of a query's positive, to be ignored.
    """
    candidates = positive if negative is None else torch.cat([positive, negative])
    cosine = F.normalize(query.float(), dim=-1) @ F.normalize(candidates.float(), dim=-1).T
    cosine = cosine if duplicates is None else cosine.masked_fill(duplicates, float("-inf"))
    return F.cross_entropy(scale * cosine, torch.arange(len(query), device=query.device))


# --- The encoder -------------------------------------------------------------------------------


class LLM2Vec(nn.Module):
    """A decoder, its tokenizer and a pooling rule: texts in, vectors out.

    A subclass may have more modules, for example a pooler: they are trained, saved and loaded with
    the decoder, by name. Modules in `heads` are for training only, not a part of the encoder.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        pooling: str = "mean",
        max_length: int = 512,
        separator: str = "\n",
        include_prompt: bool = False,
        prompts: dict[str, str] | None = None,
    ):
        """separator: see `prompt_prefix`. include_prompt: pool BOS and instructions, too.

        prompts: the texts that sentence-transformers puts before a query or a document.
        """
        super().__init__()
        self.decoder, self.tokenizer = decoder, tokenizer
        self.pooling, self.max_length, self.heads = pooling, max_length, nn.ModuleDict()
        self.separator, self.include_prompt = separator, include_prompt
        self.prompts, self.made_of = dict(prompts or {}), []  # made_of: names, for a model card
        if pooling not in POOLING:
            raise ValueError(f"pooling {pooling!r}: expected {', '.join(POOLING)}")
        # A token id beyond the embedding (often <pad>) is made special: no text can produce it.
        V, added = decoder.config.vocab_size, tokenizer.get_added_tokens_decoder()
        tokenizer.add_special_tokens([token.content for i, token in added.items() if i >= V])
        ids = tokenizer.get_vocab(with_added_tokens=False).values()
        largest = max(*ids, *tokenizer.encode("a").ids)  # with BOS, EOS and the template
        if largest >= V:
            message = f"has token ids up to {largest}, but the model has {V} embeddings"
            raise ValueError(f"tokenizer.json: {message}")

    @classmethod
    def from_pretrained(
        cls,
        path_or_name: str | Path,
        adapters: str | Path | Sequence[str | Path] = (),
        pooling: str | None = None,
        max_length: int | None = None,
        is_causal: bool | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        template: Template | None = None,
        separator: str | None = None,
        include_prompt: bool | None = None,
    ) -> "LLM2Vec":
        """Load a checkpoint and merge adapters into it, in the order given.

        Each is a folder, or a name on the Hugging Face hub. The folder of an encoder has its
        pooling, max_length, is_causal, separator and include_prompt; else the defaults are "mean",
        512, False, a line break and False. The authors' models have a space as the separator.
        template: the strings before and after every text, or a name in checkpoints.TEMPLATES; by
        default that of the last adapter that has one, else of the folder.
        device: by default the first of cuda, mps and cpu that the machine has. dtype: by default
        bfloat16 on a GPU that supports it, else float32.
        """
        folder = find_checkpoint(path_or_name, "tokenizer.json")
        adapters = [adapters] if isinstance(adapters, (str, Path)) else adapters
        names, adapters = adapters, [checkpoints.find_adapter(adapter) for adapter in adapters]
        device = torch.device(device or default_device())
        if device == torch.device("cuda"):  # safetensors would take the first GPU for each process
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if dtype is None:
            fast = device.type != "cpu" and has_bfloat16(device)
            dtype = torch.bfloat16 if fast else torch.float32
        options = checkpoints.encoder_options(folder, adapters)
        if template in ("mistral", "llama-3"):
            options.setdefault("separator", " ")  # as in the authors' code
        given = {"pooling": pooling, "max_length": max_length, "is_causal": is_causal}
        given |= {"separator": separator, "include_prompt": include_prompt}
        options |= {name: value for name, value in given.items() if value is not None}
        trained = [a for a in adapters if (a / "settings.json").exists()]  # run folders
        trained = [a for a in trained if (a / "tokenizer.json").exists() and template is None]
        tokenizer = load_tokenizer([folder, *trained][-1], template)  # before the weights are read
        decoder = Decoder.from_pretrained(path_or_name, dtype, device)
        decoder.config.is_causal = options.pop("is_causal")  # False: this is all of step 1
        with torch.random.fork_rng(devices=()):  # new modules get the same weights each time
            torch.manual_seed(0)
            model = cls(decoder, tokenizer, **options).to(device).eval()
        model.made_of = [path_or_name, *names]
        load_extra(model, folder)  # the other modules of an exported encoder
        for adapter in adapters:
            load_adapter(model, adapter)
            merge_lora(model)
        return model

    @property
    def width(self) -> int:
        """Dimensions of a vector."""
        return self.decoder.config.hidden_size

    def rows(
        self, texts: Sequence[str], instruction: str | None = None, max_length: int | None = None
    ) -> list[tuple[list[int], list[bool]]]:
        """Token ids of each text, and a mask of the tokens to pool; see `tokenize`."""
        max_length = self.max_length if max_length is None else max_length
        rows = tokenize(self.tokenizer, texts, max_length, instruction, self.separator)
        return [
            (ids, pooled if not self.include_prompt else [True] * len(ids)) for ids, pooled in rows
        ]

    def embed(self, rows: Sequence[tuple[list[int], list[bool]]]) -> Tensor:
        """Vectors, (B, d) float32, of rows from `tokenize`, as one padded batch."""
        device = self.decoder.device
        input_ids, pooled = (pad(side, device) for side in zip(*rows, strict=True))
        segments = None
        if len({len(ids) for ids, _ in rows}) > 1:
            segments = pad([[1] * len(ids) for ids, _ in rows], device)
        return pool(self.decoder(input_ids, segments), self.pooling, pooled)

    @torch.inference_mode()
    def encode(
        self,
        texts: str | Sequence[str],
        instruction: str | None = None,
        max_tokens: int = 8192,
        progress: bool = False,
        normalize: bool = False,
    ) -> np.ndarray:
        """Vectors of texts, float32 (N, d), in the order of `texts`; (d,) for one string.

        Texts of similar length share a batch of at most max_tokens tokens, with padding; a longer
        text is a batch by itself. A text gets the same vector in every batch. Vectors have length 1
        if `normalize`. Raises ValueError for a text that is not a string.
        """
        rows = self.rows([texts] if isinstance(texts, str) else texts, instruction)
        vectors = np.empty((len(rows), self.width), np.float32)
        self.eval()
        done, lengths = 0, [len(ids) for ids, _ in rows]
        for batch in batches_by_length(lengths, max_tokens, min_batch_tokens(self.decoder)):
            made = self.embed([rows[i] for i in batch])
            vectors[batch] = (F.normalize(made, dim=-1) if normalize else made).cpu().numpy()
            done += len(batch)
            if progress:
                end = "" if done < len(rows) else "\n"
                print(f"\r{done} of {len(rows)} texts", end=end, file=sys.stderr, flush=True)
        return vectors[0] if isinstance(texts, str) else vectors

    def encode_words(self, words: Sequence[str]) -> np.ndarray:
        """Vectors of a sentence's words, float32 (words, d): the means of their tokens' states.

        The sentence is the words with a space between them (section 3.1 of the paper).
        """
        return word_states(self, [words])[0].numpy()

    def save(self, folder: str | Path) -> None:
        """Write an ordinary checkpoint, with the files of sentence-transformers, for other tools.

        Raises ValueError if adapters are not merged, or if the folder holds something else.
        """
        save_encoder(self, Path(folder))


# --- Command line ------------------------------------------------------------------------------


def add_model_flags(command: argparse.ArgumentParser, **options) -> None:
    """Add the flags of every command that takes a model; `options` are for --model."""
    add = command.add_argument
    add("--model", help="checkpoint folder, or a name on the Hugging Face hub", **options)
    text = "adapters to merge, in this order: folders, or names on the hub"
    add("--adapters", nargs="*", default=[], help=text)
    text = "template around every text: the chat markers of a model, or a prompt"
    add("--template", choices=TEMPLATES, help=text)
    add("--before", metavar="TEXT", help="text before every text, after the template's start")
    add("--after", metavar="TEXT", help="text after every text; it is never cut")
    text = "text between an instruction and a text (default: from the folder, else a line break)"
    add("--separator", help=text)
    direction = {"dest": "is_causal", "action": "store_const"}
    add("--causal", const=True, help="attend to the left only", **direction)
    text = "attend both ways (default: from the folder of an encoder, else both ways)"
    add("--bidirectional", const=False, help=text, **direction)
    add("--dtype", choices=("float32", "bfloat16"), help="type of the weights")
    text = "(default: the first one that the machine has)"
    add("--device", choices=("cuda", "mps", "cpu"), help=text)
    text = "compile the layers with torch.compile: takes a minute; useful on a GPU"
    add("--compile", action="store_true", help=text)


def load(args: argparse.Namespace, **options) -> LLM2Vec:
    """The model that the flags name; `options` override the flags."""
    dtype = getattr(torch, args.dtype) if args.dtype else None
    template = args.template
    if args.before or args.after:
        opening, closing = TEMPLATES.get(template, ("", ""))
        template = (opening + (args.before or ""), (args.after or "") + closing)
    names = ("adapters", "device", "separator", "is_causal")
    given = {name: getattr(args, name) for name in names} | {"template": template, "dtype": dtype}
    model = LLM2Vec.from_pretrained(args.model, **given | options)
    if args.compile:
        compile_layers(model.decoder)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(prog="python llm2vec.py", description="Turn texts to vectors.")
    commands = parser.add_subparsers(dest="command", required=True)
    encode = commands.add_parser("encode", help="write the vectors of the texts in a file")
    add = encode.add_argument
    text = "one text a line, or .jsonl, .json, .csv with `text`; - is standard input"
    add("--input", required=True, help=text)
    add("--output", required=True, help=".npy, or .jsonl with `vector`; - is standard output")
    add("--normalize", action="store_true", help="vectors of length 1")
    similar = commands.add_parser("similar", help="print the cosines between a few sentences")
    similar.add_argument("texts", nargs="*", help="sentences, each in quotation marks")
    for command in (encode, similar):
        add_model_flags(command, required=True)
        add = command.add_argument
        add("--instruction", help="text before each text; it is read, but not averaged")
        add("--pooling", choices=POOLING, help="(default: from the folder, else mean)")
        add("--max-length", type=int, metavar="N", help="read at most N tokens of a text")
    args = parser.parse_args()
    if args.command == "similar" and not args.texts:  # --adapters took them as its values
        is_adapter = [checkpoints.is_folder_or_hub_name(name) for name in args.adapters]
        if all(is_adapter[1:]):
            similar.error("no sentences: give two or more, each in quotation marks")
        n = is_adapter.index(False, 1)
        args.adapters, args.texts = args.adapters[:n], args.adapters[n:]
    model = load(args, pooling=args.pooling, max_length=args.max_length)
    if args.command == "encode":
        encode_file(model, args.input, args.output, args.instruction, args.normalize)
        return
    report_cut(model, count_cut(model, args.texts, args.instruction), len(args.texts))
    vectors = torch.from_numpy(model.encode(args.texts, args.instruction, normalize=True))
    for row, text in zip((vectors @ vectors.T).tolist(), args.texts, strict=True):
        print("  ".join(f"{cosine:6.3f}" for cosine in row), "", text)


if __name__ == "__main__":
    cli(main)
