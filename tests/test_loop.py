"""What a run trains on, what it draws at each step, and what it does with a gradient."""

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from helpers import QUICK, TINY, log_of, refused, tiny
from safetensors.torch import load_file

import lora
import train
from llm2vec import LLM2Vec
from llm2vec_data import benchmarks
from llm2vec_data.corpus import split_documents
from llm2vec_data.runs import RunFolder
from train import STAGES, Settings

DOCUMENTS = [f"Document number {i} says that {i} is a number." for i in range(200)]


def fit(folder: Path, backward: Callable, model: LLM2Vec | None = None, **changes) -> LLM2Vec:
    """The loop, on the numbers from 0 to 7 and the gradients that `backward` leaves."""
    model, settings = model or tiny(1), Settings(**{"batch": 2, "steps": 4, "lr": 0.1} | changes)
    train.fit(model, [range(8)], lambda batch, step: (backward(model, step), 1), settings, folder)
    return model


# --- What is trained on ------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["mntp", "simcse", None])
def test_no_stage_reads_a_document_that_is_held_out(stage, monkeypatch, command):
    """Nor do all of them in order, which score what they have not read."""
    Path("corpus.txt").write_text("\n".join(DOCUMENTS))
    learn, held_out = split_documents(DOCUMENTS)
    read, scored = [], []

    def run(stage, model, documents, settings, folder):
        read.append(documents)
        folder.mkdir(parents=True)
        (folder / "log.jsonl").write_text('{"seconds": 0}\n')

    monkeypatch.setattr(train.Stage, "run", run)
    seen = lambda _, documents, *__: scored.append(documents) or {"STS": 0.5}  # noqa: E731
    monkeypatch.setattr(benchmarks, "evaluate", seen)
    flags = [stage, "--model", TINY] if stage else []
    assert command(*flags, "--corpus", "corpus.txt", "--output", "run")[0] == 0
    assert held_out and read == [learn] * (1 if stage else 2)
    assert scored == [] if stage else all(texts == held_out for texts in scored) and scored


def test_documents_are_cut_into_blocks_in_an_order_that_the_seed_draws():
    """All of them with --epochs, whatever --steps is; else as many as the steps read."""
    model, how = tiny(1), {"length": 8, "batch": 3, "steps": 2}
    n = sum(len(e.ids) for e in model.tokenizer.encode_batch(DOCUMENTS)) // 8
    orders = []
    for seed in (0, 0, 1):
        blocks = train.blocks_of(model, DOCUMENTS, Settings(**how, epochs=1, seed=seed))
        assert blocks.shape == (n, 8)
        text = model.tokenizer.decode(blocks.flatten().tolist())
        orders.append(sorted(filter(text.__contains__, DOCUMENTS), key=text.index))
        assert len(orders[-1]) >= 199, "the end of the last may be left over"
    assert orders[0] == orders[1] != orders[2], "as the seed says"
    assert DOCUMENTS[:199] not in [order[:199] for order in orders], "which is not the file's"
    assert torch.equal(train.blocks_of(model, DOCUMENTS, Settings(**how, seed=1)), blocks[:6])


def test_texts_of_exactly_the_length_are_not_cut(capsys):
    model = tiny(1)
    lengths = sorted(len(e.ids) for e in model.tokenizer.encode_batch(DOCUMENTS))
    for length in (lengths[-1], lengths[-1] - 1):
        train.simcse(model, DOCUMENTS, replace(QUICK["simcse"].for_model(model), length=length))
        cut = sum(n > length for n in lengths) / len(lengths)
        said = f"at most {lengths[-1]}; {cut:.1%} are cut at --length {length}"
        assert said in capsys.readouterr().out


# --- What is drawn -----------------------------------------------------------------------------


def test_the_numbers_of_a_step_follow_from_its_number_and_the_seed(tmp_path):
    drawn = []

    def backward(model: LLM2Vec, step: int) -> float:
        drawn.append(str(torch.rand(4)))
        return 0.0

    for i, seed in enumerate((0, 0, 1)):
        fit(tmp_path / str(i), backward, seed=seed)
    assert drawn[:4] == drawn[4:8] and len(set(drawn)) == 8


def test_masks_and_dropout_differ_by_step_and_processes_share_masks_alone(monkeypatch):
    """All rows are masked as by one process, and shared out."""
    settings = replace(QUICK["mntp"].for_model(tiny(1)), length=16)
    [data], backward = train.mntp(tiny(1), DOCUMENTS, settings)
    seen, loss = [], torch.zeros((), requires_grad=True)

    def record(_, masked, ids, chosen, total):
        seen.append((masked, torch.rand(4)))
        return loss * 1

    monkeypatch.setattr(train, "mntp_loss", record)
    for processes, rank, step in [(1, 0, 5), (1, 0, 6), (2, 0, 5), (2, 1, 5)]:
        monkeypatch.setattr(train, "WORLD_SIZE", processes)
        monkeypatch.setattr(train, "RANK", rank)
        backward(list(data[:8]), step)
    (alone, dropout), (other, later), (first, _), (second, elsewhere) = seen
    assert not torch.equal(alone, other), "each step has a mask of its own"
    assert torch.equal(torch.stack([first, second], dim=1).flatten(0, 1), alone)
    assert len({str(numbers) for numbers in (dropout, later, elsewhere)}) == 3


def test_parts_and_processes_have_dropout_of_their_own(monkeypatch):
    """Two views of a text differ, each a part by itself; and two processes add up to one."""
    model, seen = tiny(2).train(), []
    parameters = lora.add_lora(model.decoder, dropout=0.5)
    for p in parameters:
        torch.nn.init.normal_(p, std=0.2)
    rows = 2 * model.rows(["A man plays a guitar."])

    def loss_of(vectors: torch.Tensor) -> torch.Tensor:
        return torch.cosine_similarity(*vectors, dim=0)

    def view(part: int) -> torch.Tensor:
        torch.manual_seed(0)
        torch.manual_seed(int(torch.randint(2**62, ())) + part)
        return model.embed(rows[:1])

    def others(vectors: torch.Tensor) -> None:
        seen.append(vectors.clone())
        vectors.copy_(views.detach())  # the sum over both processes

    views = torch.cat([view(0), view(1)])
    loss = loss_of(views)
    expected = torch.autograd.grad(loss, parameters, retain_graph=True)
    assert loss < 0.99, "they differ"
    monkeypatch.setattr(torch.distributed, "all_reduce", others)
    for processes in ([[[0], [1]]], [[[0]], [[1]]]):
        monkeypatch.setattr(train, "WORLD_SIZE", len(processes))
        model.zero_grad()
        losses = []
        for parts in processes:
            torch.manual_seed(0)
            losses.append(train.gradcache(model, rows, loss_of, parts))
        assert sum(losses) == pytest.approx(loss.item())
        found = [p.grad for p in parameters]
        torch.testing.assert_close(found, list(expected), atol=1e-6, rtol=1e-4)
    assert torch.equal(sum(seen), views), "each gives its own, and zeros for the other's"


# --- What is done with a gradient --------------------------------------------------------------


def test_a_step_is_adams_on_gradients_cut_to_norm_1_and_nothing_decays(tmp_path):
    """In closed form: gradients of norm 50, then 0.5, and then none."""
    start, norms = {}, [50.0, 0.5, 0.0]

    def backward(model: LLM2Vec, step: int) -> float:
        trained = lora.trained(model)
        if step == 0:
            start.update({name: p.detach().clone() for name, p in trained.items()})
        n = sum(p.numel() for p in trained.values())
        for p in trained.values():
            assert p.grad is None or not p.grad.any(), "nothing is left of the step before"
            p.grad = torch.full_like(p, norms[step] / n**0.5)
        return 1.0

    fit(tmp_path, backward, steps=3)
    n, m, v, moved = sum(p.numel() for p in start.values()), 0.0, 0.0, 0.0
    for t, g in enumerate([1 / n**0.5, 0.5 / n**0.5, 0.0], start=1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        lr = 0.1 * (3 - (t - 1)) / 3
        moved += lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)) ** 0.5 + 1e-8)
    state = load_file(tmp_path / "adapter_model.safetensors")
    for name, weight in start.items():
        found = state[name.replace("decoder.", "base_model.model.")]
        torch.testing.assert_close(found, weight - moved, atol=1e-5, rtol=0)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_is_never_stepped_on(bad, tmp_path):
    """Though the loss is finite; what is saved is from before that step."""
    before = {}

    def backward(model: LLM2Vec, step: int) -> float:
        for name, p in lora.trained(model).items():
            before[name], p.grad = p.detach().clone(), torch.ones_like(p)
        p.grad.view(-1)[0] = bad if step == 2 else 1.0
        return 1.0

    refused("step 3: .* norm of the gradient", fit, tmp_path, backward)
    [file] = tmp_path.glob("state-*")
    state = load_file(file)
    assert all(torch.equal(state[name], p) for name, p in before.items())


def test_weights_in_bfloat16_are_not_trained_and_adapters_on_them_are(tmp_path):
    """And a model whose training is refused is as it was."""
    model = tiny(1)
    model.decoder.bfloat16()
    fit(tmp_path / "adapters", lambda *_: 0.0, model)
    lora.add_lora(model.decoder)
    model.decoder.norm.requires_grad_()
    refused("--dtype float32", fit, tmp_path / "norm", lambda *_: 0.0, model)
    assert not lora.adapted(model) and not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("was_training", [True, False])
def test_training_changes_what_it_is_told_to_and_puts_it_back(was_training, tmp_path, monkeypatch):
    """In every step, also after a score."""
    model, seen = tiny(1).train(was_training), []
    decoder, config = model.decoder, model.decoder.config
    config.attention_dropout = 0.1

    def backward(model: LLM2Vec, step: int) -> float:
        in_training = model.training and decoder.layers[0].mlp.up_proj.training
        seen.append((in_training, config.attention_dropout, decoder.recompute))
        return 0.0

    monkeypatch.setattr(train, "dev_score", lambda model, _: float(model.encode(["a"]).sum()))
    how = {"attention_dropout": 0.4, "recompute": 1, "dev": "scores.tsv", "save_every": 1}
    fit(tmp_path, backward, model, **how)
    assert seen == 4 * [(True, 0.4, 1)]
    after = model.training, config.attention_dropout, decoder.recompute
    assert after == (was_training, 0.1, 0)
    assert model.made_of[-1] == tmp_path, "a card names it"


@pytest.mark.parametrize("processes, expected", [(1, [0, 1]), (2, [0])])
def test_what_there_is_no_memory_for_is_an_error_at_once_where_others_would_wait(
    processes, expected, tmp_path, monkeypatch
):
    """A process alone first recomputes its layers, of which there is one here."""
    tried = []

    def backward(model: LLM2Vec, step: int) -> float:
        tried.append(model.decoder.recompute)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(train, "WORLD_SIZE", processes)
    refused("step 1: out of memory; lower --max-tokens", fit, tmp_path, backward)
    assert tried == expected


def test_a_batch_that_fits_is_encoded_once_and_a_larger_or_shared_one_in_parts(monkeypatch):
    model, encoded, shares = tiny(1), [], []
    rows, embed = model.rows(DOCUMENTS[:6], max_length=8), model.embed
    lora.add_lora(model.decoder)
    monkeypatch.setattr(model, "embed", lambda part: encoded.extend(part) or embed(part))
    for max_tokens, times in ((48, 1), (47, 2)):
        encoded.clear()
        train.backward_through_encoder(model, rows, torch.sum, max_tokens)
        assert len(encoded) == 6 * times
    monkeypatch.setattr(train, "WORLD_SIZE", 2)
    monkeypatch.setattr(train, "gradcache", lambda model, rows, loss_of, parts: parts)
    for rank, max_tokens, sizes in ((1, 16, [2, 1]), (0, 24, [3])):
        monkeypatch.setattr(train, "RANK", rank)
        parts, tokens = train.backward_through_encoder(model, rows, torch.sum, max_tokens)
        assert tokens == 48 and [len(part) for part in parts] == sizes
        shares += sum(parts, [])
    assert sorted(shares) == list(range(6)), "each row once"
    refused("nothing to train on", train.Batches, [[]], Settings())


# --- What is kept of a run ---------------------------------------------------------------------


def test_a_run_may_go_on_with_other_settings_where_they_change_no_result():
    """The data and what is in it count, and not its name."""
    kinds = {type(preset) for stage in STAGES.values() for preset in stage.presets.values()}
    free = {f.name for kind in kinds for f in fields(kind) if f.metadata["same_result"]}
    memory, data = {"max_tokens", "recompute"}, {"corpus", "errors", "pairs", "instructions"}
    assert free == memory | data | {"save_every"}


def test_a_line_of_the_log_has_the_mean_loss_since_the_line_before(tmp_path):
    run = RunFolder(tmp_path, Settings(steps=400), {}, lambda: 0.0)
    run.restore({}, torch.optim.SGD([torch.zeros(1)]))
    for step in range(1, 401):
        run.log(step, loss=step, lr=0.5, tokens=7)
    lines = [(line["step"], line["loss"]) for line in log_of(tmp_path)]
    assert lines == [(step, step - 1.5) for step in range(4, 401, 4)], "a hundred lines"


# --- What the paper says -----------------------------------------------------------------------

ADAPTERS = {"rank": 16, "alpha": None, "targets": [], "dropout": 0.05, "steps": 1000}
PAPER = {  # the tables of its appendix; 20 and 50 are those of the authors' code
    "mntp": {"length": 512, "batch": 32, "lr": 5e-5, "attention_dropout": 0.0, "warm_up": 0},
    "simcse": {"length": 128, "batch": 128, "lr": 3e-5, "attention_dropout": 0.3, "scale": 20.0},
    "supervised": {"length": 512, "batch": 512, "lr": 2e-4, "attention_dropout": 0.0, "scale": 50},
}


@pytest.mark.parametrize("stage", PAPER)
def test_a_stage_has_the_settings_of_the_paper_unless_another_preset_is_named(stage):
    args = train.parser().parse_args([stage, "--model", "m", "--output", "o"])
    settings = train.settings_of(stage, args)
    expected = ADAPTERS | PAPER[stage]
    assert {name: getattr(settings, name) for name in expected} == expected


def test_masking_is_that_of_the_paper_for_each_family_unless_a_rate_is_given():
    model, given = tiny(1), {"mask_rate": 0.4, "mask_share": 0.0}
    for family, rates in (("llama", (0.2, 0.8, 0.1)), ("mistral", (0.8, 1.0, 0.0))):
        model.decoder.config.model_type = family
        for changes, expected in (({}, rates), (given, (0.4, 0.0, rates[2]))):
            how = replace(STAGES["mntp"].presets["paper"], **changes).for_model(model)
            assert (how.mask_rate, how.mask_share, how.swap_share) == expected


def test_flags_are_written_out_and_what_a_stage_needs_is_required():
    parse = train.parser().parse_args
    alone, needed = parse([]), ["mntp", "--model", "m", "--output", "o"]
    assert (alone.seeds, alone.stages, alone.preset) == ([0], ["mntp", "simcse"], "tiny")
    for args in ([*needed, "--step", "3"], needed[:3], [needed[0], *needed[3:]]):
        with pytest.raises(SystemExit):
            parse(args)
