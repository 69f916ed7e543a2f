# /// script
# dependencies = ["torch>=2.6", "numpy", "tokenizers", "safetensors"]
# ///
"""Make data/tiny-llama, the causal Llama that the bundled commands start from.

    python data/make_tiny.py          about an hour and a half on two CPU cores

Tokenizer: the first 6,000 merges of SmolLM2's byte-level BPE; its tokens are the first ones of
SmolLM2, with the same ids. Embeddings: SmolLM2's, reduced from 576 to 256 dimensions by PCA.
Layers: random, trained as a causal language model on the training side of data/wikipedia.jsonl.
The target is a mixture of the true next token and of SmolLM2's predictions (knowledge distillation,
Hinton et al. 2015). The printed loss is on held-out documents, which are not trained on.
Benchmarks are never read.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from llm2vec import Config, Decoder
from llm2vec_data.corpus import WIKIPEDIA, cut_into_blocks, read_documents, split_documents
from llm2vec_data.export import new_folder
from llm2vec_data.fetch import fetch

FOLDER = Path(__file__).parent / "tiny-llama"
MERGES, LENGTH, BATCH, STEPS = 6000, 256, 16, 3600
RATE, WARM_UP, TOP, DISTILLED = 2e-3, 100, 32, 0.7
SHAPE = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6}
SHAPE |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}


def smaller_tokenizer(file: Path) -> Tokenizer:
    """SmolLM2's tokenizer with its first MERGES merges."""
    whole = json.loads(file.read_text(encoding="utf-8"))
    model = whole["model"]
    V = len(model["vocab"]) - len(model["merges"]) + MERGES
    model["vocab"] = {token: i for token, i in model["vocab"].items() if i < V}
    model["merges"] = model["merges"][:MERGES]
    return Tokenizer.from_str(json.dumps(whole))


@torch.inference_mode()
def teach(blocks: Tensor, small: Tokenizer, folder: Path) -> tuple[Tensor, Tensor]:
    """SmolLM2's TOP most likely next tokens and their probabilities, (N, LENGTH, TOP) each.

    SmolLM2 reads the small tokenizer's ids, because they are also its ids. If the small vocabulary
    lacks a token, its probability goes to the small token at the start of its text.
    """
    teacher, V = Decoder.from_pretrained(folder, torch.bfloat16), small.get_vocab_size()
    pieces = torch.arange(teacher.config.vocab_size)
    for token, i in Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab().items():
        if i >= V:  # BPE on the token's characters; the alphabet is the same
            pieces[i] = small.model.tokenize(token)[0].id
    index, prob = [], []
    for i in range(0, len(blocks), 8):
        for hidden in teacher(blocks[i : i + 8]):
            p = teacher.logits(hidden).float().softmax(-1)
            p, top = torch.zeros(LENGTH, V).index_add_(1, pieces, p).topk(TOP)
            index.append(top.short())
            prob.append(p.half())
        if i % 80 == 0:
            print(f"teacher: block {i} of {len(blocks)}", flush=True)
    return torch.stack(index), torch.stack(prob)


def start_from(embedding: Tensor, config: Config) -> Decoder:
    """A decoder with random layers and the leading principal components of an embedding."""
    torch.manual_seed(0)
    decoder = Decoder(config)
    for name, weight in decoder.named_parameters():
        if weight.dim() == 2:
            depth = math.sqrt(2 * config.num_hidden_layers)
            divisor = depth if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5 / 2 / divisor)
    centred = embedding - embedding.mean(0)
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    reduced = centred @ axes[: config.hidden_size].T
    decoder.embed_tokens.weight.data = reduced * (0.05 / reduced.std())
    return decoder


def main() -> None:
    source = fetch("smollm2")
    tokenizer = smaller_tokenizer(source / "tokenizer.json")
    V = tokenizer.get_vocab_size()
    blocks, held_out = (
        cut_into_blocks([e.ids + [0] for e in tokenizer.encode_batch(side)], LENGTH)  # 0: the end
        for side in split_documents(read_documents(WIKIPEDIA))
    )
    index, prob = teach(blocks, tokenizer, source)
    embedding = load_file(source / "model.safetensors")["model.embed_tokens.weight"][:V].float()
    config = Config(vocab_size=V, tie_word_embeddings=True, rms_norm_eps=1e-5, **SHAPE)
    decoder = start_from(embedding, config).train()
    body = [p for name, p in decoder.named_parameters() if name != "embed_tokens.weight"]
    groups = [
        {"params": [p for p in body if p.dim() == 2], "lr": RATE, "weight_decay": 0.1},
        {"params": [p for p in body if p.dim() == 1], "lr": RATE, "weight_decay": 0.0},
        {"params": [decoder.embed_tokens.weight], "lr": RATE / 4, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))

    def rate(s: int) -> float:
        return min((s + 1) / WARM_UP, 0.02 + 0.98 * (1 + math.cos(math.pi * s / STEPS)) / 2)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    generator, queue = torch.Generator().manual_seed(0), []
    for step in range(1, STEPS + 1):
        if len(queue) < BATCH:
            queue = torch.randperm(len(blocks), generator=generator).tolist()
        batch, queue = queue[:BATCH], queue[BATCH:]
        ids = blocks[batch]
        with torch.autocast("cpu", torch.bfloat16):
            logits = decoder.logits(decoder(ids)[:, :-1]).flatten(0, 1)  # (B (T - 1), V)
        log_p = logits.float().log_softmax(-1)
        likely, p = (side[batch][:, :-1].flatten(0, 1) for side in (index, prob))
        p = p.float() / p.float().sum(-1, keepdim=True)
        soft = -(p * log_p.gather(1, likely.long())).sum(-1).mean()
        hard = F.nll_loss(log_p, ids[:, 1:].flatten())
        optimizer.zero_grad()
        (DISTILLED * soft + (1 - DISTILLED) * hard).backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step} of {STEPS}  loss {hard:.3f}", flush=True)
        if step % 500 == 0:
            with torch.inference_mode():
                logits = decoder.logits(decoder(held_out)[:, :-1]).flatten(0, 1)
                loss = F.cross_entropy(logits, held_out[:, 1:].flatten())
            print(f"held-out loss {loss:.3f} nats a token", flush=True)
            write(decoder, tokenizer)


def write(decoder: Decoder, tokenizer: Tokenizer) -> None:
    """Write a Hugging Face folder of the causal model, in bfloat16."""
    config = {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}
    config |= {"torch_dtype": "bfloat16"} | vars(decoder.config)
    state = {f"model.{name}": w.bfloat16() for name, w in decoder.state_dict().items()}
    with new_folder(FOLDER) as folder:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        tokenizer.save(str(folder / "tokenizer.json"))


if __name__ == "__main__":
    main()
