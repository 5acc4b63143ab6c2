"""A network over a picture too large for it: overlapping tiles, faded into each other."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor


def run_tiled(network: Callable[[Tensor], Tensor], x: Tensor, tile: int, scale: Fraction, step: int = 1) -> Tensor:
    """`network` over x (N, C, H, W) in tiles of side `tile` -> float32 (N, D, scale H, scale W).

    `scale` is the network's, `step` what tiles' places must be multiples of. Tiles overlap by a quarter. What lies
    within a sixteenth of a tile's inner edges, where the network saw too little, is not used; then one tile fades out
    as the next fades in, to three sixteenths.
    """
    overlap = tile // 4 // step * step
    total: Tensor | None = None
    weights = torch.zeros((), device=x.device)
    rows, columns = (_starts(side, tile, overlap) for side in x.shape[2:])
    for top in rows:
        for left in columns:
            part = network(x[:, :, top : top + tile, left : left + tile]).float()
            if total is None:
                sides = [int(side * scale) for side in x.shape[2:]]
                total = part.new_zeros((*part.shape[:2], *sides))
                weights = part.new_zeros(sides)
            y, x_ = int(top * scale), int(left * scale)
            height, width = part.shape[2:]
            fades = (
                _fade(size, int(overlap * scale), first=start == 0, last=start == starts[-1]).to(part.device)
                for size, start, starts in ((height, top, rows), (width, left, columns))
            )
            down, across = fades
            weight = down[:, None] * across
            total[:, :, y : y + height, x_ : x_ + width] += part * weight
            weights[y : y + height, x_ : x_ + width] += weight
    assert total is not None
    return total / weights


def _starts(side: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin: the last one ends with the picture, and a picture smaller than a tile has one."""
    if side <= tile:
        return [0]
    return [*range(0, side - tile, tile - overlap), side - tile]


def _fade(size: int, overlap: int, *, first: bool, last: bool) -> Tensor:
    """Weights along a side of a tile: 0, then rising, then 1 and back; 1 up to the picture's own edges."""
    # Never quite 0: where the last tile begins early, three tiles may meet at their edges.
    ramp = ((torch.arange(overlap) + 0.5) / overlap * 2 - 0.5).clamp(1e-6, 1)
    weights = torch.ones(size)
    if not first:
        weights[:overlap] = ramp
    if not last:
        weights[-overlap:] = torch.minimum(weights[-overlap:], ramp.flip(0))
    return weights
