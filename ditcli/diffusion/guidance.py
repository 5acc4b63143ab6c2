"""Guidance: a denoiser made of a denoiser and something worse than it, whose difference is enlarged."""

from __future__ import annotations

from dataclasses import dataclass

from array_api_compat import array_namespace

from ditcli.diffusion.denoiser import Denoiser, Wrapper
from ditcli.diffusion.process import Array
from ditcli.errors import SettingError

ALWAYS = (0.0, 1.0)


def guide(
    denoiser: Denoiser,
    scale: float,
    *,
    channels: int | None = None,
    interval: tuple[float, float] = ALWAYS,
    rescale: float = 0.0,
    weaker: Denoiser | None = None,
) -> Denoiser:
    """The denoiser guided by `scale`; at scale 1 that is the denoiser itself, at one pass per step.

    Classifier-free guidance (arXiv 2207.12598) compares with the null class, autoguidance (arXiv 2406.02507) with a
    `weaker` model of the same process. `channels` guides only the first few channels; the default is the model's own
    convention (3 in the published DiT and SiT), else all. `interval` (arXiv 2404.07724) guides only at times t from
    the first to the second, 0 data and 1 noise; elsewhere there is a single pass. `rescale` (arXiv 2305.08891, section
    3.4), 0 to 1, gives the guided output back that share of the standard deviation of the unguided one. Raises
    SettingError for a `weaker` model that does not fit.
    """
    if scale == 1:
        return denoiser
    if weaker is not None:
        _check_same(denoiser, weaker)
    channels = channels or denoiser.diffusion.config.guided_channels or denoiser.input_shape[0]
    return GuidedDenoiser(denoiser, scale, channels, interval, rescale, weaker)


@dataclass(frozen=True)
class GuidedDenoiser(Wrapper):
    """worse + scale (better - worse) over the first `channels` of the output.

    The other channels, a learned variance among them, are the better one's.
    """

    scale: float
    channels: int
    interval: tuple[float, float] = ALWAYS
    rescale: float = 0.0
    weaker: Denoiser | None = None

    def __call__(self, x_t: Array, t: float, labels: Array) -> Array:
        low, high = self.interval
        if not low <= t <= high:
            return self.denoiser(x_t, t, labels)
        xp = array_namespace(x_t)
        if self.weaker is None:  # one doubled batch
            null = xp.full_like(labels, len(self.class_names))
            both = self.denoiser(xp.concat([x_t, x_t]), t, xp.concat([labels, null]))  # (2N, C or 2C, H, W)
            output, worse = both[: len(x_t)], both[len(x_t) :]
        else:
            output, worse = self.denoiser(x_t, t, labels), self.weaker(x_t, t, labels)
        better, worse = output[:, : self.channels], worse[:, : self.channels]
        guided = worse + self.scale * (better - worse)
        if self.rescale:
            axes = tuple(range(1, guided.ndim))
            ratio = xp.std(better, axis=axes, keepdims=True) / xp.std(guided, axis=axes, keepdims=True)
            guided = guided * (self.rescale * ratio + (1 - self.rescale))  # eqs. 15 and 16
        return xp.concat([guided, output[:, self.channels :]], axis=1)


def _check_same(denoiser: Denoiser, weaker: Denoiser) -> None:
    for what, of_one, of_other in (
        ("states of shape", denoiser.input_shape, weaker.input_shape),
        ("classes", denoiser.class_names, weaker.class_names),
        ("schedule", denoiser.diffusion.config.schedule, weaker.diffusion.config.schedule),
        ("num-timesteps", denoiser.diffusion.config.num_timesteps, weaker.diffusion.config.num_timesteps),
        ("prediction", denoiser.diffusion.config.prediction, weaker.diffusion.config.prediction),
        ("reversed-time", denoiser.diffusion.config.reversed_time, weaker.diffusion.config.reversed_time),
    ):
        if of_one != of_other:
            raise SettingError(
                f"the guide model has {what} {of_other}, the model {of_one}: take an earlier checkpoint of the same "
                "run, or a smaller model trained alike."
            )
