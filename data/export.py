"""An encoder as an ordinary checkpoint folder, for transformers, sentence-transformers and vLLM."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file

from llm2vec import FLOATS, POOLING, LLM2Vec

SHARD = 5 * 10**9  # bytes of weights in one file, at most, as on the Hugging Face hub
NOTHING = "\u2063"  # a character that an exported tokenizer drops


def save_encoder(model: LLM2Vec, folder: Path) -> None:
    """Write a Hugging Face folder with the files of sentence-transformers.

    transformers 5.2 and later honours its `"is_causal": false`; sentence-transformers gives the
    same vectors. The folder appears under its name once it is complete; a checkpoint of that name
    is replaced. Raises ValueError if adapters are not merged, or the folder holds something else.
    """
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


def checkpoint_files(model: LLM2Vec) -> dict[str, object]:
    """Every JSON file of a checkpoint folder, by name.

    sentence-transformers averages all tokens, BOS included, but for those of a prompt. So where
    the tokenizer puts BOS in front, the default prompt is a character that the tokenizer drops:
    what is left of the prompt is BOS, which then is read and not averaged, as here. It allows for
    one token behind a prompt. Its files are left out for a template that closes with more, and for
    a pooling that it does not know.
    """
    config, tokenizer = model.decoder.config, json.loads(model.tokenizer.to_str())
    alone = model.tokenizer.encode("a")
    own = alone.special_tokens_mask.index(0)
    special = [i for i, s in zip(alone.ids, alone.special_tokens_mask, strict=True) if s]
    in_front, behind = special[:own], special[own:]
    if in_front:
        pre, normalizer = tokenizer["pre_tokenizer"] or {}, tokenizer["normalizer"]
        if pre.get("prepend_scheme") == "first":  # with a prompt, it would not be first
            pre["prepend_scheme"] = "always"
        if NOTHING not in json.dumps(normalizer, ensure_ascii=False):
            drop = {"type": "Replace", "pattern": {"String": NOTHING}, "content": ""}
            steps = [drop, normalizer] if normalizer else [drop]
            tokenizer["normalizer"] = {"type": "Sequence", "normalizers": steps}
    added = [token["id"] for token in tokenizer["added_tokens"]]
    pad = next(i for i in (*added, *range(len(in_front) + 1)) if i not in in_front)
    kind = "ForCausalLM" if model.decoder.can_predict else "Model"
    family = {"smollm3": "SmolLM3"}.get(config.model_type, config.model_type.capitalize())
    about = {"architectures": [family + kind], "hidden_act": "silu", "pad_token_id": pad}
    about["torch_dtype"] = str(model.decoder.norm.weight.dtype).removeprefix("torch.")
    tokens = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": model.tokenizer.id_to_token(pad),
        "padding_side": "right",
        "split_special_tokens": True,
        "model_max_length": model.max_length,
    }
    if len(behind) == 1:
        tokens["eos_token"] = model.tokenizer.id_to_token(behind[0])
    fields = vars(config) | about
    if config.layer_types is None:  # the very key makes a Ministral of a Mistral, in transformers
        del fields["layer_types"]
    files = {"config.json": fields, "tokenizer.json": tokenizer}
    files["tokenizer_config.json"] = tokens
    _, pooling = POOLING[model.pooling]
    if len(behind) > 1 or pooling is None:
        return files
    module = "sentence_transformers.models."
    return files | {
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": module + "Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": module + "Pooling"},
        ],
        "1_Pooling/config.json": {
            "word_embedding_dimension": config.hidden_size,
            **{f"pooling_mode_{name}": name == pooling for _, name in POOLING.values() if name},
            "include_prompt": False,
        },
        "sentence_bert_config.json": {"max_seq_length": model.max_length, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "prompts": {"default": NOTHING} if in_front else {},
            "default_prompt_name": "default" if in_front else None,
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
