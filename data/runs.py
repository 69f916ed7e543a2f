"""The folder of a run: the files that a stage of training writes, and resumes from.

settings.json            the settings, and fingerprints of the code, the data and the model
log.jsonl                a hundred lines of loss, learning rate and tokens per second
state-*.safetensors      trained parameters and the optimiser's moments, by name, until the end
adapter_*, extra.*       trained parameters, in files for other programs
finished                 an empty file, once all steps are done
"""

import ast
import datetime
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors.torch import load_file
from safetensors.torch import save as save_bytes
from torch import Tensor, nn

from llm2vec_data.disk import read_json, reading, write_json, write_whole
from llm2vec_data.export import checkpoint_files, stop_sign
from llm2vec_data.processes import RANK, WORLD_SIZE, log, of_main, on_main
from lora import save_adapter, trained

# --- Fingerprints ------------------------------------------------------------------------------


def fingerprint(
    model, datasets: Sequence[Sequence], settings, code: Sequence[str | Path]
) -> dict[str, object]:
    """The settings, code, data and model that must be the same when a run is resumed or reused.

    Settings with `same_result` in their field are left out. code: the files that make the result.
    """
    decoder = model.decoder
    firsts = [p.detach().flatten()[:256].float().cpu() for p in model.parameters()]
    free = {f.name for f in fields(settings) if f.metadata.get("same_result")}
    return {name: value for name, value in asdict(settings).items() if name not in free} | {
        "weights": ", ".join(sorted({str(p.dtype)[6:] for p in decoder.parameters()})),
        "is_causal": decoder.config.is_causal,
        "processes": WORLD_SIZE,
        "code": digest(map(code_of, code)),
        "data": digest(item for items in datasets for item in items),
        "model": digest([torch.cat(firsts), decoder.config]),
        "tokenizer": digest([model.tokenizer.to_str()]),
    }


def digest(items: Iterable) -> str:
    """A short fingerprint of texts, blocks of tokens, or any values, by `str`."""
    sha = hashlib.sha256()
    for item in items:
        sha.update(item.numpy().tobytes() if isinstance(item, Tensor) else str(item).encode())
    return sha.hexdigest()[:16]


def code_of(file: str | Path) -> str:
    """The code of a Python file without comments and docstrings, which change no result."""
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(
            node
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


# --- The run folder ----------------------------------------------------------------------------


class RunFolder:
    """The folder of one run.

    Raises ValueError if it holds something else, or a run with other settings, data or code, which
    can't be resumed or reused.

    score: with settings.dev, gives the score of the model; the best step is kept.
    """

    def __init__(
        self, folder: Path, settings, fingerprints: dict[str, object], score: Callable[[], float]
    ):
        self.folder, self.settings, self.scorer = folder, settings, score
        self.log_file, self.best_file = folder / "log.jsonl", folder / "best.safetensors"
        on_main(lambda: self.open(fingerprints))
        self.finished = (folder / "finished").exists()

    def open(self, fingerprints: dict[str, object]) -> None:
        file = self.folder / "settings.json"
        if self.states() or (self.folder / "finished").exists():
            before = read_json(file)
            for key, value in json.loads(json.dumps(fingerprints)).items():
                if before.get(key) != value:
                    change = f"{key} was {before.get(key)!r} and is {value!r}"
                    message = f"a run with other settings, {change}; --overwrite trains it anew"
                    raise ValueError(f"{self.folder}: {message}")
        elif not file.exists() and self.folder.exists() and any(self.folder.iterdir()):
            message = "is not empty and not a run folder; choose another --output"
            raise ValueError(f"{self.folder}: {message}")
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(file, fingerprints)

    def states(self) -> list[Path]:
        return sorted(self.folder.glob("state-*.safetensors"))

    def restore(self, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
        """Go back to the newest state; returns the number of steps done."""
        done = 0
        for file in self.states()[-1:]:
            with reading(file):
                tensors = load_file(file)
            done = int(file.stem.removeprefix("state-"))
            for name, p in parameters.items():
                p.data.copy_(tensors.pop(name))
                moments = [(k, v) for k, v in tensors.items() if k.startswith(f"{name}:")]
                # Copies: on Windows, a file can't be deleted while a tensor is a view of it.
                state = {k.rpartition(":")[2]: v.to(p.device, copy=True) for k, v in moments}
                optimizer.state[p] = state
        text = self.log_file.read_text(encoding="utf-8") if self.log_file.exists() else ""
        lines = text.splitlines(True)
        lines = [x for x in lines if x.endswith("\n") and json.loads(x)["step"] <= done]
        on_main(lambda: write_whole(self.log_file, "".join(lines).encode()))
        self.before = json.loads(lines[-1])["seconds"] if lines else 0.0
        scores = [line["dev"] for line in map(json.loads, lines) if "dev" in line]
        self.best = max(filter(math.isfinite, scores), default=-math.inf)
        self.worse = len(scores) - 1 - (scores.index(self.best) if self.best in scores else -1)
        self.first, self.start, self.losses, self.tokens = done, time.monotonic(), [], 0
        return done

    @property
    def patient(self) -> bool:
        """Whether there are fewer scores than --patience since the best one."""
        return self.settings.patience is None or self.worse < self.settings.patience

    def save(self, step: int, model, parameters: dict[str, nn.Parameter], optimizer) -> None:
        """Write the trained parameters and moments after `step` steps; delete older states."""
        if RANK > 0:
            return
        tensors = {name: p.detach() for name, p in parameters.items()}
        for name, p in parameters.items():
            tensors |= {f"{name}:{key}": value for key, value in optimizer.state[p].items()}
        write_whole(self.folder / f"state-{step:08d}.safetensors", save_bytes(tensors))
        for old in self.states()[:-1]:
            old.unlink()
        save_adapter(model, self.folder)

    def score(self, step: int, parameters: dict[str, nn.Parameter]) -> float | None:
        """The score, at every save and at the end; the weights with the best one are saved."""
        steps, every = self.settings.steps, self.settings.save_every
        if self.settings.dev is None or step % every and step < steps:
            return None
        score, self.worse = of_main(self.scorer()), self.worse + 1
        if score > self.best:
            self.best, self.worse = score, 0
            if RANK == 0:
                best = save_bytes({name: p.detach() for name, p in parameters.items()})
                write_whole(self.best_file, best)
        return score

    def log(self, step: int, loss: float, lr: float, tokens: int, dev: float | None = None) -> None:
        """Log loss (mean since the last line), rate and pace: 100 lines, a fifth are printed."""
        self.losses.append(loss)
        self.tokens += tokens
        steps, seconds = self.settings.steps, time.monotonic() - self.start
        if RANK > 0 or step % max(1, steps // 100) and step < steps and dev is None:
            return
        loss, pace = sum(self.losses) / len(self.losses), self.tokens / max(seconds, 1e-9)
        line = {"step": step, "steps": steps, "loss": loss, "lr": lr, "tokens_per_second": pace}
        line |= {} if dev is None else {"dev": dev}
        with self.log_file.open("a", encoding="utf-8") as file:
            print(json.dumps(line | {"seconds": self.before + seconds}), file=file)
        self.losses = []
        if step % max(1, steps // 20) == 0 or step == steps or dev is not None:
            left = datetime.timedelta(seconds=round(seconds / (step - self.first) * (steps - step)))
            pace = f"lr {lr:.1e}  {pace:,.0f} tokens/s  {left} left"
            pace += "" if dev is None else f"  dev {dev:.4f}"
            print(f"step {step:4d} of {steps}  loss {loss:.3f}  {pace}", flush=True)

    def finish(self, model, parameters: dict[str, nn.Parameter]) -> None:
        """Go back to the best step, if steps were scored; write the trained parameters.

        The tokenizer is written, too: sentence-transformers needs it in this folder.
        """
        on_main(lambda: None)  # the others wait until the best step is written
        if self.best_file.exists():
            for name, weight in load_file(self.best_file).items():
                parameters[name].data.copy_(weight)
            log(f"the best step is kept, which scored {self.best:.4f} on {self.settings.dev}")
        elif self.settings.dev is not None:
            log(f"no step has a score on {self.settings.dev}: the last one is kept")
        on_main(lambda: self.write(model))

    def write(self, model) -> None:
        files = checkpoint_files(model)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            write_json(self.folder / name, files[name])
        save_adapter(model, self.folder)
        extra = [name for name in trained(model) if "lora_" not in name and "heads." not in name]
        if extra:
            write_json(self.folder / "modules.json", stop_sign(extra))
        (self.folder / "finished").touch()
        for file in (*self.states(), self.best_file):
            file.unlink(missing_ok=True)
