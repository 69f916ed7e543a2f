"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685), by hand.

A frozen projection W gets two small matrices beside it: y = W x + scale * B A dropout(x), with
A (rank, in), B (out, rank) and scale = alpha / rank. B starts at zero, so a fresh adapter changes
nothing; a trained one can be added into W, and then costs nothing. Adapters are kept in float32
while W may be bfloat16, because the steps of an optimiser are far smaller than the spacing of
bfloat16; they are multiplied in the type of W, as mixed precision does.
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
from safetensors.torch import load_file
from safetensors.torch import save as save_bytes
from torch import Tensor, nn

from llm2vec import PREFIX, UNUSED, checked, read_json, reading, tell_unused

PARTS = ("lora_A", "lora_B")  # what an adapter is made of, and what is written of it


class LoRALinear(nn.Linear):
    """A frozen nn.Linear that owns `lora_A` and `lora_B`, which alone have gradients."""

    lora_A: nn.Linear  # (rank, in)
    lora_B: nn.Linear  # (out, rank)
    scale: float  # alpha / rank
    dropout: float

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        A, B = self.lora_A.weight.to(x.dtype), (self.scale * self.lora_B.weight).to(x.dtype)
        return super().forward(x) + dropout(x, self.dropout, self.training) @ A.T @ B.T

    def delta(self) -> Tensor:
        """What the adapter adds to the weight, (out, in) float32."""
        return self.scale * self.lora_B.weight @ self.lora_A.weight


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """torch's dropout; on a CPU four numbers share 64 random bits.

    That takes an eighth off an MNTP step of SmolLM2 there, and a fifth off a SimCSE step.
    """
    if x.device.type != "cpu" or not training or p == 0 or torch.compiler.is_compiling():
        return F.dropout(x, p, training)
    return torch.where(kept(x, p), x, 0) / (1 - p)


def kept(x: Tensor, p: float) -> Tensor:
    """Booleans of the shape of x, each False with chance p to within 2^-16."""
    n = x.numel()
    bits = torch.empty(n // 4 + 1, dtype=torch.int64, device=x.device).random_(-(2**63), None)
    return (bits.view(torch.int16)[:n] >= round(p * 2**16) - 2**15).view(x.shape)


def adapt(module: nn.Linear, rank: int, scale: float, dropout: float) -> None:
    """Turn an nn.Linear into a LoRALinear. It changes class, not identity: weight and name stay."""
    module.__class__ = QLoRALinear if isinstance(module, NF4Linear) else LoRALinear
    module.lora_A = nn.Linear(module.in_features, rank, bias=False)
    module.lora_B = nn.Linear(rank, module.out_features, bias=False)
    nn.init.kaiming_uniform_(module.lora_A.weight, a=math.sqrt(5))
    nn.init.zeros_(module.lora_B.weight)
    module.scale, module.dropout = scale, dropout
    module.to(module.weight.device)  # drawn on the CPU: the same numbers on every device


def projections(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers inside `model.layers`, by name."""
    modules = model.layers.named_modules()
    return {f"layers.{name}": m for name, m in modules if isinstance(m, nn.Linear)}


def adapted(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted projections of a model, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def add_lora(
    model: nn.Module,
    rank: int = 16,
    alpha: float | None = None,
    dropout: float = 0.05,
    targets: Sequence[str] | None = None,
) -> list[nn.Parameter]:
    """Freeze a model and put fresh adapters on its projections.

    Args:
        alpha: over rank, it is the scale; by default twice the rank.
        targets: the ends of the projections' names; by default every linear layer of
            `model.layers`, as the paper adapts them.

    Returns the parameters of the adapters, all that there is to train. Raises ValueError for a
    target that the model lacks, a rank below 1, or a model that has adapters already.
    """
    if adapted(model):
        raise ValueError("the model has adapters already: merge_lora first")
    if rank < 1:
        raise ValueError(f"rank is {rank}, expected 1 or more")
    found = projections(model)
    ends = [""] if targets is None else [f".{target}" for target in targets]
    for end in ends:
        if not any(name.endswith(end) for name in found):
            raise ValueError(f"target {end[1:]!r} is not the name of a projection in this model")
    model.requires_grad_(False)
    for name, module in found.items():
        if name.endswith(tuple(ends)):
            adapt(module, rank, (2 * rank if alpha is None else alpha) / rank, dropout)
    return [p for name, p in model.named_parameters() if "lora_" in name]


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Add each adapter into its projection, computed in float32, and remove it.

    Raises ValueError for a 4-bit projection, whose steps are too coarse to hold an adapter.
    """
    if is_quantized(model):
        raise ValueError("4-bit weights take no adapter: merge it into the weights as they were")
    for module in adapted(model).values():
        module.weight.copy_(module.weight.float() + module.delta())
        for part in (*PARTS, "scale", "dropout"):
            delattr(module, part)
        module.__class__ = nn.Linear
        model.name_or_path = None  # no checkpoint has these weights


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
        for part in PARTS
    }
    ranks = {name: module.lora_A.out_features for name, module in modules.items()}
    alphas = {name: module.scale * ranks[name] for name, module in modules.items()}
    first = next(iter(modules))
    config = {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": model.name_or_path,  # None: other adapters are merged in
        "r": ranks[first],
        "lora_alpha": alphas[first],
        "rank_pattern": {n: r for n, r in ranks.items() if r != ranks[first]},
        "alpha_pattern": {n: a for n, a in alphas.items() if a != alphas[first]},
        "lora_dropout": modules[first].dropout,
        "target_modules": sorted({name.rpartition(".")[2] for name in modules}),
        "bias": "none",
        "inference_mode": True,
    }
    # The config comes last: a folder that has one is complete.
    write_whole(folder / "adapter_model.safetensors", save_bytes(state, {"format": "pt"}))
    write_whole(folder / "adapter_config.json", (json.dumps(config, indent=2) + "\n").encode())


def write_whole(file: Path, content: bytes) -> None:
    """Write a file under another name and rename it once it is complete and on the disk."""
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
def load_adapter(model: nn.Module, path_or_name: str | Path) -> None:
    """Put an adapter that this project or PEFT saved onto a model, which it freezes.

    Honours rank_pattern, alpha_pattern and use_rslora as peft 0.21 does. What it has for the heads
    of a model is left out, and standard error says so. Raises FileNotFoundError, or ValueError
    naming the file and what can't be honoured or does not fit; the model is then as it was before.
    """
    from data.checkpoints import find_adapter  # a folder, or a name on the hub

    if adapted(model):
        raise ValueError("the model has adapters already: merge_lora first")
    folder = find_adapter(path_or_name)
    states = sorted(folder.glob("state-*.safetensors"))
    if states and not (folder / "finished").exists():
        return load_state(model, folder, states[-1])
    file = folder / "adapter_model.safetensors"
    config = read_adapter_config(folder / "adapter_config.json")
    modules = dict(model.named_modules())
    with reading(file):
        pairs = read_pairs(file)
        for name, pair in pairs.items():
            module = modules.get(name)
            if set(pair) != set(PARTS):
                raise ValueError(f"{name} has {', '.join(sorted(pair))}, not lora_A and lora_B")
            if not isinstance(module, nn.Linear):
                raise ValueError(f"{name} is not the name of a projection in this model")
            rank = matched(config["rank_pattern"], name, config["r"])
            shapes = {"lora_A": (rank, module.in_features), "lora_B": (module.out_features, rank)}
            for part, shape in shapes.items():
                pair[part] = checked(pair[part], f"{name}.{part}", shape, torch.float32)
    model.requires_grad_(False)
    for name, pair in pairs.items():
        module, rank = modules[name], pair["lora_A"].shape[0]
        alpha = matched(config["alpha_pattern"], name, config["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        adapt(module, rank, scale, config.get("lora_dropout", 0.0))
        for part in PARTS:
            getattr(module, part).weight.copy_(pair[part])


def read_pairs(file: Path) -> dict[str, dict[str, Tensor]]:
    """The matrices in a file of PEFT: for the name of each projection, its lora_A and lora_B."""
    pairs, unused = {}, []
    for key, weight in load_file(file).items():
        bare = PREFIX.sub("", key.replace(".default.", ".")).removesuffix(".weight")
        name, _, part = bare.rpartition(".")
        if bare.startswith("lm_head") or UNUSED.match(f"{bare}."):
            unused.append(key)
        elif bare.startswith("embed_tokens"):
            what = "changes the embeddings, which have no adapter here"
            raise ValueError(f"{key} {what}: merge it with PEFT, and give the whole checkpoint")
        elif part in pairs.setdefault(name, {}):
            raise ValueError(f"{name} is there twice, once as model.{name}")
        else:
            pairs[name][part] = weight
    if not pairs:
        raise ValueError("holds no adapter of the layers")
    tell_unused(file, unused)
    return pairs


def load_state(model: nn.Module, folder: Path, state: Path) -> None:
    """The adapter of a run of train.py that is not finished, as of its newest state."""
    with reading(state):
        s, tensors = read_json(folder / "settings.json"), load_file(state)
        for i, p in enumerate(add_lora(model, s["rank"], s["alpha"], s["dropout"])):
            p.data.copy_(tensors[f"{i}.weight"])
    print(f"{state}: the adapter of a run that is not finished", file=sys.stderr)


# What PEFT has and this file has not: it would change the numbers, so it is refused by name.
UNSUPPORTED = ("use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens", "lora_bias")
UNSUPPORTED += ("fan_in_fan_out", "layer_replication", "trainable_token_indices")
STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")  # of init_lora_weights: change the base


def read_adapter_config(file: Path) -> dict:
    """adapter_config.json; refuses by name what this file can't honour."""
    config = read_json(file)
    with reading(file):
        if config.get("peft_type") != "LORA":
            raise ValueError("peft_type is not LORA")
        unsupported = [key for key in UNSUPPORTED if config.get(key)]
        if config.get("bias") not in (None, "none"):
            unsupported.append("bias")
        if str(config.get("init_lora_weights")).lower().startswith(STARTS):
            unsupported.append("init_lora_weights")
        saved = config.get("modules_to_save") or []
        if not all(name == "lm_head" or UNUSED.match(f"{name}.") for name in saved):
            unsupported.append("modules_to_save")
        for key in unsupported:
            raise ValueError(f"{key} is {config[key]!r}, which is not supported")
        numbers = {key: config[key] for key in ("r", "lora_alpha")}
        for field in ("rank_pattern", "alpha_pattern"):
            patterns = config.get(field) or {}
            numbers |= {f"{field} of {p}": value for p, value in patterns.items()}
            config[field] = {re.compile(rf"(.*\.)?({p})$"): v for p, v in patterns.items()}
        for key, value in numbers.items():
            if type(value) not in (int, float) or not 0 < value < 1e15:
                raise ValueError(f"{key} is {value!r}, expected a number above 0")
        if not 0 <= config.get("lora_dropout", 0.0) < 1:
            raise ValueError(f"lora_dropout is {config['lora_dropout']!r}, expected 0 to below 1")
    return config


def matched(patterns: dict[re.Pattern, float], name: str, default: float) -> float:
    """The value of the first pattern that matches the end of a name, from a dot on, as in PEFT."""
    names = (name, f"model.{name}")  # in the inner model, and in a causal LM
    for pattern, value in patterns.items():
        if any(map(pattern.match, names)):
            return value
    return default


# --- A 4-bit base ------------------------------------------------------------------------------
# QLoRA (Dettmers et al. 2023, arXiv 2305.14314). Training never changes a frozen weight, so it may
# be stored coarsely: in blocks of 64 numbers, each a 4-bit code, a place in a table of 16 values,
# times the largest absolute value of its block. A matrix is decoded where it is multiplied, in the
# forward pass and again in the backward pass, and not kept. A weight takes 4 bits, and half a bit
# of its block's float32 scale, instead of 16. The adapters learn to live with the rounding; for
# use, they are merged into the weights as they were.

BLOCK = 64


class NF4Linear(nn.Linear):
    """A frozen projection in 4 bits, made by `quantize_nf4`."""

    scales: Tensor  # (out * in / 64), float32; `weight` is (out * in / 2) bytes of two codes each

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
    """x (..., in) times a 4-bit matrix, which both passes decode and neither keeps."""

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
    """Freeze a model, store the projections of its layers in 4 bits, and move it to a device.

    Raises ValueError for adapters that are not merged, or a projection that blocks of 64 don't fit.
    """
    if adapted(model):
        raise ValueError("the model has adapters: merge_lora first")
    model.requires_grad_(False)
    table = nf4_table().to(device)
    between = (table[1:] + table[:-1]) / 2  # the code of a number: how many of these lie below it
    for name, module in projections(model).items():
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


@functools.cache
def nf4_pairs(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The two values that each byte stands for, (256, 2)."""
    table = nf4_table()
    return torch.stack([table.repeat_interleave(16), table.repeat(16)], dim=1).to(device, dtype)


def nf4_table() -> Tensor:
    """The 16 values of NormalFloat, ascending from -1 to 1, float32 (their section 3).

    Weights are about normally distributed, so the values are quantiles of the normal distribution:
    each code is then used about as often as any other. Eight quantiles are positive and seven
    negative, evenly spaced in probability, and zero is exact. The outermost would be infinite at
    probability 1; they stop half-way between 1 - 1/30 and 1 - 1/32.
    """
    outermost = 1 - (1 / 30 + 1 / 32) / 2
    positive, negative = (
        torch.special.ndtri(torch.linspace(outermost, 0.5, n + 1, dtype=torch.float64))[:-1]
        for n in (8, 7)
    )
    return torch.cat([-negative, torch.zeros(1), positive.flip(0)]).div(positive[0]).float()
