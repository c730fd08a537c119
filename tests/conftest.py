"""One thread for the tests and for what they start: tensors here are so small that a second one
only waits, for long where other programs run as well, and rounding differs with their number."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, after this
