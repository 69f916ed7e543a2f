"""The stages, from the gradients of one batch to whole commands."""

import gc
import json
import re
import subprocess
import sys
import weakref
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters

import llm2vec
import lora
import train
from data import benchmarks, figures
from data.benchmarks import BASELINES, STS_FILES, STSB_TEST
from data.corpus import WIKIPEDIA, read_documents
from data.pairs import PAIRS, read_pairs
from llm2vec import LLM2Vec, compile_layers, contrastive_loss, tokenize
from lora import add_lora, load_adapter
from train import STAGES, Batches, Settings, Stage, Trained, contrast, fit, settings_of

ROOT = Path(__file__).parent.parent
TINY = ROOT / "data" / "tiny-llama"
QUICK = {n: replace(s.presets["tiny"], steps=3, batch=8, length=32) for n, s in STAGES.items()}


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return read_documents(WIKIPEDIA)[:200]


@pytest.fixture(scope="module")
def data(documents) -> dict[str, list]:
    return {"mntp": documents, "simcse": documents, "supervised": read_pairs([PAIRS])}


def tiny() -> LLM2Vec:
    return LLM2Vec.from_pretrained(TINY, dtype=torch.float32)


def weights(model: LLM2Vec) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.decoder.state_dict().items()}


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_an_adapter_and_nothing_else(stage, data, tmp_path):
    """The trained model is the base plus the written adapter: no base weight moved."""
    model = tiny()
    before = weights(model)
    STAGES[stage].run(model, data[stage], QUICK[stage], tmp_path)
    after = weights(model)
    base = tiny()
    load_adapter(base.decoder, tmp_path)
    frozen = weights(base)
    for name, weight in before.items():
        assert torch.equal(frozen[name], weight)
        assert torch.equal(after[name], weight) is not name.endswith("_proj.weight")
    again = LLM2Vec.from_pretrained(TINY, adapters=[tmp_path], dtype=torch.float32)
    assert all(torch.equal(v, after[k]) for k, v in weights(again).items())
    assert model.decoder.config.attention_dropout == 0 and not model.decoder.training


# --- Gradients ---------------------------------------------------------------------------------


def simcse_step(model: LLM2Vec, rows: list, max_tokens: int) -> float:
    return contrast(model, 2 * rows, lambda v: contrastive_loss(*v.chunk(2)), max_tokens)[0]


def adapted(dropout: float = 0.0, attention_dropout: float = 0.0) -> tuple[LLM2Vec, list]:
    """A model in training whose adapters, always the same, have learnt something."""
    model = tiny()
    model.decoder.config.attention_dropout = attention_dropout
    torch.manual_seed(0)
    parameters = add_lora(model.decoder.train(), dropout=dropout)
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.05)
    return model, parameters


def test_gradients_in_parts_equal_those_of_one_pass(documents):
    """GradCache: the same loss and gradients however few tokens fit; and for adapters alone."""
    rows = tokenize(tiny().tokenizer, documents[:9], 40)
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


def test_the_second_pass_in_parts_sees_the_same_dropout(documents):
    """Against finite differences: with other dropout the derivative along the gradient is off."""
    model, parameters = adapted(dropout=0.2, attention_dropout=0.3)
    rows = tokenize(model.tokenizer, documents[:6], 24)

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


def test_rows_of_like_length_share_a_pass_and_keep_their_places(monkeypatch):
    """Uneven rows, one graph: the loss sees every vector at its row, and little is padding."""
    model = tiny()
    lengths = [60, 5, 33, 8, 64, 6, 30, 31, 62, 7] * 8
    rows = [([10 + i, *range(11, 10 + n)], [True] * n) for i, n in enumerate(lengths)]
    with torch.no_grad():
        expected = torch.cat([model.embed([row]) for row in rows])
    parameters = add_lora(model.decoder.train(), dropout=0.0)
    passes, embed = [], model.embed

    def seen(part: list) -> torch.Tensor:
        passes.append([len(ids) for ids, _ in part])
        return embed(part)

    def loss_of(vectors: torch.Tensor) -> torch.Tensor:
        torch.testing.assert_close(vectors.detach(), expected, atol=1e-5, rtol=1e-5)
        return vectors.square().mean()

    monkeypatch.setattr(model, "embed", seen)
    _, tokens = contrast(model, rows, loss_of, 8192)
    assert tokens == sum(lengths) and len(passes) > 1
    assert sum(len(row) * max(row) for row in passes) < 1.1 * tokens
    assert all(parameter.grad is not None for parameter in parameters)


def test_mntp_in_parts_gives_the_same_adapter_as_in_one_pass(documents, tmp_path):
    made = []
    for max_tokens in (8192, 1):
        model = tiny()
        settings = replace(QUICK["mntp"], max_tokens=max_tokens, dropout=0.0)
        STAGES["mntp"].run(model, documents, settings, tmp_path / str(max_tokens))
        made.append(model.encode(documents[:5]))
    assert abs(made[0] - made[1]).max() < 1e-3


def test_dropout_makes_the_two_views_of_a_sentence_differ(documents):
    model = tiny()
    [row] = tokenize(model.tokenizer, documents[:1], 32)
    add_lora(model.decoder.train())  # fresh adapters add nothing, so this is attention dropout
    model.decoder.config.attention_dropout = 0.3
    first, second = model.embed([row, row])
    assert not torch.allclose(first, second, atol=0.1)
    model.decoder.config.attention_dropout = 0.0
    assert torch.equal(*model.embed([row, row]))


@pytest.mark.parametrize("stage", ["mntp", "simcse"])
def test_a_step_that_runs_out_of_memory_recomputes_more_layers(
    stage, documents, tmp_path, monkeypatch, capsys
):
    """A GPU's error in the middle of the second step leads to the adapter of a run without it."""
    made, layers = [], []
    for failures in (0, 2):
        model, calls = tiny(), iter([False, *[True] * failures])
        forward = model.decoder.layers[3].forward

        def short_of_memory(*args, forward=forward, decoder=model.decoder, calls=calls):
            if torch.is_grad_enabled() and next(calls, False):
                raise torch.OutOfMemoryError("CUDA out of memory.")
            layers.append(decoder.recompute)
            return forward(*args)

        monkeypatch.setattr(model.decoder.layers[3], "forward", short_of_memory)
        STAGES[stage].run(model, documents, QUICK[stage], tmp_path / str(failures))
        assert model.decoder.recompute == 0, "as it was"
        made.append((tmp_path / str(failures) / "adapter_model.safetensors").read_bytes())
    assert made[0] == made[1], "the same bits, dropout included"
    assert set(layers) == {0, 2}, "an eighth of the layers, rounded up, for each time"
    assert capsys.readouterr().out.count("2 of 6 layers are computed twice") == 1


@pytest.mark.slow
def test_compiled_layers_train_the_same_adapter(documents, tmp_path, monkeypatch):
    """With dropout and in parts; traced, but run operation by operation: no compiler is needed."""
    compile, shapes = torch.compile, set()

    def traced(function, dynamic, options):
        assert options == {"fallback_random": True}, "without it, two passes may drop differently"
        return compile(function, dynamic=dynamic, backend="eager")

    monkeypatch.setattr(torch, "compile", traced)
    # Uncompiled on a CPU, adapters have a dropout of their own: here torch's numbers for both.
    monkeypatch.setattr(lora, "kept", lambda x, p: F.dropout(torch.ones_like(x), p) > 0)
    counters.clear()
    made, settings = [], replace(QUICK["simcse"], batch=24, max_tokens=96)
    for compiled in (False, True):
        model = tiny()
        del model.decoder.layers[2:]
        model.decoder.norm.register_forward_hook(lambda _, x, y: shapes.add(y.shape))
        if compiled:
            compile_layers(model.decoder)
        STAGES["simcse"].run(model, documents, settings, tmp_path / str(compiled))
        made.append(load_file(tmp_path / str(compiled) / "adapter_model.safetensors"))
    for a, b in zip(*made, strict=True):
        torch.testing.assert_close(made[0][a], made[1][b], atol=1e-5, rtol=0)  # of Adam's 5e-3
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
    assert sorted(Batches([[1, 2]], Settings(batch=5))[0]) == [1, 2]


def test_epochs_count_the_steps_and_the_warm_up_keeps_its_share(data, tmp_path):
    for stage in ("mntp", "simcse"):
        few = data[stage][:4]
        settings = replace(QUICK[stage], steps=100, warm_up=50, epochs=3)
        STAGES[stage].run(tiny(), few, settings, tmp_path / stage)
        log = log_of(tmp_path / stage)
        if stage == "mntp":
            ids = sum(len(e.ids) for e in tiny().tokenizer.encode_batch(few))
            items = ids // settings.length
        else:
            items = len({s for d in few for s in train.sentences(d)})
        assert len(log) == log[0]["steps"] == 3 * max(1, items // settings.batch)
        assert log[0]["lr"] == pytest.approx(settings.lr / max(1, len(log) // 2))
    settings = train.with_steps(STAGES["supervised"].presets["paper"], 100)
    rates = [train.learning_rate(step, settings) / settings.lr for step in range(100)]
    assert settings.warm_up == 30 and rates[29] == 1
    assert rates[0] == pytest.approx(1 / 30) and rates[99] == pytest.approx(1 / 70)


def test_the_loss_falls_and_is_logged_with_its_schedule(documents, tmp_path):
    settings = replace(QUICK["simcse"], steps=25, length=16)
    STAGES["simcse"].run(tiny(), documents, settings, tmp_path)
    log = log_of(tmp_path)
    assert [line["step"] for line in log] == list(range(1, 26))
    assert sum(x["loss"] for x in log[-5:]) < sum(x["loss"] for x in log[:5])
    assert {"step", "steps", "loss", "lr", "tokens_per_second", "seconds"} <= set(log[0])
    warm_up = settings.warm_up
    expected = [settings.lr * min((i + 1) / warm_up, (25 - i) / (25 - warm_up)) for i in range(25)]
    assert [line["lr"] for line in log] == pytest.approx(expected)


def test_a_batch_larger_than_the_corpus_is_the_corpus(tmp_path):
    """Equal sentences are one: else a batch would hold a sentence as its own negative."""
    same = ["One sentence here. And another one."] * 9
    STAGES["simcse"].run(tiny(), same, QUICK["simcse"], tmp_path / "run")
    assert len(log_of(tmp_path / "run")) == 3
    with pytest.raises(ValueError, match="fewer than two different sentences"):
        STAGES["simcse"].run(tiny(), ["One sentence here."] * 9, QUICK["simcse"], tmp_path / "no")


def test_a_mask_token_that_the_vocabulary_lacks_is_named(documents, tmp_path):
    settings = replace(QUICK["mntp"], mask_token="no such token")
    with pytest.raises(ValueError, match="'no such token' is not in the vocabulary"):
        STAGES["mntp"].run(tiny(), documents, settings, tmp_path)


def all_weights(decoder, _) -> list[torch.nn.Parameter]:
    decoder.requires_grad_(True)
    return list(decoder.parameters())


WHOLE = Trained(
    all_weights,
    lambda decoder, folder: save_file(decoder.state_dict(), folder / "all.safetensors"),
    lambda decoder, folder: decoder.load_state_dict(load_file(folder / "all.safetensors")),
    lambda decoder: decoder.requires_grad_(False),
)


def test_the_loop_trains_whatever_it_is_told_to(documents, tmp_path, capsys):
    """All weights instead of adapters: stopped, resumed, finished, and read back."""
    made, settings = [], replace(QUICK["simcse"], lr=1e-4, save_every=1)

    def shallow() -> LLM2Vec:
        model = tiny()
        del model.decoder.layers[1:]
        return model

    def go(folder: Path, steps: int = 9) -> None:
        model, calls = shallow(), iter(range(steps))

        def backward(batch):
            next(calls)
            return simcse_step(model, tokenize(model.tokenizer, batch, 16), 8192), 1

        fit(model, [documents], backward, settings, folder, trained=WHOLE)
        assert not any(p.requires_grad for p in model.decoder.parameters())
        made.append(weights(model))

    go(tmp_path / "whole")
    with pytest.raises(StopIteration):
        go(tmp_path / "stopped", steps=2)
    go(tmp_path / "stopped", steps=1)
    go(tmp_path / "stopped", steps=0)
    assert "stopped: finished before" in capsys.readouterr().out
    base = weights(shallow())
    for name, weight in made[0].items():
        assert all(torch.equal(other[name], weight) for other in made)
        assert not torch.equal(base[name], weight)


# --- The commands ------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Run a command in this process, in an empty folder: its exit status, output and errors."""
    monkeypatch.chdir(tmp_path)

    def run(main, *args) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["program", *map(str, args)])
        status = 0
        try:
            llm2vec.run(main)
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


def small(model: Path | str = TINY) -> list:
    quick = ["--preset", "tiny", "--steps", 2, "--batch", 4, "--length", 32]
    return ["--model", model, "--dtype", "float32", "--device", "cpu", *quick]


@pytest.mark.slow
def test_everything_runs_and_ends_with_the_table(tmp_path):
    args = ["--steps", "2", "--output", "run"]
    command = [sys.executable, ROOT / "train.py", *args]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert list(results) == ["causal", "bidirectional, untrained", "+ mntp", "+ simcse"]
    for name, scores in results.items():
        assert f"| {name}" in done.stdout
        assert set(scores) == {"stsb-test", "masked tokens", "alignment", "uniformity", "seconds"}
        assert 0 < scores["stsb-test"] < 1 and 0 < scores["masked tokens"] < 1
        assert scores["uniformity"] < 0 < scores["alignment"]
    commands = [line.strip() for line in done.stdout.splitlines() if line.startswith("  python ")]
    assert len(commands) == 2
    (tmp_path / "texts.txt").write_text("One.\nTwo.\n")
    for command in commands:  # what it prints is what works, from where it was run
        script, rest = command.removeprefix("python ").split(" ", 1)
        shell = f"{sys.executable} {ROOT / script} {rest}"
        out = subprocess.run(shell, shell=True, cwd=tmp_path, capture_output=True, text=True)
        assert out.returncode == 0, out.stderr
    assert (tmp_path / "vectors.npy").exists()
    assert re.search("step +2 of 2", done.stdout) and "\r" not in done.stdout


def test_stages_one_by_one_are_scored_and_drawn(command, tmp_path):
    Path("corpus.txt").write_text("\n".join(read_documents(WIKIPEDIA)[:300]))
    for file in (STS_FILES[0], STSB_TEST):
        Path(file.name).write_text("\n".join(file.read_text().splitlines()[:20]))
    for stage, before in (("mntp", []), ("simcse", ["--adapters", "mntp"])):
        args = [stage, *small(), "--corpus", "corpus.txt", *before, "--output", stage]
        status, _, errors = command(train.main, *args)
        assert status == 0, errors
    model, adapters = ["--model", TINY], ["--adapters", "mntp", "simcse"]
    few = ["--corpus", "corpus.txt"]
    scored = ["--benchmarks", "sts", "--sts", STS_FILES[0].name, STSB_TEST.name]
    scored += ["--dtype", "float32"]
    _, out, _ = command(benchmarks.main, "--model", "simcse/encoder", *scored)
    merged = json.loads(out.splitlines()[-1])
    assert set(merged) == {"STS", "STS12", "stsb-test", "alignment", "uniformity", "seconds"}
    _, out, _ = command(benchmarks.main, *model, *adapters, *scored, "--baselines")
    rows = json.loads(out.splitlines()[-1])
    assert list(rows) == [*BASELINES, "tiny-llama"] and all(f"| {name}" in out for name in rows)
    assert len({scores["STS"] for scores in rows.values()}) == len(rows)
    assert rows["tiny-llama"]["STS"] == pytest.approx(merged["STS"], abs=1e-6)
    _, out, _ = command(figures.main, "layers", *model, *adapters, *few, "--output", "seen.svg")
    assert all(title in out for title in ("tiny-llama", "+ mntp", "+ simcse"))
    assert "+ simcse" in Path("seen.svg").read_text()
    status, out, _ = command(figures.main, "curves", tmp_path)
    assert status == 0 and out.strip() == str(tmp_path / "curves.svg")
    assert "mntp" in Path("curves.svg").read_text()


def test_words_of_a_file_of_ones_own(command):
    for side in ("train", "test"):
        Path(f"{side}.txt").write_text("a DET\ndog NOUN\n\nthe DET\ncat NOUN\n" * 20)
    own = ["--benchmarks", "words", "--words", "train.txt", "test.txt"]
    _, out, errors = command(benchmarks.main, "--model", TINY, *own)
    assert json.loads(out.splitlines()[-1])["test"] == 1, errors


def test_a_finished_stage_is_said_to_be_and_overwrite_trains_it_anew(command):
    for flags, trained in ([], True), ([], False), (["--overwrite"], True):
        status, out, errors = command(train.main, "supervised", *small(), "--output", "p", *flags)
        assert status == 0, errors
        assert ("step" in out) is trained
        assert ("p: finished before; --overwrite trains it anew" in out) is not trained
        assert Path("p/encoder/model.safetensors").exists()


def test_a_comparison_holds_one_model_at_a_time(monkeypatch, command):
    load, alive = LLM2Vec.from_pretrained, []

    def load_alone(*args, **kwargs):
        gc.collect()
        assert not any(decoder() for decoder in alive)
        model = load(*args, **kwargs)
        alive.append(weakref.ref(model.decoder))
        return model

    monkeypatch.setattr(LLM2Vec, "from_pretrained", load_alone)
    for module in (train, benchmarks):
        monkeypatch.setattr(module, "evaluate", lambda *_, **__: {"STS": 0.5})
    _, out, _ = command(train.main, "--compare", "--steps", 1, "--output", "run")
    rows = json.loads(Path("run/results.json").read_text())
    assert len(rows) == 9 and list(rows)[-1] == "simcse alone"
    assert all(f"| {name}" in out for name in rows)
    command(benchmarks.main, "--model", TINY, "--baselines")
    assert len(alive) == 4


def test_a_new_entry_among_the_stages_is_a_command(documents, monkeypatch, command):
    """One function and one entry: flags, help, a run folder and an encoder come with it."""

    def shuffled(model, documents, settings, folder):
        def backward(batch):
            rows = tokenize(model.tokenizer, batch, settings.length)
            return simcse_step(model, rows, settings.max_tokens), 1

        fit(model, [documents], backward, settings, folder)

    presets = {"tiny": Settings(steps=9, batch=4, length=16)}
    monkeypatch.setitem(STAGES, "mine", Stage(shuffled, "A stage of mine.", presets))
    assert "A stage of mine." in command(train.main, "--help")[1]
    status, _, errors = command(train.main, "mine", *small(), "--output", "run")
    assert status == 0, errors
    assert len(log_of(Path("run"))) == 2 and Path("run/encoder/config.json").exists()
    monkeypatch.setattr(train, "evaluate", lambda *_, **__: {"STS": 0.5})
    args = ["--stages", "mine", "mntp", "--steps", 1, "--dtype", "float32", "--output", "all"]
    status, out, errors = command(train.main, *args)
    assert status == 0, errors
    assert "| + mine" in out and Path("all/mntp/adapter_config.json").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_every_setting_of_a_stage_is_a_flag_with_the_presets_in_its_help(stage, command):
    given = {"pooling": "last", "mask_token": "x"}
    for f in fields(Settings):
        given.setdefault(f.name, 3 if f.type in (int, int | None) else 0.25)
    others = {"mntp": ("scale", "pooling")}.get(stage, ("mask_rate", "mask_token"))
    start, flags = [stage, "--model", "m", "--output", "o"], {}
    for name, value in given.items():
        flags[name] = ["--" + name.replace("_", "-"), str(value)]
    for name in others:
        assert command(train.main, *start, *flags.pop(name))[0] == 2
        del given[name]
    args = train.parser().parse_args([*start, *sum(flags.values(), [])])
    expected = replace(STAGES[stage].presets["paper"], **given)
    assert settings_of(stage, args) == expected
    status, out, _ = command(train.main, stage, "--help")
    said = " ".join(out.split())
    assert status == 0 and all(f" {flag} " in said for flag, _ in flags.values())
    for preset, settings in STAGES[stage].presets.items():
        args = train.parser().parse_args([*start, "--preset", preset])
        assert settings_of(stage, args) == settings
        for name in ("length", "batch", "steps", "lr", "warm_up"):
            assert f"{preset}: {getattr(settings, name)}" in said


def test_the_compile_flag_and_what_is_said_without_a_compiler(command, monkeypatch):
    compiled = []

    def fails(model, *_):
        assert compiled == [model.decoder]
        raise torch._dynamo.exc.TorchDynamoException("backend raised:\nno compiler\n\nmore")

    monkeypatch.setattr(llm2vec, "compile_layers", compiled.append)
    monkeypatch.setitem(STAGES, "simcse", STAGES["simcse"]._replace(run=fails))
    args = ["simcse", *small(), "--compile", "--output", "run"]
    said = "error: --compile: backend raised: no compiler\n"
    assert command(train.main, *args) == (2, "", said)
    said = command(train.main, *args, "--quantize", "nf4")
    assert said[0] == 2 and "--compile: not with --quantize nf4" in said[2]


def test_what_can_not_be_scored_is_said_before_anything_is(monkeypatch):
    monkeypatch.setattr(benchmarks, "sts", lambda *_: pytest.fail("scored"))
    with pytest.raises(ValueError, match="0 tokens, too few"):
        benchmarks.evaluate(tiny(), [])


OUTPUT = ["--model", TINY, "--output", "x"]
SCORE = ["--model", TINY]


@pytest.mark.parametrize(
    "main, args, said",
    [
        (train.main, ["mntp", "--model", "nowhere", "--output", "x"], "nowhere"),
        (train.main, ["mntp", *OUTPUT, "--corpus", "nowhere.txt"], "nowhere.txt"),
        (train.main, ["mntp", "--model", TINY], "--output"),
        (train.main, ["simcse", *OUTPUT, "--steps", "0"], "--steps"),
        (train.main, ["simcse", *OUTPUT, "--batch", "many"], "--batch"),
        (train.main, ["mntp", *OUTPUT, "--mask-rate", "1.5"], "--mask-rate"),
        (train.main, ["mntp", *OUTPUT, "--dropout", "1"], "--dropout"),
        (train.main, ["mntp", *OUTPUT, "--lr", "0"], "--lr"),
        (train.main, ["mntp", *OUTPUT, "--lr", "nan"], "--lr"),
        (train.main, ["simcse", *OUTPUT, "--pooling", "median"], "median"),
        (train.main, ["mntp", *OUTPUT, "--template", "alpaca"], "alpaca"),
        (train.main, ["supervised", *OUTPUT, "--pairs", "nowhere"], "nowhere"),
        (train.main, ["--stepps=3"], "--stepps"),
        (train.main, ["--stages", "mntp", "simsce"], "simsce"),
        (benchmarks.main, [*SCORE, "--sts", "nowhere.tsv"], "nowhere.tsv"),
        (benchmarks.main, [*SCORE, "--benchmarks", "mteb"], "mteb"),
        (benchmarks.main, [*SCORE, "--pooling", "median"], "median"),
        (benchmarks.main, [*SCORE, "--corpus", "small.txt"], "small.txt: none"),
        (benchmarks.main, [*SCORE, *["--words", "a", "b/c"] * 2], "test files of one name"),
        (figures.main, ["layers", "--model", "nowhere"], "nowhere"),
        (figures.main, ["layers", *SCORE, "--corpus", "small.txt"], "small.txt: none"),
        (figures.main, ["curves", "nowhere"], "nowhere"),
    ],
)
def test_an_error_names_what_is_wrong_and_leaves_nothing_behind(main, args, said, command):
    Path("small.txt").write_text("One document.\n")
    status, _, errors = command(main, *args)
    assert status == 2 and said in errors.splitlines()[-1]
    assert [file.name for file in Path().iterdir()] == ["small.txt"]


def test_ctrl_c_is_one_line_and_status_130(command):
    def stopped():
        raise KeyboardInterrupt

    assert command(stopped) == (130, "", "\ninterrupted\n")
