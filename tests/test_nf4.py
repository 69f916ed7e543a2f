"""The 4-bit base: its table and rounding, its gradients, and what it keeps in memory."""

from pathlib import Path

import pytest
import torch
from helpers import GOLDEN, TINY, log_of, refused, small_decoder, tiny
from safetensors.torch import load_file
from torch import nn

import lora
from llm2vec import Decoder, LLM2Vec, mntp_loss
from lora import add_lora, load_adapter, merge_lora, quantize_nf4, save_adapter

# QLoRA's table, as its appendix E and bitsandbytes have it.
PUBLISHED = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453]
PUBLISHED += [-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0]
PUBLISHED += [0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
PUBLISHED += [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]


def quantized(layer: nn.Linear) -> torch.Tensor:
    """Store a layer in 4 bits; returns its weight as it was."""
    before, model = layer.weight.detach().clone(), nn.Module()
    model.layers = nn.ModuleList([layer])
    quantize_nf4(model)
    return before


def test_every_number_becomes_the_nearest_value_of_its_block():
    torch.manual_seed(0)
    layer = nn.Linear(96, 32, bias=False)
    layer.weight.data[0] = 0  # a block of zeros
    before = quantized(layer)
    blocks, decoded = before.view(-1, 64), layer.decoded(torch.float32).view(-1, 64)
    values = torch.tensor(PUBLISHED) * blocks.abs().amax(1)[:, None]
    nearest = (blocks[:, :, None] - values[:, None]).abs().amin(2)
    torch.testing.assert_close((decoded - blocks).abs(), nearest)
    assert layer.weight.nbytes == before.numel() / 2, "two codes a byte"
    assert layer.scales.numel() == before.numel() / 64 and not layer.weight.requires_grad


@pytest.mark.parametrize("folder", [TINY, GOLDEN / "qwen2"], ids=["llama", "with biases"])
def test_gradients_are_those_of_the_decoded_weights(folder):
    exact, decoder = Decoder.from_pretrained(folder), Decoder.from_pretrained(folder)
    quantize_nf4(decoder)
    for name, module in lora.projections(decoder).items():
        exact.get_submodule(name).weight.data = module.decoded(torch.float32)
    ids = torch.randint(exact.config.vocab_size, (2, 24), generator=torch.manual_seed(0))

    def gradients(decoder: Decoder, recompute: int = 0) -> list[torch.Tensor]:
        torch.manual_seed(0)
        lora.remove_lora(decoder)
        parameters = add_lora(decoder.train(), dropout=0.1)
        for p in parameters:
            nn.init.normal_(p, std=0.02)
        decoder.recompute = recompute
        loss = mntp_loss(decoder, ids, ids, (ids % 3 == 0) & (torch.arange(24) > 0))
        return [loss.detach(), *torch.autograd.grad(loss, parameters)]

    expected = gradients(exact)
    assert all(gradient.any() for gradient in expected)
    for recompute in (0, 6):
        found = gradients(decoder, recompute)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_a_step_keeps_no_decoded_weight_for_its_backward_pass():
    decoder, kept = tiny(1).decoder, []
    quantize_nf4(decoder)
    add_lora(decoder.train())
    layer, x = decoder.layers[0].mlp.up_proj, torch.randn(3, decoder.config.hidden_size)
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda saved: saved):
        layer(x.requires_grad_())
    sizes = [tensor.untyped_storage().nbytes() for tensor in kept]
    assert sizes and max(sizes) < layer.weight.nbytes, "not even the codes, which the module has"


def test_an_adapter_is_merged_into_the_weights_as_they_were_and_never_into_4_bits(tmp_path):
    model, whole = tiny(), tiny().decoder
    quantize_nf4(model.decoder)
    refused("4-bit weights are for training", model.save, tmp_path / "encoder")
    for p in add_lora(model.decoder):
        nn.init.normal_(p, std=0.02)
    save_adapter(model.decoder, tmp_path / "adapter")
    refused("4-bit weights take no adapter", merge_lora, model.decoder)
    refused("adapters are not merged", model.save, tmp_path / "encoder")
    assert not (tmp_path / "encoder").exists()
    module = whole.layers[1].mlp.up_proj
    before = module.weight.clone()
    load_adapter(whole, tmp_path / "adapter")
    delta = 2 * module.lora_B.weight @ module.lora_A.weight
    merge_lora(whole)
    torch.testing.assert_close(module.weight, before + delta)


def test_what_does_not_fit_is_refused():
    refused("layers.0 .*64", quantized, nn.Linear(30, 34))
    decoder = small_decoder()
    add_lora(decoder, rank=2)
    refused("merge_lora first", quantize_nf4, decoder)


@pytest.mark.slow
def test_stages_train_on_it_and_export_whole_weights(command):
    how = ["--model", TINY, "--preset", "tiny", "--dtype", "float32", "--quantize", "nf4"]
    simcse = ["simcse", *how, "--steps", 1, "--adapters", "mntp", "--output", "simcse"]
    for args in (["mntp", *how, "--steps", 12, "--output", "mntp"], simcse):
        status, _, errors = command(*args)
        assert status == 0, errors
    losses = [line["loss"] for line in log_of(Path("mntp"))]
    assert losses[-1] < losses[0]
    exported = load_file("simcse/encoder/model.safetensors")
    merged = LLM2Vec.from_pretrained(TINY, ["mntp", "simcse"]).decoder.state_dict()
    assert all(torch.equal(exported[f"model.{name}"], w) for name, w in merged.items())
    plain = [flag for flag in simcse if flag not in ("--quantize", "nf4")]
    assert command(*plain)[0] == 2, "a run with other settings"
