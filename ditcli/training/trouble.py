"""Signs that training goes wrong: gradients that are not finite, and a loss that jumps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ditcli.training.metrics import Row

MOST_SKIPS_IN_A_ROW = 10
# A loss above so many times the smoothed one is told of, once that is the mean of a few.
SPIKE, ROWS_BEFORE = 2.0, 5
ADVICE = "Try a lower --lr, more --warmup-steps, --clip-grad 1, --qk-norm (in a new run) or --precision fp32."


class Skips:
    """Counts the steps that changed no weight since their gradient was not finite."""

    def __init__(self) -> None:
        self.in_a_row = self.since_row = 0
        self._norms: list[Tensor] = []

    def add(self, norm: Tensor) -> None:
        """The gradient's norm of a step, on the device."""
        self._norms.append(norm)

    def read(self) -> None:
        """Count those added, which waits for the device."""
        for norm in torch.stack(self._norms).tolist() if self._norms else ():
            finite = math.isfinite(norm)
            self.in_a_row = 0 if finite else self.in_a_row + 1
            self.since_row += not finite
        self._norms.clear()


def mean_of_finite(losses: Sequence[Tensor]) -> list[float]:
    """What steps measured, the loss first, averaged over those whose loss is finite; not a number where none is."""
    values = torch.stack(list(losses)).reshape(len(losses), -1).cpu()
    return values[values[:, 0].isfinite()].mean(dim=0).tolist()


def spike(rows: Sequence[Row]) -> float | None:
    """How many times the smoothed loss before it the last row's is, if that is a jump."""
    if len(rows) <= ROWS_BEFORE or not rows[-2].smoothed or rows[-2].smoothed <= 0:
        return None
    jump = rows[-1].loss / rows[-2].smoothed
    return jump if jump > SPIKE else None
