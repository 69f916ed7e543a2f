"""Run the fast tests with the oldest packages that pyproject.toml allows, and with the newest.

    python tests/versions.py [--old-python python3.10] [FOLDER]

Each environment is made in FOLDER (by default a scratch folder), outside the repository; the oldest
torch that PyPI has is a CUDA build, of some gigabytes. Prints a line for each: its packages, and
what pytest says at the end. Exit status 1 if a suite fails.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "numpy", "tokenizers", "safetensors", "huggingface_hub")


def oldest() -> list[str]:
    """The lower bounds of the dependencies, each with its own patch releases."""
    bounds = re.findall(r'"([\w-]+)>=([\d.]+)"', (ROOT / "pyproject.toml").read_text("utf-8"))
    return [f"{name}=={bound}.*" for name, bound in bounds if name in (*PACKAGES, "pytest")]


def run(name: str, python: str, packages: list[str], folder: Path) -> bool:
    venv = folder / name
    bin = venv / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    if not venv.exists():
        subprocess.run([python, "-m", "venv", venv], check=True)
        pip = [bin, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *packages], check=True)
        subprocess.run([*pip, "-e", f"{ROOT}[test]"], check=True)
    show = "import sys; from importlib.metadata import version; "
    show += "print(sys.version.split()[0], *(f'{name} {version(name)}' for name in sys.argv[1:]))"
    how = {"cwd": ROOT, "capture_output": True, "text": True}
    found = subprocess.run([bin, "-c", show, *PACKAGES], **how).stdout.strip()
    done = subprocess.run([bin, "-m", "pytest", "-q"], **how)
    lines = done.stdout.strip().splitlines()
    print(*(line for line in lines if line.startswith(("FAILED", "ERROR"))), sep="\n")
    print(f"{name}: {found}: {lines[-1]}", flush=True)
    return done.returncode == 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", help="where environments are made, and kept")
    parser.add_argument("--old-python", default="python3.10", help="(default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        suites = [("oldest", args.old_python, oldest()), ("newest", sys.executable, ["torch"])]
        good = [run(*suite, Path(args.folder or scratch)) for suite in suites]
    sys.exit(0 if all(good) else 1)
