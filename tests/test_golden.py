"""The same numbers as transformers and PEFT, on checkpoints that they wrote.

tests/golden/make.py made the files, and says what each model is there for.
"""

import pytest
import torch
from helpers import GOLDEN
from safetensors.torch import load_file

from llm2vec import Decoder, mntp_loss
from lora import load_adapter, merge_lora

ADAPTED = sorted(f.name.removesuffix("-adapter") for f in GOLDEN.glob("*-adapter"))
MODELS = sorted(file.parent.name for file in GOLDEN.glob("*/config.json"))


def read(name: str, is_causal: bool = False) -> tuple[Decoder, dict[str, torch.Tensor]]:
    """A golden model facing one way, and what the reference computed of it."""
    decoder = Decoder.from_pretrained(GOLDEN / name)
    decoder.config.is_causal = is_causal
    return decoder, load_file(GOLDEN / name / "expected.safetensors")


def read_adapted(name: str) -> tuple[Decoder, dict, dict]:
    """The same with an adapter of PEFT, and what PEFT computed of it."""
    decoder, given = read(name)
    load_adapter(decoder, GOLDEN / f"{name}-adapter")
    return decoder, given, load_file(GOLDEN / f"{name}-adapter" / "expected.safetensors")


def assert_close(ours: torch.Tensor, reference: torch.Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(ours, reference, atol=atol, rtol=0)


@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
@pytest.mark.parametrize("layout", ["unpadded", "right", "left", "packed"])
@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_are_those_of_transformers(name, layout, direction):
    """Padded at either side or packed with others, every token of a text has its own state."""
    decoder, expected = read(name, is_causal=direction == "causal")
    ids, segments = expected[f"{layout}.input_ids"], expected[f"{layout}.segments"]
    hidden = decoder(ids, None if layout == "unpadded" else segments)
    assert hidden.isfinite().all(), "padding too has finite states"
    assert_close(hidden[segments > 0], expected[f"{layout}.{direction}"][segments > 0])


@pytest.mark.parametrize("name", [name for name in MODELS if name != "mistral-inner"])
def test_mntp_reads_each_masked_token_off_the_state_before_it(name):
    decoder, expected = read(name)
    input_ids, segments = expected["right.input_ids"], expected["right.segments"]
    masked_ids, chosen = expected["mntp.masked_ids"], expected["mntp.chosen"]
    hidden = decoder(masked_ids, segments)
    assert_close(decoder.logits(hidden[:, :-1][chosen[:, 1:]]), expected["mntp.logits"])
    loss = mntp_loss(decoder, masked_ids, input_ids, chosen, segments)
    assert_close(loss, expected["mntp.loss"], atol=1e-5)


@pytest.mark.parametrize("name", ADAPTED)
def test_an_adapter_of_peft_does_the_same_here_adapted_and_merged(name):
    decoder, given, expected = read_adapted(name)
    ids, segments = given["right.input_ids"], given["right.segments"]
    adapted = decoder(ids, segments)
    assert_close(adapted[segments > 0], expected["adapted"][segments > 0])
    merge_lora(decoder)
    assert_close(decoder(ids, segments)[segments > 0], expected["merged"][segments > 0])


@pytest.mark.parametrize("name", ADAPTED)
def test_steps_of_adam_move_an_adapter_to_where_peft_moves_it(name):
    """The loss, its gradient's norm over all adapters, and the weights after three steps."""
    decoder, given, expected = read_adapted(name)
    batch = ("mntp.masked_ids", "right.input_ids", "mntp.chosen", "right.segments")
    trained = {key: p for key, p in decoder.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * 2 and all("lora_" in key for key in trained)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0)
    for loss_there, norm_there in zip(expected["losses"], expected["gradient_norms"], strict=True):
        loss = mntp_loss(decoder, *(given[key] for key in batch))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert_close(loss.detach(), loss_there, atol=1e-5)
        torch.testing.assert_close(norm, norm_there, atol=0, rtol=1e-4)
    after = {key[6:]: weight for key, weight in expected.items() if key.startswith("after.")}
    assert len(after) == 4
    for key, weight in after.items():
        assert_close(trained[key].detach(), weight, atol=1e-5)
