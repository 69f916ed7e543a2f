"""The stages, from the gradients of one batch to whole commands."""

import gc
import json
import re
import subprocess
import sys
import weakref
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import DATA, DOCUMENTS, QUICK, ROOT, TINY, go, log_of, tiny
from safetensors.torch import load_file
from torch._dynamo.utils import counters

import llm2vec
import lora
import train
from llm2vec import LLM2Vec, contrastive_loss, pad, pool, tokenize
from llm2vec_data import benchmarks, compare, figures
from llm2vec_data.commands import kind_of
from llm2vec_data.corpus import sentences
from train import STAGES, Batches, Settings, Stage, backward_through_encoder


def weights(model: LLM2Vec) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.decoder.state_dict().items()}


@pytest.mark.parametrize("stage", QUICK)
def test_a_stage_is_an_adapter_and_nothing_else(stage, tmp_path):
    """The trained model is the base plus the written adapter: no base weight moved."""
    model, base, seen = tiny(), tiny(), set()
    before, decoder = weights(model), model.decoder
    decoder.register_forward_hook(
        lambda *_: seen.add((decoder.training, decoder.config.attention_dropout))
    )
    after = weights(go(stage, tmp_path, model, attention_dropout=0.25))
    assert seen == {(True, 0.25)}
    lora.load_adapter(base.decoder, tmp_path)
    frozen = weights(base)
    again = weights(tiny(adapters=(tmp_path,)))
    for name, weight in before.items():
        assert torch.equal(frozen[name], weight)
        assert torch.equal(after[name], weight) is not name.endswith("_proj.weight")
        assert torch.equal(after[name], again[name])
    assert decoder.config.attention_dropout == 0 and not decoder.training, "as it was"


# --- Gradients ---------------------------------------------------------------------------------


def simcse_step(model: LLM2Vec, rows: list, max_tokens: int = 8192) -> float:
    loss_of = lambda v: contrastive_loss(*v.chunk(2))  # noqa: E731
    return backward_through_encoder(model, 2 * rows, loss_of, max_tokens)[0]


def adapted(dropout: float = 0.0, attention_dropout: float = 0.0) -> tuple[LLM2Vec, list]:
    """A model in training whose adapters, always the same, have learnt something."""
    model = tiny()
    model.decoder.config.attention_dropout = attention_dropout
    torch.manual_seed(0)
    parameters = lora.add_lora(model.decoder.train(), dropout=dropout)
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.05)
    return model, parameters


def test_gradients_in_parts_equal_those_of_one_pass():
    """GradCache: the same loss and gradients however few tokens fit; and for adapters alone."""
    rows = tokenize(tiny().tokenizer, DOCUMENTS[:9], 40)
    found = []
    for max_tokens in (8192, 160, 1):
        model, parameters = adapted()
        loss = simcse_step(model, rows, max_tokens)
        found.append((loss, torch.cat([p.grad.flatten() for p in parameters])))
        with_gradient = {id(p) for p in model.decoder.parameters() if p.grad is not None}
        assert with_gradient == {id(p) for p in parameters}
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], abs=1e-5)
        torch.testing.assert_close(gradient, found[0][1], atol=1e-5, rtol=1e-4)


def test_the_second_pass_in_parts_sees_the_same_dropout():
    """Against finite differences: with other dropout the derivative along the gradient is off."""
    model, parameters = adapted(dropout=0.2, attention_dropout=0.3)
    rows = tokenize(model.tokenizer, DOCUMENTS[:6], 24)
    a, b = model.embed(2 * rows[:1])
    assert not torch.allclose(a, b, atol=0.1), "two views of a sentence differ"

    @torch.no_grad()
    def move(by: float) -> None:
        for p, d in zip(parameters, direction, strict=True):
            p += by * d

    def loss() -> float:
        torch.manual_seed(7)
        model.decoder.zero_grad()
        return simcse_step(model, rows, max_tokens=100)

    loss()
    direction = [p.grad.clone() for p in parameters]
    norm = torch.cat([d.flatten() for d in direction]).norm().item()
    step = 1e-3 / norm
    move(step)
    up = loss()
    move(-2 * step)
    assert (up - loss()) / (2 * step) == pytest.approx(norm**2, rel=0.02)


def test_rows_of_like_length_share_a_pass():
    """Every row once, and little is padding."""
    lengths = [60, 5, 33, 8, 64, 6, 30, 31, 62, 7] * 8
    parts = list(llm2vec.batches_by_length(lengths, max_tokens=8192))
    assert sorted(i for part in parts for i in part) == list(range(80))
    padded = sum(len(part) * max(lengths[i] for i in part) for part in parts)
    assert len(parts) > 1 and padded < 1.1 * sum(lengths)


def test_a_step_that_runs_out_of_memory_recomputes_more_layers(tmp_path, monkeypatch, capsys):
    """A GPU's error in a later part of a step leads to the adapter of a run without it."""
    made, layers = [], []
    for failures in (0, 2):
        model, calls = tiny(6), iter([False] * 5 + [True] * failures)
        forward = model.decoder.layers[3].forward

        def short_of_memory(*args, forward=forward, decoder=model.decoder, calls=calls):
            if torch.is_grad_enabled():
                if next(calls, False):
                    raise torch.OutOfMemoryError("CUDA out of memory.")
                layers.append(decoder.recompute)
            return forward(*args)

        monkeypatch.setattr(model.decoder.layers[3], "forward", short_of_memory)
        go("mntp", tmp_path / str(failures), model, max_tokens=64)
        assert model.decoder.recompute == 0, "as it was"
        made.append((tmp_path / str(failures) / "adapter_model.safetensors").read_bytes())
    assert made[0] == made[1], "the same bits, dropout included"
    assert set(layers) == {0, 2}, "an eighth of the layers, rounded up, for each time"
    assert capsys.readouterr().out.count("from here on as with --recompute 2") == 1


@pytest.mark.parametrize(
    "family, mask_rate, rate, hidden",
    [("llama", None, 0.2, 0.8), ("mistral", None, 0.8, 1.0), ("llama", 0.5, 0.5, 0.8)],
)
def test_mntp_hides_tokens_as_the_paper_does(
    family, mask_rate, rate, hidden, tmp_path, monkeypatch
):
    """And asks for the tokens that were there, of the whole batch, in however many parts."""
    model, parts, loss = tiny(layers=1), [], train.mntp_loss
    model.decoder.config.model_type = family
    model.tokenizer.add_special_tokens(["s"])  # which is never hidden
    special, mask_id = map(model.tokenizer.token_to_id, ("s", "_"))

    def seen(decoder, *part, total, **how):
        parts.append((*part, total))
        return loss(decoder, *part, total=total, **how)

    monkeypatch.setattr(train, "mntp_loss", seen)
    how = {"batch": 100, "steps": 1, "max_tokens": 640, "mask_rate": mask_rate}
    go("mntp", tmp_path, model, **how)
    *batch, totals = zip(*parts, strict=True)
    masked, ids, chosen = map(torch.cat, batch)
    blocks = train.blocks_of(model, DOCUMENTS, replace(QUICK["mntp"], **how))
    assert sorted(ids.tolist()) == sorted(blocks.tolist()) and len(parts) == 5
    assert torch.equal(masked[~chosen], ids[~chosen]) and set(totals) == {int(chosen.sum())}
    assert chosen[:, 1:].float().mean().item() == pytest.approx(rate, abs=0.03)
    assert (ids == special).any() and not (ids[chosen] == special).any()
    share = (masked[chosen] == mask_id).float().mean().item()
    assert share == pytest.approx(hidden, abs=0.05)


@pytest.mark.slow
def test_compiled_layers_train_the_same_adapter(tmp_path, monkeypatch):
    """With dropout and in parts; traced, but run operation by operation: no compiler is needed."""
    compile, shapes, made = torch.compile, set(), []

    def traced(function, dynamic, options):
        assert options == {"fallback_random": True}, "without it, two passes may drop differently"
        return compile(function, dynamic=dynamic, backend="eager")

    monkeypatch.setattr(torch, "compile", traced)
    # Uncompiled on a CPU, adapters have a dropout of their own: here torch's numbers for both.
    monkeypatch.setattr(lora, "kept", lambda x, p: F.dropout(torch.ones_like(x), p) > 0)
    counters.clear()
    for compiled in (False, True):
        model = tiny(layers=2)
        model.decoder.norm.register_forward_hook(lambda _, x, y: shapes.add(y.shape))
        if compiled:
            llm2vec.compile_layers(model.decoder)
        go("simcse", tmp_path / str(compiled), model, batch=24, max_tokens=96, warm_up=10)
        made.append(load_file(tmp_path / str(compiled) / "adapter_model.safetensors"))
    torch.testing.assert_close(*made, atol=1e-5, rtol=0)  # of Adam's 5e-3
    assert 0 < counters["stats"]["unique_graphs"] < len(shapes), "not again for every length"
    assert not counters["graph_break"]


# --- The loop ----------------------------------------------------------------------------------


def test_a_batch_comes_from_one_dataset_and_an_epoch_from_all():
    datasets = [[f"{d}{i}" for i in range(n)] for d, n in (("a", 23), ("b", 9), ("c", 3))]
    batches = Batches(datasets, Settings(batch=4, seed=1))
    slots = 5 + 2 + 1  # of 4, and all of c
    epochs = [[batches[epoch * slots + i] for i in range(slots)] for epoch in range(2)]
    for epoch in epochs:
        assert all(len({item[0] for item in batch}) == 1 for batch in epoch)
        seen = [item for batch in epoch for item in batch]
        assert len(seen) == len(set(seen)) == 20 + 8 + 3
        kinds = [batch[0][0] for batch in epoch]
        assert kinds != sorted(kinds), "datasets take turns"
    assert epochs[0] != epochs[1] and batches[0] == epochs[0][0]


@pytest.mark.parametrize("stage", ["mntp", "simcse", "supervised"])
def test_epochs_count_the_steps(stage, tmp_path):
    """And a batch larger than the corpus is the corpus, of which equal sentences are one."""
    few, length = 2 * DOCUMENTS[:4], QUICK[stage].length
    blocks = sum(len(e.ids) for e in tiny().tokenizer.encode_batch(few)) // length
    items = {"mntp": blocks, "simcse": len({s for d in few for s in sentences(d)})}.get(stage, 40)
    for batch, steps in ((items // 2, 6), (items + 1, 3)):
        data = DATA[stage] if stage == "supervised" else few
        how = {"batch": batch, "epochs": 3, "steps": 100, "warm_up": 0.5}
        go(stage, tmp_path / str(batch), tiny(layers=1), data, **how)
        log = log_of(tmp_path / str(batch))
        assert len(log) == log[0]["steps"] == steps
        assert log[0]["lr"] == pytest.approx(QUICK[stage].lr / round(steps / 2)), "half is warm-up"
    with pytest.raises(ValueError, match="fewer than two different sentences"):
        go("simcse", tmp_path / "none", data=["One sentence here."] * 9)


def test_the_loss_falls_and_is_logged_with_its_schedule(tmp_path):
    settings = replace(QUICK["simcse"], steps=25)
    go("simcse", tmp_path, steps=25, length=16)
    log = log_of(tmp_path)
    assert set(log[0]) == {"step", "steps", "loss", "lr", "tokens_per_second", "seconds"}
    assert [line["step"] for line in log] == list(range(1, 26))
    assert sum(x["loss"] for x in log[-5:]) < sum(x["loss"] for x in log[:5])
    warm_up = round(settings.warm_up * 25)
    expected = [settings.lr * min((i + 1) / warm_up, (25 - i) / (25 - warm_up)) for i in range(25)]
    assert [line["lr"] for line in log] == pytest.approx(expected)


def test_the_best_step_on_a_development_file_is_kept(tmp_path, monkeypatch, capsys):
    """With the score in the log; a run that was stopped keeps the same."""
    scores = {2: 0.3, 4: 0.5, 6: 0.4, 7: 0.1}
    file = tmp_path / "dev.tsv"
    file.write_text("5\ta\tb\n1\tc\td\n")
    changes = {"steps": 7, "save_every": 2, "dev": str(file)}
    seen, stop = {}, []

    def sts(model, _):
        step = len(log_of(run)) + 1 if (run / "log.jsonl").exists() else 1
        seen[step] = weights(model)
        if step in stop:
            raise KeyboardInterrupt
        model.decoder.eval()
        return {"dev": scores[step]}

    monkeypatch.setattr(benchmarks, "sts", sts)
    made = []
    for name in ("whole", "stopped"):
        run = tmp_path / name
        if name == "stopped":
            stop.append(6)
            with pytest.raises(KeyboardInterrupt):
                go("simcse", run, tiny(2), **changes)
            stop.clear()
        go("simcse", run, tiny(2), **changes)
        assert {x["step"]: x["dev"] for x in log_of(run) if "dev" in x} == scores
        made.append(load_file(run / "adapter_model.safetensors"))
        assert not (run / "best.safetensors").exists()
    assert f"the best step is kept, which scored 0.5000 on {file}" in capsys.readouterr().out
    for name, weight in made[0].items():
        assert torch.equal(weight, made[1][name])
        assert torch.equal(weight, seen[4][name.removeprefix("base_model.model.")])
    with pytest.raises(FileNotFoundError, match="nowhere.tsv"):
        go("simcse", tmp_path / "none", tiny(1), dev="nowhere.tsv")


def test_the_adapter_of_a_run_that_is_not_finished_is_that_of_its_newest_state(
    tmp_path, monkeypatch, capsys
):
    model, again, seen = tiny(2), tiny(2), []

    def stop(step: int, *_) -> float:
        seen.append(weights(model))
        return 1 / 0 if step == 5 else 1e-3

    monkeypatch.setattr(train, "learning_rate", stop)
    with pytest.raises(ZeroDivisionError):
        go("mntp", tmp_path, model, steps=9, save_every=2)
    assert list(weights(model)) == list(weights(again)), "its adapters are off again"
    lora.load_adapter(again.decoder, tmp_path)
    assert f"{tmp_path}: a run that is not finished" in capsys.readouterr().err
    torch.testing.assert_close(weights(again), seen[4], atol=0, rtol=0)  # after four steps


def test_sentences_are_counted_and_lines_may_be_texts(tmp_path, capsys):
    documents = ["One sentence here. Two of them.\nA line. " + "And a very long one " * 20 + "."]
    go("simcse", tmp_path / "a", tiny(1), documents, steps=1)
    assert "4 texts, of " in (said := capsys.readouterr().out)
    assert "25.0% are cut at --length 32" in said
    go("simcse", tmp_path / "b", tiny(1), documents, steps=1, split="line")
    assert "2 texts, of " in capsys.readouterr().out


class Pooled(LLM2Vec):
    """The tokens weighed by a query that is learnt, beside norms that are."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.query = torch.nn.Linear(self.decoder.config.hidden_size, 1, bias=False)
        torch.nn.init.zeros_(self.query.weight)

    def embed(self, rows: list) -> torch.Tensor:
        ids, own = (pad(side, self.decoder.device) for side in zip(*rows, strict=True))
        hidden = self.decoder(ids, pad([[1] * len(ids) for ids, _ in rows], ids.device))
        return pool(hidden, self.query(hidden)[..., 0].exp() * own)


@pytest.mark.parametrize("kind", ["pooler and norms", "all weights"])
def test_whatever_requires_a_gradient_is_trained_saved_resumed_and_read_back(
    kind, tmp_path, monkeypatch, capsys
):
    add_lora, made = lora.add_lora, []

    def unfrozen(decoder, *args, **how):
        if kind == "all weights":
            return list(decoder.requires_grad_().parameters())
        parameters = add_lora(decoder, *args, **how)
        decoder.norm.requires_grad_()
        return parameters

    def load(folder: Path = TINY, adapters: tuple = ()) -> LLM2Vec:
        return (LLM2Vec if kind == "all weights" else Pooled).from_pretrained(
            folder, adapters, dtype=torch.float32
        )

    def run(folder: Path, steps: int = 9) -> LLM2Vec:
        calls, model = iter(range(steps)), load()
        with monkeypatch.context() as patch:
            patch.setattr(lora, "add_lora", unfrozen)
            patch.setattr(train, "learning_rate", lambda *_: next(calls) and 1e-4 or 1e-4)
            go("simcse", folder, model, save_every=1)
        assert not any(p.requires_grad for p in model.decoder.parameters())
        made.append(model.state_dict())
        return model

    whole = run(tmp_path / "whole")
    with pytest.raises(StopIteration):
        run(tmp_path / "stopped", steps=2)
    run(tmp_path / "stopped")
    run(tmp_path / "stopped", steps=0)
    assert "stopped: finished before" in capsys.readouterr().out
    made.append(load(adapters=(tmp_path / "whole",)).state_dict())
    for name, weight in load().state_dict().items():
        assert all(torch.equal(other[name], made[0][name]) for other in made), name
        changed = kind == "all weights" or "_proj" in name or name in ("query.weight",)
        assert torch.equal(made[0][name], weight) is not (changed or name == "decoder.norm.weight")
    adapter = (tmp_path / "whole" / "adapter_config.json").exists()
    assert adapter is (kind != "all weights")

    texts = ["A man plays a guitar.", "Someone makes music."]
    whole.save(tmp_path / "encoder")
    again = load(tmp_path / "encoder")
    assert (
        again.decoder.config.is_causal is False
        and (again.encode(texts) == whole.encode(texts)).all()
    )
    if kind == "pooler and norms":
        for folder, adapters in ((tmp_path / "encoder", ()), (TINY, (tmp_path / "whole",))):
            with pytest.raises(ValueError, match="query.weight has no place in this LLM2Vec"):
                LLM2Vec.from_pretrained(folder, adapters)
        [module] = json.loads((tmp_path / "encoder" / "modules.json").read_text())
        assert "query" in module["type"], "sentence-transformers has no such module, and says so"


# --- The commands ------------------------------------------------------------------------------


SMALL = ["--model", TINY, "--dtype", "float32", "--device", "cpu"]
SMALL += ["--preset", "tiny", "--steps", 2, "--batch", 4, "--length", 32]


@pytest.mark.slow
def test_everything_runs_and_ends_with_the_table(tmp_path):
    def shell(line: str) -> str:
        done = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    out = shell(f"{sys.executable} {ROOT / 'train.py'} --steps 2 --output run")
    results = compare.read_results(tmp_path / "run" / "results.json")
    assert list(results) == ["causal, mean", "both ways, untrained", "+ mntp", "+ simcse"]
    for name, [scores] in results.items():
        assert f"| {name}" in out
        measured = {"stsb-test", "masked tokens", "alignment", "uniformity", "seconds"}
        assert set(scores) == measured | ({"seed"} if "+" in name else set())
        assert 0 < scores["stsb-test"] < 1 and 0 < scores["masked tokens"] < 1
    commands = [line.strip() for line in out.splitlines() if line.startswith("  python ")]
    (tmp_path / "texts.txt").write_text("One.\nTwo.\n")
    for line in commands:  # what it prints is what works, from where it was run
        shell(line.replace("python ", f"{sys.executable} {ROOT}/"))
    assert len(commands) == 2 and (tmp_path / "vectors.npy").exists()


def test_stages_one_by_one_and_what_is_finished_is_said_to_be(command):
    Path("corpus.txt").write_text("\n".join(DOCUMENTS))
    for stage, *flags in (
        ["mntp", "--corpus", "corpus.txt"],
        ["simcse", "--corpus", "corpus.txt", "--adapters", "mntp"],
        ["supervised"],
    ):
        for again, trained in ([], True), (["--overwrite"], True), ([], False):
            args = [stage, *SMALL, *flags, "--output", stage, *again]
            status, out, errors = command(*args)
            assert status == 0, errors
            assert ("step" in out) is trained
            said = f"{stage}: finished before; --overwrite trains it anew"
            assert (said in out) is not trained
            assert Path(stage, "encoder").exists() is (stage != "mntp")
    exported = LLM2Vec.from_pretrained("simcse/encoder", dtype=torch.float32)
    expected = weights(tiny(6, ("mntp", "simcse")))
    torch.testing.assert_close(weights(exported), expected, atol=0, rtol=0)


def test_controls_and_seeds_are_trained_as_they_are_called(monkeypatch, command):
    """Each with its own attention, pooling and seed, in its own folder, with no other in memory."""
    load, alive, trained = LLM2Vec.from_pretrained, [], {}

    def load_alone(*args, **kwargs):
        gc.collect()
        assert not any(decoder() for decoder in alive)
        model = load(*args, **kwargs)
        alive.append(weakref.ref(model.decoder))
        return model

    def seen(model, datasets, backward, settings, folder):
        folder.mkdir(parents=True)
        (folder / "log.jsonl").write_text(json.dumps({"seconds": settings.seed}) + "\n")
        pooling = getattr(settings, "pooling", "mean")
        trained[str(folder)] = model.decoder.config.is_causal, pooling, settings.seed

    monkeypatch.setattr(LLM2Vec, "from_pretrained", load_alone)
    for name in ("mntp", "simcse"):
        task = lambda *_: ([], None)  # noqa: E731
        monkeypatch.setitem(STAGES, name, STAGES[name]._replace(task=task))
    monkeypatch.setattr(train, "fit", seen)
    monkeypatch.setattr(benchmarks, "evaluate", lambda *_: {"STS": 0.5})
    status, out, errors = command(*SMALL[:6], "--compare", "--seeds", 5, 8, "--output", "run")
    assert status == 0, errors
    for seed, folder in ((5, "run"), (8, "run/seed-8")):
        both_ways, causal = (False, "mean", seed), (True, "mean", seed)
        for name in ("mntp", "simcse", "simcse-without-mntp"):
            assert trained.pop(f"{folder}/{name}") == both_ways
        control = f"{folder}/simcse-on-the-causal-model"
        assert trained.pop(control) == causal
        assert trained.pop(f"{control}-weighted-mean") == (True, "weighted_mean", seed)
    assert not trained and len(alive) == 8
    assert Path("run/encoder").exists() and not Path("run/seed-8/encoder").exists()
    rows = compare.read_results("run/results.json")
    assert [len(seeds) for seeds in rows.values()] == 8 * [1] + 5 * [2]
    weighted = rows["simcse on the causal model, weighted mean"]
    assert [one["seconds"] for one in weighted] == pytest.approx([5, 8], abs=1)
    assert [one["seed"] for one in weighted] == [5, 8]
    for kind in ("", ", lowest", ", highest"):
        assert f"| simcse on the causal model, weighted mean{kind} " in out


def test_a_causal_run_is_not_taken_for_one_that_looks_both_ways(tmp_path):
    causal = tiny(layers=1)
    causal.decoder.config.is_causal = True
    go("simcse", tmp_path, causal)
    with pytest.raises(ValueError, match="a run with other settings, is_causal was"):
        go("simcse", tmp_path, tiny(layers=1))


def test_a_new_entry_among_the_stages_is_a_command(monkeypatch, command):
    """One function and one entry: flags, help, a run folder and an encoder come with it."""

    @dataclass
    class Mine(Settings):
        texts: list[str] = train.setting("what to learn from", [])
        twice: bool = train.setting("whether texts are said twice", False)
        dims: list[int] = train.setting("numbers", [8, 4])

    def texts_in_turns(model, texts, settings):
        def backward(batch, step):
            seen.append((step, batch, settings.dims))
            return simcse_step(model, tokenize(model.tokenizer, batch, settings.length)), 1

        return [texts], backward

    presets, seen = {"tiny": Mine(batch=4, length=16)}, []
    mine = Stage(texts_in_turns, "A stage of mine.", lambda s: s.texts * (1 + s.twice), presets)
    monkeypatch.setitem(STAGES, "mine", mine)
    assert "A stage of mine." in command("--help")[1]
    flags = ["--texts", "a b", "c d", "--twice", "--dims", 2, 1, "--output", "run"]
    status, _, errors = command("mine", *SMALL, *flags)
    assert status == 0, errors
    assert [(step, sorted(batch)) for step, batch, _ in seen] == [
        (step, ["a b", "a b", "c d", "c d"]) for step in (0, 1)
    ]
    assert seen[0][2] == [2, 1]
    assert len(log_of(Path("run"))) == 2 and Path("run/encoder/config.json").exists()
    monkeypatch.setitem(presets, "tiny", replace(presets["tiny"], texts=["e f", "g h"]))
    monkeypatch.setattr(benchmarks, "evaluate", lambda *_, **__: {"STS": 0.5})
    args = ["--stages", "mine", "mntp", "--steps", 1, "--dtype", "float32", "--output", "all"]
    status, out, errors = command(*args)
    assert status == 0, errors
    assert "| + mine" in out and Path("all/mntp/adapter_config.json").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_every_setting_of_a_stage_is_a_flag_with_the_presets_in_its_help(stage, command):
    presets = STAGES[stage].presets
    first = next(iter(presets.values()))
    start, values, flags = [stage, "--model", "m", "--output", "o"], {}, []
    for f in fields(first):
        value = {bool: True, int: 3, float: 0.25, str: "x"}[kind_of(f)]
        value = list(f.metadata["choices"])[-1] if f.metadata["choices"] else value
        flags += ["--" + f.name.replace("_", "-"), *([] if value is True else [str(value)])]
        values[f.name] = [value] if isinstance(getattr(first, f.name), list) else value
    args = train.parser().parse_args([*start, *flags])
    with pytest.raises(ValueError, match="--steps and --epochs: give one of them"):
        train.settings_of(stage, args)
    args.epochs, values["epochs"] = None, None
    assert train.settings_of(stage, args) == replace(first, **values)
    help = " ".join(command(stage, "--help")[1].split())
    assert all(re.search(f" {flag}[ ,]", help) for flag in flags if flag.startswith("--"))
    args.preset = "mine"
    with pytest.raises(ValueError, match=f"--preset mine: {stage} has {', '.join(presets)}"):
        train.settings_of(stage, args)
    for preset, settings in presets.items():
        args = train.parser().parse_args([*start, "--preset", preset])
        assert train.settings_of(stage, args) == settings
        for name in ("length", "batch", "steps", "lr", "warm_up"):
            assert f"{preset}: {getattr(settings, name)}" in help


def test_a_stage_has_no_flags_of_another_one(command):
    for stage, flag in (("mntp", "--scale"), ("simcse", "--mask-rate"), ("supervised", "--split")):
        assert command(stage, "--model", "m", "--output", "o", flag, "1")[0] == 2


def test_the_compile_flag_and_what_is_said_without_a_compiler(command, monkeypatch):
    compiled = []

    def fails(model, *_):
        assert compiled == [model.decoder]
        raise torch._dynamo.exc.TorchDynamoException("backend raised:\nno compiler\n\nmore")

    monkeypatch.setattr(llm2vec, "compile_layers", compiled.append)
    monkeypatch.setitem(STAGES, "simcse", STAGES["simcse"]._replace(task=fails))
    args = ["simcse", *SMALL, "--compile", "--output", "run"]
    assert command(*args) == (2, "", "error: --compile: backend raised: no compiler\n")
    said = command(*args, "--quantize", "nf4")
    assert said[0] == 2 and "--compile: not with --quantize nf4" in said[2]


RUN = ["--model", TINY, "--output", "x"]
SCORE = ["--model", TINY, "--benchmarks", "sts"]


@pytest.mark.parametrize(
    "said, args",
    [
        ("nowhere", ["mntp", "--model", "nowhere", "--output", "x"]),
        ("nowhere.txt", ["mntp", *RUN, "--corpus", "nowhere.txt"]),
        ("--steps", ["simcse", *RUN, "--steps", "0"]),
        ("--mask-rate", ["mntp", *RUN, "--mask-rate", "1.5"]),
        ("'no such token'", ["mntp", *RUN, "--mask-token", "no such token"]),
        ("--dropout", ["mntp", *RUN, "--dropout", "1"]),
        ("--lr", ["mntp", *RUN, "--lr", "0"]),
        ("--lr", ["mntp", *RUN, "--lr", "nan"]),
        ("median", ["simcse", *RUN, "--pooling", "median"]),
        ("nowhere", ["supervised", *RUN, "--pairs", "nowhere"]),
        ("2 instructions for 1", ["supervised", *RUN, "--instructions", "a", "b"]),
        ("simsce", ["--stages", "mntp", "simsce"]),
        ("nowhere.tsv", [benchmarks.main, *SCORE, "--sts", "nowhere.tsv"]),
        ("one.txt: none", [benchmarks.main, *SCORE, "--corpus", "one.txt"]),
        ("one.txt: none", [figures.main, "layers", "--model", TINY, "--corpus", "one.txt"]),
        ("nowhere", [figures.main, "curves", "nowhere"]),
    ],
)
def test_an_error_names_what_is_wrong_and_leaves_nothing_behind(said, args, command):
    Path("one.txt").write_text("One document.\n")
    how = {"main": args[0]} if callable(args[0]) else {}
    status, _, errors = command(*args[len(how) :], **how)
    assert status == 2 and said in errors.splitlines()[-1]
    assert [file.name for file in Path().iterdir()] == ["one.txt"]


def test_ctrl_c_is_one_line_and_status_130(command):
    def stopped():
        raise KeyboardInterrupt

    assert command(main=stopped) == (130, "", "\ninterrupted\n")
