"""An encoder as an ordinary checkpoint folder, for transformers, sentence-transformers and vLLM.

`save_encoder` writes one; `described` reads how one is to be used, whoever wrote it.
"""

import contextlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from llm2vec import FLOATS, POOLING, LLM2Vec, read_json, reading

SHARD = 5 * 10**9  # bytes of weights in one file, at most, as on the Hugging Face hub
NOTHING = "\u2063"  # a character that an exported tokenizer drops
SENTENCE_BERT, TOKENIZER = "sentence_bert_config.json", "tokenizer_config.json"
PROMPTS = "config_sentence_transformers.json"
# What stands around the short name of a pooling mode before sentence-transformers 6.
MODE = re.compile("^pooling_mode_|_tokens?$")


def save_encoder(model: LLM2Vec, folder: Path) -> None:
    """Write a Hugging Face folder with the files of sentence-transformers.

    transformers 5.2 and later honours its `"is_causal": false`; sentence-transformers gives the
    same vectors. The folder appears under its name once it is complete; a checkpoint of that name
    is replaced. Raises ValueError if adapters are not merged, or the folder holds something else.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    state = model.decoder.state_dict()
    if any("lora_" in name for name in state):
        raise ValueError("adapters are not merged: call merge_lora before save")
    if any(weight.dtype not in FLOATS for weight in state.values()):
        raise ValueError("4-bit weights are for training: save the weights as they were")
    if model.decoder.can_predict:  # a causal-LM checkpoint, whose inner model is `model`
        state = {n if n == "lm_head.weight" else f"model.{n}": w for n, w in state.items()}
    shards = split_torch_state_dict_into_shards(state, max_shard_size=SHARD)
    files = checkpoint_files(model)
    with new_folder(folder) as new:
        for name, keys in shards.filename_to_tensors.items():
            try:
                part = {key: state[key].contiguous() for key in keys}
                save_file(part, new / name, metadata={"format": "pt"})
            except SafetensorError as error:  # of a full disk, too
                raise OSError(f"{new / name}: {error}") from None
        if shards.is_sharded:
            index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
            files["model.safetensors.index.json"] = index
        for name, content in files.items():
            (new / name).parent.mkdir(exist_ok=True)
            (new / name).write_text(json.dumps(content, indent=2) + "\n")
    model.decoder.name_or_path = str(folder.resolve())


def described(folder: Path) -> dict[str, object]:
    """How a folder is to be pooled, cut and attended: the arguments of LLM2Vec, and `is_causal`.

    config.json says so under `llm2vec`, where `save_encoder` writes it. The files of
    sentence-transformers go before that; a folder that has them is causal unless config.json says
    otherwise. A folder without either is a language model, of which the paper's encoder is made.
    Raises ValueError for a module of sentence-transformers that would change the vectors.
    """

    def read(name: str) -> dict:
        return read_json(folder / name) if (folder / name).exists() else {}

    config, modules = read("config.json"), folder / "modules.json"
    said = {"pooling": "mean", "max_length": 512} | (config.get("llm2vec") or {})
    is_encoder = "llm2vec" in config or modules.exists()
    said["is_causal"] = config.get("is_causal", True) if is_encoder else False
    if not modules.exists():
        return said
    with reading(modules):
        for module in json.loads(modules.read_text()):
            kind = module["type"].rpartition(".")[2]
            if kind not in ("Transformer", "WordWeights", "Pooling", "Normalize"):
                what = "without modules.json, this is a checkpoint like any other"
                raise ValueError(f"has a module {kind}, which is not supported; {what}")
            if kind == "Pooling":
                pooling = read_json(folder / module["path"] / "config.json")
                said["include_prompt"] = pooling.get("include_prompt", True)
                modes = [k for k, v in pooling.items() if k.startswith("pooling_mode_") and v]
                names = {MODE.sub("", st): name for name, (_, st) in POOLING.items() if st}
                mode = "+".join(MODE.sub("", k) for k in modes) or pooling["pooling_mode"]
                said["pooling"] = names.get(mode, mode)  # LLM2Vec refuses one that it doesn't know
    lengths = (config.get("max_position_embeddings"), read(TOKENIZER).get("model_max_length"))
    shorter = min(int(length) for length in (*lengths, 1e30) if length)
    said["max_length"] = read(SENTENCE_BERT).get("max_seq_length") or shorter
    more = read(PROMPTS)
    prompts = {name: text.replace(NOTHING, "") for name, text in more.get("prompts", {}).items()}
    said["prompts"] = {name: text for name, text in prompts.items() if text}
    if default := prompts.get(more.get("default_prompt_name")):
        what = f"its default prompt {default!r} is not read in front of texts"
        print(f"{folder}: {what}; as an instruction, it is", file=sys.stderr)
    return said


def checkpoint_files(model: LLM2Vec) -> dict[str, object]:
    """Every JSON file of a checkpoint folder, by name.

    sentence-transformers averages all tokens, BOS included, but for those of a prompt. So where
    the tokenizer puts BOS in front, its state gets the weight 0, by a module WordWeights. (With a
    prompt the mean is then too short, by the prompt's share of the tokens: cosines are not.) What a
    template puts in front may also stand in a text, and other poolings have no such weights: there,
    every prompt starts with a character that the tokenizer drops, so that BOS is of the prompt.
    sentence-transformers allows for one token behind a prompt. Its files are left out for a
    template that closes with more, and for a pooling that it does not know.
    """
    config, tokenizer = model.decoder.config, json.loads(model.tokenizer.to_str())
    alone = model.tokenizer.encode("a")
    own = alone.special_tokens_mask.index(0)
    special = [i for i, s in zip(alone.ids, alone.special_tokens_mask, strict=True) if s]
    in_front, behind = special[:own], special[own:]
    left_out = [] if model.include_prompt else in_front
    never_in_text = {token["id"] for token in tokenizer["added_tokens"] if token["special"]}
    weightless = left_out if model.pooling == "mean" and never_in_text.issuperset(in_front) else []
    lead = NOTHING if left_out and not weightless else ""
    # The space behind an instruction is one token with the text's first, and none without it.
    prompts = {"query": "", "document": ""} | model.prompts
    prompts = {name: lead + re.sub(" $", f" {NOTHING}", prompt) for name, prompt in prompts.items()}
    pre, normalizer = tokenizer["pre_tokenizer"] or {}, tokenizer["normalizer"]
    if lead and pre.get("prepend_scheme") == "first":  # with a prompt, it would not be first
        pre["prepend_scheme"] = "always"
    if any(prompts.values()) and NOTHING not in json.dumps(normalizer, ensure_ascii=False):
        patterns = {"Regex": f" {NOTHING}$"}, {"String": NOTHING}
        steps = [{"type": "Replace", "pattern": p, "content": ""} for p in patterns]
        steps += [normalizer] if normalizer else []
        tokenizer["normalizer"] = {"type": "Sequence", "normalizers": steps}
    added = [t["id"] for t in tokenizer["added_tokens"] if t["id"] < config.vocab_size]
    pad = next(i for i in (*added, *range(len(in_front) + 1)) if i not in in_front)
    kind = "ForCausalLM" if model.decoder.can_predict else "Model"
    family = {"smollm3": "SmolLM3"}.get(config.model_type, config.model_type.capitalize())
    how = ("pooling", "max_length", "separator", "include_prompt")
    fields = vars(config) | {
        "architectures": [family + kind],
        "hidden_act": "silu",
        "pad_token_id": pad,
        "torch_dtype": str(model.decoder.norm.weight.dtype).removeprefix("torch."),
        "llm2vec": {name: getattr(model, name) for name in how},
    }
    if config.model_type != "mistral":
        fields["use_sliding_window"] = config.sliding_window is not None
    if config.layer_types is None:  # the very key makes a Ministral of a Mistral, in transformers
        del fields["layer_types"]
    tokens = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": model.tokenizer.id_to_token(pad),
        "padding_side": "right",
        "split_special_tokens": True,
        "model_max_length": model.max_length,
    }
    if len(behind) == 1:
        tokens["eos_token"] = model.tokenizer.id_to_token(behind[0])
    files = {"config.json": fields, "tokenizer.json": tokenizer, TOKENIZER: tokens}
    _, pooling = POOLING[model.pooling]
    if len(behind) > 1 or pooling is None:
        return files
    modules = ["Transformer", "WordWeights", "Pooling"]
    if weightless:  # a character for each id
        vocab = "".join("0" if i in weightless else "1" for i in range(config.vocab_size))
        weights = {"vocab": vocab, "word_weights": {"0": 0.0}, "unknown_word_weight": 1.0}
        files["1_WordWeights/config.json"] = weights
    else:
        modules.remove("WordWeights")
    place = "sentence_transformers.models."
    return files | {
        "modules.json": [
            {"idx": i, "name": str(i), "path": f"1_{name}" if i else "", "type": place + name}
            for i, name in enumerate(modules)
        ],
        "1_Pooling/config.json": {
            "word_embedding_dimension": config.hidden_size,
            **{f"pooling_mode_{name}": name == pooling for _, name in POOLING.values() if name},
            "include_prompt": model.include_prompt,
        },
        SENTENCE_BERT: {"max_seq_length": model.max_length, "do_lower_case": False},
        PROMPTS: {
            "prompts": prompts | ({"default": lead} if lead else {}),
            "default_prompt_name": "default" if lead else None,
            "similarity_fn_name": "cosine",
        },
    }


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which is renamed to `folder` at the end, if all went well.

    A checkpoint of that name is replaced, whole; a folder of anything else is refused.
    """
    known = (folder / "config.json").is_file() and any(folder.glob("model*.safetensors"))
    if folder.exists() and not known and any(folder.iterdir()):
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
