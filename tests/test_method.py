"""The mask, pooling and losses, against brute force and closed forms in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llm2vec import (
    Config,
    Decoder,
    attend,
    attention_mask,
    batches_by_length,
    contrastive_loss,
    mask_tokens,
    mntp_loss,
    pool,
)

SHAPE = dict(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
)


def small_decoder(**changes) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(Config(**SHAPE | changes)).double().train(False)
    for weight in decoder.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    return decoder


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 2, 3, 100])
@pytest.mark.parametrize(
    "segments",
    [
        [[1, 1, 1, 1, 1, 1]],
        [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]],
        [[0, 0, 3, 3, 3, 3]],
        [[1, 1, 2, 2, 2, 0], [5, 4, 4, 4, 0, 0]],
        [[1]],
    ],
)
def test_the_mask_is_what_a_double_loop_says(segments, window, is_causal):
    segments = torch.tensor(segments)
    B, T = segments.shape
    mask = attention_mask(segments, is_causal, window)
    shown = torch.ones(B, 1, T, T, dtype=torch.bool) if mask is None else mask.expand(B, 1, T, T)
    for b in range(B):
        for i in range(T):
            for j in range(T):
                allowed = bool(segments[b, i] == segments[b, j])
                if is_causal:
                    allowed = allowed and j <= i
                    allowed = allowed and (window is None or i - j < window)
                else:
                    allowed = allowed and (window is None or abs(i - j) <= window)
                assert bool(shown[b, 0, i, j]) == allowed
    assert shown.any(-1).all(), "a row that sees nothing would be NaN"
    assert (mask is None) == bool(shown.all()), "None is the fast path, and only for no mask"


def test_step_one_is_one_argument():
    """Causal states depend on nothing to their right, bidirectional ones do; no weight changes."""
    decoder = small_decoder()
    before = {name: weight.clone() for name, weight in decoder.state_dict().items()}
    ids = torch.randint(50, (1, 7))
    changed = ids.clone()
    changed[0, 6] = (ids[0, 6] + 1) % 50
    causal, causal_changed = decoder(ids), decoder(changed)
    decoder.config.is_causal = False
    both, both_changed = decoder(ids), decoder(changed)
    assert torch.equal(causal[:, :6], causal_changed[:, :6])
    assert ((both - both_changed)[:, :6].abs().amax(-1) > 1e-6).all()
    assert all(torch.equal(weight, before[name]) for name, weight in decoder.state_dict().items())


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("window", [None, 3])
def test_padding_and_packing_change_no_text(is_causal, window):
    decoder = small_decoder(is_causal=is_causal, sliding_window=window)
    a, b = torch.randint(50, (1, 5)), torch.randint(50, (1, 8))
    zeros = torch.zeros(1, 3, dtype=torch.long)
    alone_a, alone_b = decoder(a), decoder(b)
    padded = decoder(
        torch.cat([torch.cat([a, zeros], 1), b]), torch.tensor([[1] * 5 + [0] * 3, [1] * 8])
    )
    left = decoder(torch.cat([zeros, a], 1), torch.tensor([[0] * 3 + [1] * 5]))
    packed = decoder(torch.cat([a, b, zeros], 1), torch.tensor([[1] * 5 + [2] * 8 + [0] * 3]))
    for got, expected in [
        (padded[:1, :5], alone_a),
        (padded[1:], alone_b),
        (left[:, 3:], alone_a),
        (packed[:, :5], alone_a),
        (packed[:, 5:13], alone_b),
    ]:
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)  # positions are float32
    assert padded.isfinite().all() and packed.isfinite().all()


def test_pooling_by_hand():
    hidden = torch.tensor([[[1.0], [2.0], [4.0], [100.0]]])
    own = torch.tensor([[False, True, True, False]])
    assert pool(hidden, "mean", own).item() == 3
    assert pool(hidden, "weighted_mean", own).item() == pytest.approx((2 * 2 + 3 * 4) / 5)
    assert pool(hidden, "last", own).item() == 4
    assert pool(hidden, "first", own).item() == 2
    assert pool(hidden, torch.tensor([[3.0, 1, 0, 0]])).item() == pytest.approx(5 / 4)
    assert pool(hidden, "mean").item() == pytest.approx(107 / 4)
    with pytest.raises(ValueError, match="median"):
        pool(hidden, "median")


@pytest.mark.parametrize("rate, replace", [(0.2, (0.8, 0.1)), (0.8, (1.0, 0.0)), (0.5, (0.0, 1.0))])
def test_masking_rates_are_what_was_asked(rate, replace):
    ids = torch.randint(1, 1000, (200, 500))
    maskable = ids > 100
    generator = torch.Generator().manual_seed(1)
    hidden, chosen = mask_tokens(ids, 0, 1000, rate, replace, maskable, generator)
    may = maskable.clone()
    may[:, 0] = False
    assert not chosen[~may].any()
    assert chosen[may].float().mean() == pytest.approx(rate, abs=0.01)
    assert torch.equal(hidden[~chosen], ids[~chosen])
    masked = (hidden[chosen] == 0).float().mean().item()
    changed = (hidden[chosen] != ids[chosen]).float().mean().item()
    assert masked == pytest.approx(replace[0], abs=0.01)
    assert changed == pytest.approx(sum(replace), abs=0.01)


@pytest.mark.parametrize("chunk", [2**25, 200])
def test_mntp_reads_a_masked_token_off_the_state_in_front_of_it(chunk, monkeypatch):
    """Loss and gradient of every weight, against the full softmax over all positions."""
    monkeypatch.setattr("llm2vec.CHUNK", chunk)
    decoder = small_decoder(is_causal=False, tie_word_embeddings=True)
    ids = torch.randint(50, (3, 9))
    masked, chosen = mask_tokens(ids, 7, 50, 0.5, generator=torch.Generator().manual_seed(0))
    loss = mntp_loss(decoder, masked, ids, chosen)
    gradients = torch.autograd.grad(loss, list(decoder.parameters()))

    log_p = (decoder(masked) @ decoder.embed_tokens.weight.T).log_softmax(-1)
    rows = [-log_p[b, i - 1, ids[b, i]] for b in range(3) for i in range(1, 9) if chosen[b, i]]
    expected = torch.stack(rows).mean()
    # The loss is taken in float32 whatever the model's type, hence the tolerance.
    torch.testing.assert_close(loss.double(), expected, atol=1e-6, rtol=1e-6)
    for got, want in zip(
        gradients, torch.autograd.grad(expected, list(decoder.parameters())), strict=True
    ):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)

    none = mntp_loss(decoder, ids, ids, torch.zeros_like(chosen))
    assert none.item() == 0, "no chosen token: no loss, and no NaN"


@pytest.mark.parametrize("n_negatives", [0, 5])
def test_contrastive_loss_and_gradient_in_closed_form(n_negatives):
    """d loss / d score is (softmax - one-hot) / B; the cosine's gradient is a projection."""
    rng = np.random.default_rng(0)
    q, p, n = rng.normal(size=(4, 6)), rng.normal(size=(4, 6)), rng.normal(size=(n_negatives, 6))
    scale = 20.0
    candidates = np.concatenate([p, n])
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
    scores = scale * unit(q) @ unit(candidates).T
    softmax = np.exp(scores - scores.max(1, keepdims=True))
    softmax /= softmax.sum(1, keepdims=True)
    expected = -np.log(softmax[np.arange(4), np.arange(4)]).mean()
    d_scores = scale * (softmax - np.eye(4, len(candidates))) / 4
    d_unit = d_scores @ unit(candidates)
    d_query = d_unit - (d_unit * unit(q)).sum(1, keepdims=True) * unit(q)
    d_query /= np.linalg.norm(q, axis=1, keepdims=True)

    query = torch.tensor(q, requires_grad=True)
    negative = torch.tensor(n) if n_negatives else None
    loss = contrastive_loss(query, torch.tensor(p), negative, scale)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(query.grad.numpy(), d_query, atol=1e-6)


@pytest.mark.parametrize("T", [1, 9, 128, 129, 140])
@pytest.mark.parametrize("mask", ["none", "causal", "padded"])
def test_attention_is_the_formula_head_by_head(T, mask):
    torch.manual_seed(T)
    q = torch.randn(2, 6, T, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 3, T, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    segments = torch.ones(2, T, dtype=torch.long)
    segments[1, T // 2 + 1 :] = 0 if mask == "padded" else 1
    allowed = attention_mask(segments, mask == "causal")
    expected = torch.zeros(2, 6, T, 8, dtype=torch.float64)
    shown = torch.ones(2, T, T, dtype=torch.bool)
    if allowed is not None:
        shown = allowed[:, 0].expand(2, T, T)
    for head in range(6):  # two query heads share each key/value head
        scores = q[:, head] @ k[:, head // 2].transpose(1, 2) / 8**0.5
        weights = scores.masked_fill(~shown, float("-inf")).softmax(-1)
        expected[:, head] = weights @ v[:, head // 2]
    found = attend(q, k, v, allowed, 0.0)
    torch.testing.assert_close(found, expected)
    direction = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(found, (q, k, v), direction),
        torch.autograd.grad(expected, (q, k, v), direction),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("T", [16, 200])
def test_attention_dropout_spares_weights_and_keeps_their_mean(T):
    q = k = torch.zeros(4, 2, T, 8)  # every weight is 1 / T
    v = torch.ones(4, 2, T, 8)
    torch.manual_seed(0)
    y = attend(q, k, v, None, 0.25)
    spared = y[..., 0] * T * 0.75  # how many of T
    torch.testing.assert_close(spared, spared.round())
    assert spared.mean() / T == pytest.approx(0.75, abs=0.02) and spared.std() > 0


def test_batches_are_of_like_length_and_within_their_budget():
    torch.manual_seed(0)
    lengths = torch.randint(1, 200, (500,)).tolist()
    for max_tokens in (100, 600, 8192):
        batches = list(batches_by_length(lengths, max_tokens))
        assert sorted(i for batch in batches for i in batch) == list(range(500))
        for batch in batches:
            longest = max(lengths[i] for i in batch)
            assert len(batch) == 1 or len(batch) * longest <= max_tokens
            small = len(batch) * longest <= 256
            assert small or all(8 * lengths[i] >= 7 * longest for i in batch)
    padded = sum(len(b) * lengths[b[0]] for b in batches_by_length(lengths, 8192))
    assert padded < 1.1 * sum(lengths)


@pytest.mark.parametrize("layers", [1, 3, 5])
def test_recomputing_layers_changes_no_bit_of_a_gradient(layers):
    decoder = small_decoder(is_causal=False, num_hidden_layers=5, attention_dropout=0.2).train()
    ids = torch.randint(50, (2, 6))
    runs, gradients = [], []
    for layer in decoder.layers:
        layer.register_forward_pre_hook(lambda *_: runs.append(1))
    for decoder.recompute in (0, layers):
        torch.manual_seed(1)
        loss = decoder(ids).square().mean()
        weights = [p for p in decoder.parameters() if p is not decoder.lm_head.weight]
        gradients.append(torch.autograd.grad(loss, weights))
    assert len(runs) == 5 + 5 + layers
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_attention_dropout_acts_in_training_only():
    decoder = small_decoder(is_causal=False, attention_dropout=0.3).float()
    ids = torch.randint(50, (1, 12))
    assert torch.equal(decoder(ids), decoder(ids))
    decoder.train()
    assert not torch.allclose(decoder(ids), decoder(ids))
    assert F.mse_loss(decoder(ids), decoder(ids)) > 0


def test_the_stream_of_a_bfloat16_model_is_float32():
    decoder, seen = small_decoder().bfloat16(), []
    for layer in decoder.layers:
        layer.register_forward_hook(lambda module, x, y: seen.extend([x[0].dtype, y.dtype]))
        layer.mlp.register_forward_hook(lambda module, x, y: seen.append(y.dtype))
    assert decoder(torch.arange(4)[None]).dtype == torch.bfloat16
    assert seen == [torch.bfloat16, torch.float32, torch.float32] * len(decoder.layers)
