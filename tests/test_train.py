"""The stages, from small steps to the whole command."""

import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch._dynamo.utils import counters

import llm2vec
import lora
import train as train_module
from data.benchmarks import BASELINES, STS_FILES, STSB_TEST
from data.corpus import WIKIPEDIA, read_documents
from data.pairs import PAIRS, read_pairs
from llm2vec import LLM2Vec, compile_layers, contrastive_loss, tokenize
from lora import add_lora, load_adapter
from train import COMMANDS, SETTINGS, STAGES, batch_at, contrast

ROOT = Path(__file__).parent.parent
TINY = ROOT / "data" / "tiny-llama"
QUICK = {
    "mntp": replace(SETTINGS["mntp"]["tiny"], steps=3, batch=4, length=32),
    "simcse": replace(SETTINGS["simcse"]["tiny"], steps=3, batch=8, length=32),
    "supervised": replace(SETTINGS["supervised"]["tiny"], steps=3, batch=8, length=32),
}


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return read_documents(WIKIPEDIA)[:200]


@pytest.fixture(scope="module")
def data(documents) -> dict[str, list]:
    return {"mntp": documents, "simcse": documents, "supervised": read_pairs([PAIRS])}


def simcse_step(model: LLM2Vec, rows: list, max_tokens: int) -> float:
    return contrast(model, 2 * rows, lambda v: contrastive_loss(*v.chunk(2)), max_tokens)[0]


def weights(model: LLM2Vec) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.decoder.state_dict().items()}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_an_adapter_and_nothing_else(stage, data, tmp_path):
    """The trained model is the base plus the written adapter: no base weight moved."""
    model = LLM2Vec.from_pretrained(TINY)
    before = weights(model)
    STAGES[stage](model, data[stage], QUICK[stage], tmp_path)
    after = weights(model)
    base = LLM2Vec.from_pretrained(TINY)
    load_adapter(base.decoder, tmp_path)
    frozen = weights(base)
    for name, weight in before.items():
        assert torch.equal(frozen[name], weight)
        adapted = name.endswith("_proj.weight")
        assert torch.equal(after[name], weight) is not adapted
    again = LLM2Vec.from_pretrained(TINY, adapters=[tmp_path])
    assert all(torch.equal(v, after[k]) for k, v in weights(again).items())
    assert model.decoder.config.attention_dropout == 0 and not model.decoder.training


@pytest.mark.parametrize("stage", STAGES)
def test_the_same_seed_gives_the_same_adapter(stage, data, tmp_path):
    made = []
    for run in ("a", "b"):
        model = LLM2Vec.from_pretrained(TINY)
        STAGES[stage](model, data[stage], QUICK[stage], tmp_path / run)
        made.append((tmp_path / run / "adapter_model.safetensors").read_bytes())
    assert made[0] == made[1]


def test_only_adapters_have_gradients(documents):
    model = LLM2Vec.from_pretrained(TINY)
    parameters = add_lora(model.decoder.train())
    simcse_step(model, tokenize(model.tokenizer, documents[:4], 32), 8192)
    with_gradient = {id(p) for p in model.decoder.parameters() if p.grad is not None}
    assert with_gradient == {id(p) for p in parameters}


def test_gradients_in_parts_equal_those_of_one_pass(documents):
    """GradCache: the same loss and gradients however few tokens fit into a forward pass."""
    rows = tokenize(LLM2Vec.from_pretrained(TINY).tokenizer, documents[:9], 40)
    found = []
    for max_tokens in (8192, 160, 1):
        model = LLM2Vec.from_pretrained(TINY)
        torch.manual_seed(0)
        parameters = add_lora(model.decoder.train(), dropout=0.0)
        for parameter in parameters:
            torch.nn.init.normal_(parameter, std=0.05)
        loss = simcse_step(model, rows, max_tokens)
        found.append((loss, torch.cat([p.grad.flatten() for p in parameters])))
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], abs=1e-5)
        torch.testing.assert_close(gradient, found[0][1], atol=1e-5, rtol=1e-4)


def test_the_second_pass_in_parts_sees_the_same_dropout(documents):
    """Against finite differences: with other dropout the derivative along the gradient is off."""
    model = LLM2Vec.from_pretrained(TINY)
    rows = tokenize(model.tokenizer, documents[:6], 24)
    model.decoder.config.attention_dropout = 0.3
    torch.manual_seed(0)
    parameters = add_lora(model.decoder.train(), dropout=0.2)
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.05)

    def loss() -> float:
        torch.manual_seed(7)
        for parameter in parameters:
            parameter.grad = None
        return simcse_step(model, rows, max_tokens=100)

    loss()
    direction = [p.grad.clone() for p in parameters]
    norm = torch.cat([d.flatten() for d in direction]).norm().item()
    step = 1e-3 / norm
    with torch.no_grad():
        for p, d in zip(parameters, direction, strict=True):
            p += step * d
    up = loss()
    with torch.no_grad():
        for p, d in zip(parameters, direction, strict=True):
            p -= 2 * step * d
    down = loss()
    assert (up - down) / (2 * step) == pytest.approx(norm**2, rel=0.02)


def test_rows_of_like_length_share_a_pass_and_keep_their_places(documents, monkeypatch):
    """Uneven rows, one graph: the loss sees every vector at its row, and little is padding."""
    model = LLM2Vec.from_pretrained(TINY)
    lengths = [60, 5, 33, 8, 64, 6, 30, 31, 62, 7] * 8
    rows = [(list(range(10, 10 + n)), [True] * n) for n in lengths]
    expected = model.encode_rows(rows, 8192)
    parameters = add_lora(model.decoder.train(), dropout=0.0)
    passes, embed = [], model.embed

    def seen(part: list) -> torch.Tensor:
        passes.append([len(ids) for ids, _ in part])
        return embed(part)

    def loss_of(vectors: torch.Tensor) -> torch.Tensor:
        torch.testing.assert_close(vectors.detach(), torch.tensor(expected), atol=1e-5, rtol=1e-5)
        return vectors.square().mean()

    monkeypatch.setattr(model, "embed", seen)
    _, tokens = train_module.contrast(model, rows, loss_of, 8192)
    assert tokens == sum(lengths) and len(passes) > 1
    assert sum(len(row) * max(row) for row in passes) < 1.1 * tokens
    assert all(parameter.grad is not None for parameter in parameters)


@pytest.mark.parametrize("stage", ["mntp", "simcse"])
def test_a_step_that_runs_out_of_memory_recomputes_more_layers(
    stage, documents, tmp_path, monkeypatch, capsys
):
    """A GPU's error in the middle of the second step leads to the adapter of a run without it."""
    made, layers = [], []
    for failures in (0, 2):
        model, calls = LLM2Vec.from_pretrained(TINY), iter([False, *[True] * failures])
        forward = model.decoder.layers[3].forward

        def short_of_memory(*args, forward=forward, decoder=model.decoder, calls=calls):
            if torch.is_grad_enabled() and next(calls, False):
                raise torch.OutOfMemoryError("CUDA out of memory.")
            layers.append(decoder.recompute)
            return forward(*args)

        monkeypatch.setattr(model.decoder.layers[3], "forward", short_of_memory)
        STAGES[stage](model, documents, QUICK[stage], tmp_path / str(failures))
        assert model.decoder.recompute == 0, "as it was"
        made.append((tmp_path / str(failures) / "adapter_model.safetensors").read_bytes())
    assert made[0] == made[1], "the same bits, dropout included"
    assert set(layers) == {0, 2}, "an eighth of the layers, rounded up, for each time"
    assert capsys.readouterr().out.count("2 of 6 layers are computed twice") == 1


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
        model = LLM2Vec.from_pretrained(TINY)
        del model.decoder.layers[2:]
        model.decoder.norm.register_forward_hook(lambda _, x, y: shapes.add(y.shape))
        if compiled:
            compile_layers(model.decoder)
        STAGES["simcse"](model, documents, settings, tmp_path / str(compiled))
        made.append(load_file(tmp_path / str(compiled) / "adapter_model.safetensors"))
    for a, b in zip(*made, strict=True):
        torch.testing.assert_close(made[0][a], made[1][b], atol=1e-5, rtol=0)  # of Adam's 5e-3
    assert 0 < counters["stats"]["unique_graphs"] < len(shapes), "not again for every length"
    assert not counters["graph_break"]


def test_the_compile_flag_and_what_is_said_without_a_compiler(tmp_path, monkeypatch, capsys):
    compiled = []

    def fails(model, *_):
        assert compiled == [model.decoder]
        raise torch._dynamo.exc.TorchDynamoException("backend raised:\nno compiler\n\nmore")

    monkeypatch.setattr(train_module, "compile_layers", compiled.append)
    monkeypatch.setitem(STAGES, "simcse", fails)
    command = ["train.py", "simcse", "--model", str(TINY), "--compile", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as status:
        llm2vec.run(train_module.main)
    said = capsys.readouterr().err
    assert status.value.code == 2 and said == "error: --compile: backend raised: no compiler\n"
    monkeypatch.setattr(sys, "argv", [*command, "--quantize", "nf4"])
    with pytest.raises(ValueError, match="--compile: not with --quantize nf4"):
        train_module.main()


def test_mntp_in_parts_gives_the_same_adapter_as_in_one_pass(documents, tmp_path):
    made = []
    for max_tokens in (8192, 1):
        model = LLM2Vec.from_pretrained(TINY)
        settings = replace(QUICK["mntp"], max_tokens=max_tokens, dropout=0.0)
        STAGES["mntp"](model, documents, settings, tmp_path / str(max_tokens))
        made.append(model.encode(documents[:5]))
    assert abs(made[0] - made[1]).max() < 1e-3


def test_batches_hold_every_item_once_an_epoch():
    epochs = [
        [i for step in range(3 * e, 3 * e + 3) for i in batch_at(step, [range(10)], 3, seed=0)]
        for e in range(2)
    ]
    assert all(len(set(epoch)) == 9 for epoch in epochs) and epochs[0] != epochs[1]
    assert sorted(batch_at(0, [[1, 2]], 5, seed=0)) == [1, 2]


def test_duplicate_sentences_are_not_each_others_negatives(tmp_path):
    model = LLM2Vec.from_pretrained(TINY)
    with pytest.raises(ValueError, match="fewer than two different sentences"):
        STAGES["simcse"](model, ["The same."] * 9, QUICK["simcse"], tmp_path)


def test_the_loss_falls_and_is_logged_with_its_schedule(documents, tmp_path):
    model = LLM2Vec.from_pretrained(TINY)
    settings = replace(QUICK["simcse"], steps=25, batch=16)
    STAGES["simcse"](model, documents, settings, tmp_path)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(1, 26))
    assert sum(x["loss"] for x in log[-5:]) < sum(x["loss"] for x in log[:5])
    assert {"step", "steps", "loss", "lr", "tokens_per_second", "seconds_left"} <= set(log[0])
    warm_up = settings.warm_up
    expected = [settings.lr * min((i + 1) / warm_up, (25 - i) / (25 - warm_up)) for i in range(25)]
    assert [line["lr"] for line in log] == pytest.approx(expected)


def test_the_warm_up_keeps_its_share_of_the_steps():
    settings = train_module.with_steps(train_module.SETTINGS["supervised"]["paper"], 100)
    rates = [train_module.learning_rate(step, settings) / settings.lr for step in range(100)]
    assert settings.warm_up == 30 and rates[29] == 1
    assert rates[0] == pytest.approx(1 / 30) and rates[99] == pytest.approx(1 / 70)


def test_what_can_not_be_scored_is_said_before_anything_is(monkeypatch, tmp_path):
    monkeypatch.setattr(train_module, "sts", lambda *_: pytest.fail("scored"))
    with pytest.raises(ValueError, match="0 tokens, too few"):
        train_module.evaluate(LLM2Vec.from_pretrained(TINY), [])
    (tmp_path / "small.txt").write_text("One document.\n")
    twice = ["a/train.txt", "a/test.txt"], ["b/train.txt", "b/test.txt"]
    for command, flags, said in (
        ("evaluate", ["--corpus", str(tmp_path / "small.txt")], "small.txt: none"),
        ("inspect", ["--corpus", str(tmp_path / "small.txt")], "small.txt: none"),
        ("evaluate", ["--words", *twice[0], "--words", *twice[1]], "test files of one name"),
    ):
        args = train_module.parser().parse_args([command, "--model", str(TINY), *flags])
        with pytest.raises(ValueError, match=said):
            args.run(args)


def test_a_comparison_holds_one_model_at_a_time(monkeypatch, tmp_path):
    load, alive = LLM2Vec.from_pretrained, []

    def load_alone(*args, **kwargs):
        gc.collect()
        assert not any(decoder() for decoder in alive)
        model = load(*args, **kwargs)
        alive.append(weakref.ref(model.decoder))
        return model

    monkeypatch.setattr(LLM2Vec, "from_pretrained", load_alone)
    monkeypatch.setattr(train_module, "evaluate", lambda *_: {"STS": 0.5})
    for args in (
        ["--compare", "--steps", "1", "--output", str(tmp_path / "run")],
        ["evaluate", "--model", str(TINY), "--baselines"],
    ):
        args = train_module.parser().parse_args(args)
        args.run(args)
    rows = json.loads((tmp_path / "run" / "results.json").read_text())
    assert len(alive) == 4 and len(rows) == 9 and list(rows)[-1] == "SimCSE without MNTP"


def test_dropout_makes_the_two_views_of_a_sentence_differ(documents):
    model = LLM2Vec.from_pretrained(TINY)
    [row] = tokenize(model.tokenizer, documents[:1], 32)
    add_lora(model.decoder.train())  # fresh adapters add nothing, so this is attention dropout
    model.decoder.config.attention_dropout = 0.3
    first, second = model.embed([row, row])
    assert not torch.allclose(first, second, atol=0.1)
    model.decoder.config.attention_dropout = 0.0
    assert torch.equal(*model.embed([row, row]))


def test_contrastive_loss_at_chance_is_the_log_of_the_batch():
    same = torch.ones(8, 4)
    assert contrastive_loss(same, same).item() == pytest.approx(2.0794415, abs=1e-5)


# --- The commands ------------------------------------------------------------------------------


def train(*args, cwd=ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "train.py"), *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_everything_runs_and_ends_with_the_table(tmp_path):
    done = train("--steps", 2, "--output", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert list(results) == ["causal", "bidirectional, untrained", "+ MNTP", "+ SimCSE"]
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


def test_stages_one_by_one(tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(read_documents(WIKIPEDIA)[:300]))
    common = ["--model", TINY, "--corpus", corpus]
    quick = ["--preset", "tiny", "--steps", 2, "--batch", 4, "--length", 32]
    for stage, before in (("mntp", []), ("simcse", ["--adapters", tmp_path / "mntp"])):
        done = train(stage, *common, *quick, *before, "--output", tmp_path / stage)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / stage / "adapter_model.safetensors").exists()
    files = ["--benchmarks", "sts", "--sts", STS_FILES[0], STSB_TEST]
    done = train("evaluate", "--model", tmp_path / "simcse" / "encoder", *files)
    assert done.returncode == 0, done.stderr
    merged = json.loads(done.stdout.splitlines()[-1])
    assert set(merged) == {"STS", "STS12", "stsb-test", "alignment", "uniformity", "seconds"}
    adapters = ["--adapters", tmp_path / "mntp", tmp_path / "simcse"]
    done = train("evaluate", "--model", TINY, *adapters, *files)
    assert json.loads(done.stdout.splitlines()[-1])["STS"] == pytest.approx(merged["STS"], abs=1e-6)
    done = train("inspect", "--model", TINY, *adapters, "--output", tmp_path / "seen.svg")
    assert done.returncode == 0, done.stderr
    assert all(title in done.stdout for title in ("tiny-llama", "+ mntp", "+ simcse"))
    assert "+ simcse" in (tmp_path / "seen.svg").read_text()
    done = train("plot", tmp_path)
    assert done.returncode == 0 and done.stdout.strip() == str(tmp_path / "curves.svg")
    assert "mntp" in (tmp_path / "curves.svg").read_text()


def test_baselines_stand_in_the_table_beside_the_model(tmp_path):
    lines = STSB_TEST.read_text().splitlines()
    (tmp_path / "few.tsv").write_text("\n".join(lines[:50]))
    args = ["--benchmarks", "sts", "--sts", tmp_path / "few.tsv", "--baselines"]
    done = train("evaluate", "--model", TINY, *args)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    assert list(rows) == [*BASELINES, "tiny-llama"]
    assert len({scores["few"] for scores in rows.values()}) == len(rows)
    assert all(f"| {name}" in done.stdout for name in rows)


def test_words_of_a_file_of_ones_own(tmp_path):
    for side in ("train", "test"):
        (tmp_path / f"{side}.txt").write_text("a DET\ndog NOUN\n\nthe DET\ncat NOUN\n" * 20)
    own = ["--benchmarks", "words", "--words", tmp_path / "train.txt", tmp_path / "test.txt"]
    done = train("evaluate", "--model", TINY, *own)
    assert json.loads(done.stdout.splitlines()[-1])["test"] == 1, done.stderr


def test_supervised_on_top_of_a_stage(tmp_path):
    quick = ["--preset", "tiny", "--steps", 2, "--batch", 4, "--length", 32]
    done = train("supervised", "--model", TINY, *quick, "--output", tmp_path / "pairs")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "pairs" / "encoder" / "model.safetensors").exists()
    again = train("supervised", "--model", TINY, *quick, "--output", tmp_path / "pairs")
    assert again.returncode == 0 and "step" not in again.stdout  # it was finished


@pytest.mark.parametrize(
    "args, said",
    [
        (["mntp", "--model", "nowhere", "--output", "x"], "nowhere"),
        (["mntp", "--model", TINY, "--corpus", "nowhere.txt", "--output", "x"], "nowhere.txt"),
        (["mntp", "--model", TINY], "--output"),
        (["simcse", "--model", TINY, "--output", "x", "--steps", "0"], "--steps"),
        (["mntp", "--model", TINY, "--output", "x", "--mask-rate", "1.5"], "--mask-rate"),
        (["evaluate", "--model", TINY, "--sts", "nowhere.tsv"], "nowhere.tsv"),
        (["evaluate", "--model", TINY, "--benchmarks", "mteb"], "mteb"),
        (["supervised", "--model", TINY, "--pairs", "nowhere", "--output", "x"], "nowhere"),
        (["inspect", "--model", "nowhere"], "nowhere"),
        (["plot", "nowhere"], "nowhere"),
        (["mntp", "--model", TINY, "--template", "alpaca", "--output", "x"], "alpaca"),
        (["evaluate", "--model", TINY, "--pooling", "median"], "median"),
        (["--stepps=3"], "--stepps"),
    ],
)
def test_an_error_names_what_is_wrong_and_leaves_nothing_behind(args, said, tmp_path):
    done = train(*args, cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_mask_token_that_the_vocabulary_lacks_is_named(documents, tmp_path, monkeypatch):
    monkeypatch.setattr("train.MASK_TOKEN", "no such token")
    with pytest.raises(ValueError, match="'no such token' is not in the tokenizer's vocabulary"):
        STAGES["mntp"](LLM2Vec.from_pretrained(TINY), documents, QUICK["mntp"], tmp_path)


def test_ctrl_c_is_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), "--output", str(tmp_path / "run")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline()
    time.sleep(1)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    assert not (tmp_path / "run" / "encoder").exists()


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS if name != "plot")])
def test_help_fits_on_a_screen_and_says_the_defaults(command):
    done = train(*command, "--help")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) <= 40
    assert "default" in done.stdout
