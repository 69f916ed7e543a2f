"""Rows of tokens in batches, as the hardware likes them."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn


def pad(rows: Sequence[Sequence[int]], device: str | torch.device = "cpu") -> Tensor:
    """Rows of different lengths as one (B, T) tensor, filled with 0 or False at the right."""
    T, nothing = max(map(len, rows)), type(rows[0][0])()
    return torch.tensor([[*row, *[nothing] * (T - len(row))] for row in rows], device=device)


def batches_by_length(
    lengths: Sequence[int], max_tokens: int, least: int = 256
) -> Iterator[list[int]]:
    """Indices in batches of like length, longest first, each of at most max_tokens with padding.

    What is longer than that is a batch by itself. A text shorter than 7/8 of the longest starts a
    new batch, if this one has `least` tokens.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        longest = lengths[order[0]]
        most = max(1, max_tokens // longest)
        alike = sum(8 * lengths[i] >= 7 * longest for i in order[:most])
        n = max(alike, min(most, least // longest))
        yield order[:n]
        order = order[n:]


def min_batch_tokens(decoder: nn.Module) -> int:
    """Tokens of a pass, fewer of which would take as long.

    With fewer, a GPU waits for some hundred kernels of each layer to be launched, not for the
    arithmetic, of which each token needs as much as a layer has numbers.
    """
    if decoder.device.type == "cpu":
        return 256
    return 2**39 // sum(p.numel() for p in decoder.layers[0].parameters())


def compile_layers(decoder: nn.Module) -> None:
    """Have torch.compile fuse what each layer does between its matrix products.

    On an H100, an MNTP step of a 7B model then takes 0.77 of the time, encoding 0.85. How compiled
    code rounds depends on its first batch: a run that is resumed does not end with the same bits.
    """
    torch._dynamo.config.cache_size_limit = 64  # a layer compiled too often is not compiled at all
    for layer in decoder.layers:  # dynamic: batches differ in length
        layer.compile(dynamic=True, options={"fallback_random": True})  # dropout as uncompiled
