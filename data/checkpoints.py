"""Where a checkpoint is, and how its files are read.

    find_checkpoint    the folder of a checkpoint, or of a name on the hub
    read_config        config.json as the fields of a decoder
    weight_files       the safetensors of a checkpoint
    load_tokenizer     tokenizer.json, perhaps with a template around every text
    encoder_options    pooling, length and attention, from the files of a folder

llm2vec.py loads the weights: its modules have the names of a checkpoint's tensors.
"""

import contextlib
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import Field
from pathlib import Path

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from safetensors.torch import load_file
from tokenizers import Tokenizer, normalizers
from tokenizers.normalizers import Prepend
from torch import Tensor

from llm2vec_data.disk import read_json, reading

TINY = Path(__file__).parent / "tiny-llama"  # the bundled model

# --- Where a checkpoint is ---------------------------------------------------------------------

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
CHECKPOINT = ["config.json", "tokenizer*", "model*.safetensors", "model.safetensors.index.json"]
CHECKPOINT += ["modules.json", "*_Pooling/config.json", "sentence_bert_config.json"]
EXTRA = "extra.safetensors"  # trained weights that are not adapters, by name
CHECKPOINT += ["config_sentence_transformers.json", EXTRA]
ADAPTER = ["adapter_config.json", "adapter_model.safetensors"]


def find_checkpoint(path_or_name: str | Path, *also: str) -> Path:
    """The folder of a checkpoint with config.json, safetensors and the files `also`.

    Any other path is a name on the Hugging Face hub: only the needed files are downloaded, into
    huggingface_hub's cache. Raises FileNotFoundError, which says what the folder holds instead and
    how to convert it, or ValueError if the download fails.
    """
    folder, files = locate(path_or_name, CHECKPOINT)
    if not files.intersection(WEIGHTS):
        raise FileNotFoundError(f"{path_or_name}: {without_weights(path_or_name, files)}")
    for name in ("config.json", *also):
        if name not in files:
            message = f"{folder / name}: no such file"
            older = files.intersection(("tokenizer.model", "vocab.json"))
            if name == "tokenizer.json" and older:
                line = conversion("Tokenizer", path_or_name)
                message += f"; to make it from {older.pop()}: {line}"
            raise FileNotFoundError(message)
    return folder


def without_weights(path_or_name: str | Path, files: set[str]) -> str:
    """The message about a checkpoint without model.safetensors: its kind, and what to do."""
    kinds = {Path(name).suffix for name in files}
    if "adapter_config.json" in files:
        file, base = Path(path_or_name) / "adapter_config.json", None
        if file.is_file():
            base = read_json(file).get("base_model_name_or_path")
        return f"is an adapter: give its base, {base or 'BASE'}, as the model, and it as --adapters"
    if ".gguf" in kinds:
        return "has GGUF weights: use the safetensors that they were made from"
    if "params.json" in files or ".pth" in kinds:
        return "is in the format of Meta or Mistral: use the folder for transformers (-hf)"
    if any(re.fullmatch(r"pytorch_model.*\.bin(\.index\.json)?", name) for name in files):
        line = conversion("ModelForCausalLM", path_or_name)
        return f"has .bin weights, which can run code, so they are not read; to convert: {line}"
    others = sorted(name for name in files if name.endswith(".safetensors"))
    return "no such file: model.safetensors" + (f", but {others[0]}" if others else "")


def conversion(kind: str, path_or_name: str | Path, library: str = "transformers") -> str:
    """The command that loads a file with a library and saves it in a newer format."""
    target = path_or_name if Path(path_or_name).is_dir() else Path(path_or_name).name
    read = f"from {library} import Auto{kind} as A; A.from_pretrained('{path_or_name}')"
    return f"python -c \"{read}.save_pretrained('{target}')\""


def find_adapter(path_or_name: str | Path) -> Path:
    """The folder of an adapter, or of other weights that a run trained; see `find_checkpoint`."""
    folder, files = locate(path_or_name, [*ADAPTER, EXTRA])
    if EXTRA in files and not files.intersection((*ADAPTER, *WEIGHTS)):
        return folder  # trained without adapters
    if "adapter_model.bin" in files and ADAPTER[1] not in files:
        line = conversion("PeftModel", path_or_name, "peft")
        message = f"has .bin weights, which can run code, so they are not read; to convert: {line}"
        raise FileNotFoundError(f"{path_or_name}: {message}")
    if files.intersection(WEIGHTS) and ADAPTER[0] not in files:
        raise FileNotFoundError(f"{path_or_name}: is a whole checkpoint: give it as the model")
    for name in ADAPTER:
        if name not in files:
            raise FileNotFoundError(f"{folder / name}: no such file")
    return folder


def is_folder_or_hub_name(path_or_name: str | Path) -> bool:
    """Whether this is a folder, or may be a name on the hub."""
    path = Path(path_or_name)
    may_be = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path_or_name)) is not None
    return path.is_dir() or may_be and not path.parent.is_dir()


def locate(path_or_name: str | Path, patterns: list[str]) -> tuple[Path, set[str]]:
    """A folder, or a snapshot from the hub with the files of some patterns; the names in it."""
    folder, name = Path(path_or_name), str(path_or_name)
    if folder.is_dir():
        return folder, set(os.listdir(folder))
    if not is_folder_or_hub_name(name):
        message = "no such folder; expected a folder with config.json, or a name on the hub"
        raise FileNotFoundError(f"{name}: {message}")
    with on_the_hub(f"{name}: no such folder, and it"):
        folder = Path(snapshot_download(name, allow_patterns=patterns))
        files = set(os.listdir(folder)) if folder.is_dir() else set()
        if not files.intersection((*WEIGHTS, *ADAPTER[1:])):
            files |= set(HfApi().list_repo_files(name))  # for the error message
        return folder, files


@contextlib.contextmanager
def on_the_hub(subject: str) -> Iterator[None]:
    """Turn any error of the hub into one ValueError that says what to do."""
    try:
        yield
    except Exception as error:  # many come from the HTTP library of huggingface_hub
        advice = "check the network, HF_ENDPOINT and HF_HUB_OFFLINE"
        if isinstance(error, GatedRepoError):
            advice = "accept its terms on its page on the hub, then `hf auth login`"
        elif isinstance(error, (RepositoryNotFoundError, HFValidationError)):
            advice = "check the name; for a private repository, `hf auth login`"
        reason = " ".join(str(error.__cause__ or error).split())
        message = f"{subject} can't be downloaded from the Hugging Face hub ({reason})"
        raise ValueError(f"{message}; {advice}") from None


# --- config.json -------------------------------------------------------------------------------

# The model types: transformers' defaults for keys that config.json leaves out, and the features of
# a family, which config.json does not name.
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 4096, "num_key_value_heads": 8},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "qkv_bias": True},
    "qwen3": {"num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128, "qk_norm": True},
    "smollm3": {"num_key_value_heads": 4, "rope_theta": 2e6, "tie_word_embeddings": True},
}
FEATURES = {"qkv_bias": False, "qk_norm": False}
# Keys in config.json that transformers does not read for a family.
UNREAD = {"llama": ["sliding_window"], "mistral": ["attention_bias", "mlp_bias"]}
UNREAD |= {"qwen2": ["attention_bias", "mlp_bias"], "qwen3": ["mlp_bias"]}
# The kinds of rotary scaling, and the numbers that each one needs.
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ROPE_SCALING = {"default": (), "linear": ("factor",), "dynamic": ("factor",), "llama3": LLAMA3}


def read_config(file: Path, fields: Sequence[Field]) -> dict[str, object]:
    """config.json as values for `fields`, the fields of a dataclass.

    A missing key means transformers' default for the family. null means no window, or a key/value
    head for every head; for any other field it means the field's default.
    """
    raw, defaults = read_json(file), {f.name: f.default for f in fields}

    def expect(holds: bool, key: str, expected: str) -> None:
        if not holds:
            raise ValueError(f"{key} is {raw.get(key)!r}, expected {expected}")

    with reading(file):
        family = raw.get("model_type")
        expect(str(family) in FAMILIES, "model_type", " or ".join(FAMILIES))
        expect(raw.get("hidden_act", "silu") == "silu", "hidden_act", "'silu'")
        raw = FAMILIES[family] | {k: v for k, v in raw.items() if k not in FEATURES}
        unread = UNREAD.get(family, []) + ["no_rope_layers"] * (family != "smollm3")
        given = {k: raw[k] for k in defaults if k not in unread and raw.get(k) is not None}
        layers, every = given["num_hidden_layers"], raw.get("no_rope_layer_interval", 4)
        if family == "smollm3":
            by_position = [int((i + 1) % every > 0) for i in range(layers)]
            rotary = given.setdefault("no_rope_layers", by_position)
            expect(len(rotary) == layers, "no_rope_layers", "a number for each layer")
        if family != "mistral" and not raw.get("use_sliding_window"):
            given.pop("sliding_window", None)
        elif family != "mistral" and "sliding_window" in given:  # some layers have the window
            first = raw.get("max_window_layers", 28)
            wide = rotary if family == "smollm3" else [i < first for i in range(layers)]
            kinds = ["full_attention" if full else "sliding_attention" for full in wide]
            given.setdefault("layer_types", kinds)
        types = given.get("layer_types", [])
        allowed = ("full_attention", "sliding_attention")[: 1 + ("sliding_window" in given)]
        expect(all(t in allowed for t in types), "layer_types", " and ".join(allowed))
        expect(len(types) in (0, layers), "layer_types", "one for each layer")
        # Newer files have `rope_parameters` in place of `rope_scaling` and `rope_theta`.
        rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        longest = given.get("max_position_embeddings", defaults["max_position_embeddings"])
        outside = {k: raw[k] for k in LLAMA3[3:] if k in raw}  # this key may be outside
        rope = {LLAMA3[3]: longest} | rope | outside
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ROPE_SCALING:
            message = f"rope_type is {kind!r}, expected {' or '.join(ROPE_SCALING)}"
            advice = "; texts up to the length of pre-training need no scaling: remove it"
            raise ValueError(message + advice * (kind in ("yarn", "longrope")))
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
        for field in fields:
            name, value = field.name, given.get(field.name, field.default)
            if field.type is int or name == "sliding_window" and name in given:
                expect(type(value) is int and value > 0, name, "a positive whole number")
            elif field.type in (bool, float):
                holds = field.type(value) == value and value >= 0
                expect(holds, name, f"a {field.type.__name__}, not below 0")
        shared = heads % given["num_key_value_heads"] == 0
        expect(shared, "num_attention_heads", "a multiple of num_key_value_heads")
        expect(given["head_dim"] % 2 == 0, "head_dim", "an even number")
        return given


# --- Weights ----------------------------------------------------------------------------------
# A tensor that can't be used raises an error that names it. Only JSON and safetensors are read.

# Prefixes that wrappers add to the names of tensors; and tensors that an encoder does not use: the
# heads of classifiers and of reward models, and tables that are computed here.
PREFIX = re.compile(r"^((module|_orig_mod|base_model\.model|model)\.)+")
UNUSED = re.compile(r"(score|classifier|classification_head|v_head|value_head)\.|.*rotary_emb\.")


# Types of plain weights; integers and 8 bits mean a quantised checkpoint.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(weight: Tensor, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor of a file as `dtype`. Raises ValueError for a wrong shape or type, NaN, infinity."""
    if list(weight.shape) != list(shape):
        raise ValueError(f"tensor {name} is {list(weight.shape)}, expected {list(shape)}")
    if weight.dtype not in FLOATS:
        raise ValueError(f"tensor {name} has type {weight.dtype}")
    weight = weight.to(dtype)
    if not weight.isfinite().all():
        raise ValueError(f"tensor {name} holds NaN or infinity as {dtype}")
    return weight


def report_unused(file: Path, names: list[str]) -> None:
    """Print one line about the tensors that are left out, because an encoder does not use them."""
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        print(f"{file}: {names[0]}{more} left out, not used by an encoder", file=sys.stderr)


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or else the shards that its index names."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file() or not index.is_file():
        return [whole]
    raw = read_json(index)
    with reading(index):
        names = sorted(set(raw["weight_map"].values()))
        for name in names:
            if Path(name).name != name:  # a path could name any file of the machine
                raise ValueError(f"{name!r} is not the name of a file in this folder")
    return [folder / name for name in names]


# --- The files of an adapter -------------------------------------------------------------------

# Options of PEFT that lora.py lacks. They would change the numbers, so each raises an error.
UNSUPPORTED = ("use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens", "lora_bias")
UNSUPPORTED += ("fan_in_fan_out", "layer_replication", "trainable_token_indices")
STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")  # init_lora_weights that change the base


def read_adapter_config(file: Path) -> dict:
    """Read adapter_config.json. Raises ValueError for an option that lora.py does not support."""
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
            with warnings.catch_warnings():  # for some bad patterns, Python 3.10 only warns
                warnings.simplefilter("error")
                config[field] = {re.compile(rf"(.*\.)?({p})$"): v for p, v in patterns.items()}
        for key, value in numbers.items():
            if type(value) not in (int, float) or not 0 < value < 1e15:
                raise ValueError(f"{key} is {value!r}, expected a number above 0")
        if not 0 <= config.get("lora_dropout", 0.0) < 1:
            raise ValueError(f"lora_dropout is {config['lora_dropout']!r}, expected 0 to below 1")
    return config


def matched(patterns: dict[re.Pattern, float], name: str, default: float) -> float:
    """The value of the first pattern that matches the end of a name, from a dot on, as in PEFT."""
    return next((value for pattern, value in patterns.items() if pattern.match(name)), default)


def read_pairs_of_matrices(file: Path) -> dict[str, tuple[str, dict[str, Tensor]]]:
    """For each projection in a file of PEFT: its name in PEFT, its lora_A and lora_B."""
    pairs, unused = {}, []
    for key, weight in load_file(file).items():
        whole = key.replace(".default.", ".").removesuffix(".weight")
        bare = PREFIX.sub("", whole)
        name, _, part = bare.rpartition(".")
        peft_name, pair = pairs.get(name, ("", {}))
        if bare.startswith("lm_head") or UNUSED.match(f"{bare}."):
            unused.append(key)
        elif bare.startswith("embed_tokens"):
            message = "changes the embeddings, which have no adapter here"
            raise ValueError(f"{key} {message}: merge it with PEFT, and give the whole checkpoint")
        elif part in pair:
            raise ValueError(f"{name} is in it twice, once as model.{name}")
        else:
            peft_name = whole.removeprefix("base_model.model.").rpartition(".")[0]
            pairs[name] = peft_name, pair | {part: weight}
    if not pairs:
        raise ValueError("holds no adapter of the layers")
    report_unused(file, unused)
    return pairs


# --- Tokenizer --------------------------------------------------------------------------------

# Texts before and after every text. A tokenizer without BOS (SmolLM2, Qwen) gets the token that
# began each document in pre-training: a causal model puts unneeded attention on its first token
# (Xiao et al. 2023, arXiv 2309.17453), and that should not be a word of the text.
START = "<|endoftext|>"
ONE_WORD = '" The meaning of the sentence in one word: "'
TEMPLATES = {
    "endoftext": (START, ""),
    # The chat markers that the authors put around every input of an instruct model.
    "mistral": ("[INST]", " [/INST]"),  # Mistral-Instruct, Llama-2-chat
    "llama-3": ("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
    # A causal instruct model is asked for the text in one word, and its last state is the vector:
    # PromptEOL (Jiang et al. 2023, arXiv 2307.16645), in the words that suit SmolLM2 best on STS-B
    # dev. The second template shows an example first.
    "one-word": (f'{START}Sentence: "', ONE_WORD),
    "one-word-example": (
        f'{START}Sentence: "A man sings and plays the guitar.{ONE_WORD}Music"\nSentence: "',
        ONE_WORD,
    ),
}
Template = str | tuple[str, str]  # a name in TEMPLATES, or the text before and the text after


def load_tokenizer(folder: str | Path, template: Template | None = None) -> Tokenizer:
    """The tokenizer of `folder`/tokenizer.json. Special tokens inside a text are plain text.

    template: the texts before and after every text.
    """
    if isinstance(template, str) and template not in TEMPLATES:
        raise ValueError(f"template {template!r}: expected {' or '.join(TEMPLATES)}")
    file = Path(folder) / "tokenizer.json"
    with reading(file):
        tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8"))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode("a")  # some errors come only in use
        if template is not None:
            tokenizer = add_template(tokenizer, template)
    settings = Path(folder) / TOKENIZER
    adds = settings.exists() and read_json(settings).get("add_eos_token")
    if adds and not tokenizer.encode("a").special_tokens_mask[-1]:
        message = "add_eos_token is true, but tokenizer.json appends no EOS: texts end without it"
        print(f"{settings}: {message}", file=sys.stderr)
    tokenizer.encode_special_tokens = True
    return tokenizer


def tokens_around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The token ids before every text, and those after it."""
    alone = tokenizer.encode("a")
    first = alone.special_tokens_mask.index(0)
    special = [i for i, s in zip(alone.ids, alone.special_tokens_mask, strict=True) if s]
    return special[:first], special[first:]


def add_template(tokenizer: Tokenizer, template: Template) -> Tokenizer:
    """A tokenizer that puts a template around every text. The template is never cut.

    It is saved with the tokenizer, as tokens by name, because other readers look these up. A space
    at the end of the opening joins the first word of the text, as in a sentence. A tokenizer with
    a BOS needs no START before a named template.
    """
    opening, closing = TEMPLATES[template] if isinstance(template, str) else template
    bos, eos = tokens_around(tokenizer)
    if len(bos) > 1 or len(eos) > 1:
        raise ValueError("has a template already")
    if bos and isinstance(template, str):
        opening = opening.removeprefix(START)
    for marker in re.findall(r"<\|\w+\|>", opening + closing):
        if tokenizer.token_to_id(marker) is None:
            raise ValueError(f"has no token {marker}, which the template needs")
    markers = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    closing = closing.strip(" ") if closing.strip(" ") in markers else closing
    # Sentencepiece puts a space before its input. A line break before `closing` prevents this.
    spaced = tokenizer.encode("a").tokens[len(bos)].startswith("▁")
    before = "\n" if spaced else ""
    parts = (opening.rstrip(" "), before, before + closing)
    front, skipped, back = (tokenizer.encode(part, add_special_tokens=False).ids for part in parts)
    back = back[len(skipped) :]
    if opening.endswith(" ") and not spaced:
        steps = [Prepend(" "), tokenizer.normalizer]
        tokenizer.normalizer = normalizers.Sequence([step for step in steps if step])
    names = {i: tokenizer.id_to_token(i) for i in (*bos, *front, *back, *eos)}
    front, back = (
        [{"SpecialToken": {"id": names[i], "type_id": 0}} for i in ids]
        for ids in (bos + front, back + eos)
    )
    around = {
        "type": "TemplateProcessing",  # its class takes no token with a colon
        "single": [*front, {"Sequence": {"id": "A", "type_id": 0}}, *back],
        "pair": [{"Sequence": {"id": side, "type_id": 0}} for side in "AB"],
        "special_tokens": {n: {"id": n, "ids": [i], "tokens": [n]} for i, n in names.items()},
    }
    return Tokenizer.from_str(
        json.dumps(json.loads(tokenizer.to_str()) | {"post_processor": around})
    )


# --- How to use a folder -----------------------------------------------------------------------

SENTENCE_BERT, TOKENIZER = "sentence_bert_config.json", "tokenizer_config.json"
PROMPTS = "config_sentence_transformers.json"
NOTHING = "\u2063"  # a character that an exported tokenizer drops
# Our names of pooling rules, and sentence-transformers'.
POOLING_MODES = {"mean": "mean_tokens", "weighted_mean": "weightedmean_tokens"}
POOLING_MODES |= {"last": "lasttoken", "first": "cls_token"}
# Before sentence-transformers 6, the short name of a pooling mode has these around it.
MODE = re.compile("^pooling_mode_|_tokens?$")


def encoder_options(folder: Path, adapters: Sequence[Path] = ()) -> dict[str, object]:
    """Pooling, length and attention for a folder: the arguments of LLM2Vec, and `is_causal`.

    `save_encoder` writes them to config.json, under `llm2vec`. The files of sentence-transformers
    override these; a folder that has them is causal unless config.json says otherwise. A folder
    with neither is a language model, and is used as in the paper. The authors' models and adapters
    have a space as the separator. Raises ValueError for a module of sentence-transformers that
    would change the vectors.
    """

    config, modules = read_json(folder / "config.json"), folder / "modules.json"
    options = {"pooling": "mean", "max_length": 512}
    configs = [read_json(a / ADAPTER[0]) for a in adapters if (a / ADAPTER[0]).exists()]
    if any(map(by_the_authors, [config, *configs])):
        options["separator"] = " "
    is_encoder = "llm2vec" in config or modules.exists()
    options["is_causal"] = config.get("is_causal", True) if is_encoder else False
    options |= config.get("llm2vec") or {}
    options |= {} if "llm2vec" in config or not modules.exists() else {"separator": ""}
    if modules.exists() and not (folder / EXTRA).exists():  # with EXTRA, the modules are ours
        options |= sentence_transformers_options(folder, config)
    for adapter in adapters:  # a run folder has the options of its training
        if (adapter / "settings.json").exists():
            run = read_json(adapter / "settings.json")
            trained = {name: run.get(name) for name in ("pooling", "include_prompt", "is_causal")}
            options |= {name: value for name, value in trained.items() if value is not None}
    return options


def sentence_transformers_options(folder: Path, config: dict) -> dict[str, object]:
    """The same, from the files of sentence-transformers."""

    def read(name: str) -> dict:
        return read_json(folder / name) if (folder / name).exists() else {}

    options, modules = {}, folder / "modules.json"
    with reading(modules):
        for module in json.loads(modules.read_text(encoding="utf-8")):
            kind = module["type"].rpartition(".")[2]
            if kind not in ("Transformer", "WordWeights", "Pooling", "Normalize"):
                advice = "to read it as a plain checkpoint, remove modules.json"
                raise ValueError(f"has a module {kind}, which is not supported; {advice}")
            if kind == "Pooling":
                pooling = read_json(folder / module["path"] / "config.json")
                modes = [k for k, v in pooling.items() if k.startswith("pooling_mode_") and v]
                names = {MODE.sub("", theirs): ours for ours, theirs in POOLING_MODES.items()}
                mode = "+".join(MODE.sub("", k) for k in modes) or pooling["pooling_mode"]
                options["pooling"] = names.get(mode, mode)  # LLM2Vec raises for an unknown one
                if options["pooling"] != "last":  # the last token is the same without the prompt
                    options["include_prompt"] = pooling.get("include_prompt", True)
    reader, more = read(SENTENCE_BERT), read(PROMPTS)
    side = read(TOKENIZER).get("truncation_side", "right")
    unread = {name: reader.get(name) for name in ("do_lower_case", "processing_kwargs")}
    unread |= {
        "truncate_dim": more.get("truncate_dim"),
        "truncation_side": side != "right" and side,
    }
    for name, value in unread.items():
        if value:
            message = f"{name} is {value!r}, which is not supported"
            advice = "to read it as a plain checkpoint, remove modules.json"
            raise ValueError(f"{folder}: {message}; {advice}")
    lengths = (config.get("max_position_embeddings"), read(TOKENIZER).get("model_max_length"))
    shorter = min(int(length) for length in (*lengths, 1e30) if length)
    options["max_length"] = reader.get("max_seq_length") or shorter
    prompts = {name: text.replace(NOTHING, "") for name, text in more.get("prompts", {}).items()}
    options["prompts"] = {name: text for name, text in prompts.items() if text}
    if default := prompts.get(more.get("default_prompt_name")):
        message = f"its default prompt {default!r} is not read before texts"
        print(f"{folder}: {message}; give it as the instruction", file=sys.stderr)
    return options


def by_the_authors(config: dict) -> bool:
    """Whether a model's or an adapter's config names a class of the authors' package."""
    parent = (config.get("auto_mapping") or {}).get("parent_library") or ""
    names = map(str, config.get("architectures") or ())
    ends = ("EncoderModel", "BiModel", "BiForMNTP")
    return parent.startswith("llm2vec.") or any(name.endswith(ends) for name in names)
