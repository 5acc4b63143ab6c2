"""Muon for the matrices inside a DiT, AdamW for the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ditcli.errors import SettingError


class MuonAndAdamW(torch.optim.Optimizer):
    """One optimiser of two: Muon (Jordan et al. 2024) for what attention and MLPs of the blocks multiply by.

    Its steps are scaled to the size of AdamW's (arXiv 2502.16982, section 2.2), so that one rate and weight decay serve
    both. As a fused optimiser it takes no step where `found_inf` is 1; Muon knows nothing of that, so the device is
    waited for. Raises SettingError where no matrix is left to it.
    """

    found_inf: Tensor | None = None

    def __init__(self, network: nn.Module, *, lr: float, betas: tuple[float, float], weight_decay: float):
        trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
        hidden = [name for name, parameter in trained.items() if parameter.ndim == 2 and _is_hidden(name)]
        if not hidden:
            raise SettingError("optimizer is 'muon', but no matrix of the blocks is left to train: leave it out.")
        self.muon = torch.optim.Muon(
            [trained[name] for name in hidden], lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        others = [parameter for name, parameter in trained.items() if name not in hidden]
        self.adamw = torch.optim.AdamW(others, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})  # the groups themselves, not copies
        self.muon.state = self.adamw.state = self.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """A step of both."""
        if self.found_inf is None or not self.found_inf.item():
            self.muon.step()
            self.adamw.step()


def _is_hidden(name: str) -> bool:
    return name.startswith("blocks.") and "adaLN_modulation" not in name
