"""The README.md of an exported folder: its contents, how to load it, and its limits."""

import re
from pathlib import Path

from llm2vec_data.checkpoints import tokens_around

CARD = """---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags:
- feature-extraction
- sentence-similarity
- llm2vec
{base}---

# {name}

A text encoder made from a decoder-only language model by the method of LLM2Vec
([arXiv 2404.05961](https://arxiv.org/abs/2404.05961)).

| | |
| --- | --- |
| made of | {made_of} |
| attention | {direction} |
| a text's vector | {pooling} |
| around every text | {around} |
| longest text | {length} tokens |
| prompts | {prompts} |
| type of the weights | {dtype} |

```python
{load}
vectors = model.encode(["A man plays a guitar.", "Someone makes music."])
```

Its config.json has `"is_causal": {is_causal}`, which transformers reads since version 5.2.
{older}{rounding}"""
LOAD = """import torch
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("FOLDER", model_kwargs={"dtype": torch.float32})"""
OURS = """from llm2vec import LLM2Vec

model = LLM2Vec.from_pretrained("FOLDER")"""


def model_card(encoder, name: str, for_all: bool) -> str:
    """The card of an encoder. for_all: sentence-transformers gives the same vectors."""
    decoder, made_of = encoder.decoder, [str(part) for part in encoder.made_of]
    a_name = bool(made_of) and re.fullmatch(r"[\w.-]+/[\w.-]+", made_of[0])
    on_hub = a_name and not Path(made_of[0]).exists()
    dtype = str(decoder.norm.weight.dtype).removeprefix("torch.")
    whole = "all tokens" if encoder.include_prompt else "its tokens, without BOS and prompt"
    pooling = {"mean": "the mean", "weighted_mean": "the mean, weighted by position,"}
    ids = tokens_around(encoder.tokenizer)
    before, after = (encoder.tokenizer.decode(side, skip_special_tokens=False) for side in ids)
    around = f"{before}TEXT{after}".replace("|", "\\|")  # which would end the cell
    older = "Older versions read it as a causal model, without a warning, and give other vectors.\n"
    rounding = "The cosines of vectors in bfloat16 with those in float32 are near 1, less near\n"
    rounding += "for short texts: compute in float32 if that matters.\n"
    return CARD.format(
        name=name,
        base=f"base_model: {made_of[0]}\n" if on_hub else "",
        made_of=", then ".join(f"`{p if on_hub else Path(p).name}`" for p in made_of) or "?",
        direction="to the left only" if decoder.config.is_causal else "both ways",
        pooling=f"{pooling.get(encoder.pooling, 'the ' + encoder.pooling)} of {whole}",
        around=f"`{around}`" if before + after else "nothing",
        length=encoder.max_length,
        prompts=", ".join(f"{k}: `{v!r}`" for k, v in encoder.prompts.items() if v) or "none",
        dtype=dtype,
        load=LOAD if for_all else OURS,
        is_causal=str(decoder.config.is_causal).lower(),
        older="" if decoder.config.is_causal else older,
        rounding=rounding if dtype != "float32" else "",
    )
