"""The mask, pooling and losses, against brute force and closed forms in float64."""

import numpy as np
import pytest
import torch
from helpers import refused, small_decoder

from llm2vec import attention_mask, contrastive_loss, cross_entropy, mask_tokens, mntp_loss, pool
from llm2vec_data.batches import batches_by_length

# --- Step 1 ------------------------------------------------------------------------------------

ROWS = [[[1] * 6], [[1, 1, 1, 1, 0, 0], [1] * 6], [[0, 0, 3, 3, 3, 3]], [[1]]]
ROWS += [[[1, 1, 2, 2, 2, 0], [5, 4, 4, 4, 0, 0]]]


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 2, 3, 100])
def test_the_mask_is_what_a_double_loop_says(window, is_causal):
    for segments in map(torch.tensor, ROWS):
        B, T = segments.shape
        mask = attention_mask(segments, is_causal, window)
        expected = torch.zeros(B, 1, T, T, dtype=torch.bool)
        for b, i, j in np.ndindex(B, T, T):
            near = j <= i if is_causal else True
            if window is not None:
                near = near and (i - j < window if is_causal else abs(i - j) <= window)
            expected[b, 0, i, j] = near and bool(segments[b, i] == segments[b, j])
        shown = torch.ones_like(expected) if mask is None else mask.expand_as(expected)
        assert torch.equal(shown, expected)
        assert shown.any(-1).all(), "a row that sees nothing would be NaN"
        assert (mask is None) == bool(shown.all()), "None is the fast path, and only for no mask"


def test_step_one_is_one_argument():
    """Causal states depend on nothing to their right, bidirectional ones do; no weight changes."""
    decoder = small_decoder()
    before = {name: weight.clone() for name, weight in decoder.state_dict().items()}
    rows = torch.tensor([[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 8]])
    one, other = (decoder(row[None])[0, :6] for row in rows)
    assert torch.equal(one, other)
    decoder.config.is_causal = False
    one, other = (decoder(row[None])[0, :6] for row in rows)
    assert ((one - other).abs().amax(-1) > 1e-6).all()
    assert all(torch.equal(weight, before[name]) for name, weight in decoder.state_dict().items())


# --- The decoder -------------------------------------------------------------------------------


def test_attention_dropout_acts_in_training_only():
    decoder = small_decoder(is_causal=False, attention_dropout=0.3).float()
    ids = torch.randint(50, (1, 12))
    assert torch.equal(decoder(ids), decoder(ids))
    decoder.train()
    assert not torch.allclose(decoder(ids), decoder(ids))


def test_states_behind_the_last_layers_are_what_those_layers_gave():
    decoder, given = small_decoder(num_hidden_layers=3), []
    for layer in decoder.layers:
        layer.register_forward_hook(lambda module, x, y: given.append(y))
    ids = torch.randint(50, (2, 6))
    segments = torch.tensor([[1] * 4 + [0] * 2, [1] * 6])
    states = decoder(ids, segments, last=2)
    assert torch.equal(states, torch.stack(given[1:])) and states.shape == (2, 2, 6, 16)
    assert torch.equal(decoder.norm(states[-1]), decoder(ids, segments))


def test_recomputing_layers_changes_no_bit_of_a_gradient():
    decoder = small_decoder(is_causal=False, num_hidden_layers=5, attention_dropout=0.2).train()
    ids = torch.randint(50, (2, 6))
    runs, gradients = [], []
    for layer in decoder.layers:
        layer.register_forward_pre_hook(lambda *_: runs.append(1))
    for decoder.recompute in (0, 3):
        torch.manual_seed(1)
        weights = [p for p in decoder.parameters() if p is not decoder.lm_head.weight]
        gradients.append(torch.autograd.grad(decoder(ids).square().mean(), weights))
    assert len(runs) == 5 + 5 + 3
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_stream_of_a_bfloat16_model_is_float32():
    decoder, seen = small_decoder().bfloat16(), []
    for layer in decoder.layers:
        layer.register_forward_hook(lambda module, x, y: seen.extend([x[0].dtype, y.dtype]))
        layer.mlp.register_forward_hook(lambda module, x, y: seen.append(y.dtype))
    assert decoder(torch.arange(4)[None]).dtype == torch.bfloat16
    assert seen == [torch.bfloat16, torch.float32, torch.float32] * len(decoder.layers)


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
    assert sum(len(b) * lengths[b[0]] for b in batches) < 1.1 * sum(lengths), "little is padding"


# --- Pooling, steps 2 and 3 --------------------------------------------------------------------


def test_pooling_by_hand():
    hidden = torch.tensor([[[1.0], [2.0], [4.0], [100.0]]])
    own = torch.tensor([[False, True, True, False]])
    expected = {"mean": 3, "weighted_mean": (2 * 2 + 3 * 4) / 5, "last": 4, "first": 2}
    for name, vector in expected.items():
        assert pool(hidden, name, own).item() == pytest.approx(vector)
    assert pool(hidden, torch.tensor([[3.0, 1, 0, 0]])).item() == pytest.approx(5 / 4)
    assert pool(hidden, torch.tensor([[0.1, 0.1, 0, 0]])).item() == pytest.approx(3 / 2)
    assert pool(hidden, "mean").item() == pytest.approx(107 / 4)
    assert pool(hidden, "mean", torch.zeros(1, 4)).isfinite().all(), "of nothing, too"
    refused("median", pool, hidden, "median")


@pytest.mark.parametrize("rate, replace", [(0.2, (0.8, 0.1)), (0.8, (1.0, 0.0)), (0.5, (0.0, 1.0))])
def test_masking_rates_are_what_was_asked(rate, replace):
    ids = torch.randint(1, 1000, (200, 500))
    may = ids > 100
    generator = torch.Generator().manual_seed(1)
    hidden, chosen = mask_tokens(ids, 0, 1000, rate, replace, may.clone(), generator)
    may[:, 0] = False  # no state stands before it
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
    log_p = (decoder(masked) @ decoder.embed_tokens.weight.T).log_softmax(-1)
    rows = [-log_p[b, i - 1, ids[b, i]] for b in range(3) for i in range(1, 9) if chosen[b, i]]
    expected = torch.stack(rows).mean()
    # The loss is taken in float32 whatever the model's type, hence the tolerance.
    torch.testing.assert_close(loss.double(), expected, atol=1e-6, rtol=1e-6)
    gradients = (torch.autograd.grad(x, list(decoder.parameters())) for x in (loss, expected))
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
    part = mntp_loss(decoder, masked, ids, chosen, total=2 * len(rows))
    torch.testing.assert_close(part, loss / 2)
    none = mntp_loss(decoder, ids, ids, torch.zeros_like(chosen))
    assert none.item() == 0, "no chosen token: no loss, and no NaN"


@pytest.mark.parametrize("n_negatives", [0, 5])
def test_contrastive_loss_and_gradient_by_hand(n_negatives):
    """The positive of each query is picked among all candidates, by cosines times 20."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randn(n, 6, generator=generator).double().requires_grad_()  # noqa: E731
    query, positive, negative = draw(4), draw(4), draw(n_negatives)
    scores = torch.cosine_similarity(query[:, None], torch.cat([positive, negative]), dim=-1)
    expected = ((20 * scores).logsumexp(1) - 20 * scores.diagonal()).mean()
    loss = contrastive_loss(query, positive, negative if n_negatives else None, scale=20.0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = (torch.autograd.grad(x, [query, positive]) for x in (loss, expected))
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=0)


def test_the_loss_of_a_bfloat16_model_is_taken_in_float32():
    decoder = small_decoder().bfloat16()
    states, tokens = 4 * torch.randn(9, 16).bfloat16(), torch.randint(50, (9,))
    logits = decoder.logits(states).double()
    losses = cross_entropy(decoder, states, tokens)
    assert losses.dtype == torch.float32
    expected = logits.logsumexp(1) - logits[torch.arange(9), tokens]
    torch.testing.assert_close(losses.double(), expected, atol=1e-5, rtol=1e-5)


def test_the_defaults_are_those_of_the_paper():
    """A fifth of the tokens, by BERT's rule; a temperature of 1/20."""
    ids, draw = torch.randint(50, (40, 90)), lambda: torch.Generator().manual_seed(0)
    found = mask_tokens(ids, 7, 50, generator=draw())
    expected = mask_tokens(ids, 7, 50, 0.2, (0.8, 0.1), generator=draw())
    assert all(map(torch.equal, found, expected))
    query, positive = torch.randn(2, 5, 8)
    losses = contrastive_loss(query, positive), contrastive_loss(query, positive, scale=20.0)
    assert torch.equal(*losses)


def test_logits_in_memory_are_bounded(monkeypatch):
    """Many chosen tokens go through the vocabulary in chunks, few at once."""
    decoder, rows = small_decoder(), []
    logits = decoder.logits
    monkeypatch.setattr(decoder, "logits", lambda x: rows.append(len(x)) or logits(x))
    monkeypatch.setattr("llm2vec.CHUNK", 4 * 50)
    states, tokens = torch.randn(10, 16).double(), torch.randint(50, (10,))
    for n, expected in ((4, [4]), (10, [4, 4, 2])):
        cross_entropy(decoder, states[:n], tokens[:n])
        assert rows == expected
        rows.clear()
