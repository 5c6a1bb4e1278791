"""The repository root on the path, one thread a process, notebooks included, no windows."""
import os
import sys
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")
if "PYTEST_XDIST_WORKER" in os.environ:  # two processes share two cores
    os.environ["OMP_NUM_THREADS"] = "1"  # also of notebooks
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

torch.set_num_threads(1)
