"""Texts end to end, for torch's variable-length attention, which computes on a GPU alone.

Here a stand-in takes its place, text by text, with its arguments and its result.
"""

import functools
import itertools
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import llm2vec
from data.corpus import WIKIPEDIA, read_documents, sentences
from llm2vec import LLM2Vec, Packed, attend, attention_mask
from train import TINY

TEXTS = [s for document in read_documents(WIKIPEDIA)[:8] for s in sentences(document)]


class StandIn:
    """varlen_attn: queries, keys and values (T, H, D), of texts that end at `ends`."""

    def __init__(self):
        self.tokens = 0  # that it was given, since it was tried out

    def __call__(self, q, k, v, ends, ends_of_keys, longest, longest_key):
        cuts = ends.cpu().tolist()
        assert q.shape == k.shape == v.shape and ends.dtype == torch.int32
        assert ends is ends_of_keys and cuts[0] == 0 and cuts[-1] == len(q)
        assert longest == longest_key == max(b - a for a, b in itertools.pairwise(cuts))
        assert ends.device == q.device
        self.tokens += len(q)
        y = [
            attend(*(x[a:b].transpose(0, 1)[None] for x in (q, k, v)), None, 0.0)[0]
            for a, b in itertools.pairwise(cuts)
        ]
        return torch.cat(y, dim=1).transpose(0, 1)


def install(monkeypatch, kernel, device="cpu"):
    """Put another in the place of torch's kernel, on such devices."""
    module = SimpleNamespace(varlen_attn=kernel)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    monkeypatch.setattr(llm2vec, "VARLEN", (device,))
    untried = functools.cache(llm2vec.varlen_kernel.__wrapped__)
    monkeypatch.setattr(llm2vec, "varlen_kernel", untried)
    return kernel


def ragged() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and segments of three texts, padded on the right, on the left, and not at all."""
    ids = torch.arange(3, 27).view(3, 8)
    segments = torch.ones(3, 8, dtype=torch.int64)
    segments[0, 5:] = segments[1, :2] = 0
    return ids * segments, segments


def test_vectors_are_those_of_padded_batches_and_padding_is_not_computed(monkeypatch):
    model = LLM2Vec.from_pretrained(TINY, dtype=torch.float32, device="cpu")
    expected = model.encode(TEXTS)
    kernel = install(monkeypatch, StandIn())
    seen = []
    hook = model.decoder.layers[0].mlp.register_forward_hook(lambda _, x, y: seen.append(y.shape))
    np.testing.assert_allclose(model.encode(TEXTS), expected, atol=1e-5, rtol=0)
    hook.remove()
    tokens = sum(len(ids) for ids, _ in llm2vec.tokenize(model.tokenizer, TEXTS, 512))
    assert sum(shape[0] * shape[1] for shape in seen) == tokens
    assert any(shape[0] == 1 for shape in seen) and kernel.tokens > tokens


@torch.inference_mode()
def test_states_keep_their_places(monkeypatch):
    model = LLM2Vec.from_pretrained(TINY, dtype=torch.float32, device="cpu")
    ids, segments = ragged()
    padded = model.decoder(ids, segments)
    kernel = install(monkeypatch, StandIn())
    states = model.decoder(ids, segments)
    assert kernel.tokens == int(segments.sum()) * len(model.decoder.layers) + 8  # 8 to try it out
    torch.testing.assert_close(states, padded * segments[:, :, None], atol=1e-5, rtol=0)


def prefix_lm(segments, is_causal, window=None):
    first = torch.arange(segments.shape[1]) < 3
    return attention_mask(segments, True, window) | first


@pytest.mark.parametrize("why", ["plain", "causal", "window", "two texts", "own mask", "even"])
@torch.inference_mode()
def test_whatever_else_a_mask_says_is_computed_as_it_stands(monkeypatch, why):
    model = LLM2Vec.from_pretrained(TINY, dtype=torch.float32, device="cpu")
    ids, segments = ragged()
    config = model.decoder.config
    if why == "causal":
        config.is_causal = True
    elif why == "window":
        config.sliding_window = 3
    elif why == "two texts":
        segments[2, 4:] = 2
    elif why == "own mask":
        monkeypatch.setattr(llm2vec, "attention_mask", prefix_lm)
    elif why == "even":
        segments = torch.ones_like(ids)
    padded = model.decoder(ids, segments)
    kernel = install(monkeypatch, StandIn())
    states = model.decoder(ids, segments)
    used = kernel.tokens > 0
    assert used == (why == "plain")
    if not used:
        assert torch.equal(states, padded)


def test_what_is_not_inference_is_padded(monkeypatch):
    """SimCSE drops attention, which the kernel can't, and hooks see the shapes that they expect."""
    model = LLM2Vec.from_pretrained(TINY, dtype=torch.float32, device="cpu")
    kernel = install(monkeypatch, StandIn())
    rows = llm2vec.tokenize(model.tokenizer, TEXTS[:5], 512)
    model.embed(rows)
    with torch.no_grad():
        model.decoder.train()
        model.embed(rows)
    assert kernel.tokens == 0
    assert model.encode(TEXTS[:5]).shape == (5, 256) and kernel.tokens > 0


def blind(q, k, v, *_):
    """One text, whatever the ends say."""
    y = attend(*(x.transpose(0, 1)[None] for x in (q, k, v)), None, 0.0)
    return y[0].transpose(0, 1)


def crashes(*_):
    raise RuntimeError("no kernel image is available for execution on the device")


@pytest.mark.parametrize("kernel", [blind, crashes], ids=lambda f: f.__name__)
def test_a_kernel_that_does_not_do_it_is_not_used(monkeypatch, kernel):
    install(monkeypatch, kernel)
    model = LLM2Vec.from_pretrained(TINY, dtype=torch.float32, device="cpu")
    assert llm2vec.varlen_kernel(torch.device("cpu"), torch.float32, 8, 32) is None
    assert np.isfinite(model.encode(TEXTS)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("H, D", [(32, 128), (14, 64), (1, 8)])
def test_one_that_does_is(monkeypatch, dtype, H, D):
    kernel = install(monkeypatch, StandIn())
    assert llm2vec.varlen_kernel(torch.device("cpu"), dtype, H, D) is kernel


def test_a_torch_without_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    assert llm2vec.varlen_kernel(torch.device("cpu"), torch.bfloat16, 4, 64) is None


def test_torch_takes_these_arguments():
    """As far as the kernel, which a CPU does not have."""
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="torch 2.10")
    q = torch.ones(1, 4, 8, 16, dtype=torch.bfloat16)
    ends = torch.tensor([0, 3, 8], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="_flash_attention_forward"):
        Packed(varlen.varlen_attn, ends, 5).attend(q, q, q)
