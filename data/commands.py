"""Command lines: flags made from settings, and errors on one line.

Settings are the fields of a dataclass, made by `setting`; each one is a flag.
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import Field, field, fields
from pathlib import Path
from typing import Any, get_args

PACKAGE = Path(__file__).resolve().parent


def setting(
    about: str, default: Any, choices: Iterable[str] | None = None, same_result: bool = False
) -> Any:
    """A field of a dataclass, with the help and choices of its flag.

    same_result: a run may be resumed with another value.
    """
    more = {"help": about, "choices": choices, "same_result": same_result}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=more)
    return field(default=default, metadata=more)


def kind_of(f: Field) -> type:
    """The type of a setting, or of the items of a list."""
    return next(kind for kind in (bool, int, float, str) if kind in (f.type, *get_args(f.type)))


def check_settings(settings) -> None:
    """Raise ValueError for a number outside the range of its setting."""
    for f in fields(settings):
        value, name = getattr(settings, f.name), f.name.replace("_", "-")
        lowest = 0 if f.default == 0 or f.name.endswith(("dropout", "_share")) else 1e-9
        lowest = 1 if lowest and kind_of(f) is int else lowest
        highest = 0.99 if f.name.endswith("dropout") else 1e12
        highest = 1 if f.name.endswith(("_rate", "_share")) else highest
        if type(value) in (int, float) and not lowest <= value <= highest:
            raise ValueError(f"--{name} is {value}, expected {lowest:g} to {highest:g}")


def add_settings(command: argparse.ArgumentParser, presets: dict[str, Any]) -> None:
    """A flag for each setting, with the values of the presets."""
    for f in fields(next(iter(presets.values()))):
        values = {preset: getattr(settings, f.name) for preset, settings in presets.items()}
        first = next(iter(values.values()))
        if all(value == first for value in values.values()):
            values = {"default": first}
        shown = ", ".join(f"{name}: {v}" for name, v in values.items() if v not in (None, []))
        options = {"help": f.metadata["help"] + (f" ({shown})" if shown else ""), "default": None}
        kind = kind_of(f)
        if kind is bool:
            options |= {"action": argparse.BooleanOptionalAction}
        else:
            options |= {"type": kind, "choices": f.metadata["choices"]}
            options |= {"metavar": None if kind is str else "N"}
            options |= {"nargs": "+"} if isinstance(first, list) else {}
        command.add_argument("--" + f.name.replace("_", "-"), **options)


def cli(main: Callable[[], None]) -> None:
    """Run a command line: expected errors are one line and exit status 2; Ctrl-C exits with 130."""
    for stream in (sys.stdout, sys.stderr):  # letters that can't be shown become escapes
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    lora = sys.modules.get("lora")
    try:
        if lora and Path(lora.__file__).resolve().parent != PACKAGE.parent:
            message = f"this file would use {PACKAGE}, from another copy"
            raise ValueError(f"{lora.__file__}: {message}; run `pip install -e .` beside it")
        main()
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        message = str(error)
        of_memory = "out of memory" in message or "can't allocate memory" in message
        if isinstance(error, MemoryError) or isinstance(error, RuntimeError) and of_memory:
            message = f"out of memory; lower --max-tokens if the command has it: {message}"
        elif type(error).__module__.startswith("torch._dynamo"):
            message = "--compile: " + message.partition("\n\n")[0]  # without a C++ compiler
        elif isinstance(error, RuntimeError):
            raise
        print("error:", " ".join(message.split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
