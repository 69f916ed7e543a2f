"""Adapters: what they change, what they never touch, and what is said of bad ones."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_method import small_decoder

from lora import (
    PROJECTIONS,
    adapted,
    add_lora,
    kept,
    load_adapter,
    merge_lora,
    save_adapter,
)

IDS = torch.arange(12).view(2, 6)


def with_adapters(**changes):
    """A decoder whose adapters have been moved off zero."""
    decoder = small_decoder().float()
    torch.manual_seed(1)
    for parameter in add_lora(decoder, **{"rank": 3, "alpha": 12} | changes):
        torch.nn.init.normal_(parameter, std=0.2)
    return decoder


def test_a_fresh_adapter_changes_nothing():
    decoder = small_decoder().float()
    before = decoder(IDS)
    parameters = add_lora(decoder, rank=4)
    assert torch.equal(decoder(IDS), before)
    assert len(parameters) == 2 * 7 * 2, "A and B, of seven projections, of two layers"
    assert len({p.data_ptr() for p in parameters}) == len(parameters)


def test_an_adapter_adds_alpha_over_rank_times_b_a():
    decoder = with_adapters()
    module = decoder.layers[0].mlp.down_proj
    x = torch.randn(5, 24)
    delta = 12 / 3 * module.lora_B.weight @ module.lora_A.weight
    torch.testing.assert_close(module(x), x @ (module.weight + delta).T)


def test_a_starts_kaiming_uniform_and_b_zero():
    decoder = small_decoder().float()
    add_lora(decoder, rank=4)
    for module in adapted(decoder).values():
        bound = module.in_features**-0.5  # Kaiming's bound with a = sqrt(5), as PEFT starts A
        assert 0.5 * bound < module.lora_A.weight.abs().max() <= bound
        assert not module.lora_B.weight.any()


def test_merged_equals_unmerged_and_leaves_plain_projections():
    decoder = with_adapters(dropout=0.5)
    names = list(small_decoder().state_dict())
    before = decoder(IDS)
    merge_lora(decoder)
    assert list(decoder.state_dict()) == names and not adapted(decoder)
    torch.testing.assert_close(decoder(IDS), before, atol=1e-5, rtol=1e-5)


def test_dropout_is_on_the_adapters_input_and_in_training_only():
    decoder = with_adapters(dropout=0.5)
    assert torch.equal(decoder(IDS), decoder(IDS))
    module = decoder.layers[0].mlp.down_proj.train()
    x = torch.ones(1, 24)
    outputs = torch.cat([module(x) for _ in range(200)])
    assert len(outputs.unique(dim=0)) > 100
    frozen = torch.nn.functional.linear(x, module.weight)
    mean = outputs.mean(0, keepdim=True) - frozen
    torch.testing.assert_close(mean, module.train(False)(x) - frozen, atol=0.5, rtol=0.3)


def test_only_chosen_projections_are_adapted():
    decoder = small_decoder()
    add_lora(decoder, targets=["q_proj", "down_proj"])
    assert {name.rpartition(".")[2] for name in adapted(decoder)} == {"q_proj", "down_proj"}


def test_adapters_stay_float32_on_a_bfloat16_base():
    decoder = small_decoder().bfloat16()
    parameters = add_lora(decoder)
    assert {p.dtype for p in parameters} == {torch.float32}
    trained = [p for p in decoder.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in parameters}
    assert decoder(IDS).dtype == torch.bfloat16
    module = decoder.layers[1].self_attn.q_proj
    torch.nn.init.normal_(module.lora_B.weight, std=0.1)
    expected = (module.weight.float() + module.delta()).bfloat16()
    merge_lora(decoder)
    assert torch.equal(decoder.layers[1].self_attn.q_proj.weight, expected)


def test_a_saved_adapter_comes_back(tmp_path):
    decoder = with_adapters()
    save_adapter(decoder, tmp_path / "adapter")
    again = small_decoder().float()
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again(IDS), decoder(IDS))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 12)
    assert sorted(config["target_modules"]) == sorted(PROJECTIONS)


def test_what_can_not_be_added_is_named():
    decoder = small_decoder()
    with pytest.raises(ValueError, match="'qq_proj'"):
        add_lora(decoder, targets=["qq_proj"])
    with pytest.raises(ValueError, match="'mlp'"):
        add_lora(decoder, targets=["q_proj", "mlp"])
    with pytest.raises(ValueError, match="rank is 0"):
        add_lora(decoder, rank=0)
    add_lora(decoder)
    with pytest.raises(ValueError, match="already"):
        add_lora(decoder)
    with pytest.raises(ValueError, match="no adapters"):
        save_adapter(small_decoder(), "nowhere")


def test_a_broken_adapter_is_named(tmp_path):
    save_adapter(with_adapters(), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    key = "base_model.model.layers.0.mlp.up_proj.lora_A.weight"
    for change, said in [
        ({key: state[key][:, 1:].contiguous()}, r"up_proj.lora_A is \[3, 15\]"),
        ({"base_model.model.layers.9.mlp.up_proj.lora_A.weight": state[key].clone()}, "layers.9"),
    ]:
        save_file(state | change, file)
        with pytest.raises(ValueError, match=said):
            load_adapter(small_decoder(), tmp_path)
    save_file({k: v for k, v in state.items() if k != key}, file)
    with pytest.raises(ValueError, match="layers.0.mlp.up_proj has lora_B, not lora_A"):
        load_adapter(small_decoder(), tmp_path)
    file.write_bytes(b"\0" * 9)
    with pytest.raises(ValueError, match="adapter_model.safetensors"):
        load_adapter(small_decoder(), tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors"):
        load_adapter(small_decoder(), tmp_path)


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_dropout_spares_each_number_with_the_chance_it_should(p):
    torch.manual_seed(0)
    x = torch.zeros(3, 7, 10_001)
    spared = kept(x, p)
    assert spared.shape == x.shape
    n = x.numel()
    assert abs((~spared).sum() - n * p) < 4 * (n * p * (1 - p)) ** 0.5, "four standard deviations"
    # Numbers that share 64 random bits, or lie far apart, are spared independently of each other.
    flat = spared.flatten().float() - (1 - p)
    for distance in (1, 2, 3, 4, 10_001):
        product = (flat[:-distance] * flat[distance:]).mean().item()
        assert abs(product) < 5 * p * (1 - p) / n**0.5
    torch.manual_seed(0)
    assert torch.equal(kept(x, p), spared), "as the seed says"
    assert not torch.equal(kept(x, p), spared)


def test_dropout_keeps_the_mean():
    decoder = with_adapters(dropout=0.3).train()
    module = decoder.layers[0].mlp.up_proj
    x = torch.ones(20_000, module.in_features)
    torch.manual_seed(0)
    with_dropout = module(x).mean(0)
    module.train(False)
    torch.testing.assert_close(with_dropout, module(x[0]), atol=0.02, rtol=0.02)
