"""The smallest training runs, in this process and in one that can be killed."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ditcli.config import TrainConfig
from ditcli.runs import RunDir, state_file
from ditcli.training.metrics import read_metrics
from ditcli.training.train import train

TINY: dict[str, Any] = {
    "data": "fashion-mnist",
    "pixels": True,
    "image_size": 28,
    "model": "DiT-S/4",
    "width": 32,
    "depth": 2,
    "num_heads": 2,
    "batch_size": 16,
    "steps": 12,
    "lr": 1e-3,
    "log_every": 3,
    "checkpoint_every": 4,
    "sample_every": 0,
    "precision": "fp32",
    "device": "cpu",
}


def run_tiny(out: Path, **changes: Any) -> RunDir:
    return train(TrainConfig.from_dict(TINY | {"out": str(out)} | changes))


def start(
    out: Path,
    *,
    file_size: int = resource.RLIM_INFINITY,
    environment: dict[str, str] | None = None,
    **changes: Any,
) -> subprocess.Popen[str]:
    """`ditcli train` in a process of its own, to which the system refuses files above a size."""
    options = TINY | {"out": str(out)} | changes
    words = [
        f"--{'' if value is not False else 'no-'}{key.replace('_', '-')}"
        + ("" if isinstance(value, bool) else f"={value}")
        for key, value in options.items()
    ]
    return subprocess.Popen(
        [sys.executable, "-m", "ditcli", "train", "--preset", "paper", *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {}),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size)),
    )


def assert_same_run(first: RunDir, second: RunDir) -> None:
    """Weights, training state and losses are equal to the bit."""
    paths = first.newest_checkpoint(), second.newest_checkpoint()
    for one, other in (paths, tuple(state_file(path) for path in paths)):
        expected, found = load_file(one), load_file(other)
        assert expected.keys() == found.keys()
        different = [k for k in expected if k != "seconds" and not torch.equal(expected[k], found[k])]
        assert different == []
    losses = [
        [(row.step, row.loss, row.grad_norm) for row in read_metrics(run.metrics_file)] for run in (first, second)
    ]
    assert losses[0] == losses[1]
