# /// script
# requires-python = ">=3.10"
# dependencies = ["transformers==5.23.*", "peft==0.21.*", "torch", "numpy", "safetensors"]
# ///
"""Make the golden files beside this script: what transformers and PEFT compute, for tiny models.

    uv run tests/golden/make.py        (or: python tests/golden/make.py, with the packages above)

Each model is a checkpoint folder that transformers wrote and read again, with expected.safetensors
beside its weights; each adapter is a folder that PEFT wrote, with the same. Nothing here imports
the project. The asserts say that each case tests what it is there for: that its window, its rope
scaling or the direction of its attention makes a difference at this length.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.utils import logging

HERE = Path(__file__).parent
PAD, MASK = 0, 63  # token ids; padding is told from text by the attention mask alone
LENGTHS = (24, 17)  # tokens of the two texts of the padded batches
PACKED = ((11, 13), (7, 12, 3))  # tokens of the texts packed in each row; 2 of row 2 are padding
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# --- Checkpoints -------------------------------------------------------------------------------

SHAPE = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
SHAPE |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
SHAPE |= dict(rms_norm_eps=1e-2)  # large enough to make a difference
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0}
DYNAMIC = LINEAR | {"rope_type": "dynamic"}  # idle in short texts
# With heads of width 8 and this theta, llama3 scaling keeps the first wavelength, mixes the second,
# and stretches the others.
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32, "rope_theta": 100.0}
WINDOW = {"sliding_window": 5}
SOME = WINDOW | {"use_sliding_window": True}  # of the layers
SMOLLM3 = {"pad_token_id": PAD, "no_rope_layer_interval": 2}
BIASES = {"attention_bias": True, "mlp_bias": True}
# One folder a kind of model, and between them each kind of file that transformers writes.
MODELS = {
    "llama-grouped": ("llama", {}),
    "llama-linear-older": ("llama", {"rope_parameters": LINEAR}),
    "llama-llama3-sharded": ("llama", {"rope_parameters": LLAMA3}),
    "llama-tied-wide-heads": ("llama", {"tie_word_embeddings": True, "head_dim": 12}),
    "mistral-window": ("mistral", WINDOW),
    "mistral-inner": ("mistral", {"num_key_value_heads": 1, "sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "smollm3": ("smollm3", SMOLLM3),
    "llama-biased-dynamic": ("llama", BIASES | {"rope_parameters": DYNAMIC}),
    "qwen2-window": ("qwen2", SOME | {"max_window_layers": 1}),
    "smollm3-window": ("smollm3", SMOLLM3 | SOME),
}
SAVED = {  # as bfloat16 in one file with an output head, but for these
    "llama-linear-older": {"dtype": torch.float16},
    "llama-llama3-sharded": {"max_shard_size": "16KB"},
    "mistral-inner": {"dtype": torch.float32, "auto": AutoModel},
}


def write_checkpoint(
    name: str, seed: int, config, dtype=torch.bfloat16, auto=AutoModelForCausalLM, **how
) -> Path:
    """Weights large enough that attention is uneven, and norms that are not all one."""
    folder, model = fresh_folder(name), auto.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            scale = 1 if "embed" in key else 0.2
            weight.copy_(1 + 0.3 * noise if weight.dim() == 1 else scale * noise)
    model.to(dtype).save_pretrained(folder, **how)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if name.endswith("-older"):
        make_older(folder / "config.json")
    return folder


def make_older(file: Path) -> None:
    """Write a config.json as transformers 4 did in the days of Llama 2."""
    config = json.loads(file.read_text())
    rope, dtype = config.pop("rope_parameters"), config.pop("dtype")
    config |= {"rope_theta": rope["rope_theta"], "torch_dtype": dtype}
    config["rope_scaling"] = {"type": rope["rope_type"], "factor": rope["factor"]}
    config["transformers_version"] = "4.31.0"
    del config["head_dim"]
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def read_checkpoint(folder: Path, is_causal: bool, auto=AutoModel, **changes) -> nn.Module:
    """The model as transformers reads it, in float32, with the plainest attention that it has."""
    config = AutoConfig.from_pretrained(folder, **changes)
    config.is_causal = is_causal  # as a key of config.json would
    how = {"config": config, "dtype": torch.float32, "attn_implementation": "eager"}
    return auto.from_pretrained(folder, **how).eval()


# --- Hidden states -----------------------------------------------------------------------------


def make_batches(seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """By layout, token ids and segments: 0 for padding, else the number of the text in its row."""
    generator = torch.Generator().manual_seed(seed)
    T = max(LENGTHS)
    ids = torch.randint(1, MASK, (2, T), generator=generator)
    place, lengths = torch.arange(T), torch.tensor(LENGTHS)[:, None]
    right = (place < lengths).long()
    left = (place >= T - lengths).long()
    packed = torch.zeros(2, T, dtype=torch.long)
    for row, texts in enumerate(PACKED):
        numbers = torch.repeat_interleave(torch.arange(1, len(texts) + 1), torch.tensor(texts))
        packed[row, : len(numbers)] = numbers
    batches = {"right": right, "left": left, "packed": packed}
    batches = {layout: (torch.where(s > 0, ids, PAD), s) for layout, s in batches.items()}
    return batches | {"unpadded": (ids[:1], torch.ones(1, T, dtype=torch.long))}


@torch.no_grad()
def hidden_states(model: nn.Module, layout: str, ids: Tensor, segments: Tensor) -> Tensor:
    """States after the final norm, (B, T, d); zeros at padding, where they have no meaning.

    Packed texts are run one at a time, so that none can see another and each starts at position 0.
    """
    if layout != "packed":
        mask = None if layout == "unpadded" else segments
        states = model(input_ids=ids, attention_mask=mask).last_hidden_state
        return states * (segments > 0)[..., None]
    states = torch.zeros(*ids.shape, model.config.hidden_size)
    for row, texts in enumerate(PACKED):
        for number in range(1, len(texts) + 1):
            own = segments[row] == number
            states[row, own] = model(input_ids=ids[row, own][None]).last_hidden_state[0]
    return states


def differ(a: Tensor, b: Tensor) -> bool:
    return (a - b).abs().max().item() > 0.1


def expect_hidden_states(folder: Path, seed: int) -> dict[str, Tensor]:
    models = {
        "causal": read_checkpoint(folder, True),
        "bidirectional": read_checkpoint(folder, False),
    }
    expected, batches = {}, make_batches(seed)
    for layout, (ids, segments) in batches.items():
        states = {k: hidden_states(model, layout, ids, segments) for k, model in models.items()}
        assert differ(*states.values()), f"{folder.name}: direction makes no difference"
        for key, tensor in ({"input_ids": ids, "segments": segments} | states).items():
            expected[f"{layout}.{key}"] = tensor
    config, without = models["causal"].config, {}
    rope, window = config.rope_parameters, getattr(config, "sliding_window", None)
    if rope["rope_type"] != "default":
        plain = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
        without = {"rope_parameters": plain}
    if window:
        without = {"sliding_window": None}
        if not folder.name.startswith("mistral"):
            without |= {"layer_types": ["full_attention"] * 2, "use_sliding_window": False}
    for key, model in models.items() if without else ():
        model = read_checkpoint(folder, key == "causal", **without)
        plain = hidden_states(model, "unpadded", *batches["unpadded"])
        idle = rope["rope_type"] == "dynamic"  # in short texts
        assert differ(plain, expected[f"unpadded.{key}"]) != idle, f"{folder.name}: {without}"
    return expected


# --- Masked next-token prediction --------------------------------------------------------------


def read_off(logits: Tensor, chosen: Tensor) -> Tensor:
    """The logits at i - 1 for each chosen token i, row by row: (number of chosen, V)."""
    return torch.stack([logits[row, i - 1] for row, i in chosen.nonzero().tolist()])


def expect_mntp(folder: Path, seed: int) -> dict[str, Tensor]:
    ids, segments = make_batches(seed)["right"]
    generator = torch.Generator().manual_seed(seed)
    chosen = (torch.rand(ids.shape, generator=generator) < 0.3) & (segments > 0)
    chosen[:, 0] = False
    masked = torch.where(chosen, MASK, ids)
    model = read_checkpoint(folder, False, AutoModelForCausalLM)
    with torch.no_grad():
        logits = read_off(model(input_ids=masked, attention_mask=segments).logits, chosen)
    loss = nn.functional.cross_entropy(logits, ids[chosen])
    found = {"masked_ids": masked, "chosen": chosen, "logits": logits, "loss": loss}
    return {f"mntp.{name}": tensor for name, tensor in found.items()}


# --- Adapters ----------------------------------------------------------------------------------


def fill(named: Iterable[tuple[str, Tensor]], seed: int) -> None:
    """Draw the matrices of an adapter, none of which is zero then: it makes a difference."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in named:
            if "lora_" in name:
                weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))


def settle(folder: Path, base: str, indent: int) -> None:
    """Leave out of an adapter's folder what depends on where and when it was written."""
    (folder / "README.md").unlink(missing_ok=True)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text()) | {"base_model_name_or_path": base}
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()  # PEFT writes its set in any order
    file.write_text(json.dumps(config, indent=indent, sort_keys=True) + "\n")


def write_adapter(base: Path, seed: int, **options) -> Path:
    folder = fresh_folder(f"{base.name}-adapter")
    options |= {"target_modules": PROJECTIONS, "task_type": "FEATURE_EXTRACTION"}
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, **options)
    model = get_peft_model(read_checkpoint(base, False), config)
    fill(model.named_parameters(), seed)
    model.save_pretrained(folder)
    settle(folder, base.name, indent=2)
    return folder


def expect_adapted(base: Path, folder: Path) -> dict[str, Tensor]:
    given = load_file(base / "expected.safetensors")
    batch = "right", given["right.input_ids"], given["right.segments"]
    model = PeftModel.from_pretrained(read_checkpoint(base, False), folder).eval()
    adapted = hidden_states(model, *batch)
    assert differ(adapted, given["right.bidirectional"]), "the adapter is idle"
    return {"adapted": adapted, "merged": hidden_states(model.merge_and_unload(), *batch)}


def expect_adam(base: Path, folder: Path) -> dict[str, Tensor]:
    """Three steps of AdamW on the MNTP loss of one fixed batch, gradients clipped at norm 1."""
    given = load_file(base / "expected.safetensors")
    ids, segments = given["right.input_ids"], given["right.segments"]
    masked, chosen = given["mntp.masked_ids"], given["mntp.chosen"]
    model = read_checkpoint(base, False, AutoModelForCausalLM)
    # PEFT adapts the inner model in place, so that the outer one puts its head on adapted states.
    peft = PeftModel.from_pretrained(model.model, folder, is_trainable=True)
    parameters = {
        name.removeprefix("base_model.model.").replace(".default", ""): parameter
        for name, parameter in peft.named_parameters()
        if parameter.requires_grad
    }
    assert len(parameters) == 2 * 7 * 2 and all("lora_" in name for name in parameters)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2, weight_decay=0)
    losses, norms, smallest = [], [], []
    for _ in range(3):
        logits = model(input_ids=masked, attention_mask=segments).logits
        loss = nn.functional.cross_entropy(read_off(logits, chosen), ids[chosen])
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(parameters.values(), 1.0))
        smallest.append(min(p.grad.abs().min() for p in parameters.values()))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    assert losses[0] > losses[1] > losses[2] and min(norms) > 1, "the loss falls, clipping bites"
    # The first step is the gradient's sign: were one near zero, rounding errors would decide it.
    assert smallest[0] > 2e-6, f"{folder.name}: choose another seed"
    after = {
        f"after.{module}.{part}.weight": parameters[f"{module}.{part}.weight"].detach()
        for module in ("layers.0.self_attn.q_proj", "layers.1.mlp.down_proj")
        for part in ("lora_A", "lora_B")
    }
    return {"losses": torch.stack(losses), "gradient_norms": torch.stack(norms)} | after


# --- Files -------------------------------------------------------------------------------------


def fresh_folder(name: str) -> Path:
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def write_expected(folder: Path, tensors: dict[str, Tensor]) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "expected.safetensors")


def main() -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()  # an encoder leaves the output head unread, and that is meant
    logging.disable_progress_bar()
    for seed, (name, (kind, options)) in enumerate(MODELS.items(), start=1):
        folder = write_checkpoint(
            name, seed, AutoConfig.for_model(kind, **SHAPE | options), **SAVED.get(name, {})
        )
        expected = expect_hidden_states(folder, seed + 9)
        if name != "mistral-inner":  # which has no output head
            expected |= expect_mntp(folder, seed + 9)
        write_expected(folder, expected)
    # The second adapter has a rank and a scale that differ from projection to projection.
    patterns = {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {r"0\.self_attn.q_proj": 16}}
    options = {"llama-grouped": {}, "mistral-window": {"use_rslora": True, **patterns}}
    for name, seed in (("llama-grouped", 20), ("mistral-window", 23)):
        base, folder = HERE / name, write_adapter(HERE / name, seed, **options[name])
        write_expected(folder, expect_adapted(base, folder) | expect_adam(base, folder))


if __name__ == "__main__":
    main()
