"""Exponentially averaged weights, from which samples are drawn."""

from __future__ import annotations

import copy

import torch
from torch import nn

from ditcli.training.sharding import local


def average_of(model: nn.Module) -> nn.Module:
    """A copy of the model to hold the average; what is frozen is shared."""
    shared = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
    return copy.deepcopy(model, shared).eval().requires_grad_(False)


def ema_decay(decay: float, step: int, *, warmup: bool) -> float:
    """The decay after `step` updates.

    With warm-up it rises as (1 + step) / (10 + step), so that a short run is averaged over its own length instead of
    remembering its random start.
    """
    return min(decay, (1 + step) / (10 + step)) if warmup else decay


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average = decay average + (1 - decay) model, all weights that are not frozen in one call."""
    pairs = [(a, p) for a, p in zip(average.parameters(), model.parameters(), strict=True) if p.requires_grad]
    torch._foreach_lerp_([local(a) for a, _ in pairs], [local(p) for _, p in pairs], 1 - decay)
