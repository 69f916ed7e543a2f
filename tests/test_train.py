"""The stages, from the gradients of one batch to whole commands."""

import gc
import json
import math
import re
import shlex
import weakref
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import DOCUMENTS, QUICK, TINY, adapter_bytes, go, log_of, refused, tiny
from safetensors.torch import load_file
from torch._dynamo.utils import counters

import llm2vec
import lora
import train
from llm2vec import LLM2Vec
from llm2vec_data import benchmarks, compare, figures
from llm2vec_data.commands import kind_of
from train import STAGES, Batches, Settings, Stage


def weights(model: LLM2Vec) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.decoder.state_dict().items()}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(a, b, atol=0, rtol=0)


@pytest.mark.parametrize("stage", QUICK)
def test_a_stage_is_an_adapter_and_nothing_else(stage, tmp_path):
    """The trained model is the base, of which no weight moved, plus the written adapter."""
    base, before = tiny(), weights(tiny())
    after = weights(go(stage, tmp_path))
    assert_equal(after, weights(tiny(adapters=(tmp_path,))))
    lora.load_adapter(base.decoder, tmp_path)
    frozen = weights(base)
    for name, weight in before.items():
        assert torch.equal(frozen[name], weight)
        assert torch.equal(after[name], weight) is not name.endswith("_proj.weight")


# --- Steps -----------------------------------------------------------------------------------


def test_a_step_that_runs_out_of_memory_recomputes_more_layers(tmp_path):
    """A GPU's error in a later part of a step leads to the bits of a run without it."""
    layers = []
    for failures in (0, 2):
        model, calls = tiny(6), iter([False] * 5 + [True] * failures)

        def short_of_memory(*_, decoder=model.decoder, calls=calls):
            if torch.is_grad_enabled():
                if next(calls, False):
                    raise torch.OutOfMemoryError("CUDA out of memory.")
                layers.append(decoder.recompute)

        model.decoder.layers[3].register_forward_pre_hook(short_of_memory)
        go("mntp", tmp_path / str(failures), model, max_tokens=64)
    assert adapter_bytes(tmp_path / "0") == adapter_bytes(tmp_path / "2")
    assert set(layers) == {0, 2}, "an eighth of the layers, rounded up, for each time"


def test_mntp_masks_no_special_token_and_divides_by_the_masked_tokens_of_all_parts(monkeypatch):
    model, parts, loss = tiny(layers=1), [], torch.zeros((), requires_grad=True)
    model.tokenizer.add_special_tokens(["s"])
    special, mask_id = map(model.tokenizer.token_to_id, ("s", "_"))
    seen = lambda _, *part, total: parts.append((*part, total)) or loss * 1  # noqa: E731
    monkeypatch.setattr(train, "mntp_loss", seen)
    settings = replace(QUICK["mntp"], batch=100, max_tokens=640, mask_rate=0.5)
    [blocks], backward = train.mntp(model, DOCUMENTS, settings.for_model(model))
    backward(list(blocks), 0)
    *batch, totals = zip(*parts, strict=True)
    masked, ids, chosen = map(torch.cat, batch)
    assert torch.equal(ids, blocks) and len(parts) > 1 and set(totals) == {int(chosen.sum())}
    assert chosen[:, 1:].float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert (ids == special).any() and not (ids[chosen] == special).any()
    assert (masked[chosen] == mask_id).float().mean().item() == pytest.approx(0.8, abs=0.05)


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
    settings, slots = Settings(batch=4, epochs=2, seed=1), 5 + 2 + 1  # of 4, and all of c
    batches = Batches(datasets, settings)
    assert settings.steps == 2 * slots
    epochs = [[batches[epoch * slots + i] for i in range(slots)] for epoch in range(2)]
    for epoch in epochs:
        assert all(len({item[0] for item in batch}) == 1 for batch in epoch)
        seen = [item for batch in epoch for item in batch]
        assert len(seen) == len(set(seen)) == 20 + 8 + 3
        kinds = [batch[0][0] for batch in epoch]
        assert kinds != sorted(kinds), "datasets take turns"
    assert epochs[0] != epochs[1] and batches[0] == epochs[0][0]


@pytest.mark.parametrize(
    "warm_up, decay_epochs, end",
    [(10, None, 40), (0.25, None, 40), (10, 3, 60), (10, 1, 40)],
    ids=["steps", "share of the run", "longer than the run", "never before its end"],
)
def test_the_rate_rises_in_warm_up_and_then_falls_to_zero(warm_up, decay_epochs, end):
    settings = Settings(steps=40, lr=0.1, warm_up=warm_up, decay_epochs=decay_epochs)
    rates = [train.learning_rate(step, settings, epoch=20) for step in range(40)]
    expected = [0.1 * min((i + 1) / 10, (end - i) / (end - 10)) for i in range(40)]
    assert rates == pytest.approx(expected)


def test_the_loss_falls_and_is_logged_with_its_rate(tmp_path):
    texts, how = [f"Text number {i}." for i in range(16)], {"steps": 25, "decay_epochs": 40.0}
    go("simcse", tmp_path, data=texts, **how)
    log, settings = log_of(tmp_path), replace(QUICK["simcse"], **how)
    assert [line["step"] for line in log] == list(range(1, 26))
    assert sum(x["loss"] for x in log[-5:]) < sum(x["loss"] for x in log[:5])
    rates = [train.learning_rate(step, settings, epoch=2) for step in range(25)]
    assert [line["lr"] for line in log] == pytest.approx(rates) and rates[-1] > settings.lr / 2


@pytest.mark.parametrize("patience, best, last", [(None, 10, 11), (2, 4, 8)])
def test_the_best_step_is_kept_and_patience_ends_a_run(patience, best, last, tmp_path, monkeypatch):
    """At every save and at the end; a run that is stopped before a score goes on counting."""
    scores = {2: 0.3, 4: 0.5, 6: 0.4, 8: 0.45, 10: 0.9, 11: 0.1}
    run, dev, seen = tmp_path / "run", tmp_path / "dev.tsv", {}
    dev.write_text("5\ta\tb\n1\tc\td\n")

    def sts(model, _):
        step = len(log_of(run)) + 1
        again, seen[step] = step in seen, weights(model)
        if step == 8 and not again:
            raise KeyboardInterrupt
        return {"dev": scores[step]}

    monkeypatch.setattr(benchmarks, "sts", sts)
    how = {"steps": 11, "save_every": 2, "patience": patience, "dev": str(dev), "batch": 4}
    with pytest.raises(KeyboardInterrupt):
        go("simcse", run, tiny(1), **how)
    go("simcse", run, tiny(1), **how)
    found = {line["step"]: line["dev"] for line in log_of(run) if "dev" in line}
    assert found == {step: score for step, score in scores.items() if step <= last}
    adapter = load_file(run / "adapter_model.safetensors")
    assert adapter and not (run / "best.safetensors").exists()
    for name, weight in adapter.items():
        assert torch.equal(weight, seen[best][name.removeprefix("base_model.model.")])


def test_a_run_whose_scores_are_no_numbers_ends_as_others_do(tmp_path, monkeypatch):
    (tmp_path / "dev.tsv").write_text("3\ta\tb\n4\tc\td\n")
    monkeypatch.setattr(benchmarks, "sts", lambda *_: {"dev": math.nan})
    go("simcse", tmp_path / "run", tiny(1), dev=str(tmp_path / "dev.tsv"))
    assert (tmp_path / "run" / "finished").exists()


def test_an_interrupted_run_leaves_its_adapter_and_the_model_as_it_was(tmp_path, monkeypatch):
    """So it goes on in the next cell of a notebook, with the same object."""
    how = {"steps": 5, "save_every": 2}
    whole, model, seen = weights(go("mntp", tmp_path / "whole", **how)), tiny(), []

    def stop(step: int, *more, rate=train.learning_rate) -> float:
        seen.append(weights(model))
        return rate(step, *more) / (step != 3)

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(train, "learning_rate", stop)
        go("mntp", tmp_path / "run", model, **how)
    again = tiny()
    assert_equal(weights(model), weights(again))
    lora.load_adapter(again.decoder, tmp_path / "run")
    assert_equal(weights(again), seen[2])
    assert_equal(weights(go("mntp", tmp_path / "run", model, **how)), whole)


def test_simcse_learns_from_each_sentence_once_or_from_lines():
    documents = 2 * ["One sentence here. Two of them.\nA line."]
    texts = {"sentence": ["One sentence here.", "Two of them.", "A line."]}
    texts["line"] = ["One sentence here. Two of them.", "A line."]
    for split, expected in texts.items():
        settings = replace(QUICK["simcse"], split=split, pooling="mean")
        assert train.simcse(tiny(1), documents, settings)[0] == [expected]


class Pooled(LLM2Vec):
    """Each dimension of a vector has a weight that is learnt."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.query = torch.nn.Linear(self.width, 1, bias=False)
        torch.nn.init.zeros_(self.query.weight)

    def embed(self, rows: list) -> torch.Tensor:
        return super().embed(rows) * self.query.weight.exp()


@pytest.mark.parametrize("kind", ["pooler and norms", "all weights"])
def test_whatever_requires_a_gradient_is_trained_saved_and_resumed(kind, tmp_path, monkeypatch):
    all_weights, add_lora = kind == "all weights", lora.add_lora
    tiny().save(tmp_path / "base")

    def unfrozen(decoder, *args, **how):
        adapters = [] if all_weights else add_lora(decoder, *args, **how)
        trained = decoder if all_weights else decoder.norm
        return [*adapters, *trained.requires_grad_().parameters()]

    def load(name: str = "base", *adapters: Path) -> LLM2Vec:
        kind = LLM2Vec if all_weights else Pooled
        return kind.from_pretrained(tmp_path / name, adapters, dtype=torch.float32)

    def run(name: str, stop: int | None = None) -> LLM2Vec:
        model = load()
        with monkeypatch.context() as patch:
            patch.setattr(lora, "add_lora", unfrozen)
            patch.setattr(train, "learning_rate", lambda step, *_: 1e-4 / (step != stop))
            go("simcse", tmp_path / name, model, save_every=1)
        assert not any(p.requires_grad for p in model.decoder.parameters())
        return model

    whole = run("whole")
    with pytest.raises(ZeroDivisionError):
        run("stopped", stop=1)
    for again in (run("stopped"), run("stopped"), load("base", tmp_path / "whole")):
        assert_equal(again.state_dict(), whole.state_dict())
    for name, weight in load().state_dict().items():
        trained = all_weights or name.startswith(("query", "decoder.norm")) or "_proj" in name
        assert torch.equal(whole.state_dict()[name], weight) is not trained
    whole.save(tmp_path / "encoder")
    assert (load("encoder").encode(["a text"]) == whole.encode(["a text"])).all()
    if not all_weights:
        for folder, adapters in (("encoder", ()), ("base", (tmp_path / "whole",))):
            refused("query.weight", LLM2Vec.from_pretrained, tmp_path / folder, adapters)
        [module] = json.loads((tmp_path / "encoder" / "modules.json").read_text())
        assert "query" in module["type"], "sentence-transformers has no such module, and says so"


# --- The commands ------------------------------------------------------------------------------


STEPS = ("mntp", "simcse")
SMALL = ["--model", TINY, "--dtype", "float32", "--device", "cpu"]
SMALL += ["--preset", "tiny", "--steps", 2, "--batch", 4, "--length", 32]


def test_stages_build_on_each_other_and_are_trained_anew_only_if_asked(command):
    Path("corpus.txt").write_text("\n".join(DOCUMENTS))
    mntp, simcse = ([name, *SMALL, "--corpus", "corpus.txt", "--output", name] for name in STEPS)
    runs = [(mntp, True), (mntp, False), ([*mntp, "--overwrite"], True)]
    for args, trained in (*runs, ([*simcse, "--adapters", "mntp"], True)):
        status, out, errors = command(*args)
        assert status == 0, errors
        assert ("step" in out) is trained and ("--overwrite" in out) is not trained
    Path("texts.txt").write_text("One.\nTwo.\n")
    lines = [line.split("llm2vec.py")[1] for line in out.splitlines() if "llm2vec.py" in line]
    for line in lines:  # what it prints is what works
        assert command(*shlex.split(line), main=llm2vec.main)[0] == 0
    assert len(lines) == 2 and Path("vectors.npy").exists()
    exported = LLM2Vec.from_pretrained("simcse/encoder", dtype=torch.float32)
    assert_equal(weights(exported), weights(tiny(6, ("mntp", "simcse"))))


def test_controls_and_seeds_are_trained_as_they_are_called(monkeypatch, command):
    """Each with its own attention, pooling and seed, in its own folder, with no other in memory."""
    load, alive, trained = LLM2Vec.from_pretrained, [], {}

    def load_alone(*args, **how):
        gc.collect()
        assert not any(decoder() for decoder in alive)
        model = load(*args, **how)
        alive.append(weakref.ref(model.decoder))
        return model

    def seen(model, datasets, backward, settings, folder):
        folder.mkdir(parents=True)
        (folder / "log.jsonl").write_text(json.dumps({"seconds": settings.seed}) + "\n")
        pooling = getattr(settings, "pooling", "mean")
        trained[str(folder)] = model.decoder.config.is_causal, pooling, settings.seed

    monkeypatch.setattr(LLM2Vec, "from_pretrained", load_alone)
    for name in STEPS:
        monkeypatch.setitem(STAGES, name, STAGES[name]._replace(task=lambda *_: ([], None)))
    monkeypatch.setattr(train, "fit", seen)
    monkeypatch.setattr(benchmarks, "evaluate", lambda *_: {"STS": 0.5})
    status, out, errors = command(*SMALL[:6], "--compare", "--seeds", 5, 8, "--output", "run")
    assert status == 0, errors
    for seed, folder in ((5, "run"), (8, "run/seed-8")):
        for name in (*STEPS, "simcse-without-mntp"):
            assert trained.pop(f"{folder}/{name}") == (False, "mean", seed)
        control = f"{folder}/simcse-on-the-causal-model"
        assert trained.pop(control) == (True, "mean", seed)
        assert trained.pop(f"{control}-weighted-mean") == (True, "weighted_mean", seed)
    assert not trained
    assert Path("run/encoder").exists() and not Path("run/seed-8/encoder").exists()
    rows = compare.read_results("run/results.json")
    assert [len(seeds) for seeds in rows.values()] == 8 * [1] + 5 * [2]
    assert [row["seconds"] for row in rows["+ simcse"]] == pytest.approx([5, 8], abs=1)
    assert "| + simcse, lowest" in out and "| + simcse, highest" in out


def test_a_new_entry_among_the_stages_is_a_command(monkeypatch, command):
    """One function and one entry: flags, help, a run folder and an encoder come with it."""

    @dataclass
    class Mine(Settings):
        texts: list[str] = train.setting("what to learn from", ["e f", "g h"])
        twice: bool = train.setting("whether texts are said twice", False)
        dims: list[int] = train.setting("numbers", [8, 4])

    def texts_in_turns(model, texts, settings):
        def backward(batch, step):
            seen.append((sorted(batch), settings.dims))
            loss = model.embed(model.rows(batch)).square().sum()
            loss.backward()
            return loss.item(), 1

        return [texts], backward

    presets, seen = {"tiny": Mine(batch=4, length=16)}, []
    mine = Stage(texts_in_turns, "A stage of mine.", lambda s: s.texts * (1 + s.twice), presets)
    monkeypatch.setitem(STAGES, "mine", mine)
    monkeypatch.setattr(benchmarks, "evaluate", lambda *_, **__: {"STS": 0.5})
    assert "A stage of mine." in command("--help")[1]
    flags = ["--texts", "a b", "c d", "--twice", "--dims", 2, 1, "--output", "run"]
    status, _, errors = command("mine", *SMALL, *flags)
    assert status == 0, errors
    assert seen == 2 * [(["a b", "a b", "c d", "c d"], [2, 1])]
    assert Path("run/encoder/config.json").exists()
    status, out, errors = command(*SMALL[:-4], "--stages", "mine", "mntp", "--output", "all")
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
    args.epochs, values["epochs"] = None, None  # which is instead of --steps
    assert train.settings_of(stage, args) == replace(first, **values)
    help = " ".join(command(stage, "--help")[1].split())
    assert all(re.search(f" {flag}[ ,]", help) for flag in flags if flag.startswith("--"))
    for preset, settings in presets.items():
        args = train.parser().parse_args([*start, "--preset", preset])
        assert train.settings_of(stage, args) == settings
        assert f"{preset}: {settings.lr}" in help


RUN = ["--model", TINY, "--output", "x"]
SCORE = ["--model", TINY, "--benchmarks", "sts"]
FILES = {"one.txt": "One document.\n", "equal.tsv": "3\ta\tb\n3\tc\td\n"}
FILES["pairs.jsonl"] = 2 * '{"query": "a", "positive": "b"}\n'
NUMBERS = ["--steps 0", "--dropout 1", "--lr 0", "--lr nan", "--batch 1"]
NO_FILES = ["--corpus nowhere.txt", "--dev nowhere.tsv", "--dev equal.tsv"]


@pytest.mark.parametrize(
    "said, args",
    [
        ("nowhere", ["mntp", "--model", "nowhere", "--output", "x"]),
        ("--steps and --epochs", ["simcse", *RUN, "--steps", "1", "--epochs", "1"]),
        ("--mask-rate", ["mntp", *RUN, "--mask-rate", "1.5"]),
        ("'no such token'", ["mntp", *RUN, "--mask-token", "no such token"]),
        ("--scale", ["mntp", *RUN, "--scale", "1"]),
        ("--compile", ["simcse", *RUN, "--compile", "--quantize", "nf4"]),
        ("two different sentences", ["simcse", *RUN, "--corpus", "one.txt"]),
        *((x.split()[0], ["simcse", *RUN, *x.split()]) for x in NUMBERS),
        ("--batch 1", ["supervised", *RUN, "--batch", "1", "--pairs", "pairs.jsonl"]),
        ("nowhere", ["supervised", *RUN, "--pairs", "nowhere"]),
        ("2 instructions for 1", ["supervised", *RUN, "--instructions", "a", "b"]),
        *((x.split()[1], ["simcse", *RUN, *x.split()]) for x in NO_FILES),
        ("nowhere.tsv", [benchmarks.main, *SCORE, "--sts", "nowhere.tsv"]),
        ("one.txt: none", [benchmarks.main, *SCORE, "--corpus", "one.txt"]),
        ("one.txt: none", [figures.main, "layers", "--model", TINY, "--corpus", "one.txt"]),
        ("nowhere", [figures.main, "curves", "nowhere"]),
    ],
)
def test_an_error_names_what_is_wrong_and_leaves_nothing_behind(said, args, command):
    for name, text in FILES.items():
        Path(name).write_text(text)
    how = {"main": args[0]} if callable(args[0]) else {}
    status, _, errors = command(*args[len(how) :], **how)
    assert status == 2 and said in errors.splitlines()[-1]
    assert {file.name for file in Path().iterdir()} == set(FILES)


def test_what_ends_a_command_is_one_line_if_it_is_no_fault_of_ours(command):
    """No compiler, no memory, or Ctrl-C; other errors keep their traceback."""

    def no_compiler():
        raise torch._dynamo.exc.TorchDynamoException("backend raised:\nno compiler\n\nmore")

    def stopped():
        raise KeyboardInterrupt

    said = "error: --compile: backend raised: no compiler\n"
    assert command(main=no_compiler) == (2, "", said)
    assert command(main=stopped) == (130, "", "\ninterrupted\n")
    status, _, errors = command(main=lambda: torch.empty(2**50))
    assert status == 2 and errors.count("\n") == 1 and "--max-tokens" in errors
    with pytest.raises(RuntimeError):
        command(main=lambda: torch.ones(2) @ torch.ones(3))
