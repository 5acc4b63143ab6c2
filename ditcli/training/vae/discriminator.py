"""The PatchGAN discriminator (Isola et al., arXiv 1611.07004) and its losses."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 8


class Discriminator(nn.Module):
    """Judges overlapping patches: `layers` 4x4 convolutions that halve the sides, then two that do not.

    Group norm stands where the paper has batch norm, so that a picture's judgement does not depend on its batch, and
    micro-batches together are the batch.
    """

    def __init__(self, width: int, layers: int):
        super().__init__()
        widths = [width * min(2**i, 8) for i in range(layers + 1)]
        parts: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, layers + 1):
            stride = 2 if i < layers else 1
            parts += [nn.Conv2d(widths[i - 1], widths[i], 4, stride=stride, padding=1, bias=False)]
            parts += [nn.GroupNorm(GROUPS if widths[i] % GROUPS == 0 else 1, widths[i]), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*parts, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1] -> logits (N, 1, h, w), above 0 for a patch that looks real."""
        return self.layers(images)


def smallest_image(layers: int) -> int:
    """Side of the smallest picture that it can judge: each of the two layers that do not halve takes one place away."""
    return 3 * 2**layers


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """What the discriminator minimises (Lim and Ye, arXiv 1705.02894)."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def generator_loss(fake: Tensor) -> Tensor:
    """What the autoencoder minimises of the discriminator's logits."""
    return -fake.float().mean()
