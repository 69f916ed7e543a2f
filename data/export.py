"""An encoder as an ordinary checkpoint folder, for transformers, sentence-transformers and vLLM."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

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
    with new_folder(folder) as new:
        for name, content in checkpoint_files(model).items():
            (new / name).parent.mkdir(exist_ok=True)
            (new / name).write_text(json.dumps(content, indent=2) + "\n")
        # With an output head it is a causal-LM checkpoint, whose inner model is `model`.
        prefix = "model." if model.decoder.can_predict else ""
        save_weights({n if n == "lm_head.weight" else prefix + n: w for n, w in state.items()}, new)


def save_weights(state: dict[str, Tensor], folder: Path) -> None:
    """model.safetensors; or shards with their index, if there is more than SHARD of it."""
    shards: list[dict[str, Tensor]] = [{}]
    for name, weight in state.items():
        if shards[-1] and sum(w.nbytes for w in [*shards[-1].values(), weight]) > SHARD:
            shards.append({})
        shards[-1][name] = weight.contiguous()
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    names = names if len(shards) > 1 else ["model.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        try:
            save_file(shard, folder / name, metadata={"format": "pt"})
        except SafetensorError as error:  # of a full disk, too
            raise OSError(f"{folder / name}: {error}") from None
    if len(shards) > 1:
        total = sum(weight.nbytes for weight in state.values())
        weight_map = {k: name for name, shard in zip(names, shards, strict=True) for k in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


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
    in_front = alone.ids[:own]
    behind = [i for i, s in zip(alone.ids, alone.special_tokens_mask, strict=True) if s][own:]
    drop = {"type": "Replace", "pattern": {"String": NOTHING}, "content": ""}
    pre = tokenizer["pre_tokenizer"] or {}
    if in_front and pre.get("prepend_scheme") == "first":  # with a prompt, it would not be first
        pre["prepend_scheme"] = "always"
    if in_front and NOTHING not in json.dumps(tokenizer["normalizer"], ensure_ascii=False):
        steps = [drop, tokenizer["normalizer"]] if tokenizer["normalizer"] else [drop]
        tokenizer["normalizer"] = {"type": "Sequence", "normalizers": steps}
    special = [t["content"] for t in tokenizer["added_tokens"] if t["id"] not in in_front]
    other = next(i for i in range(len(in_front) + 1) if i not in in_front)
    pad = (special or [model.tokenizer.id_to_token(other)])[0]
    kind = "ForCausalLM" if model.decoder.can_predict else "Model"
    family = {"smollm3": "SmolLM3"}.get(config.model_type, config.model_type.capitalize())
    files = {
        "config.json": vars(config)
        | {
            "architectures": [family + kind],
            "hidden_act": "silu",
            "pad_token_id": model.tokenizer.token_to_id(pad),
            "torch_dtype": str(model.decoder.norm.weight.dtype).removeprefix("torch."),
        },
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": pad,
            "padding_side": "right",
            "split_special_tokens": True,
            "model_max_length": model.max_length,
        }
        | ({"eos_token": model.tokenizer.id_to_token(behind[0])} if len(behind) == 1 else {}),
    }
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
    if folder.exists() and not known:
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
