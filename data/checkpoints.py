"""Checkpoints as people have them: folders and names on the hub, and what their config.json says.

Reading a checkpoint's weights is in llm2vec.py, for modules have the names of its tensors.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

from llm2vec import Config, read_json, reading

# --- Where a checkpoint is ---------------------------------------------------------------------

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
CHECKPOINT = ["config.json", "tokenizer*", "model*.safetensors", "model.safetensors.index.json"]
CHECKPOINT += ["modules.json", "*_Pooling/config.json", "sentence_bert_config.json"]
CHECKPOINT += ["config_sentence_transformers.json"]
ADAPTER = ["adapter_config.json", "adapter_model.safetensors"]


def find_checkpoint(path_or_name: str | Path, *also: str) -> Path:
    """The folder of a checkpoint with config.json, safetensors and the files `also`.

    What is no folder is a name on the Hugging Face hub, of which only the files that are needed
    are downloaded, into huggingface_hub's cache. Raises FileNotFoundError, which says what is
    there instead and how to make a checkpoint of it, or ValueError if the hub does not give it.
    """
    folder, there = local(path_or_name, CHECKPOINT)
    if not there.intersection(WEIGHTS):
        raise FileNotFoundError(f"{path_or_name}: {instead_of_weights(path_or_name, there)}")
    for name in ("config.json", *also):
        if name not in there:
            what = f"{folder / name}: no such file"
            older = there.intersection(("tokenizer.model", "vocab.json"))
            if name == "tokenizer.json" and older:
                line = converted("Tokenizer", path_or_name)
                what += f"; to make it of {older.pop()}: {line}"
            raise FileNotFoundError(what)
    return folder


def instead_of_weights(path_or_name: str | Path, there: set[str]) -> str:
    """What a checkpoint without model.safetensors holds, and what to do about it."""
    kinds = {Path(name).suffix for name in there}
    if "adapter_config.json" in there:
        file, base = Path(path_or_name) / "adapter_config.json", None
        if file.is_file():
            base = read_json(file).get("base_model_name_or_path")
        return f"is an adapter: give its base as the model, {base or 'BASE'}, and it as --adapters"
    if ".gguf" in kinds:
        return "has GGUF weights: take the safetensors that they were made from"
    if "params.json" in there or ".pth" in kinds:
        return "is in the format of Meta or Mistral: take the folder for transformers (-hf)"
    if any(re.fullmatch(r"pytorch_model.*\.bin(\.index\.json)?", name) for name in there):
        line = converted("ModelForCausalLM", path_or_name)
        return f"has .bin weights, which are not read, for they can run code; to convert: {line}"
    others = sorted(name for name in there if name.endswith(".safetensors"))
    return "no such file: model.safetensors" + (f", but {others[0]}" if others else "")


def converted(kind: str, path_or_name: str | Path, library: str = "transformers") -> str:
    """The command by which a library saves anew what it reads."""
    target = path_or_name if Path(path_or_name).is_dir() else Path(path_or_name).name
    read = f"from {library} import Auto{kind} as A; A.from_pretrained('{path_or_name}')"
    return f"python -c \"{read}.save_pretrained('{target}')\""


def find_adapter(path_or_name: str | Path) -> Path:
    """The folder of an adapter, or of a run that has none yet; as `find_checkpoint`."""
    folder, there = local(path_or_name, ADAPTER)
    if "settings.json" in there and any(name.startswith("state-") for name in there):
        return folder
    if "adapter_model.bin" in there and ADAPTER[1] not in there:
        line = converted("PeftModel", path_or_name, "peft")
        what = f"has .bin weights, which are not read, for they can run code; to convert: {line}"
        raise FileNotFoundError(f"{path_or_name}: {what}")
    if there.intersection(WEIGHTS) and ADAPTER[0] not in there:
        raise FileNotFoundError(f"{path_or_name}: is a whole checkpoint: give it as the model")
    for name in ADAPTER:
        if name not in there:
            raise FileNotFoundError(f"{folder / name}: no such file")
    return folder


def known(path_or_name: str | Path) -> bool:
    """Whether this is a folder, or may be a name on the hub."""
    path = Path(path_or_name)
    may_be = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path_or_name)) is not None
    return path.is_dir() or may_be and not path.parent.is_dir()


def local(path_or_name: str | Path, patterns: list[str]) -> tuple[Path, set[str]]:
    """A folder, or a snapshot from the hub with the files of these patterns; the names in it."""
    folder, name = Path(path_or_name), str(path_or_name)
    if folder.is_dir():
        return folder, set(os.listdir(folder))
    if not known(name):
        what = "no such folder; expected one with config.json in it, or a name on the hub"
        raise FileNotFoundError(f"{name}: {what}")
    with on_the_hub(f"{name}: no such folder, and it"):
        folder = Path(snapshot_download(name, allow_patterns=patterns))
        there = set(os.listdir(folder)) if folder.is_dir() else set()
        if not there.intersection((*WEIGHTS, *ADAPTER[1:])):
            there |= set(HfApi().list_repo_files(name))  # to say what there is instead
        return folder, there


@contextlib.contextmanager
def on_the_hub(what: str) -> Iterator[None]:
    """Turn whatever goes wrong with the hub into one ValueError that says what to do."""
    try:
        yield
    except Exception as error:  # many are those of huggingface_hub's HTTP library
        advice = "check the network, HF_ENDPOINT and HF_HUB_OFFLINE"
        if isinstance(error, GatedRepoError):
            advice = "accept its terms on its page there, then `hf auth login`"
        elif isinstance(error, (RepositoryNotFoundError, HFValidationError)):
            advice = "check the name; for a private repository, `hf auth login`"
        reason = " ".join(str(error.__cause__ or error).split())
        what = f"{what} can't be downloaded from the Hugging Face hub ({reason})"
        raise ValueError(f"{what}; {advice}") from None


# --- What config.json says ---------------------------------------------------------------------

# The model types, and what transformers takes where their config.json is silent.
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 4096, "num_key_value_heads": 8},
    # Biases on q, k and v.
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096},
    # A norm on every head of q and k.
    "qwen3": {"num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
    # Layers without rotary positions.
    "smollm3": {"num_key_value_heads": 4, "rope_theta": 2e6, "tie_word_embeddings": True},
}
# What stands in config.json, and transformers does not read there for a family.
UNREAD = {"llama": ["sliding_window"], "mistral": ["attention_bias", "mlp_bias"]}
UNREAD |= {"qwen2": ["attention_bias", "mlp_bias"], "qwen3": ["mlp_bias"]}
# The kinds of rotary scaling, and the numbers that each one needs.
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ROPE_SCALING = {"default": (), "linear": ("factor",), "dynamic": ("factor",), "llama3": LLAMA3}


def read_config(file: Path) -> Config:
    """config.json as a Config.

    A key that is left out means transformers' default for the family; null means no window, a
    key/value head for every head, and else the default of Config.
    """
    raw = read_json(file)

    def expect(holds: bool, key: str, expected: str) -> None:
        if not holds:
            raise ValueError(f"{key} is {raw.get(key)!r}, expected {expected}")

    with reading(file):
        family = raw.get("model_type")
        expect(str(family) in FAMILIES, "model_type", " or ".join(FAMILIES))
        expect(raw.get("hidden_act", "silu") == "silu", "hidden_act", "'silu'")
        raw = FAMILIES[family] | raw
        unread = UNREAD.get(family, []) + ["no_rope_layers"] * (family != "smollm3")
        given = {k: raw[k] for k in Config.__dataclass_fields__ if raw.get(k) is not None}
        given = {k: v for k, v in given.items() if k not in unread}
        layers, every = given["num_hidden_layers"], raw.get("no_rope_layer_interval", 4)
        if family == "smollm3":
            by_place = [int((i + 1) % every > 0) for i in range(layers)]
            rotary = given.setdefault("no_rope_layers", by_place)
            expect(len(rotary) == layers, "no_rope_layers", "a number for each layer")
        if family != "mistral" and not raw.get("use_sliding_window"):
            given.pop("sliding_window", None)
        elif family != "mistral" and "sliding_window" in given:  # some layers have the window
            first = raw.get("max_window_layers", 28)
            wide = rotary if family == "smollm3" else [i < first for i in range(layers)]
            kinds = ["full_attention" if full else "sliding_attention" for full in wide]
            given.setdefault("layer_types", kinds)
        types = given.get("layer_types", [])
        known = ("full_attention", "sliding_attention")[: 1 + ("sliding_window" in given)]
        expect(all(t in known for t in types), "layer_types", " and ".join(known))
        expect(len(types) in (0, layers), "layer_types", "one for each layer")
        # Newer files hold in `rope_parameters` what used to be `rope_scaling` and `rope_theta`.
        rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        longest = given.get("max_position_embeddings", Config.max_position_embeddings)
        outside = {k: raw[k] for k in LLAMA3[3:] if k in raw}  # this one may stand outside
        rope = {LLAMA3[3]: longest} | rope | outside
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ROPE_SCALING:
            what = f"rope_type is {kind!r}, expected {' or '.join(ROPE_SCALING)}"
            short = "; up to the length of pre-training, a text needs none: remove the scaling"
            raise ValueError(what + short * (kind in ("yarn", "longrope")))
        if any(isinstance(value, dict) for value in rope.values()):
            raise ValueError("the rotary positions differ by layer, which is not supported")
        parts = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1))
        expect(parts == 1, "partial_rotary_factor", "1")
        given["rope_scaling"] = {"rope_type": kind}
        for key in ROPE_SCALING[kind]:
            given["rope_scaling"][key] = rope[key]
            if not rope[key] > 0:
                raise ValueError(f"{key} is {rope[key]!r}, expected a number above 0")
        given |= {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
        heads = given["num_attention_heads"]
        given = {"num_key_value_heads": heads, "head_dim": given["hidden_size"] // heads} | given
        for name, field in Config.__dataclass_fields__.items():
            if field.type is int or name == "sliding_window" and name in given:
                value = given.get(name, field.default)
                expect(type(value) is int and value > 0, name, "a positive whole number")
            elif field.type in (bool, float):
                value = given.get(name, field.default)
                expect(field.type(value) == value, name, f"a {field.type.__name__}")
        shared = heads % given["num_key_value_heads"] == 0
        expect(shared, "num_attention_heads", "a multiple of num_key_value_heads")
        expect(given["head_dim"] % 2 == 0, "head_dim", "an even number")
        return Config(**given)
