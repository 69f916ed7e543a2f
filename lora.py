"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685), by hand.

A frozen projection W gets two small matrices beside it: y = W x + scaling * B A dropout(x), with
A (rank, in), B (out, rank) and scaling = alpha / rank. B starts at zero, so a fresh adapter changes
nothing; a trained one can be added into W, and then costs nothing. Adapters are float32 while W may
be bfloat16, because the steps of an optimiser are far smaller than the spacing of bfloat16; they
are multiplied in the type of W, as mixed precision does.
"""

import functools
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from safetensors.torch import save as save_bytes
from torch import Tensor, nn

from llm2vec_data.checkpoints import (
    ADAPTER,
    EXTRA,
    check_tensor,
    find_adapter,
    matched,
    read_adapter_config,
    read_pairs_of_matrices,
)
from llm2vec_data.disk import reading, write_json, write_whole

PARTS = ("lora_A", "lora_B")  # the two matrices of an adapter


class LoRALinear(nn.Linear):
    """A frozen nn.Linear with `lora_A` and `lora_B`, and only these are trained."""

    lora_A: nn.Linear  # (rank, in)
    lora_B: nn.Linear  # (out, rank)
    scale: float  # the scaling, alpha / rank
    dropout: float

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        A, B = self.lora_A.weight.to(x.dtype), (self.scale * self.lora_B.weight).to(x.dtype)
        return super().forward(x) + dropout(x, self.dropout, self.training) @ A.T @ B.T

    def delta(self) -> Tensor:
        """The matrix that the adapter adds to the weight, (out, in) float32."""
        return self.scale * self.lora_B.weight @ self.lora_A.weight


def adapt(module: nn.Linear, rank: int, scaling: float, dropout: float) -> None:
    """Turn an nn.Linear into a LoRALinear: the same object, weight and name with another class."""
    module.__class__ = QLoRALinear if isinstance(module, NF4Linear) else LoRALinear
    module.lora_A = nn.Linear(module.in_features, rank, bias=False)
    module.lora_B = nn.Linear(rank, module.out_features, bias=False)
    nn.init.kaiming_uniform_(module.lora_A.weight, a=math.sqrt(5))
    nn.init.zeros_(module.lora_B.weight)
    module.scale, module.dropout = scaling, dropout
    module.to(module.weight.device)  # drawn on the CPU: the same numbers on every device


def decoder_of(model: nn.Module) -> nn.Module:
    """The decoder of an encoder, or the decoder itself. Every function below takes either."""
    return getattr(model, "decoder", model)


def projections(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers inside `layers` of the decoder, by name."""
    modules = decoder_of(model).layers.named_modules()
    return {f"layers.{name}": m for name, m in modules if isinstance(m, nn.Linear)}


def adapted(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted projections of the decoder, by name."""
    return {name: m for name, m in projections(model).items() if isinstance(m, LoRALinear)}


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by their names in an encoder."""
    start = "" if decoder_of(model) is not model else "decoder."
    return {start + name: p for name, p in model.named_parameters() if p.requires_grad}


def add_lora(
    model: nn.Module,
    rank: int = 16,
    alpha: float | None = None,
    dropout: float = 0.05,
    targets: Sequence[str] | None = None,
) -> list[nn.Parameter]:
    """Freeze a decoder and put fresh adapters on its projections.

    Args:
        alpha: the scaling times the rank; by default twice the rank.
        targets: ends of the names of projections; by default every linear layer of `model.layers`,
            as in the paper. A target may be a norm, too: its weight itself is trained, without an
            adapter. `norm` is the final norm.

    Returns the parameters to train. Raises ValueError for a target that the model lacks, a rank
    below 1, or a model that has adapters already.
    """
    if adapted(model):
        raise ValueError("the model has adapters already: merge_lora first")
    if rank < 1:
        raise ValueError(f"rank is {rank}, expected 1 or more")
    decoder, found = decoder_of(model), projections(model)
    if targets is not None:
        found |= {name: m for name, m in decoder.named_modules() if name.endswith("norm")}
        ends = [f".{target}" for target in targets]
        for end in ends:
            if not any(f".{name}".endswith(end) for name in found):
                message = "is not the name of a projection or a norm in this model"
                raise ValueError(f"target {end[1:]!r} {message}")
        found = {name: m for name, m in found.items() if f".{name}".endswith(tuple(ends))}
    decoder.requires_grad_(False)
    for name, module in found.items():
        if isinstance(module, nn.Linear):
            adapt(module, rank, (2 * rank if alpha is None else alpha) / rank, dropout)
        else:  # the last norm makes the vectors: these may be float32 with coarser weights
            (module.float() if name == "norm" else module).requires_grad_(True)
    return [p for p in decoder.parameters() if p.requires_grad]


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Add each adapter to the weight of its projection, in float32, and remove it.

    Raises ValueError for 4-bit weights, which are too coarse to hold an adapter.
    """
    if is_quantized(model):
        raise ValueError("4-bit weights take no adapter: merge it into the original weights")
    for module in adapted(model).values():
        module.weight.copy_(module.weight.float() + module.delta())
        decoder_of(model).name_or_path = None  # no checkpoint has these weights
    remove_lora(model)


def remove_lora(model: nn.Module) -> None:
    """Remove the adapters: the model is as it was before `add_lora`, and frozen."""
    decoder = decoder_of(model)
    decoder.norm.to(decoder.embed_tokens.weight.dtype)
    for module in adapted(model).values():
        for part in (*PARTS, "scale", "dropout"):
            delattr(module, part)
        module.__class__ = NF4Linear if isinstance(module, NF4Linear) else nn.Linear


# --- Files, in PEFT's format -------------------------------------------------------------------
# adapter_config.json holds the numbers, adapter_model.safetensors the matrices, by the names of
# their projections. Published LLM2Vec adapters have the names of the inner model
# (base_model.model.layers...); PEFT on a causal-LM model adds a second `model.`. Other trained
# weights (norms, a pooler, all weights) are in extra.safetensors, by name.


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Write the parameters that require a gradient: PEFT's files, and extra.safetensors.

    The adapter fits the inner model (transformers' AutoModel). Raises ValueError for a model
    without adapters, unless it is an encoder with other trained parameters.
    """
    modules, folder = adapted(model), Path(folder)
    extra = {name: p.detach() for name, p in trained(model).items() if "lora_" not in name}
    if not modules and (not extra or model is decoder_of(model)):
        raise ValueError("the model has no adapters to save")
    folder.mkdir(parents=True, exist_ok=True)
    if extra:
        write_whole(folder / EXTRA, save_bytes(extra, {"format": "pt"}))
    if not modules:
        return
    state = {
        f"base_model.model.{name}.{part}.weight": getattr(module, part).weight.detach()
        for name, module in modules.items()
        for part in PARTS
    }
    ranks = {name: module.lora_A.out_features for name, module in modules.items()}
    alphas = {name: module.scale * ranks[name] for name, module in modules.items()}
    first = next(iter(modules))
    config = {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": decoder_of(model).name_or_path,  # None: others were merged
        "r": ranks[first],
        "lora_alpha": alphas[first],
        "rank_pattern": {n: r for n, r in ranks.items() if r != ranks[first]},
        "alpha_pattern": {n: a for n, a in alphas.items() if a != alphas[first]},
        "lora_dropout": modules[first].dropout,
        "target_modules": sorted({name.rpartition(".")[2] for name in modules}),
        "bias": "none",
        "inference_mode": True,
    }
    write_whole(folder / ADAPTER[1], save_bytes(state, {"format": "pt"}))
    write_json(folder / ADAPTER[0], config)


@torch.no_grad()
def load_adapter(model: nn.Module, path_or_name: str | Path) -> None:
    """Load an adapter, saved by this project or by PEFT, onto a model, and freeze its decoder.

    rank_pattern, alpha_pattern and use_rslora work as in peft 0.21. Weights in extra.safetensors
    replace the model's weights of the same names. Tensors for the heads of a model are skipped,
    with a note on standard error. Raises FileNotFoundError, or ValueError that names the file and
    the part that is not supported or does not fit; the model is then unchanged.
    """
    if adapted(model):
        raise ValueError("the model has adapters already: merge_lora first")
    folder, pairs = find_adapter(path_or_name), []
    if (folder / ADAPTER[0]).exists():
        config = read_adapter_config(folder / ADAPTER[0])
        pairs = read_matrices(folder / ADAPTER[1], config, dict(decoder_of(model).named_modules()))
    if (folder / "log.jsonl").exists() and not (folder / "finished").exists():
        print(f"{folder}: a run that is not finished; its newest state is used", file=sys.stderr)
    load_extra(model, folder)
    decoder_of(model).requires_grad_(False)
    for module, peft_name, pair in pairs:
        rank = pair["lora_A"].shape[0]
        alpha = matched(config["alpha_pattern"], peft_name, config["lora_alpha"])
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        adapt(module, rank, scaling, config.get("lora_dropout", 0.0))
        for part in PARTS:
            getattr(module, part).weight.copy_(pair[part])


def read_matrices(file: Path, config: dict, modules: dict[str, nn.Module]) -> list[tuple]:
    """The matrices in a file of PEFT: each projection, its name in PEFT, and its pair."""
    found = []
    with reading(file):
        for name, (peft_name, pair) in read_pairs_of_matrices(file).items():
            module = modules.get(name)
            if set(pair) != set(PARTS):
                raise ValueError(f"{name} has {', '.join(sorted(pair))}, not lora_A and lora_B")
            if not isinstance(module, nn.Linear):
                raise ValueError(f"{name} is not the name of a projection in this model")
            rank = matched(config["rank_pattern"], peft_name, config["r"])
            shapes = {"lora_A": (rank, module.in_features), "lora_B": (module.out_features, rank)}
            for part, shape in shapes.items():
                pair[part] = check_tensor(pair[part], f"{name}.{part}", shape, torch.float32)
            found.append((module, peft_name, pair))
    return found


def load_extra(model: nn.Module, folder: Path) -> None:
    """Copy the weights in a folder's extra.safetensors, if it has one, into a model."""
    file, start = folder / EXTRA, "" if decoder_of(model) is not model else "decoder."
    if not file.exists():
        return
    parameters, found = {start + name: p for name, p in model.named_parameters()}, {}
    with reading(file):
        for name, weight in load_file(file).items():
            if name.startswith("heads."):  # for training only
                continue
            if name not in parameters:
                raise ValueError(f"{name} has no place in this {type(model).__name__}")
            p = parameters[name]
            found[name] = check_tensor(weight, name, p.shape, p.dtype)
    for name, weight in found.items():
        parameters[name].data.copy_(weight)
    if any(name.startswith("decoder.") for name in found):
        decoder_of(model).name_or_path = None  # no checkpoint has these weights


# --- Dropout on a CPU --------------------------------------------------------------------------


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """torch's dropout; on a CPU four numbers share 64 random bits.

    On a CPU, an MNTP step of SmolLM2 then takes an eighth less time, a SimCSE step a fifth less.
    """
    if x.device.type != "cpu" or not training or p == 0 or torch.compiler.is_compiling():
        return F.dropout(x, p, training)
    return torch.where(kept(x, p), x, 0) / (1 - p)


def kept(x: Tensor, p: float) -> Tensor:
    """Booleans of the shape of x, each False with probability p, to within 2^-16."""
    n = x.numel()
    bits = torch.empty(n // 4 + 1, dtype=torch.int64, device=x.device).random_(-(2**63), None)
    return (bits.view(torch.int16)[:n] >= round(p * 2**16) - 2**15).view(x.shape)


# --- A 4-bit base ------------------------------------------------------------------------------
# QLoRA (Dettmers et al. 2023, arXiv 2305.14314). Training never changes a frozen weight, so it may
# be stored coarsely. A block of 64 numbers has one float32, its largest absolute value (absmax); a
# number is absmax times one of 16 values in a table, and its 4-bit code is the position there. A
# matrix is decoded to be multiplied, in the forward pass and again in the backward pass. With its
# part of absmax, a weight takes 4.5 bits instead of 16. The adapters are trained with this
# rounding; after training, they are merged into the original weights.

BLOCK = 64


class NF4Linear(nn.Linear):
    """A frozen projection in 4 bits, made by `quantize_nf4`."""

    scales: Tensor  # absmax, (out * in / 64) float32; `weight`: (out * in / 2) bytes of two codes

    def forward(self, x: Tensor) -> Tensor:
        y = NF4Product.apply(x, self)
        return y if self.bias is None else y + self.bias

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """The weight, (out, in)."""
        pairs = nf4_pairs(self.weight.device, dtype)
        blocks = F.embedding(self.weight.int(), pairs).view(-1, BLOCK)
        return (blocks * self.scales[:, None].to(dtype)).view(self.out_features, self.in_features)


class QLoRALinear(LoRALinear, NF4Linear):
    """An adapter on a 4-bit projection: the super() of LoRALinear is NF4Linear here."""


class NF4Product(torch.autograd.Function):
    """x (..., in) times a 4-bit matrix; each pass decodes it again, to save memory."""

    @staticmethod
    def forward(ctx, x: Tensor, module: NF4Linear) -> Tensor:
        ctx.module = module
        return F.linear(x, module.decoded(x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.module.decoded(grad.dtype), None


def is_quantized(model: nn.Module) -> bool:
    return any(isinstance(module, NF4Linear) for module in model.modules())


def quantize_nf4(model: nn.Module, device: str | torch.device = "cpu") -> None:
    """Freeze a decoder, store its projections in 4 bits, and move the model to a device.

    Raises ValueError for adapters that are not merged, or a projection not divisible into blocks.
    """
    if adapted(model):
        raise ValueError("the model has adapters: merge_lora first")
    decoder_of(model).requires_grad_(False)
    table = nf4_table().to(device)
    between = (table[1:] + table[:-1]) / 2  # the code of a number: how many of these are smaller
    for name, module in projections(model).items():
        if module.weight.numel() % BLOCK:
            raise ValueError(f"{name} has {module.weight.numel()} numbers, not blocks of {BLOCK}")
        blocks = module.weight.detach().to(device).float().view(-1, BLOCK)
        absmax = blocks.abs().amax(dim=1)
        blocks = blocks / absmax.clamp_min(1e-30)[:, None]
        codes = torch.bucketize(blocks, between, out_int32=True).to(torch.uint8).view(-1, 2)
        module.weight = nn.Parameter(codes[:, 0] * 16 + codes[:, 1], requires_grad=False)
        module.register_buffer("scales", absmax)
        module.__class__ = NF4Linear
    model.to(device)


@functools.cache
def nf4_pairs(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The two values of each byte, (256, 2)."""
    table = nf4_table()
    return torch.stack([table.repeat_interleave(16), table.repeat(16)], dim=1).to(device, dtype)


def nf4_table() -> Tensor:
    """The 16 values of NormalFloat, ascending from -1 to 1, float32 (section 3 of QLoRA).

    Weights are about normally distributed, so the values are quantiles of the normal distribution:
    each code is then used about as often as any other. Eight quantiles are positive and seven
    negative, evenly spaced in probability, and zero is exact. The quantile of probability 1 is
    infinite; the outermost ones are half-way between 1 - 1/30 and 1 - 1/32.
    """
    outermost = 1 - (1 / 30 + 1 / 32) / 2
    positive, negative = (
        torch.special.ndtri(torch.linspace(outermost, 0.5, n + 1, dtype=torch.float64))[:-1]
        for n in (8, 7)
    )
    return torch.cat([-negative, torch.zeros(1), positive.flip(0)]).div(positive[0]).float()
