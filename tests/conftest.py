"""What every test may use: the folder of real data and reference numbers, where it is there, and one thread."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"

torch.set_num_threads(1)  # many tiny networks: threads cost more than they give, and the more so on a busy machine


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder beside the checkout with real pictures, weights and golden numbers; its tests skip without it."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared (real data and reference numbers), which only developers have")
    return SHARED
