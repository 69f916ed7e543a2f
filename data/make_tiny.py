# /// script
# dependencies = ["torch>=2.6", "numpy", "tokenizers", "safetensors"]
# ///
"""Make data/tiny-llama, the causal Llama that the bundled commands start from.

    python data/make_tiny.py          about an hour and a half on two CPU cores

Tokenizer: the first 6,000 merges of SmolLM2's byte-level BPE; its tokens are a prefix of
SmolLM2's, with the same ids. Embeddings: SmolLM2's, reduced from 576 to 256 dimensions by PCA.
Layers: random, trained as a causal language model on the training side of data/wikipedia.jsonl,
where the target is a mixture of the true next token and of what SmolLM2 predicts (knowledge
distillation, Hinton et al. 2015). Held-out documents give the loss that it prints, and are not
trained on; benchmarks are never read.
"""

import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parent.parent))

from data.corpus import WIKIPEDIA, cut_into_blocks, read_documents, split_documents  # noqa: E402
from data.export import new_folder  # noqa: E402
from data.fetch import MODELS, fetch  # noqa: E402
from data.gguf import byte_level_bpe  # noqa: E402
from llm2vec import Config, Decoder  # noqa: E402

FOLDER = Path(__file__).parent / "tiny-llama"
MERGES, LENGTH, BATCH, STEPS = 6000, 256, 16, 3600
RATE, WARM_UP, TOP, DISTILLED = 2e-3, 100, 32, 0.7
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
}


def smaller_tokenizer(file: Path) -> tuple[Tokenizer, Tokenizer]:
    """SmolLM2's tokenizer, and the one of its first MERGES merges."""
    model = json.loads(file.read_text())
    special = [token["content"] for token in model["added_tokens"]]
    tokens = sorted(model["model"]["vocab"], key=model["model"]["vocab"].get)
    merges = [
        pair if isinstance(pair, str) else " ".join(pair) for pair in model["model"]["merges"]
    ]
    alphabet = len(tokens) - len(merges)
    small = byte_level_bpe(tokens[: alphabet + MERGES], merges[:MERGES], special)
    return Tokenizer.from_file(str(file)), small


def first_pieces(full: Tokenizer, small: Tokenizer) -> torch.Tensor:
    """For each token of the full vocabulary, the small token that its text starts with."""
    V = small.get_vocab_size()
    ids = torch.arange(full.get_vocab_size())
    for token, i in full.get_vocab().items():
        if i >= V:  # BPE on the token's own characters; the alphabet is the same
            ids[i] = small.model.tokenize(token)[0].id
    return ids


@torch.inference_mode()
def teach(blocks: torch.Tensor, small: Tokenizer, full: Tokenizer, folder: Path) -> dict:
    """SmolLM2's TOP most likely next tokens at every position, in the small vocabulary.

    SmolLM2 reads the small tokenizer's ids, which are its own. The probability of a token that the
    small vocabulary lacks goes to the token that its text starts with.
    """
    file = MODELS / "tiny-teacher.safetensors"
    if file.exists():
        kept = load_file(file)
        if torch.equal(kept["ids"].long(), blocks):
            return kept
    teacher = Decoder.from_pretrained(folder, torch.bfloat16)
    pieces, V = first_pieces(full, small), small.get_vocab_size()
    index = torch.zeros(*blocks.shape, TOP, dtype=torch.int16)
    prob = torch.zeros(*blocks.shape, TOP, dtype=torch.float16)
    start = time.time()
    for i in range(0, len(blocks), 8):
        for b, hidden in enumerate(teacher(blocks[i : i + 8]), start=i):
            p = teacher.logits(hidden).float().softmax(-1)
            p = torch.zeros(LENGTH, V).index_add_(1, pieces, p)
            top = p.topk(TOP)
            index[b], prob[b] = top.indices.short(), top.values.half()
        if i % 80 == 0:
            pace = (i + 8) * LENGTH / (time.time() - start)
            print(f"teacher: block {i} of {len(blocks)}, {pace:.0f} tokens/s", flush=True)
    kept = {"ids": blocks.int(), "index": index, "prob": prob}
    save_file(kept, file)
    return kept


def start_from(embedding: torch.Tensor, config: Config) -> Decoder:
    """A decoder with random layers and the leading principal components of an embedding."""
    torch.manual_seed(0)
    decoder = Decoder(config)
    for name, weight in decoder.named_parameters():
        if weight.dim() == 2:
            depth = math.sqrt(2 * config.num_hidden_layers)
            scale = depth if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5 / 2 / scale)
    centred = embedding - embedding.mean(0)
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    reduced = centred @ axes[: config.hidden_size].T
    decoder.embed_tokens.weight.data = reduced * (0.05 / reduced.std())
    return decoder


def main() -> None:
    source = fetch("smollm2")
    full, small = smaller_tokenizer(source / "tokenizer.json")
    V = small.get_vocab_size()
    texts, held_out = split_documents(read_documents(WIKIPEDIA))
    blocks, test = (
        cut_into_blocks([e.ids + [0] for e in small.encode_batch(side)], LENGTH)  # 0: end of text
        for side in (texts, held_out)
    )
    kept = teach(blocks, small, full, source)
    embedding = load_file(source / "model.safetensors")["model.embed_tokens.weight"][:V].float()
    config = Config(vocab_size=V, tie_word_embeddings=True, rms_norm_eps=1e-5, **SHAPE)
    decoder = start_from(embedding, config).train()
    body = [p for n, p in decoder.named_parameters() if n != "embed_tokens.weight"]
    groups = [
        {"params": [p for p in body if p.dim() == 2], "lr": RATE, "weight_decay": 0.1},
        {"params": [p for p in body if p.dim() == 1], "lr": RATE, "weight_decay": 0.0},
        {"params": [decoder.embed_tokens.weight], "lr": RATE / 4, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min((s + 1) / WARM_UP, 0.02 + 0.98 * (1 + math.cos(math.pi * s / STEPS)) / 2),
    )
    generator, queue, start, total = torch.Generator().manual_seed(0), [], time.time(), 0.0
    for step in range(1, STEPS + 1):
        if len(queue) < BATCH:
            queue = torch.randperm(len(blocks), generator=generator).tolist()
        batch, queue = queue[:BATCH], queue[BATCH:]
        ids = blocks[batch]
        with torch.autocast("cpu", torch.bfloat16):
            logits = decoder.logits(decoder(ids)[:, :-1]).flatten(0, 1)  # (B (T - 1), V)
        log_p = logits.float().log_softmax(-1)
        index, p = (kept[k][batch][:, :-1].flatten(0, 1) for k in ("index", "prob"))
        p = p.float() / p.float().sum(-1, keepdim=True)
        soft = -(p * log_p.gather(1, index.long())).sum(-1).mean()
        hard = F.nll_loss(log_p, ids[:, 1:].flatten())
        optimizer.zero_grad()
        (DISTILLED * soft + (1 - DISTILLED) * hard).backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        total += hard.item()
        if step % 50 == 0:
            pace = step * BATCH * LENGTH / (time.time() - start)
            print(f"step {step} of {STEPS}  loss {total / 50:.3f}  {pace:.0f} tokens/s", flush=True)
            total = 0.0
        if step % 500 == 0:
            print(f"held-out loss {evaluate(decoder, test):.3f} nats a token", flush=True)
            write(decoder, small)


@torch.inference_mode()
def evaluate(decoder: Decoder, blocks: torch.Tensor) -> float:
    """Mean next-token cross-entropy of blocks (N, LENGTH), in nats."""
    logits = decoder.logits(decoder(blocks)[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten()).item()


def write(decoder: Decoder, tokenizer: Tokenizer) -> None:
    """A Hugging Face folder of the causal model, in bfloat16."""
    with new_folder(FOLDER) as folder:
        state = {f"model.{k}": v.detach().bfloat16() for k, v in decoder.state_dict().items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        kind = {
            "architectures": ["LlamaForCausalLM"],
            "hidden_act": "silu",
            "torch_dtype": "bfloat16",
        }
        (folder / "config.json").write_text(
            json.dumps(kind | vars(decoder.config), indent=2) + "\n"
        )
        tokenizer.save(str(folder / "tokenizer.json"))


if __name__ == "__main__":
    main()
