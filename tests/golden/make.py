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
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)
from transformers.utils import logging

HERE = Path(__file__).parent
SHAPE = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
SHAPE |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
SHAPE |= dict(rms_norm_eps=1e-2)  # large enough to make a difference
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0}
DYNAMIC = LINEAR | {"rope_type": "dynamic"}  # idle in short texts
# With heads of width 8 and this theta, llama3 scaling keeps the first wavelength, mixes the second,
# and stretches the others.
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32, "rope_theta": 100.0}
WINDOW = 5
PAD, MASK = 0, 63  # token ids; padding is told from text by the attention mask alone
LENGTHS = (24, 17)  # tokens of the two texts of the padded batches
PACKED = ((11, 13), (7, 12, 3))  # tokens of the texts packed in each row; 2 of row 2 are padding
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


# --- Checkpoints -------------------------------------------------------------------------------


def redraw(model: nn.Module, seed: int) -> nn.Module:
    """Weights large enough that attention is uneven, and norms that are not all one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() == 1:
                weight.copy_(1 + 0.3 * noise)
            else:
                weight.copy_(noise if "embed" in name else 0.2 * noise)
    return model


def write_checkpoint(name, seed, config, dtype=torch.bfloat16, auto=AutoModelForCausalLM, **save):
    folder = fresh_folder(name)
    redraw(auto.from_config(config), seed).to(dtype).save_pretrained(folder, **save)
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder


def write_checkpoints() -> list[Path]:
    """One folder a kind of model, and between them each kind of file that transformers writes."""
    multi_query = MistralConfig(**SHAPE | {"num_key_value_heads": 1}, sliding_window=None)
    tied = LlamaConfig(**SHAPE, tie_word_embeddings=True, head_dim=12)
    no_rope = SmolLM3Config(**SHAPE, pad_token_id=PAD, no_rope_layer_interval=2)
    some = {"use_sliding_window": True, "sliding_window": WINDOW}  # of the layers
    windowed = SmolLM3Config(**SHAPE, **some, pad_token_id=PAD, no_rope_layer_interval=2)
    biased = LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True, rope_parameters=DYNAMIC)
    linear, llama3 = (LlamaConfig(**SHAPE, rope_parameters=rope) for rope in (LINEAR, LLAMA3))
    folders = [
        write_checkpoint("llama-grouped", 1, LlamaConfig(**SHAPE)),
        write_checkpoint("llama-linear-older", 2, linear, dtype=torch.float16),
        write_checkpoint("llama-llama3-sharded", 3, llama3, max_shard_size="16KB"),
        write_checkpoint("llama-tied-wide-heads", 4, tied),
        write_checkpoint("mistral-window", 5, MistralConfig(**SHAPE, sliding_window=WINDOW)),
        write_checkpoint("mistral-inner", 6, multi_query, dtype=torch.float32, auto=AutoModel),
        write_checkpoint("qwen2", 7, Qwen2Config(**SHAPE)),
        write_checkpoint("qwen3", 8, Qwen3Config(**SHAPE, head_dim=8)),
        write_checkpoint("smollm3", 9, no_rope),
        write_checkpoint("llama-biased-dynamic", 10, biased),
        write_checkpoint("qwen2-window", 11, Qwen2Config(**SHAPE, **some, max_window_layers=1)),
        write_checkpoint("smollm3-window", 12, windowed),
    ]
    make_older(folders[1] / "config.json")
    return folders


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
    return auto.from_pretrained(
        folder, config=config, dtype=torch.float32, attn_implementation="eager"
    ).eval()


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
    if layout == "packed":
        states = torch.zeros(*ids.shape, model.config.hidden_size)
        for row, texts in enumerate(PACKED):
            for number in range(1, len(texts) + 1):
                own = segments[row] == number
                states[row, own] = model(input_ids=ids[row, own][None]).last_hidden_state[0]
        return states
    mask = None if layout == "unpadded" else segments
    states = model(input_ids=ids, attention_mask=mask).last_hidden_state
    return states * (segments > 0)[..., None]


def differ(a: Tensor, b: Tensor) -> bool:
    return (a - b).abs().max().item() > 0.1


def expect_hidden_states(folder: Path, seed: int) -> dict[str, Tensor]:
    causal, both_ways = (read_checkpoint(folder, is_causal) for is_causal in (True, False))
    expected = {}
    for layout, (ids, segments) in make_batches(seed).items():
        expected[f"{layout}.input_ids"] = ids
        expected[f"{layout}.segments"] = segments
        states = [hidden_states(model, layout, ids, segments) for model in (causal, both_ways)]
        expected[f"{layout}.causal"], expected[f"{layout}.bidirectional"] = states
        assert differ(*states), f"{folder.name}: direction makes no difference"
    ids, segments = make_batches(seed)["unpadded"]
    rope = causal.config.rope_parameters
    if rope["rope_type"] != "default":
        plain = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
        model = read_checkpoint(folder, True, rope_parameters=plain)
        unscaled = hidden_states(model, "unpadded", ids, segments)
        short = rope["rope_type"] == "dynamic"
        assert differ(unscaled, expected["unpadded.causal"]) != short, f"{folder.name}: scaling"
    if getattr(causal.config, "sliding_window", None):
        for is_causal, key in ((True, "causal"), (False, "bidirectional")):
            full = {"layer_types": ["full_attention"] * 2, "use_sliding_window": False}
            full = {} if folder.name.startswith("mistral") else full
            model = read_checkpoint(folder, is_causal, sliding_window=None, **full)
            unbounded = hidden_states(model, "unpadded", ids, segments)
            assert differ(unbounded, expected[f"unpadded.{key}"]), "the window is idle"
    return expected


# --- Masked next-token prediction --------------------------------------------------------------


def read_off(logits: Tensor, chosen: Tensor) -> Tensor:
    """The logits at i - 1 for each chosen token i, row by row: (number of chosen, V)."""
    return torch.stack([logits[row, i - 1] for row, i in chosen.nonzero().tolist()])


def expect_mntp(folder: Path, ids: Tensor, segments: Tensor, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    chosen = (torch.rand(ids.shape, generator=generator) < 0.3) & (segments > 0)
    chosen[:, 0] = False
    masked = torch.where(chosen, MASK, ids)
    model = read_checkpoint(folder, False, AutoModelForCausalLM)
    with torch.no_grad():
        logits = read_off(model(input_ids=masked, attention_mask=segments).logits, chosen)
    loss = nn.functional.cross_entropy(logits, ids[chosen])
    return {"masked_ids": masked, "chosen": chosen, "logits": logits, "loss": loss}


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
    ids, segments = given["right.input_ids"], given["right.segments"]
    model = PeftModel.from_pretrained(read_checkpoint(base, False), folder).eval()
    adapted = hidden_states(model, "right", ids, segments)
    merged = hidden_states(model.merge_and_unload(), "right", ids, segments)
    assert differ(adapted, given["right.bidirectional"]), "the adapter is idle"
    return {"adapted": adapted, "merged": merged}


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
    assert losses[0] > losses[1] > losses[2], "the loss falls"
    assert min(norms) > 1, "clipping bites"
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


def write_expected(folder: Path, tensors: dict[str, Tensor], prefix: str = "") -> None:
    """Add tensors to the folder's expected.safetensors."""
    file = folder / "expected.safetensors"
    old = load_file(file) if file.is_file() else {}
    new = {prefix + name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(old | new, file)


def main() -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()  # an encoder leaves the output head unread, and that is meant
    logging.disable_progress_bar()
    for seed, folder in enumerate(write_checkpoints(), start=10):
        write_expected(folder, expect_hidden_states(folder, seed))
        if folder.name != "mistral-inner":  # which has no output head
            batch = load_file(folder / "expected.safetensors")
            ids, segments = batch["right.input_ids"], batch["right.segments"]
            write_expected(folder, expect_mntp(folder, ids, segments, seed), "mntp.")
    # The second adapter has a rank and a scale that differ from projection to projection.
    patterns = {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {r"0\.self_attn.q_proj": 16}}
    options = {"llama-grouped": {}, "mistral-window": {"use_rslora": True, **patterns}}
    for name, seed in (("llama-grouped", 20), ("mistral-window", 23)):
        base, folder = HERE / name, write_adapter(HERE / name, seed, **options[name])
        write_expected(folder, expect_adapted(base, folder))
        write_expected(folder, expect_adam(base, folder))


if __name__ == "__main__":
    main()
