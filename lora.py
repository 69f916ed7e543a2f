"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685), by hand.

A frozen projection W gets two small matrices beside it: y = W x + (alpha / rank) B A dropout(x),
with A (rank, in) and B (out, rank). B starts at zero, so a fresh adapter changes nothing; a trained
one can be added into W, so that it costs nothing. Adapters stay in float32 while W may be bfloat16:
an optimiser's steps are far smaller than bfloat16's spacing.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

# All seven projections of a layer, as the paper adapts them (its appendix on training details).
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PREFIX = "base_model.model."  # what PEFT writes in front of the names of the inner model


class LoRALinear(nn.Linear):
    """A frozen nn.Linear that owns `lora_A` and `lora_B`, which alone have gradients."""

    def adapt(self, rank: int, alpha: float, dropout: float) -> None:
        device = self.weight.device
        self.lora_A = nn.Linear(self.in_features, rank, bias=False, device=device)
        self.lora_B = nn.Linear(rank, self.out_features, bias=False, device=device)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.rank, self.alpha, self.dropout = rank, alpha, dropout

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        z = nn.functional.dropout(x.float(), self.dropout, self.training)
        z = self.lora_B(self.lora_A(z)) * (self.alpha / self.rank)
        return super().forward(x) + z.to(x.dtype)

    def delta(self) -> Tensor:
        """What the adapter adds to the weight, (out, in) float32."""
        return self.lora_B.weight @ self.lora_A.weight * (self.alpha / self.rank)


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
    """Freeze a model and put fresh adapters on its projections named in `targets`.

    Returns the adapters' parameters, all that there is to train. Raises ValueError for a target
    that the model lacks, a rank below 1, or a model that has adapters already.
    """
    if adapted(model):
        raise ValueError("the model has adapters already: merge_lora first")
    if rank < 1:
        raise ValueError(f"rank is {rank}, expected 1 or more")
    model.requires_grad_(False)
    parameters: list[nn.Parameter] = []
    for target in targets:
        found = [m for name, m in model.named_modules() if name.rpartition(".")[2] == target]
        if not found or not all(isinstance(module, nn.Linear) for module in found):
            raise ValueError(f"target {target!r} is not the name of a projection in this model")
        for module in found:
            # The module changes class, not identity: its weight and its name stay what they are.
            module.__class__ = LoRALinear
            module.adapt(rank, alpha, dropout)
            parameters += [module.lora_A.weight, module.lora_B.weight]
    return parameters


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Add each adapter into its projection, computed in float32, and remove it."""
    for module in adapted(model).values():
        module.weight.copy_(module.weight.float() + module.delta())
        del module.lora_A, module.lora_B, module.rank, module.alpha, module.dropout
        module.__class__ = nn.Linear


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Write a model's adapters as PEFT does: adapter_config.json and adapter_model.safetensors."""
    modules = adapted(model)
    if not modules:
        raise ValueError("the model has no adapters to save")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        f"{PREFIX}{name}.{part}.weight": getattr(module, part).weight.detach().contiguous()
        for name, module in modules.items()
        for part in ("lora_A", "lora_B")
    }
    first = next(iter(modules.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": None,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout,
        "target_modules": sorted({name.rpartition(".")[2] for name in modules}),
        "bias": "none",
        "inference_mode": True,
    }
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


@torch.no_grad()
def load_adapter(model: nn.Module, folder: str | Path) -> None:
    """Put a saved adapter, which may be PEFT's, onto a model that has none.

    Raises FileNotFoundError, or ValueError naming the file and what does not fit.
    """
    file, config_file = (
        Path(folder) / name for name in ("adapter_model.safetensors", "adapter_config.json")
    )
    for needed in (file, config_file):
        if not needed.is_file():
            raise FileNotFoundError(f"{needed}: no such file; an adapter folder has one")
    try:
        config, state = json.loads(config_file.read_text(encoding="utf-8")), load_file(file)
        rank, alpha, targets = (config[k] for k in ("r", "lora_alpha", "target_modules"))
    except SafetensorError as error:
        raise ValueError(f"{file}: not a whole safetensors file: {error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{config_file}: not a LoRA adapter's config: {error!r}") from None
    if isinstance(targets, str) or config.get("use_dora") or config.get("bias", "none") != "none":
        raise ValueError(f"{config_file}: a pattern of targets, DoRA and biases are not supported")
    add_lora(model, rank, alpha, config.get("lora_dropout", 0.0), targets)
    for name, module in adapted(model).items():
        for part in ("lora_A", "lora_B"):
            key, weight = f"{PREFIX}{name}.{part}.weight", getattr(module, part).weight
            if key not in state:
                raise ValueError(f"{file}: tensor {key} is missing")
            if state[key].shape != weight.shape:
                shape, expected = list(state[key].shape), list(weight.shape)
                raise ValueError(f"{file}: tensor {key} is {shape}, expected {expected}")
            weight.copy_(state.pop(key))
    if state:
        raise ValueError(f"{file}: tensor {next(iter(state))} has no place in this model")
