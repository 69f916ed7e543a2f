"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685), by hand.

A frozen projection W gets two small matrices beside it: y = W x + (alpha / rank) B A dropout(x),
with A (rank, in) and B (out, rank). B starts at zero, so a fresh adapter changes nothing; a trained
one can be added into W, so that it costs nothing. Adapters are kept in float32 while W may be
bfloat16, because an optimiser's steps are far smaller than bfloat16's spacing; they are multiplied
in W's type, as mixed precision does.
"""

import functools
import json
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as save_bytes
from torch import Tensor, nn

# All seven projections of a layer, as the paper adapts them (its appendix on training details).
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRALinear(nn.Linear):
    """A frozen nn.Linear that owns `lora_A` and `lora_B`, which alone have gradients."""

    lora_A: nn.Linear  # (rank, in)
    lora_B: nn.Linear  # (out, rank)
    scale: float  # alpha / rank
    dropout: float

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        x_in, scale = x, self.scale
        if self.training and self.dropout > 0:
            if x.device.type != "cpu" or torch.compiler.is_compiling():
                x_in = F.dropout(x, self.dropout)
            else:
                x_in, scale = torch.where(kept(x, self.dropout), x, 0), scale / (1 - self.dropout)
        A, B = self.lora_A.weight.to(x.dtype), (self.lora_B.weight * scale).to(x.dtype)
        return super().forward(x) + F.linear(F.linear(x_in, A), B)

    def delta(self) -> Tensor:
        """What the adapter adds to the weight, (out, in) float32."""
        return self.lora_B.weight @ self.lora_A.weight * self.scale


def kept(x: Tensor, p: float) -> Tensor:
    """What dropout spares of x: booleans of its shape, each False with chance p to within 2^-16.

    For a CPU: four numbers share 64 random bits. torch's dropout draws 64 for each number, which
    there takes a fifth of a training step.
    """
    n = x.numel()
    bits = torch.empty(n // 4 + 1, dtype=torch.int64, device=x.device).random_(-(2**63), None)
    return (bits.view(torch.int16)[:n] >= round(p * 2**16) - 2**15).view(x.shape)


class NF4Linear(nn.Linear):
    """A frozen projection in 4 bits, made by `quantize_nf4` below."""

    scales: Tensor  # (out * in / 64), float32; `weight` is (out * in / 2) bytes of two codes each

    def forward(self, x: Tensor) -> Tensor:
        y = NF4Product.apply(x, self)
        return y if self.bias is None else y + self.bias


class QLoRALinear(LoRALinear, NF4Linear):
    """An adapter on a 4-bit projection: LoRALinear's super() is NF4Linear here."""


def adapt(module: nn.Linear, rank: int, scale: float, dropout: float) -> None:
    """Turn an nn.Linear into a LoRALinear. It changes class, not identity: weight and name stay."""
    module.__class__ = QLoRALinear if isinstance(module, NF4Linear) else LoRALinear
    module.lora_A = nn.Linear(module.in_features, rank, bias=False)
    module.lora_B = nn.Linear(rank, module.out_features, bias=False)
    nn.init.kaiming_uniform_(module.lora_A.weight, a=math.sqrt(5))
    nn.init.zeros_(module.lora_B.weight)
    module.to(module.weight.device)  # drawn on the CPU: the same numbers for every device
    module.scale, module.dropout = scale, dropout


def adapted(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted projections of a model, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def add_lora(
    model: nn.Module,
    rank: int = 16,
    alpha: float = 32,
    dropout: float = 0.05,
    targets: Sequence[str] = PROJECTIONS,
) -> list[nn.Parameter]:
    """Freeze a model and put fresh adapters on its projections, those whose name ends in a target.

    Returns the adapters' parameters, all that there is to train. Raises ValueError for a target
    that the model lacks, a rank below 1, or a model that has adapters already.
    """
    if adapted(model):
        raise ValueError("the model has adapters already: merge_lora first")
    if rank < 1:
        raise ValueError(f"rank is {rank}, expected 1 or more")
    found = []
    for target in targets:
        named = [m for name, m in model.named_modules() if f".{name}".endswith(f".{target}")]
        if not named or not all(isinstance(module, nn.Linear) for module in named):
            raise ValueError(f"target {target!r} is not the name of a projection in this model")
        found += named
    model.requires_grad_(False)
    for module in dict.fromkeys(found):
        adapt(module, rank, alpha / rank, dropout)
    return [p for m in adapted(model).values() for p in (m.lora_A.weight, m.lora_B.weight)]


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Add each adapter into its projection, computed in float32, and remove it.

    Raises ValueError for a 4-bit projection, whose steps are too coarse to hold an adapter.
    """
    if is_quantized(model):
        raise ValueError("4-bit weights take no adapter: merge it into the weights as they were")
    for module in adapted(model).values():
        module.weight.copy_(module.weight.float() + module.delta())
        del module.lora_A, module.lora_B, module.scale, module.dropout
        module.__class__ = nn.Linear


# --- A 4-bit base ------------------------------------------------------------------------------
# QLoRA (Dettmers et al. 2023, arXiv 2305.14314). Training never changes a frozen weight, so it may
# be stored coarsely: in blocks of 64 numbers, each a 4-bit code, a place in a table of 16 values,
# times the largest absolute value of its block. A matrix is decoded where it is multiplied, in the
# forward pass and again in the backward pass, and not kept. Per weight that is 4 bits and half a
# bit of its block's float32 scale, instead of 16. The adapters learn to live with the rounding; for
# use, they are merged into the weights as they were.

BLOCK = 64


def nf4_table() -> Tensor:
    """The 16 values of NormalFloat, ascending from -1 to 1, float32 (their section 3).

    Weights are about normally distributed, so the values are quantiles of the normal distribution:
    each code is then used about as often as any other, which is how 4 bits say most. Eight
    quantiles are positive and seven negative, evenly spaced in probability, and zero is exact. The
    outermost would be infinite at probability 1; they stop half-way between 1 - 1/30 and 1 - 1/32.
    """
    outermost = 1 - (1 / 30 + 1 / 32) / 2
    positive, negative = (
        torch.special.ndtri(torch.linspace(outermost, 0.5, n + 1, dtype=torch.float64))[:-1]
        for n in (8, 7)
    )
    return torch.cat([-negative, torch.zeros(1), positive.flip(0)]).div(positive[0]).float()


def quantize_nf4(
    model: nn.Module, device: str | torch.device = "cpu", targets: Sequence[str] = PROJECTIONS
) -> None:
    """Freeze a model, store its projections in 4 bits, and move it to a device, matrix by matrix.

    Raises ValueError for adapters that are not merged, or a projection that blocks of 64 don't fit.
    """
    if adapted(model):
        raise ValueError("the model has adapters: merge_lora first")
    model.requires_grad_(False)
    table = nf4_table().to(device)
    between = (table[1:] + table[:-1]) / 2  # a number's code is how many of these lie below it
    for name, module in model.named_modules():
        if name.rpartition(".")[2] not in targets:
            continue
        if module.weight.numel() % BLOCK:
            raise ValueError(f"{name} has {module.weight.numel()} numbers, not blocks of {BLOCK}")
        blocks = module.weight.detach().to(device).float().view(-1, BLOCK)
        scales = blocks.abs().amax(dim=1)
        blocks = blocks / scales.clamp_min(1e-30)[:, None]
        codes = torch.bucketize(blocks, between, out_int32=True).to(torch.uint8).view(-1, 2)
        module.weight = nn.Parameter(codes[:, 0] * 16 + codes[:, 1], requires_grad=False)
        module.register_buffer("scales", scales)
        module.__class__ = NF4Linear
    model.to(device)


def is_quantized(model: nn.Module) -> bool:
    return any(isinstance(module, NF4Linear) for module in model.modules())


def decode_nf4(codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers, (out * in,), of bytes of two codes each and their blocks' scales."""
    blocks = F.embedding(codes.int(), nf4_pairs(codes.device, dtype)).view(-1, BLOCK)
    return (blocks * scales[:, None].to(dtype)).flatten()


@functools.cache
def nf4_pairs(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The two values that each byte stands for, (256, 2)."""
    table = nf4_table()
    return torch.stack([table.repeat_interleave(16), table.repeat(16)], dim=1).to(device, dtype)


class NF4Product(torch.autograd.Function):
    """x (..., in) times a 4-bit matrix, which both passes decode and neither keeps."""

    @staticmethod
    def weight(module: NF4Linear, dtype: torch.dtype) -> Tensor:
        weight = decode_nf4(module.weight, module.scales, dtype)
        return weight.view(module.out_features, module.in_features)

    @staticmethod
    def forward(ctx, x: Tensor, module: NF4Linear) -> Tensor:
        ctx.module = module
        return F.linear(x, NF4Product.weight(module, x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ NF4Product.weight(ctx.module, grad.dtype), None


# --- Files, in PEFT's format -------------------------------------------------------------------
# adapter_config.json holds the numbers, adapter_model.safetensors the matrices, whose names say
# which projections are adapted. Published LLM2Vec adapters were made on the inner model
# (base_model.model.layers...); PEFT on a causal-LM model writes one `model.` more.


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Write a model's adapters as PEFT would, on the inner model (transformers' AutoModel)."""
    modules = adapted(model)
    if not modules:
        raise ValueError("the model has no adapters to save")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        f"base_model.model.{name}.{part}.weight": getattr(module, part).weight.detach().contiguous()
        for name, module in modules.items()
        for part in ("lora_A", "lora_B")
    }
    ranks = {name: module.lora_A.out_features for name, module in modules.items()}
    alphas = {name: module.scale * ranks[name] for name, module in modules.items()}
    first = next(iter(modules))
    config = {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": None,
        "r": ranks[first],
        "lora_alpha": alphas[first],
        "rank_pattern": {n: r for n, r in ranks.items() if r != ranks[first]},
        "alpha_pattern": {n: a for n, a in alphas.items() if a != alphas[first]},
        "lora_dropout": modules[first].dropout,
        "target_modules": sorted({name.rpartition(".")[2] for name in modules}),
        "bias": "none",
        "inference_mode": True,
    }
    # The config comes last: a folder that has one is whole.
    write_whole(folder / "adapter_model.safetensors", save_bytes(state, {"format": "pt"}))
    write_whole(folder / "adapter_config.json", (json.dumps(config, indent=2) + "\n").encode())


def write_whole(file: Path, content: bytes) -> None:
    """Write a file so that its name never stands for a part of it, whatever stops the process."""
    part = file.with_name(file.name + ".part")
    try:
        with part.open("wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


@torch.no_grad()
def load_adapter(model: nn.Module, folder: str | Path) -> None:
    """Put an adapter that this project or PEFT saved onto a model, which it freezes.

    Honours rank_pattern, alpha_pattern and use_rslora as peft 0.21 does. Raises FileNotFoundError,
    or ValueError naming the file and what can't be honoured or does not fit; the model is then as
    it was before.
    """
    file, config_file = (
        Path(folder) / name for name in ("adapter_model.safetensors", "adapter_config.json")
    )
    for needed in (file, config_file):
        if not needed.is_file():
            raise FileNotFoundError(f"{needed}: no such file; an adapter folder has one")
        target, home = needed.resolve(), Path(folder).resolve()
        # The hub's cache is made of links to blobs, see `inside` in llm2vec.py.
        blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
        if not any(target.is_relative_to(place) for place in (home, blobs)):
            raise ValueError(f"{needed}: a link out of its folder, to {target}")
    if adapted(model):
        raise ValueError("the model has adapters already: merge_lora first")
    size, room = file.stat().st_size, memory()
    if size > room:
        raise ValueError(f"{file}: takes {size:,} bytes, this machine has {room:,}")
    try:
        config, state = json.loads(config_file.read_text(encoding="utf-8")), load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: not a whole safetensors file: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{config_file}: not valid JSON: {error}") from None
    _check(config, config_file)

    pairs: dict[str, dict[str, Tensor]] = {}
    for key, weight in state.items():
        name, _, part = key.removesuffix(".weight").rpartition(".")
        name = name.removeprefix("base_model.model.")  # may start with `model.`, as patterns may
        pairs.setdefault(name, {})[part] = weight
    if not pairs:
        raise ValueError(f"{file}: holds no adapter")
    modules = {f"{p}{n}": m for n, m in model.named_modules() for p in ("", "model.")}
    for name, pair in pairs.items():
        module, rank = modules.get(name), _pattern(config, "rank_pattern", name, config["r"])
        if set(pair) != {"lora_A", "lora_B"}:
            raise ValueError(f"{file}: {name} has {', '.join(sorted(pair))}, not lora_A and lora_B")
        if not isinstance(module, nn.Linear):
            raise ValueError(f"{file}: {name} is not the name of a projection in this model")
        if f"model.{name}" in pairs:
            raise ValueError(f"{file}: {name} is there twice, once as model.{name}")
        fits = {"lora_A": [rank, module.in_features], "lora_B": [module.out_features, rank]}
        for part, shape in fits.items():
            weight = pair[part]
            if list(weight.shape) != shape:
                found = list(weight.shape)
                raise ValueError(f"{file}: {name}.{part} is {found}, expected {shape}")
            if weight.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
                raise ValueError(f"{file}: {name}.{part} has type {weight.dtype}")
            if not weight.float().isfinite().all():
                raise ValueError(f"{file}: {name}.{part} holds NaN or infinity")
    model.requires_grad_(False)
    for name, pair in pairs.items():
        module, rank = modules[name], pair["lora_A"].shape[0]
        alpha = _pattern(config, "alpha_pattern", name, config["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        adapt(module, rank, scale, config.get("lora_dropout", 0.0))
        module.lora_A.weight.copy_(pair["lora_A"])
        module.lora_B.weight.copy_(pair["lora_B"])
        module.train(model.training)


def memory() -> int:
    """Bytes of memory that the machine has."""
    if not hasattr(os, "sysconf"):  # Windows does not say
        return sys.maxsize
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# What PEFT has and this file has not: it would change the numbers, so it is refused by name.
UNSUPPORTED = ("use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens", "lora_bias")
UNSUPPORTED += ("modules_to_save", "fan_in_fan_out", "layer_replication")


def _check(config: object, file: Path) -> None:
    """Refuse by name what this adapter code can't honour."""
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ValueError(f"{file}: peft_type is not LORA")
    for key in ("r", "lora_alpha"):
        if type(config.get(key)) not in (int, float) or not 0 < config[key] < 1e15:
            raise ValueError(f"{file}: {key} is {config.get(key)!r}, expected a number above 0")
    dropout = config.get("lora_dropout", 0.0)
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise ValueError(
            f"{file}: lora_dropout is {dropout!r}, expected a number from 0 to below 1"
        )
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        try:
            whole = all(re.compile(_PLACE % p) and 0 < v < 1e15 for p, v in patterns.items())
        except (re.error, TypeError, AttributeError, RecursionError, OverflowError):
            whole = False
        if not whole:
            raise ValueError(f"{file}: {key} is not an object of patterns and numbers above 0")
        for p in patterns:  # one that repeats repetitions could be matched until the end of days
            if len(re.findall(r"[*+?{|]", p)) > 6 or re.search(r"\)[*+{]", p):
                raise ValueError(f"{file}: {key} has too intricate a pattern: {p!r:.60}")
    for key in UNSUPPORTED:
        if config.get(key):
            raise ValueError(f"{file}: {key} is {config[key]!r}, which is not supported")
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):  # these change the base
        raise ValueError(f"{file}: init_lora_weights is {start!r}, which is not supported")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{file}: bias is {config['bias']!r}, which is not supported")


_PLACE = r"(.*\.)?(%s)$"  # the end of a name, from a dot on


def _pattern(config: dict, field: str, name: str, default: float) -> float:
    """The value of the first pattern that the end of a name matches, as in PEFT."""
    for pattern, value in (config.get(field) or {}).items():
        if re.match(_PLACE % pattern, name):
            return value
    return default
