"""Low-rank adaptation (LoRA, arXiv 2106.09685) of attention and MLP weights: W + B A, with W as it was."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditcli.models.dit import DiT

ADAPTED = re.compile(r"blocks\.\d+\.(attn|cross_attn|mlp)\.\w+")
DOWN, UP = ".lora_down", ".lora_up"


class LoRALinear(nn.Linear):
    """A linear layer whose weight stays, beside a product of two thin ones that starts at zero (section 4.1)."""

    def __init__(self, linear: nn.Linear, rank: int):
        with torch.device("meta"):  # no time is spent on weights that are replaced
            super().__init__(linear.in_features, linear.out_features)
        self.weight, self.bias = linear.weight, linear.bias
        device = linear.weight.device
        self.lora_down = nn.Parameter(torch.empty(rank, linear.in_features, device=device))
        self.lora_up = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.lora_down), self.lora_up)  # eq. 3


def add_adapters(network: DiT, rank: int) -> None:
    """Put adapters beside every weight of attention and MLP, which keep their names; all else is frozen."""
    network.requires_grad_(False)
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Linear) and ADAPTED.fullmatch(name):
            network.set_submodule(name, LoRALinear(module, rank))


def merge(weights: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A plain network's weights: those of the base, with the products added, and whatever else was trained replaced.

    Raises KeyError or RuntimeError where they do not fit.
    """
    merged = dict(weights)
    for key, value in trained.items():
        if key.endswith(DOWN):
            name = key.removesuffix(DOWN)
            merged[f"{name}.weight"] = merged[f"{name}.weight"] + trained[name + UP] @ value
        elif not key.endswith(UP):
            merged[key] = value
    return merged
