"""An encoder as an ordinary checkpoint folder, for transformers, sentence-transformers and vLLM."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file

from llm2vec_data.card import model_card
from llm2vec_data.checkpoints import (
    EXTRA,
    FEATURES,
    FLOATS,
    NOTHING,
    POOLING_MODES,
    PROMPTS,
    SENTENCE_BERT,
    TOKENIZER,
    tokens_around,
)
from llm2vec_data.disk import new_folder

SHARD = 5 * 10**9  # bytes of weights in one file, at most, as on the Hugging Face hub


def save_encoder(model, folder: Path) -> None:
    """Write an encoder as a Hugging Face folder with the files of sentence-transformers.

    transformers 5.2 and later reads its `"is_causal": false`; sentence-transformers gives the same
    vectors. Other modules than the decoder go to extra.safetensors; sentence-transformers then
    can't load the folder, because it would leave them out. The folder is renamed into place once
    it is complete, and replaces a checkpoint of that name. Raises ValueError if adapters are not
    merged, or if the folder holds something else.
    """
    state = model.decoder.state_dict()
    if any("lora_" in name for name in state):
        raise ValueError("adapters are not merged: call merge_lora before save")
    if any(weight.dtype not in FLOATS for weight in state.values()):
        raise ValueError("4-bit weights are for training: save the original weights")
    if model.decoder.can_predict:  # in a causal-LM checkpoint, `model` is the inner model
        state = {n if n == "lm_head.weight" else f"model.{n}": w for n, w in state.items()}
    inside = ("decoder.", "heads.")
    extra = {k: w for k, w in model.state_dict().items() if not k.startswith(inside)}
    shards = split_torch_state_dict_into_shards(state, max_shard_size=SHARD)
    files = checkpoint_files(model)
    if extra:
        files["modules.json"] = stop_sign(extra)
    with new_folder(folder) as new:
        parts = {n: {k: state[k] for k in keys} for n, keys in shards.filename_to_tensors.items()}
        for name, part in (parts | ({EXTRA: extra} if extra else {})).items():
            try:
                part = {key: weight.contiguous() for key, weight in part.items()}
                save_file(part, new / name, metadata={"format": "pt"})
            except SafetensorError as error:  # also for a full disk
                raise OSError(f"{new / name}: {error}") from None
        if shards.is_sharded:
            index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
            files["model.safetensors.index.json"] = index
        for name, content in files.items():
            (new / name).parent.mkdir(exist_ok=True)
            (new / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        card = model_card(model, folder.name, SENTENCE_BERT in files and not extra)
        (new / "README.md").write_text(card, encoding="utf-8")
        for file in new.glob("*.safetensors"):  # safetensors lets only this user read them
            file.chmod((new / "config.json").stat().st_mode)
    model.decoder.name_or_path = str(folder.resolve())


def stop_sign(names: Iterable[str]) -> list[dict]:
    """A modules.json that sentence-transformers can't load, so that it leaves nothing out."""
    kind = "llm2vec.LLM2Vec with " + "+".join(dict.fromkeys(n.partition(".")[0] for n in names))
    return [{"idx": 0, "name": "0", "path": "", "type": kind}]


def checkpoint_files(model) -> dict[str, object]:
    """Every JSON file of a checkpoint folder, by name.

    sentence-transformers averages all tokens, with BOS, but without the prompt. So if the tokenizer
    adds a BOS, its state gets the weight 0, by a module WordWeights. (With a prompt the mean is
    then too short, by the prompt's share of the tokens: cosines are right.) But the tokens of a
    template may also be in a text, and other poolings have no such weights: then every prompt
    starts with a character that the tokenizer drops, so that BOS belongs to the prompt. The last
    token is the same whatever is left out before it. Of several tokens after every text,
    sentence-transformers counts all but one to the prompt. So its files are left out for a template
    with several such tokens if the prompt is not pooled, and for an unknown pooling.
    """
    config, tokenizer = model.decoder.config, json.loads(model.tokenizer.to_str())
    before, after = tokens_around(model.tokenizer)
    all_pooled = model.include_prompt or model.pooling == "last"
    left_out = [] if all_pooled else before
    never_in_text = {token["id"] for token in tokenizer["added_tokens"] if token["special"]}
    weightless = left_out if model.pooling == "mean" and never_in_text.issuperset(before) else []
    start = NOTHING if left_out and not weightless else ""
    # A space at the end of an instruction is a part of the text's first token, not a token itself.
    prompts = {"query": "", "document": ""} | model.prompts
    prompts = {name: start + re.sub(" $", f" {NOTHING}", text) for name, text in prompts.items()}
    pre, normalizer = tokenizer["pre_tokenizer"] or {}, tokenizer["normalizer"]
    if start and pre.get("prepend_scheme") == "first":  # after a prompt, it would not be first
        pre["prepend_scheme"] = "always"
    if any(prompts.values()) and NOTHING not in json.dumps(normalizer, ensure_ascii=False):
        patterns = {"Regex": f" {NOTHING}$"}, {"String": NOTHING}
        steps = [{"type": "Replace", "pattern": p, "content": ""} for p in patterns]
        steps += [normalizer] if normalizer else []
        tokenizer["normalizer"] = {"type": "Sequence", "normalizers": steps}
    # The padding token is special, or else any token that was not added to the vocabulary.
    special = [i for i in sorted(never_in_text) if i < config.vocab_size]
    unfit = {token["id"] for token in tokenizer["added_tokens"]} - {*special} | {*before}
    pad = next(i for i in (*special, *range(len(unfit) + 1)) if i not in unfit)
    kind = "ForCausalLM" if model.decoder.can_predict else "Model"
    family = {"smollm3": "SmolLM3"}.get(config.model_type, config.model_type.capitalize())
    options = ("pooling", "max_length", "separator", "include_prompt")
    fields = {k: v for k, v in vars(config).items() if k not in FEATURES} | {
        "architectures": [family + kind],
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "pad_token_id": pad,
        # If no token ends a text, `pad`: text-embeddings-inference needs one for padding.
        "eos_token_id": after[0] if len(after) == 1 else pad,
        "torch_dtype": str(model.decoder.norm.weight.dtype).removeprefix("torch."),
        "llm2vec": {name: getattr(model, name) for name in options},
    }
    if config.model_type != "mistral":
        fields["use_sliding_window"] = config.sliding_window is not None
    if not config.is_causal:  # for text-embeddings-inference
        fields["use_bidirectional_attention"] = True
    if config.layer_types is None:  # with this key, transformers reads a Mistral as a Ministral
        del fields["layer_types"]
    if (config.rope_scaling or {}).get("rope_type", "default") == "default":
        del fields["rope_scaling"]  # text-embeddings-inference raises for an unknown scaling
    tokens = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": model.tokenizer.id_to_token(pad),
        "padding_side": "right",
        "split_special_tokens": True,
        "model_max_length": model.max_length,
    }
    if len(after) == 1:
        tokens["eos_token"] = model.tokenizer.id_to_token(after[0])
    if len(before) == 1:
        fields["bos_token_id"] = before[0]
        # If sentence-transformers knows the BOS, it counts a BOS that ends a prompt as text. With
        # these fields, transformers adds the tokens around a text itself, and needs all of them.
        if not start and never_in_text.issuperset(before) and len(after) <= 1:
            tokens["bos_token"] = model.tokenizer.id_to_token(before[0])
            tokens |= {"add_bos_token": True, "add_eos_token": bool(after)}
    files = {"config.json": fields, "tokenizer.json": tokenizer, TOKENIZER: tokens}
    pooling = POOLING_MODES.get(model.pooling)
    if pooling is None or len(after) > 1 and not all_pooled:
        return files
    modules = ["Transformer", "WordWeights", "Pooling"]
    if weightless:  # a character for each id
        vocab = "".join("0" if i in weightless else "1" for i in range(config.vocab_size))
        weights = {"vocab": vocab, "word_weights": {"0": 0.0}, "unknown_word_weight": 1.0}
        files["1_WordWeights/config.json"] = weights
    else:
        modules.remove("WordWeights")
    package = "sentence_transformers.models."
    return files | {
        "modules.json": [
            {"idx": i, "name": str(i), "path": f"1_{name}" if i else "", "type": package + name}
            for i, name in enumerate(modules)
        ],
        "1_Pooling/config.json": {
            "word_embedding_dimension": config.hidden_size,
            **{f"pooling_mode_{name}": name == pooling for name in POOLING_MODES.values()},
            "include_prompt": all_pooled,
        },
        SENTENCE_BERT: {"max_seq_length": model.max_length, "do_lower_case": False},
        PROMPTS: {
            "prompts": prompts | ({"default": start} if start else {}),
            "default_prompt_name": "default" if start else None,
            "similarity_fn_name": "cosine",
        },
    }
