"""Everything lies on the model's device, as far as can be told on a machine without a second one.

A `Far` tensor says that it is on another device and computes on the CPU. An operation on far and
near tensors raises, as it would between a GPU and the CPU; so does a generator of the wrong device.
"""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import go, log_of, pair, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import llm2vec
import lora
import train
from llm2vec import LLM2Vec
from llm2vec_data import benchmarks, compare, figures, processes, runs
from lora import load_adapter, merge_lora, quantize_nf4

AWAY = torch.device("lazy")  # a device that torch names and this build does not have
TEXTS = ["A man plays a guitar.", "Stocks fell sharply on Monday, and " * 20, "x"]
QUERIES = ("one two", "three four", "five six", "seven")
PAIRS = [pair(query, query[::-1], instruction="Find:") for query in QUERIES]
aten = torch.ops.aten
COPIES = (aten.copy_.default, aten._to_copy.default)
PICKS = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)


class Far(torch.Tensor):
    """A tensor on AWAY, whose numbers are those of `near`."""

    @staticmethod
    def __new__(cls, near):
        layout = {"strides": near.stride(), "storage_offset": near.storage_offset()}
        return torch.Tensor._make_wrapper_subclass(
            cls, near.shape, dtype=near.dtype, device=AWAY, **layout
        )

    def __init__(self, near):
        self.near = near

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


class Away(TorchDispatchMode):
    """Sees what has no far tensor among its arguments, and may make one."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


def near(x):
    return x.near if isinstance(x, Far) else x


def compute(function, args, kwargs):
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    far = {id(t.near): t for t in tensors if isinstance(t, Far)}
    here = [t for t in tensors if not isinstance(t, Far) and t.dim() > 0]
    device = kwargs.get("device")
    away = bool(far) if device is None else torch.device(device).type == AWAY.type
    if function in COPIES:
        away = isinstance(args[0], Far) if device is None else away
    elif function in PICKS and isinstance(args[0], Far):  # indices may be near, values may not
        here = [] if function is aten.index.Tensor else [t for t in here if t is args[2]]
    if far and here and function not in COPIES:
        raise RuntimeError(f"{function}: tensors on two devices")
    if away and kwargs.get("generator") is not None:
        raise RuntimeError(f"{function}: a generator of another device")
    kwargs = tree_map(near, kwargs) | ({} if device is None else {"device": "cpu"})
    result = function(*tree_map(near, args), **kwargs)

    def back(x):
        if not away or not isinstance(x, torch.Tensor):
            return x
        return far[id(x)] if id(x) in far else Far(x)  # in place: the argument, not another tensor

    return tree_map(back, result)


@pytest.fixture
def away(monkeypatch):
    """The mode, and what torch and safetensors would know of a device that is there."""
    monkeypatch.setattr(torch, "lazy", SimpleNamespace(_initialized=False), raising=False)
    adam = sys.modules["torch.optim.adam"]
    for module in (adam, sys.modules["torch.optim.adamw"]):  # by name, before torch 2.7
        check = "_device_dtype_check_for_fused"
        monkeypatch.setattr(module, check, lambda *_, **__: None, raising=False)
    for module in (lora, runs):

        def save_near(state, *args, save=module.save_bytes):
            return save({name: near(w.detach()) for name, w in state.items()}, *args)

        monkeypatch.setattr(module, "save_bytes", save_near)
    monkeypatch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor makes no far tensor by itself
    try:
        with Away():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(False)


def tiny_on(device, quantize=False) -> LLM2Vec:
    model = tiny()
    if quantize:
        quantize_nf4(model.decoder)
    return model.to(device)


def test_a_far_tensor_is_told_from_a_near_one(away):
    a, b, i = torch.ones(3, device=AWAY), torch.ones(3), torch.tensor([0, 2])
    assert a.device == AWAY
    assert (a + 1).device == a[i].device == b.to(AWAY).device == AWAY
    assert (a + b.to(AWAY)).cpu().tolist() == [2, 2, 2]
    faults = [lambda: a + b, lambda: b[i.to(AWAY)], lambda: a.index_put_((i,), b[:2])]
    faults += [lambda: torch.rand(3, device=AWAY, generator=torch.Generator())]
    for fault in faults:
        with pytest.raises(RuntimeError, match="two devices|generator"):
            fault()


def test_encoding_and_scoring(away):
    near_by, model = tiny_on("cpu"), tiny_on(AWAY)
    np.testing.assert_allclose(model.encode(TEXTS), near_by.encode(TEXTS), atol=1e-4)
    for _, baseline in compare.baselines(model):
        assert np.isfinite(baseline.encode(TEXTS)).all()
    assert np.isfinite(figures.layer_cosines(model, TEXTS)).all()
    states = (llm2vec.word_states(m, [["A", "man"], ["plays"]]) for m in (model, near_by))
    for here, there in zip(*states, strict=True):
        torch.testing.assert_close(here, there, atol=1e-4, rtol=0)
    blocks = torch.tensor([model.tokenizer.encode(TEXTS[1]).ids])
    assert 0 <= benchmarks.masked_accuracy(model, blocks, benchmarks.mask_id_of(model)) <= 1


@pytest.mark.parametrize("nf4", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stage", train.STAGES)
def test_a_stage_that_was_stopped_goes_on(away, monkeypatch, tmp_path, stage, nf4):
    """In parts, recomputed and on a 4-bit base; or in one pass on weights as they are."""
    monkeypatch.setattr(llm2vec, "CHUNK", 2**16)
    # On a CPU adapters have a dropout of their own, elsewhere torch's: here its numbers for both.
    monkeypatch.setattr(lora, "kept", lambda x, p: F.dropout(torch.ones_like(x), p) > 0)
    small = {"length": 16, "batch": 4, "steps": 2, "save_every": 1, "attention_dropout": 0.0}
    small |= {"max_tokens": 32, "recompute": 1} if nf4 else {}
    data, losses = [PAIRS] if stage == "supervised" else TEXTS, []

    def save_and_stop(*args, save=train.RunFolder.save):
        save(*args)
        raise InterruptedError

    for device in ("cpu", AWAY):
        folder = tmp_path / str(device)
        with monkeypatch.context() as patch, pytest.raises(InterruptedError):
            patch.setattr(train.RunFolder, "save", save_and_stop)
            go(stage, folder, tiny_on(device, nf4), data, **small)
        go(stage, folder, tiny_on(device, nf4), data, **small)
        losses.append([line["loss"] for line in log_of(folder)])
        decoder = tiny_on(device).decoder
        load_adapter(decoder, folder)
        merge_lora(decoder)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_the_device_and_its_type_are_those_of_the_hardware(monkeypatch, capsys):
    """A GPU before a CPU; a GPU without bfloat16 (T4, V100) computes in float32 and says so."""
    there = lambda answer: lambda *_, **__: answer  # noqa: E731
    monkeypatch.setenv("LOCAL_RANK", "2")
    found = ((False, False, "cpu"), (True, False, "mps"), (True, True, "cuda:2"))
    for mps, cuda, expected in found:
        monkeypatch.setattr(torch.backends.mps, "is_available", there(mps))
        monkeypatch.setattr(torch.cuda, "is_available", there(cuda))
        assert processes.default_device() == expected
    assert not processes.has_bfloat16(torch.device("mps"))
    for able in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", there(able))
        assert processes.has_bfloat16(torch.device("cuda")) == able
        assert ("has no bfloat16" in capsys.readouterr().err) != able
