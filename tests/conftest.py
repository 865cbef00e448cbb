"""What every test shares: no network, few threads, fixed seeds, and the package as it is installed."""

import os
import random
import sys
from pathlib import Path

# Before the first import of torch or the Hub client, which read them once.
for _name, _value in {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
}.items():
    os.environ[_name] = _value
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

# The folder st_moe in the repository root lacks the rooms: a root ahead of an installed wheel would hide the package.
# Behind it, the root still lets processes started by tests import `tests` and `benchmarks`.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT] + [str(ROOT)]

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Importing the host's tests fetches them, so a run that deselects them does not even look."""
    if collection_path == ROOT / "tests" / "host" and "not host" in config.option.markexpr:
        return True
    return None


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (libraries of the host draw from the old global generator)
    torch.manual_seed(0)
