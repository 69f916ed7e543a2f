# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "transformers==5.23.*", "peft==0.21.*", "sentence-transformers==6.2.*",
#     "torch", "numpy", "safetensors", "tokenizers",
# ]
# ///
"""Round trips between this project and the libraries that its users have, run live.

    uv run tests/interop.py [--write] [--tokenizer FILE]     (or python, with the packages above)

One line a check, with the largest difference; exit status 1 if any is above 1e-5. Hidden states may
differ by twice what the library's own are away from float64, which has to be below 2e-5.
`--tokenizer` adds a tokenizer.json to those built here. `--write` keeps what the libraries wrote
and computed in golden/interop, if all agreed; test_interop.py holds the project to it where they
are not installed.
"""

import argparse
import copy
import json
import logging
import math
import os
import shutil
import socket
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.append(str(Path(__file__).parent.parent))

import torch
from golden.make import PROJECTIONS, redraw
from peft import AutoPeftModelForFeatureExtraction, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    MistralConfig,
)
from transformers.utils.logging import disable_progress_bar

import data.export
import lora
from llm2vec import POOLING, Decoder, LLM2Vec, lead_of, load_tokenizer

HERE = Path(__file__).parent
GOLDEN = HERE / "golden"
MAX_LENGTH = 16
INSTRUCTION = "find the query:\n"
TEXTS = [
    "find the thing",
    "his",
    "  two spaces in front",
    " one in front, and one behind ",
    "the quick query and the thing, finding his things again and again",  # above MAX_LENGTH
    "naïve café 日本 🙂",
    "a <s> b </s> <unk>",  # the names of special tokens, which in a text are text
    "the\nand\tthe",
    "\n a new line first",
]
failed = []


def check(name: str, ours, theirs, atol: float = 1e-5) -> None:
    """Print the largest difference of two arrays, and remember the name if it is too large."""
    ours, theirs = (torch.as_tensor(x).float() for x in (ours, theirs))
    error = (ours - theirs).abs().max().item() if ours.shape == theirs.shape else math.inf
    if not error <= atol:
        failed.append(name)
    print(f"{'ok    ' if error <= atol else 'FAILED'}  {error:.1e}  {name}", flush=True)


# --- Models and tokenizers -----------------------------------------------------------------------


def write_base(folder: Path, tokenizer: Tokenizer, vocab_size: int = 384) -> Path:
    """A Mistral with room for every tokenizer here, and a window shorter than the texts."""
    config = MistralConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        sliding_window=6,
        tie_word_embeddings=True,
    )
    model = redraw(AutoModelForCausalLM.from_config(config), seed=40)
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def build_tokenizer(kind: str) -> Tokenizer:
    """A small BPE of one of the four kinds that Llama and Mistral checkpoints have.

    prepend: sentencepiece with byte fallback, as Llama 2 and Mistral 7B were first converted
    metaspace: the same, as later conversions write it
    bytes: over bytes, without BOS
    bytes-bos: over bytes, with BOS, as Llama 3's
    """
    over_bytes = kind.startswith("bytes")
    special, space = ["<unk>", "<s>", "</s>"], "Ġ" if over_bytes else "▁"
    if over_bytes:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    else:
        alphabet = [f"<0x{byte:02X}>" for byte in range(256)] + [space]
        alphabet += list("abcdefghijklmnopqrstuvwxyz,:")
    merges = [("Ċ", "Ċ"), ("Ċ", space)] if over_bytes else [(space, space)]
    for word in ("the", "and", "find", "his", "query"):
        merges += [(word[:i], word[i]) for i in range(1, len(word))] + [(space, word)]
    merges = list(dict.fromkeys(merges))
    vocab = {token: i for i, token in enumerate(special + alphabet)}
    for a, b in merges:
        vocab[a + b] = len(vocab)
    options = {} if over_bytes else {"unk_token": "<unk>", "byte_fallback": True}
    tokenizer = Tokenizer(models.BPE(vocab, merges, **options))
    tokenizer.add_special_tokens(special)
    steps = []
    if over_bytes:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        steps.append(processors.ByteLevel(trim_offsets=True))
    elif kind == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)
    else:
        prepend, replace = normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")
        tokenizer.normalizer = normalizers.Sequence([prepend, replace])
    if kind != "bytes":
        steps.append(processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)]))
    tokenizer.post_processor = processors.Sequence(steps)
    return tokenizer


def transformers_model(folder: Path, auto=AutoModel, **changes) -> nn.Module:
    config = AutoConfig.from_pretrained(folder)
    for key, value in changes.items():
        setattr(config, key, value)
    return auto.from_pretrained(folder, config=config, dtype=torch.float32).train(False)


def our_decoder(folder: Path, is_causal: bool = False) -> Decoder:
    decoder = Decoder.from_pretrained(folder)
    decoder.config.is_causal = is_causal
    return decoder


# --- sentence-transformers -----------------------------------------------------------------------


def sentence_transformers(base: Path, kind: str, tokenizer: Tokenizer, out: Path) -> dict:
    """Vectors of exported folders: each pooling, with and without a prompt.

    `out` keeps the tokenizer that came in, and the JSON that went out: all but the vocabulary, and
    for one pooling after another what differs.
    """
    out.mkdir()
    tokenizer.save(str(out / "tokenizer.json"))
    vectors, exported = {}, {}
    for pooling in (name for name, (_, theirs) in POOLING.items() if theirs):
        options = {"pooling": pooling, "max_length": MAX_LENGTH}
        model = LLM2Vec(our_decoder(base), load_tokenizer(out), **options)
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "exported"
            model.save(folder)
            theirs = SentenceTransformer(str(folder), device="cpu")
            again = LLM2Vec.from_pretrained(folder)
            assert theirs.max_seq_length == again.max_length == MAX_LENGTH
            files = sorted(folder.rglob("*.json") if pooling == "mean" else folder.glob("*/*.json"))
            exported[pooling] = {
                file.relative_to(folder).as_posix(): json.loads(file.read_text()) for file in files
            }
        for prompt, name in ((None, "plain"), (INSTRUCTION, "instructed")):
            key = f"{kind}.{pooling}.{name}"
            # With BOS and a prompt, their mean is too short, and points the same way.
            how = {"normalize": pooling == "mean" and kind != "bytes" and prompt is not None}
            vectors[key] = torch.from_numpy(
                theirs.encode(TEXTS, prompt=prompt, normalize_embeddings=how["normalize"])
            )
            check(f"sentence-transformers, {key}", model.encode(TEXTS, prompt, **how), vectors[key])
            check("    and loaded again here", again.encode(TEXTS, prompt, **how), vectors[key])
        for encode in (theirs.encode_query, theirs.encode_document):
            check(f"    {encode.__name__}", model.encode(TEXTS), encode(TEXTS))
        if pooling in ("mean", "last"):
            with torch.no_grad():  # as their trainer does
                forward = theirs(theirs.preprocess(TEXTS))["sentence_embedding"]
            check("    a forward pass", model.encode(TEXTS), forward)
        # Theirs of the empty text is zero, as it has no token of its own, or else its only token.
        if pooling == "first" and kind != "bytes":
            vectors[f"{kind}.empty"] = torch.from_numpy(theirs.encode([""]))
            check("    of the empty text", model.encode([""]), vectors[f"{kind}.empty"])
    del exported["mean"]["tokenizer.json"]["model"]
    write_json(out / "exported.json", exported)
    return vectors


def prompts(base: Path, kind: str, scratch: Path) -> None:
    """The instruction that a folder was trained with is its prompt for queries."""
    build_tokenizer(kind).save(str(base / "tokenizer.json"))
    for separator in ("\n", " "):
        model = LLM2Vec.from_pretrained(base, separator=separator)
        model.prompts["query"] = lead_of("find the query:", separator)
        model.save(scratch / "prompts")
        theirs = SentenceTransformer(str(scratch / "prompts"), device="cpu")
        ours = LLM2Vec.from_pretrained(scratch / "prompts").encode(
            TEXTS[:3], "find the query:", normalize=True
        )
        found = theirs.encode_query(TEXTS[:3], normalize_embeddings=True)
        check(f"encode_query, {kind}, separator {separator!r}", ours, found)


def made_elsewhere(base: Path, kind: str, scratch: Path) -> None:
    """A folder of sentence-transformers is taken at its word: causal, cut at 8, BOS averaged."""
    build_tokenizer(kind).save(str(base / "tokenizer.json"))
    tokens = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<unk>"}
    write_json(base / "tokenizer_config.json", tokens)
    for pooling in ("lasttoken", "mean", "weightedmean", "cls"):
        transformer = Transformer(str(base), max_seq_length=8)
        modules = [transformer, Pooling(transformer.get_embedding_dimension(), pooling)]
        theirs = SentenceTransformer(modules=modules, device="cpu").float()
        theirs.save(str(scratch / "elsewhere"))
        ours = LLM2Vec.from_pretrained(scratch / "elsewhere")
        name = f"made by sentence-transformers, {kind}, {pooling}"
        check(name, ours.encode(TEXTS[:6]), theirs.encode(TEXTS[:6]))
        ours.save(scratch / "elsewhere")
        again = SentenceTransformer(str(scratch / "elsewhere"), device="cpu")
        check("    and saved again here", again.encode(TEXTS[:6]), theirs.encode(TEXTS[:6]))
        shutil.rmtree(scratch / "elsewhere")


def write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


# --- transformers --------------------------------------------------------------------------------


def batch(vocab_size: int) -> tuple[Tensor, Tensor]:
    """Token ids and segments of three texts, (3, 14), padded at the right, the left, nowhere."""
    place = torch.arange(14)
    segments = torch.stack([place < 9, place >= 4, place < 14]).long()
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, vocab_size, segments.shape, generator=generator), segments


@torch.no_grad()
def compare(name: str, decoder: Decoder, model: nn.Module) -> Tensor:
    """Check hidden states at a padded batch; returns theirs, zero at padding."""
    ids, segments = batch(decoder.config.vocab_size)
    text = (segments > 0)[..., None]
    theirs = model(input_ids=ids, attention_mask=segments).last_hidden_state * text
    exact = copy.deepcopy(decoder).double()(ids, segments) * text
    rounding = (theirs - exact).abs().max().item()
    check(f"{name} (to float64)", exact, theirs, 2e-5)
    check(name, decoder(ids, segments) * text, theirs, max(1e-5, 2 * rounding))
    return theirs


def word_tokenizer() -> Tokenizer:
    return Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))


def transformers(scratch: Path) -> None:
    """Every golden model, exported and read by AutoModel, faces the way that it was saved."""
    folder = scratch / "exported"
    for file in sorted(GOLDEN.glob("*/expected.safetensors")):
        if file.parent.name.endswith("-adapter"):
            continue
        for is_causal in (False, True):
            decoder = our_decoder(file.parent, is_causal)
            LLM2Vec(decoder, word_tokenizer()).save(folder)
            model = AutoModel.from_pretrained(folder).train(False)
            side = "causal" if is_causal else "bidirectional"
            compare(f"AutoModel, {file.parent.name}, {side}", decoder, model)
            assert model.config.is_causal is is_causal, "config.is_causal is what was saved"
            assert "auto_map" not in model.config.to_dict(), "no remote code"
        if decoder.can_predict:
            ids, _ = batch(decoder.config.vocab_size)
            with torch.no_grad():
                logits = AutoModelForCausalLM.from_pretrained(folder).train(False)(ids).logits
                check("    with its output head", decoder.logits(decoder(ids)), logits)


def shards(base: Path, scratch: Path) -> None:
    whole, data.export.SHARD = data.export.SHARD, 20_000
    decoder, folder = our_decoder(base), scratch / "shards"
    LLM2Vec(decoder, word_tokenizer()).save(folder)
    data.export.SHARD = whole
    count = len(list(folder.glob("model-*.safetensors")))
    assert count > 3 and (folder / "model.safetensors.index.json").is_file()
    compare(f"AutoModel, {count} shards", decoder, AutoModel.from_pretrained(folder).train(False))
    ids, _ = batch(decoder.config.vocab_size)
    again = our_decoder(folder)
    check("    bits after loading again", decoder(ids), again(ids), atol=0)


def types(base: Path, scratch: Path) -> None:
    """A checkpoint keeps its type, and every bit."""
    for dtype in (torch.float32, torch.bfloat16):
        model, folder = LLM2Vec.from_pretrained(base, dtype=dtype), scratch / str(dtype)
        model.save(folder)
        vectors = model.encode(TEXTS)
        again = LLM2Vec.from_pretrained(folder, dtype=dtype).encode(TEXTS)
        check(f"{dtype}, bits of vectors after loading again", vectors, again, atol=0)
        theirs = AutoModel.from_pretrained(folder)
        weights = model.decoder.state_dict()
        assert theirs.dtype == dtype and set(theirs.state_dict()) == set(weights)
        errors = [(weights[n] - w).abs().max() for n, w in theirs.state_dict().items()]
        check("    bits of the weights in AutoModel", max(errors), 0, atol=0)
        theirs = SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
        cosines = torch.cosine_similarity(*map(torch.from_numpy, (vectors, theirs)))
        check("    cosine with sentence-transformers", cosines, torch.ones(len(TEXTS)), 1e-4)


# --- PEFT ----------------------------------------------------------------------------------------

# What PEFT is asked to write, and from which model. A pattern may name a projection in full, and
# then has the prefix of the model that it was made on.
WRITTEN = {
    "inner-list": (AutoModel, {"target_modules": PROJECTIONS}),
    "inner-pattern": (
        AutoModel,
        {"target_modules": r".*\.(q|v|up)_proj", "use_rslora": True, "rank_pattern": {"q_proj": 3}},
    ),
    "inner-all-linear": (
        AutoModel,
        {
            "target_modules": "all-linear",
            "rank_pattern": {r"layers\.0\..*_proj": 1},
            "alpha_pattern": {"layers.1.mlp.down_proj": 24, "mlp.*": 2},
        },
    ),
    "causal-list": (
        AutoModelForCausalLM,
        {
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"model.layers.1.mlp.down_proj": 3},
            "alpha_pattern": {"model.layers.0.self_attn.q_proj": 32},
        },
    ),
    "causal-pattern": (
        AutoModelForCausalLM,
        {
            "target_modules": r"model\.layers\.\d\.self_attn\.(k|o)_proj",
            "alpha_pattern": {r"^model\.layers\.1": 1, "o_proj": 16},
            "use_rslora": True,
        },
    ),
    "causal-all-linear": (
        AutoModelForCausalLM,
        {"target_modules": "all-linear", "exclude_modules": ["k_proj"]},
    ),
    "causal-one-layer": (
        AutoModelForCausalLM,
        {"target_modules": ["o_proj", "gate_proj"], "layers_to_transform": [1]},
    ),
    "causal-head": (AutoModelForCausalLM, {"target_modules": ["v_proj", "lm_head"]}),
    "classifier": (
        AutoModelForSequenceClassification,
        {"target_modules": ["k_proj"], "task_type": "SEQ_CLS"},  # which saves the head, too
    ),
}


def fill(named: dict[str, Tensor], seed: int) -> None:
    """Draw the matrices of an adapter, so that it makes a difference."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in sorted(named):
            named[name].copy_(0.2 * torch.randn(named[name].shape, generator=generator))


def write_adapter(base: Path, folder: Path, auto, options: dict, seed: int) -> None:
    model = get_peft_model(
        transformers_model(base, auto), LoraConfig(r=2, lora_alpha=8, lora_dropout=0.05, **options)
    )
    fill({name: w for name, w in model.named_parameters() if "lora_" in name}, seed)
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()  # PEFT writes its set in any order
    config["base_model_name_or_path"] = base.name
    file.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


def inner(model: PeftModel) -> nn.Module:
    """The model under an adapter that gives hidden states."""
    model = model.base_model.model
    return getattr(model, "model", model)


def adapters_in(base: Path, out: Path, states: dict[str, Tensor]) -> None:
    """What PEFT wrote, read here."""
    plain = compare("no adapter", our_decoder(base), transformers_model(base, is_causal=False))
    for seed, (name, (auto, options)) in enumerate(WRITTEN.items(), start=50):
        write_adapter(base, out / name, auto, options, seed)
        decoder = our_decoder(base)
        lora.load_adapter(decoder, out / name)
        model = transformers_model(base, auto, is_causal=False)
        model = PeftModel.from_pretrained(model, out / name).train(False)
        states[name] = compare(f"PEFT's adapter, {name}", decoder, inner(model))
        assert (states[name] - plain).abs().max() > 0.1, "the adapter makes a difference"
        if name == "causal-head":  # merged, it would change the embeddings that are tied to it
            continue
        lora.merge_lora(decoder)
        model.merge_and_unload()
        compare("    both merged", decoder, inner(model))


def published(base: Path, folder: Path, states: dict[str, Tensor]) -> None:
    """An adapter laid out as those of LLM2Vec on Mistral 7B, whose base model is not on disk.

    Its config, which is kept as it was, has the keys that PEFT wrote when those were made.
    """
    folder.mkdir()
    shutil.copy(GOLDEN / "interop" / "published" / "adapter_config.json", folder)
    state = {}
    for name, module in our_decoder(base).named_modules():
        if isinstance(module, nn.Linear):
            shapes = {"lora_A": (16, module.in_features), "lora_B": (module.out_features, 16)}
            for part, shape in shapes.items():
                state[f"base_model.model.{name}.{part}.weight"] = torch.empty(shape)
    fill(state, 60)
    state = {name: weight.bfloat16() for name, weight in state.items()}
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    decoder = our_decoder(base)
    lora.load_adapter(decoder, folder)
    model = PeftModel.from_pretrained(transformers_model(base, is_causal=False), folder).train(
        False
    )
    states["published"] = compare("an adapter laid out as the published ones", decoder, model)


def two_in_a_row(base: Path, out: Path, states: dict[str, Tensor]) -> None:
    model = transformers_model(base, is_causal=False)
    for name in ("inner-list", "inner-pattern"):
        model = PeftModel.from_pretrained(model, out / name).merge_and_unload()
    ours = LLM2Vec.from_pretrained(base, [out / "inner-list", out / "inner-pattern"])
    states["two"] = compare("two adapters, each merged before the next", ours.decoder, model)


def adapters_out(base: Path, out: Path, states: dict[str, Tensor]) -> None:
    """What this project writes, read by PEFT: one rank for all; or ranks and scales that differ."""
    uniform, mixed = our_decoder(base), our_decoder(base)
    lora.add_lora(uniform, rank=3, alpha=12, dropout=0.05)
    sizes = {"q_proj": (2, 8), "up_proj": (3, 6), "down_proj": (1, 4)}
    for i, layer in enumerate(mixed.layers):
        for part, (rank, alpha) in sizes.items():
            module = getattr(layer.self_attn if part == "q_proj" else layer.mlp, part)
            lora.adapt(module, rank + i, (alpha + i) / (rank + i), 0.05)
    for seed, (name, decoder) in enumerate({"uniform": uniform, "mixed": mixed}.items(), start=70):
        folder = out / f"ours-{name}"
        fill({n: w for n, w in decoder.named_parameters() if "lora_" in n}, seed)
        lora.save_adapter(decoder, folder)
        model = PeftModel.from_pretrained(transformers_model(base, is_causal=False), folder).train(
            False
        )
        decoder.train(False)
        states[folder.name] = compare(f"our adapter in PEFT, {name}", decoder, model)
        alone = AutoPeftModelForFeatureExtraction.from_pretrained(folder, dtype=torch.float32)
        alone.base_model.model.config.is_causal = False
        compare("    opened alone, by the base that it names", decoder, alone.train(False))
        file = folder / "adapter_config.json"
        config = json.loads(file.read_text()) | {"base_model_name_or_path": base.name}
        file.write_text(json.dumps(config, indent=2) + "\n")
        again = our_decoder(base)
        lora.load_adapter(again, folder)
        compare("    and loaded again here", again, model)


# --- All of it -----------------------------------------------------------------------------------


def refuse(*_, **__):
    raise OSError("a check went to the network")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="keep the results as golden files")
    parser.add_argument("--tokenizer", help="a tokenizer.json to check as well")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    disable_progress_bar()
    socket.socket.connect = refuse
    with tempfile.TemporaryDirectory() as scratch:
        scratch, out = Path(scratch), Path(scratch) / "interop"
        base = write_base(out / "base", build_tokenizer("prepend"))
        vectors, states = {}, {}
        for kind in ("prepend", "metaspace", "bytes", "bytes-bos"):
            vectors |= sentence_transformers(base, kind, build_tokenizer(kind), out / kind)
        if args.tokenizer:
            tokenizer = Tokenizer.from_file(args.tokenizer)
            larger = write_base(scratch / "larger", tokenizer, tokenizer.get_vocab_size())
            sentence_transformers(larger, Path(args.tokenizer).name, tokenizer, scratch / "given")
        for kind in ("prepend", "bytes", "bytes-bos"):
            apart = shutil.copytree(base, scratch / kind)
            prompts(apart, kind, scratch)
            made_elsewhere(apart, kind, scratch)
        transformers(scratch)
        shards(base, scratch)
        types(base, scratch)
        adapters_in(base, out, states)
        published(base, out / "published", states)
        two_in_a_row(base, out, states)
        adapters_out(base, out, states)
        print(f"{len(failed)} failed" if failed else "all agree")
        if args.write and not failed:
            cases = {"max_length": MAX_LENGTH, "instruction": INSTRUCTION, "texts": TEXTS}
            write_json(out / "cases.json", cases)
            ids, segments = batch(384)
            states |= {"input_ids": ids, "segments": segments}
            save_file(vectors, out / "vectors.safetensors")
            save_file(states, out / "states.safetensors")
            shutil.rmtree(GOLDEN / "interop", ignore_errors=True)
            shutil.copytree(out, GOLDEN / "interop")
            for file in (GOLDEN / "interop").rglob("*.*"):
                file.chmod(0o644)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
