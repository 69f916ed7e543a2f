"""The 4-bit base: its table and rounding, its gradients, and the memory that Mistral-7B takes."""

import functools
import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_method import small_decoder
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import lora
from llm2vec import Config, Decoder, LLM2Vec, mntp_loss
from lora import NF4Linear, add_lora, load_adapter, merge_lora, quantize_nf4, save_adapter

ROOT = Path(__file__).parent.parent
TINY, GOLDEN = ROOT / "data" / "tiny-llama", ROOT / "tests" / "golden"

# QLoRA's table, as its appendix E and bitsandbytes have it.
PUBLISHED = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453]
PUBLISHED += [-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0]
PUBLISHED += [0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
PUBLISHED += [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
PUBLISHED = torch.tensor(PUBLISHED)


def quantized(layer: nn.Linear) -> torch.Tensor:
    """Store a layer in 4 bits; returns its weight as it was."""
    before, model = layer.weight.detach().clone(), nn.Module()
    model.layers = nn.ModuleList([layer])
    quantize_nf4(model)
    return before


def test_the_table_is_the_published_one():
    torch.testing.assert_close(lora.nf4_table(), PUBLISHED, atol=1e-6, rtol=0)


def test_every_number_becomes_the_nearest_value_of_its_block():
    torch.manual_seed(0)
    layer = nn.Linear(96, 32, bias=False)
    layer.weight.data[0] = 0  # a block of zeros
    before = quantized(layer)
    blocks, decoded = before.view(-1, 64), layer.decoded(torch.float32).view(-1, 64)
    values = PUBLISHED * blocks.abs().amax(1)[:, None]
    nearest = (blocks[:, :, None] - values[:, None]).abs().amin(2)
    torch.testing.assert_close((decoded - blocks).abs(), nearest)
    assert layer.weight.nbytes == before.numel() / 2, "two codes a byte"
    assert layer.scales.numel() == before.numel() / 64


def as_plain_layers(decoder: Decoder) -> Decoder:
    """The decoder whose weights are what the 4 bits stand for."""
    for module in decoder.modules():
        if isinstance(module, NF4Linear):
            weight = module.decoded(torch.float32)
            module.__class__ = nn.Linear
            module.weight = nn.Parameter(weight, requires_grad=False)
    return decoder


@pytest.mark.parametrize("recompute", [0, 6])
@pytest.mark.parametrize("folder", [TINY, GOLDEN / "qwen2"], ids=["llama", "with biases"])
def test_gradients_are_those_of_the_decoded_weights(folder, recompute):
    decoders = [Decoder.from_pretrained(folder) for _ in range(2)]
    for decoder in decoders:
        quantize_nf4(decoder)
    as_plain_layers(decoders[1])
    V = decoders[0].config.vocab_size
    ids = torch.randint(V, (2, 24), generator=torch.Generator().manual_seed(0))
    chosen = torch.zeros(2, 24, dtype=torch.bool)
    chosen[:, 5::3] = True
    gradients = []
    for decoder in decoders:
        torch.manual_seed(0)
        parameters = add_lora(decoder.train(), dropout=0.1)
        for p in parameters:
            nn.init.normal_(p, std=0.02)
        decoder.recompute = recompute
        loss = mntp_loss(decoder, ids, ids, chosen)
        gradients.append([loss.detach(), *torch.autograd.grad(loss, parameters)])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
        assert a.abs().max() > 0


def test_an_adapter_is_merged_into_the_weights_as_they_were_and_never_into_4_bits(tmp_path):
    model = LLM2Vec.from_pretrained(TINY)
    quantize_nf4(model.decoder)
    with pytest.raises(ValueError, match="4-bit weights are for training"):
        model.save(tmp_path / "encoder")
    for p in add_lora(model.decoder):
        nn.init.normal_(p, std=0.02)
    save_adapter(model.decoder, tmp_path / "adapter")
    with pytest.raises(ValueError, match="4-bit weights take no adapter"):
        merge_lora(model.decoder)
    assert lora.adapted(model.decoder), "the model is as it was"
    with pytest.raises(ValueError, match="adapters are not merged"):
        model.save(tmp_path / "encoder")
    assert not (tmp_path / "encoder").exists()

    decoder = Decoder.from_pretrained(TINY)
    module = decoder.layers[3].mlp.up_proj
    before = module.weight.clone()
    load_adapter(decoder, tmp_path / "adapter")
    delta = 2 * module.lora_B.weight @ module.lora_A.weight
    merge_lora(decoder)
    torch.testing.assert_close(module.weight, before + delta)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="layers.0 has 1020 numbers, not blocks of 64"):
        quantized(nn.Linear(30, 34))
    decoder = small_decoder()
    add_lora(decoder, rank=2)
    with pytest.raises(ValueError, match="merge_lora first"):
        quantize_nf4(decoder)


@pytest.mark.slow
def test_stages_train_on_it_and_export_whole_weights(tmp_path):
    mntp, simcse = tmp_path / "mntp", tmp_path / "simcse"
    four_bits = ["--quantize", "nf4"]

    def train(*flags: object, quantize: list[str] = four_bits) -> subprocess.CompletedProcess:
        command = [sys.executable, "train.py", *map(str, flags), "--model", TINY, *quantize]
        command += ["--preset", "tiny", "--dtype", "float32"]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)

    first = train("mntp", "--steps", 12, "--output", mntp)
    assert first.returncode == 0, first.stderr
    losses = [json.loads(line)["loss"] for line in (mntp / "log.jsonl").open()]
    assert losses[-1] < losses[0]
    second = ["simcse", "--steps", 2, "--adapters", mntp, "--output", simcse]
    for _ in range(2):  # a finished stage is found finished
        assert train(*second).returncode == 0
        exported = load_file(simcse / "encoder" / "model.safetensors")
        merged = LLM2Vec.from_pretrained(TINY, [mntp, simcse]).decoder.state_dict()
        assert all(torch.equal(exported[f"model.{name}"], w) for name, w in merged.items())
    other = train(*second, quantize=[])
    assert other.returncode == 2 and "a run with other settings" in other.stderr


# --- Memory ------------------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """Bytes of all tensors alive that were made under it, and their largest sum so far."""

    def __init__(self):
        super().__init__()
        self.known, self.now, self.peak = set(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor) and x.device.type != "meta":
                self.count(x.untyped_storage())
        return result

    def count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.gone, key, size)

    def gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def test_an_mntp_step_of_mistral_7b_stays_below_8_gib(monkeypatch):
    """Of 512 tokens at rate 0.8, every tensor counted; none is computed, only its shape."""
    monkeypatch.setattr(lora, "nf4_pairs", functools.cache(lora.nf4_pairs.__wrapped__))
    monkeypatch.setattr(nn.Module, "to", lambda module, *_: module)  # all is where it should be
    monkeypatch.setattr("llm2vec.attention_mask", lambda *_: None)  # a row without padding
    config = Config(32000, 4096, 14336, 32, 32, 8, 128, "mistral", is_causal=False)
    with FakeTensorMode(), Live() as live:
        torch.set_default_dtype(torch.bfloat16)
        try:
            decoder = Decoder(config)
        finally:
            torch.set_default_dtype(torch.float32)
        quantize_nf4(decoder)
        gc.collect()
        live.peak = live.now
        parameters = add_lora(decoder.train())
        decoder.recompute = 32
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
        for p in parameters:
            p.grad = torch.zeros_like(p)
        optimizer.step()  # makes Adam's moments
        optimizer.zero_grad()
        before = live.now
        # mntp_loss, if the hidden tokens come first: which ones they are, shapes alone don't tell.
        ids = torch.zeros(1, 512, dtype=torch.long)
        states = decoder(ids)[0, :410]
        F.cross_entropy(decoder.logits(states).float(), ids[0, :410]).backward()
        optimizer.step()
    weights = 32 * 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336) * (0.5 + 4 / 64) + 2 * 32000 * 4096 * 2
    adapters = 32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    fixed = weights + adapters * 4 * 3  # float32, with Adam's moments
    inputs = 32 * 512 * 4096 * 4  # of the layers, float32
    decoding = 4096 * 14336 * 8  # of one matrix at a time: its codes and numbers on the way
    print(f"{live.peak / 2**30:.2f} GiB, {fixed / 2**30:.2f} of them before the step")
    assert before == pytest.approx(fixed, rel=0.01)
    assert fixed + inputs < live.peak < fixed + inputs + decoding < 8 * 2**30
