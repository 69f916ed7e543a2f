"""Adapters: what they change, what they never touch, and what is said of bad ones."""

import re
from collections import Counter

import pytest
import torch
from helpers import go, refused, small_decoder, spoil, tiny
from safetensors.torch import load_file, save_file

import lora
from llm2vec import LLM2Vec
from lora import adapted, add_lora, kept, load_adapter, merge_lora, remove_lora, save_adapter

IDS = torch.arange(12).view(2, 6)


def with_adapters(**changes):
    """A decoder whose adapters have been moved off zero."""
    decoder = small_decoder().float()
    torch.manual_seed(1)
    for parameter in add_lora(decoder, **{"rank": 3, "alpha": 12} | changes):
        torch.nn.init.normal_(parameter, std=0.2)
    return decoder


def test_a_fresh_adapter_is_the_papers_and_changes_nothing():
    decoder = small_decoder().float()
    before = decoder(IDS)
    parameters = add_lora(decoder)
    assert torch.equal(decoder(IDS), before)
    assert len({p.data_ptr() for p in parameters}) == 2 * 7 * 2, "A, B; seven projections; 2 layers"
    for module in adapted(decoder).values():
        assert (module.lora_A.out_features, module.scale, module.dropout) == (16, 32 / 16, 0.05)
        bound = module.in_features**-0.5  # Kaiming's bound with a = sqrt(5), as PEFT starts A
        assert 0.5 * bound < module.lora_A.weight.abs().max() <= bound
        assert not module.lora_B.weight.any()


@pytest.mark.parametrize("alpha, scale", [(12, 12 / 3), (None, 2)])
def test_an_adapter_adds_alpha_over_rank_times_b_a(alpha, scale):
    module = with_adapters(alpha=alpha).layers[0].mlp.down_proj
    x = torch.randn(5, 24)
    delta = scale * module.lora_B.weight @ module.lora_A.weight
    torch.testing.assert_close(module(x), x @ (module.weight + delta).T)


def test_merged_equals_unmerged_and_leaves_plain_projections():
    decoder = with_adapters(dropout=0.5)
    before = decoder(IDS)
    merge_lora(decoder)
    assert list(decoder.state_dict()) == list(small_decoder().state_dict()) and not adapted(decoder)
    torch.testing.assert_close(decoder(IDS), before, atol=1e-5, rtol=1e-5)


CHOSEN = [(["q_proj", "mlp.down_proj"], {"q_proj": 4, "down_proj": 4})]
CHOSEN += [(["v_proj", "q_norm", "norm"], {"v_proj": 4, "q_norm": 2, "norm": 1})]


@pytest.mark.parametrize("targets, ends", CHOSEN)
def test_what_was_chosen_is_trained_in_every_layer_and_nothing_else(targets, ends):
    decoder = small_decoder(qk_norm=True).float()
    parameters = add_lora(decoder, targets=targets)
    names = [name for name, p in decoder.named_parameters() if p.requires_grad]
    modules = [re.sub(r"(\.lora_[AB])?\.weight$", "", name) for name in names]
    assert Counter(name.rpartition(".")[2] for name in modules) == ends
    assert len(parameters) == len(names)


def test_adapters_stay_float32_on_a_bfloat16_base():
    decoder = small_decoder().bfloat16()
    parameters = add_lora(decoder)
    assert {p.dtype for p in parameters} == {torch.float32}
    assert {*map(id, lora.trained(decoder).values())} == {*map(id, parameters)}
    assert decoder(IDS).dtype == torch.bfloat16
    module = decoder.layers[1].self_attn.q_proj
    torch.nn.init.normal_(module.lora_B.weight, std=0.1)
    expected = module.weight.float() + 2 * module.lora_B.weight @ module.lora_A.weight
    merge_lora(decoder)
    assert torch.equal(module.weight, expected.bfloat16())


def test_dropout_is_on_the_adapters_input_and_in_training_only():
    module = with_adapters(dropout=0.3).layers[0].mlp.up_proj
    x = torch.ones(20_000, module.in_features)
    plain = module(x[:1])
    assert torch.equal(module(x[:1]), plain)
    torch.manual_seed(0)
    outputs = module.train()(x)
    assert len(outputs[:200].unique(dim=0)) > 100
    torch.testing.assert_close(outputs.mean(0), plain[0], atol=0.02, rtol=0.02)


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_dropout_spares_each_number_with_the_chance_it_should(p):
    torch.manual_seed(0)
    x = torch.zeros(3, 7, 10_001)
    spared, n = kept(x, p), x.numel()
    assert spared.shape == x.shape
    assert abs((~spared).sum() - n * p) < 4 * (n * p * (1 - p)) ** 0.5, "four standard deviations"
    # Numbers that share 64 random bits, or lie far apart, are spared independently of each other.
    flat = spared.flatten().float() - (1 - p)
    for distance in (1, 2, 3, 4, 10_001):
        product = (flat[:-distance] * flat[distance:]).mean().item()
        assert abs(product) < 5 * p * (1 - p) / n**0.5
    torch.manual_seed(0)
    assert torch.equal(kept(x, p), spared), "as the seed says"
    assert not torch.equal(kept(x, p), spared)


def test_what_can_not_be_added_is_named(tmp_path):
    decoder = small_decoder()
    refused("'qq_proj'", add_lora, decoder, targets=["qq_proj"])
    refused("'mlp'", add_lora, decoder, targets=["q_proj", "mlp"])
    refused("rank is 0", add_lora, decoder, rank=0)
    refused("no adapters", save_adapter, decoder, tmp_path)
    add_lora(decoder)
    refused("already", add_lora, decoder)


@pytest.mark.parametrize("inner", ["", "model."])
@pytest.mark.parametrize("start", ["", "^layers.0.", "^model.layers.0."])
def test_an_anchored_pattern_matches_the_name_that_peft_saw(start, inner, tmp_path):
    """In the inner model or in a causal one, as the keys of the file say."""
    save_adapter(with_adapters(), tmp_path)
    spoil(tmp_path / "adapter_config.json", alpha_pattern={f"{start}mlp.up_proj": 24})
    weights, decoder = tmp_path / "adapter_model.safetensors", small_decoder()
    state = load_file(weights)
    save_file({k.replace("layers", f"{inner}layers"): w for k, w in state.items()}, weights)
    load_adapter(decoder, tmp_path)
    scales = [layer.mlp.up_proj.scale for layer in decoder.layers]
    first = 24 / 3 if start in ("", f"^{inner}layers.0.") else 12 / 3
    assert scales == [first, 12 / 3 if start else 24 / 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_that_is_a_target_is_trained_itself_and_nothing_else(dtype, tmp_path):
    """And read back from a run folder, exported and pooled as it was trained."""
    base, texts = tiny(dtype=dtype, is_causal=True), ["birds fly south", "a stone"]
    before = {name: p.clone() for name, p in base.named_parameters()}
    model = go("simcse", tmp_path / "run", base, targets=["norm"], pooling="last", lr=0.1)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"decoder.norm.weight"}
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()
    again = tiny(adapters=tmp_path / "run", dtype=dtype)
    model.save(tmp_path / "encoder")
    exported = LLM2Vec.from_pretrained(tmp_path / "encoder", dtype=dtype)
    for other in (again, exported):
        assert (other.pooling, other.decoder.config.is_causal) == ("last", True)
        assert (other.encode(texts) == model.encode(texts)).all()


def test_the_adapter_of_an_unfinished_run_adds_what_it_added_there(tmp_path, capsys):
    """And a second one is not put over it."""
    trained, decoder = with_adapters(alpha=5, dropout=0.5), small_decoder().float()
    save_adapter(trained, tmp_path)
    (tmp_path / "log.jsonl").touch()
    load_adapter(decoder, tmp_path)
    assert "not finished" in capsys.readouterr().err
    frozen = [name for name, p in decoder.named_parameters() if not p.requires_grad]
    assert frozen == list(small_decoder().state_dict()), "all but the adapters"
    torch.testing.assert_close(decoder(IDS), trained(IDS), atol=1e-6, rtol=0)
    refused("already", load_adapter, decoder, tmp_path)
    torch.testing.assert_close(decoder(IDS), trained(IDS), atol=1e-6, rtol=0)


def test_an_adapter_that_names_no_dropout_has_none_as_in_peft(tmp_path):
    save_adapter(with_adapters(dropout=0.5), tmp_path)
    spoil(tmp_path / "adapter_config.json", lambda config: config.pop("lora_dropout"))
    load_adapter(decoder := small_decoder(), tmp_path)
    assert {module.dropout for module in adapted(decoder).values()} == {0}


def test_what_trains_has_one_name_in_a_decoder_and_in_its_encoder():
    """As the files of a run have it: `decoder.` stands before what is the decoder's."""
    encoder = torch.nn.Module()
    encoder.decoder, encoder.pooler = with_adapters(), torch.nn.Linear(2, 2, bias=False)
    inside = {f"decoder.{n}": p for n, p in encoder.decoder.named_parameters() if "lora_" in n}
    assert lora.trained(encoder.decoder) == inside
    assert lora.trained(encoder) == inside | {"pooler.weight": encoder.pooler.weight}


def test_what_was_trained_beside_adapters_comes_back_in_a_decoder_and_in_its_encoder(tmp_path):
    """And weights that are not those of a checkpoint are said to be of none."""
    made = with_adapters()
    made.norm.requires_grad_()
    torch.nn.init.normal_(made.norm.weight)
    save_adapter(made, tmp_path)
    encoder, alone = torch.nn.Module(), small_decoder().float()
    encoder.decoder, encoder.pooler = small_decoder().float(), torch.nn.Linear(2, 2, bias=False)
    for model, decoder in ((encoder, encoder.decoder), (alone, alone)):
        decoder.name_or_path = "base"
        load_adapter(model, tmp_path)
        assert torch.equal(decoder.norm.weight, made.norm.weight) and decoder.name_or_path is None
        remove_lora(model)
        decoder.name_or_path = "base"
    for more, name in (({}, "base"), ({"decoder.norm.weight": torch.ones(16)}, None)):
        save_file({"pooler.weight": torch.eye(2)} | more, tmp_path / "extra.safetensors")
        refused("pooler.weight has no place", load_adapter, alone, tmp_path)
        load_adapter(encoder, tmp_path)
        assert torch.equal(encoder.pooler.weight, torch.eye(2))
        assert encoder.decoder.name_or_path == name
        remove_lora(encoder)
