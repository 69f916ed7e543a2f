"""One thread: two are no faster on tensors as small as here, and ten times slower when busy."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the commands that tests run, too
