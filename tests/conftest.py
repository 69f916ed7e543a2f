"""One thread: two are no faster on tensors as small as here, and ten times slower when busy."""

import os

import checkout  # noqa: F401 (what is tested is this checkout)

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the commands that tests run, too
