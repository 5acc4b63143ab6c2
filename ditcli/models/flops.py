"""What a network computes, counted from its shapes."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ditcli.config import DiTConfig


def training_flops(network: nn.Module, dit: DiTConfig) -> int:
    """Floating-point operations of an image's forward and backward pass through a network on the meta device.

    Those of matrix products and convolutions: two per multiplication and addition, and the backward pass has twice the
    forward pass's (PaLM, arXiv 2204.02311, appendix B). What is computed again for want of memory does not count.
    """
    x = torch.zeros(1, dit.in_channels, *dit.input_size, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(x, torch.zeros(1, device="meta"), torch.zeros(1, dtype=torch.long, device="meta"))
    return 3 * counter.get_total_flops()
