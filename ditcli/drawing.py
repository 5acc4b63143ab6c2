"""Batches of images: noise in, a sampler over its times, decoded images out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from ditcli.config import SamplerName
from ditcli.denoisers.opening import Decode
from ditcli.diffusion import samplers
from ditcli.diffusion.denoiser import Denoiser
from ditcli.diffusion.wrappers import KnownRegion, Remembering
from ditcli.starts import Start

Solve = Callable[..., Any]  # a sampler with its own settings filled in


@dataclass(frozen=True)
class Drawing:
    """An image (H, W, 3), and what was foreseen of it on the way, if that was asked for."""

    image: np.ndarray
    frames: list[np.ndarray] = field(default_factory=list)


def generate(
    denoiser: Denoiser,
    decode: Decode,
    solve: Solve,
    times: list[float],
    *,
    labels: Sequence[int],
    starts: Sequence[Start],
    batch_size: int = 16,
    init: np.ndarray | None = None,
    paint: np.ndarray | None = None,
    num_frames: int = 0,
    advance: Callable[[int], object] = lambda count: None,
) -> Iterator[Drawing]:
    """Run a sampler over `times` for each label and start.

    `init` are latents (C, h, w) that stand for x0 at the first time; without them it is pure noise. `paint` (1, h, w)
    is 0 where they are kept to the end. At most `num_frames` of the x0 that the network foresees are decoded too.
    `advance(n)` is called as n steps of an image are done.
    """
    for begin in range(0, len(labels), batch_size):
        batch = slice(begin, begin + batch_size)
        streams = [start.normals() for start in starts[batch]]

        def noise(streams: list[Callable[..., np.ndarray]] = streams) -> Any:
            return denoiser.from_numpy(np.stack([normals(denoiser.input_shape) for normals in streams]))

        def repeated(array: np.ndarray, num: int = len(streams)) -> Any:
            return denoiser.from_numpy(np.repeat(array[None], num, axis=0))

        chosen = denoiser.from_numpy(np.array(labels[batch], dtype=np.int64))
        network, x_t = denoiser, noise()
        if init is not None:
            x_t = denoiser.diffusion.add_noise(repeated(init), x_t, times[0])
            if paint is not None:
                network = KnownRegion(denoiser, repeated(init), repeated(paint))
        memory = Remembering(network)
        network = memory if num_frames else network
        x0 = solve(network, x_t, chosen, times, noise=noise, watch=lambda t, state: advance(len(state)))
        if init is not None and paint is not None:  # to the last bit
            x0 = repeated(paint) * x0 + repeated(1 - paint) * repeated(init)
        images = decode(denoiser.to_numpy(x0))
        seen = memory.estimates
        picks = np.linspace(0, len(seen) - 1, min(num_frames, len(seen))).round().astype(int)
        frames = [decode(seen[pick]) for pick in picks]
        for i, image in enumerate(images):
            yield Drawing(image, [frame[i] for frame in frames])


def choose_sampler(name: SamplerName, *, eta: float = 0.0, order: int = 4) -> Solve:
    """The sampler of a name; `eta` is DDIM's and `order` that of `lms`."""
    match name:
        case "ddim":
            return partial(samplers.ddim, eta=eta)
        case "ddpm":
            return samplers.ddpm
        case "euler":
            return samplers.euler
        case "heun":
            return samplers.heun
        case "midpoint":
            return samplers.midpoint
        case "rk4":
            return samplers.runge_kutta_4
        case "lms":
            return partial(samplers.linear_multistep, order=order)
        case "dpm++2m":
            return samplers.dpm_solver
        case "dpm++2m-sde":
            return samplers.dpm_solver_sde
        case "unipc":
            return samplers.unipc
