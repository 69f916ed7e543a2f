# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "transformers==5.23.*", "peft==0.21.*", "sentence-transformers==6.2.*", "pytest",
#     "torch", "numpy", "safetensors", "tokenizers",
# ]
# ///
"""Round trips between this project and the libraries that its users have, run live.

    uv run tests/interop.py [--write]     (or python, with the packages above)

One line a check, with the largest difference; exit status 1 if any is above 1e-5. Hidden states may
differ by twice what the library's own are away from float64, which has to be below 2e-5. `--write`
keeps what the libraries wrote and computed in golden/interop, if all agreed; test_interop.py holds
the project to it where they are not installed. What goes in lies there, too: texts, an adapter with
the config that PEFT wrote when the authors' were made, `base`, a small Mistral that transformers
wrote, whose window is shorter than the texts, and a small BPE tokenizer of each of the four KINDS.
"""

import argparse
import copy
import json
import logging
import math
import os
import shutil
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from golden.make import PROJECTIONS, fill, read_checkpoint, settle
from helpers import GOLDEN, INTEROP, failed, finish, report
from peft import AutoPeftModelForFeatureExtraction, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils.logging import disable_progress_bar

import llm2vec_data.export
import lora
from llm2vec import Decoder, LLM2Vec, load_tokenizer, prompt_prefix
from llm2vec_data.checkpoints import POOLING_MODES

BASE = INTEROP / "base"
CASES = json.loads((INTEROP / "cases.json").read_text(encoding="utf-8"))
TEXTS, MAX_LENGTH = CASES["texts"], CASES["max_length"]  # one text is longer than that


def check(name: str, ours, theirs, atol: float = 1e-5) -> None:
    """Report the largest difference of two arrays."""
    ours, theirs = (torch.as_tensor(x).float() for x in (ours, theirs))
    error = (ours - theirs).abs().max().item() if ours.shape == theirs.shape else math.inf
    report(name, error, error <= atol)


def our_decoder(folder: Path = BASE, is_causal: bool = False) -> Decoder:
    decoder = Decoder.from_pretrained(folder)
    decoder.config.is_causal = is_causal
    return decoder


def write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


# --- sentence-transformers -----------------------------------------------------------------------

KINDS = (
    "prepend",  # sentencepiece with byte fallback, as Llama 2 and Mistral 7B were first converted
    "metaspace",  # the same, as later conversions write it
    "bytes",  # over bytes, without BOS
    "bytes-bos",  # over bytes, with BOS, as Llama 3's
)


def encoder(kind: str, template: tuple[str, str] | None = None, **how) -> LLM2Vec:
    how = {"max_length": MAX_LENGTH} | how
    return LLM2Vec(our_decoder(), load_tokenizer(INTEROP / kind, template), **how)


def exported(model: LLM2Vec, scratch: Path) -> SentenceTransformer:
    model.save(scratch / "exported")
    return SentenceTransformer(str(scratch / "exported"), device="cpu")


def vectors_of(kind: str, scratch: Path, out: Path) -> dict[str, Tensor]:
    """Vectors of exported folders: each pooling, with and without a prompt.

    `out` keeps the JSON that went out: all but the vocabulary, and for one pooling after another
    what differs.
    """
    vectors, written, folder = {}, {}, scratch / "exported"
    for pooling in POOLING_MODES:
        model = encoder(kind, pooling=pooling)
        theirs = exported(model, scratch)
        assert theirs.max_seq_length == MAX_LENGTH
        files = sorted(folder.rglob("*.json") if pooling == "mean" else folder.glob("*/*.json"))
        written[pooling] = {
            file.relative_to(folder).as_posix(): json.loads(file.read_text()) for file in files
        }
        for prompt, name in ((None, "plain"), (CASES["instruction"], "instructed")):
            key = f"{kind}.{pooling}.{name}"
            # With BOS and a prompt, their mean is too short, and points the same way.
            unit = pooling == "mean" and kind != "bytes" and prompt is not None
            found = theirs.encode(TEXTS, prompt=prompt, normalize_embeddings=unit)
            check(f"vectors, {key}", model.encode(TEXTS, prompt, normalize=unit), found)
            vectors[key] = torch.from_numpy(found)
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
    del written["mean"]["tokenizer.json"]["model"]
    out.mkdir(parents=True)
    write_json(out / "exported.json", written)
    return vectors


def prompts(kind: str, scratch: Path) -> None:
    """Text around every text; and the instruction that a folder was trained with, for queries."""
    for template in (("Q: ", " A:"), ('This "', '" is:')):  # several tokens, some of them words
        model = encoder(kind, template, pooling="last", max_length=2 * MAX_LENGTH)
        theirs = exported(model, scratch)
        check(f"{kind}, within {template}", model.encode(TEXTS), theirs.encode(TEXTS))
    for separator in ("\n", " "):
        model = encoder(kind, separator=separator, max_length=512)
        model.prompts["query"] = prompt_prefix("find the query:", separator)
        theirs = exported(model, scratch)
        found = theirs.encode_query(TEXTS[:3], normalize_embeddings=True)
        again = LLM2Vec.from_pretrained(scratch / "exported")
        ours = again.encode(TEXTS[:3], "find the query:", normalize=True)
        check(f"encode_query, {kind}, separator {separator!r}", ours, found)


def made_elsewhere(kind: str, scratch: Path) -> None:
    """A folder of sentence-transformers is taken at its word: causal, cut at 8, BOS averaged."""
    base = shutil.copytree(BASE, scratch / kind)
    shutil.copy(INTEROP / kind / "tokenizer.json", base)
    tokens = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<unk>"}
    write_json(base / "tokenizer_config.json", tokens)
    for pooling in ("lasttoken", "mean", "weightedmean", "cls"):
        transformer, folder = Transformer(str(base), max_seq_length=8), scratch / kind / pooling
        modules = [transformer, Pooling(transformer.get_embedding_dimension(), pooling)]
        theirs = SentenceTransformer(modules=modules, device="cpu").float()
        theirs.save(str(folder))
        ours, expected = LLM2Vec.from_pretrained(folder), theirs.encode(TEXTS[:6])
        check(f"made elsewhere, {kind}, {pooling}", ours.encode(TEXTS[:6]), expected)
        again = exported(ours, scratch)
        check("    and saved again here", again.encode(TEXTS[:6]), expected)
        again.save(str(folder))  # as after training it there
        ours = LLM2Vec.from_pretrained(folder)
        check("    and there, and read here", ours.encode(TEXTS[:6]), expected)


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


def transformers(scratch: Path) -> None:
    """Every golden model, exported and read by AutoModel, faces the way that it was saved."""
    folder, llm2vec_data.export.SHARD = scratch / "plain", 20_000  # some in several files
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    for config in sorted(GOLDEN.glob("*/config.json")):
        for is_causal in (False, True):
            decoder = our_decoder(config.parent, is_causal)
            LLM2Vec(decoder, words).save(folder)
            model = AutoModel.from_pretrained(folder).eval()
            compare(f"AutoModel, {config.parent.name}, {is_causal=}", decoder, model)
            assert model.config.is_causal is is_causal, "config.is_causal is what was saved"
            assert "auto_map" not in model.config.to_dict(), "no remote code"
        if decoder.can_predict:
            ids, _ = batch(decoder.config.vocab_size)
            with torch.no_grad():
                logits = AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits
                check("    with its output head", decoder.logits(decoder(ids)), logits)


# --- PEFT ----------------------------------------------------------------------------------------

# What PEFT is asked to write, from the model that the name begins with. A pattern may name a
# projection in full, and then has the prefix of the model that it was made on.
MODELS = {"inner": AutoModel, "causal": AutoModelForCausalLM}
MODELS["classifier"] = AutoModelForSequenceClassification
WRITTEN = {
    "inner-list": dict(target_modules=PROJECTIONS),
    "inner-pattern": dict(
        target_modules=r".*\.(q|v|up)_proj", use_rslora=True, rank_pattern={"q_proj": 3}
    ),
    "inner-all-linear": dict(
        target_modules="all-linear",
        rank_pattern={r"layers\.0\..*_proj": 1},
        alpha_pattern={"layers.1.mlp.down_proj": 24, "mlp.*": 2},
    ),
    "causal-list": dict(
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"model.layers.1.mlp.down_proj": 3},
        alpha_pattern={"model.layers.0.self_attn.q_proj": 32},
    ),
    "causal-pattern": dict(
        target_modules=r"model\.layers\.\d\.self_attn\.(k|o)_proj",
        alpha_pattern={r"^model\.layers\.1": 1, "o_proj": 16},
        use_rslora=True,
    ),
    "causal-all-linear": dict(target_modules="all-linear", exclude_modules=["k_proj"]),
    "causal-one-layer": dict(target_modules=["o_proj", "gate_proj"], layers_to_transform=[1]),
    "causal-head": dict(target_modules=["v_proj", "lm_head"]),
    "classifier": dict(target_modules=["k_proj"], task_type="SEQ_CLS"),  # saves the head, too
}


def peft_model(folder: Path, auto=AutoModel) -> PeftModel:
    return PeftModel.from_pretrained(read_checkpoint(BASE, False, auto), folder).eval()


def adapted(folder: Path) -> Decoder:
    decoder = our_decoder()
    lora.load_adapter(decoder, folder)
    return decoder


def adapters_in(out: Path, states: dict[str, Tensor]) -> None:
    """What PEFT wrote, read here; one as published; two adapters, each merged before the next."""
    plain = compare("no adapter", our_decoder(), read_checkpoint(BASE, False))
    for seed, (name, options) in enumerate(WRITTEN.items(), start=50):
        auto, folder = MODELS[name.partition("-")[0]], out / name
        config = LoraConfig(r=2, lora_alpha=8, lora_dropout=0.05, **options)
        model = get_peft_model(read_checkpoint(BASE, False, auto), config)
        fill(sorted(model.named_parameters()), seed)
        model.save_pretrained(folder)
        settle(folder, BASE.name, indent=1)
        inner = peft_model(folder, auto).base_model.model
        inner = getattr(inner, "model", inner)  # a causal LM and a classifier have one in them
        states[name] = compare(f"PEFT's adapter, {name}", adapted(folder), inner)
        assert (states[name] - plain).abs().max() > 0.1, "the adapter makes a difference"
    both, model = [out / "inner-list", out / "inner-pattern"], read_checkpoint(BASE, False)
    for folder in both:
        model = PeftModel.from_pretrained(model, folder).merge_and_unload()
    folder = INTEROP / "published"  # laid out as those of LLM2Vec on Mistral 7B
    states[folder.name] = compare("as the published ones", adapted(folder), peft_model(folder))
    states["two"] = compare("two adapters", LLM2Vec.from_pretrained(BASE, both).decoder, model)


def adapters_out(out: Path, states: dict[str, Tensor]) -> None:
    """What this project writes, read by PEFT: one rank for all; or ranks and scales that differ."""
    uniform, mixed = our_decoder(), our_decoder()
    lora.add_lora(uniform, rank=3, alpha=12, dropout=0.05)
    for i, layer in enumerate(mixed.layers):
        lora.adapt(layer.self_attn.q_proj, 2 + i, (8 + i) / (2 + i), 0.05)
        lora.adapt(layer.mlp.up_proj, 3 + i, (6 + i) / (3 + i), 0.05)
        lora.adapt(layer.mlp.down_proj, 1 + i, (4 + i) / (1 + i), 0.05)
    for seed, (name, decoder) in enumerate({"uniform": uniform, "mixed": mixed}.items(), start=70):
        folder = out / f"ours-{name}"
        fill(sorted(decoder.named_parameters()), seed)
        lora.save_adapter(decoder.eval(), folder)
        states[folder.name] = compare(f"our adapter in PEFT, {name}", decoder, peft_model(folder))
        alone = AutoPeftModelForFeatureExtraction.from_pretrained(folder, dtype=torch.float32)
        alone.base_model.model.config.is_causal = False
        compare("    opened alone, by the base that it names", decoder, alone.eval())
        settle(folder, BASE.name, indent=1)


# --- All of it -----------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="keep the results as golden files")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        scratch, out, vectors, states = Path(scratch), Path(scratch) / "interop", {}, {}
        for kind in KINDS:
            vectors |= vectors_of(kind, scratch, out / kind)
            prompts(kind, scratch)
            made_elsewhere(kind, scratch)
        transformers(scratch)
        adapters_in(out, states)
        adapters_out(out, states)
        if args.write and not failed:
            ids, segments = batch(384)
            states |= {"input_ids": ids, "segments": segments}
            save_file(vectors, out / "vectors.safetensors")
            save_file(states, out / "states.safetensors")
            shutil.copytree(out, INTEROP, dirs_exist_ok=True)
    finish()


if __name__ == "__main__":
    main()
