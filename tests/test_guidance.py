"""Guidance and the other denoisers made of denoisers: what they compute, and how often they call the network."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ditcli.config import DiffusionConfig
from ditcli.diffusion import samplers
from ditcli.diffusion.guidance import guide
from ditcli.diffusion.process import Diffusion
from ditcli.diffusion.wrappers import BetweenClasses, KnownRegion, Remembering

FLOW = DiffusionConfig(schedule="flow", prediction="flow")


class Network:
    """A denoiser whose output depends on state, label and channel; it keeps the rows of each call."""

    def __init__(self, config: DiffusionConfig = FLOW, class_names=("a", "b"), gain: float = 1.0, channels: int = 4):
        self.diffusion, self.class_names, self.gain = Diffusion(config), class_names, gain
        self.input_shape, self.rows = (channels, 2, 2), []

    def __call__(self, x_t, t, labels):
        self.rows.append(len(x_t))
        output = self.gain * x_t * (t + labels.reshape(-1, 1, 1, 1)) + 0.1
        return np.concatenate([output, output + 1], axis=1) if self.diffusion.config.learn_sigma else output

    def from_numpy(self, array):
        return array

    def to_numpy(self, array):
        return array


def a_state(num: int = 3, channels: int = 4) -> tuple[np.ndarray, np.ndarray]:
    return np.random.default_rng(0).standard_normal((num, channels, 2, 2)), np.arange(num) % 2


def test_outside_its_interval_guidance_makes_single_passes():
    times = samplers.time_grid(Diffusion(FLOW).schedule, 10)
    x_t, labels = a_state()
    network = Network()
    samplers.euler(guide(network, 3.0, interval=(0.25, 0.75)), x_t, labels, times, noise=None)
    assert network.rows == [6 if 0.25 <= t <= 0.75 else 3 for t in times[:-1]]
    assert network.rows.count(6) == 5
    network.rows.clear()
    samplers.euler(guide(network, 1.0), x_t, labels, times, noise=None)
    assert network.rows == [3] * 10


def test_outside_its_interval_guidance_is_the_denoiser():
    network = Network()
    x_t, labels = a_state()
    guided = guide(network, 3.0, interval=(0.25, 0.75))
    np.testing.assert_array_equal(guided(x_t, 0.2, labels), network(x_t, 0.2, labels))
    assert np.abs(guided(x_t, 0.5, labels) - network(x_t, 0.5, labels)).max() > 0.1


@pytest.mark.parametrize("class_names", [(), ("a", "b")])
def test_autoguidance_by_itself_is_the_identity_and_by_another_enlarges_the_difference(class_names):
    better, weaker = Network(class_names=class_names), Network(class_names=class_names, gain=0.5)
    x_t, labels = a_state()
    labels = labels * bool(class_names)
    plain, worse = better(x_t, 0.5, labels), weaker(x_t, 0.5, labels)
    np.testing.assert_array_equal(guide(better, 2.5, weaker=better)(x_t, 0.5, labels), plain)
    np.testing.assert_allclose(guide(better, 2.5, weaker=weaker)(x_t, 0.5, labels), worse + 2.5 * (plain - worse))
    assert set(better.rows + weaker.rows) == {3}  # no doubled batch: each network is called once


@pytest.mark.parametrize(
    ("weaker", "word"),
    [
        (Network(channels=3), "shape"),
        (Network(class_names=("a",)), "classes"),
        (Network(DiffusionConfig(prediction="v")), "schedule"),
        (Network(DiffusionConfig(schedule="flow", prediction="v")), "prediction"),
        (Network(DiffusionConfig(schedule="flow", prediction="flow", num_timesteps=500)), "num-timesteps"),
    ],
)
def test_a_guide_of_another_kind_is_refused(weaker, word):
    with pytest.raises(ValueError, match=f"the guide model has .*{word}"):
        guide(Network(), 2.0, weaker=weaker)


def test_channels_beyond_the_guided_ones_are_those_of_the_label():
    network = Network(DiffusionConfig(learn_sigma=True))
    x_t, labels = a_state()
    plain, guided = network(x_t, 0.5, labels), guide(network, 4.0, channels=3)(x_t, 0.5, labels)
    null = network(x_t, 0.5, np.full_like(labels, 2))
    assert guided.shape == (3, 8, 2, 2)
    np.testing.assert_allclose(guided[:, :3], (null + 4 * (plain - null))[:, :3])
    np.testing.assert_array_equal(guided[:, 3:], plain[:, 3:])


@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy])
def test_rescaling_gives_each_image_its_unguided_contrast_back(convert):
    class Torch(Network):
        def __call__(self, x_t, t, labels):
            return (
                super().__call__(x_t, t, labels)
                if isinstance(x_t, np.ndarray)
                else x_t * (1 + labels[:, None, None, None])
            )

    network = Torch()
    x_t, labels = (convert(array) for array in a_state())
    plain, loud = network(x_t, 0.5, labels), guide(network, 5.0)(x_t, 0.5, labels)
    full, half = (guide(network, 5.0, rescale=share)(x_t, 0.5, labels) for share in (1.0, 0.5))

    def contrast(images):
        return np.asarray(images).std(axis=(1, 2, 3))

    np.testing.assert_allclose(contrast(full), contrast(plain))
    np.testing.assert_allclose(contrast(half), (contrast(plain) + contrast(loud)) / 2)
    assert (contrast(loud) > contrast(plain)).any()


@pytest.mark.parametrize("name", ["ddim", "ddpm", "heun", "dpm_solver", "dpm_solver_sde", "unipc", "linear_multistep"])
@pytest.mark.parametrize(
    "config", [DiffusionConfig(), DiffusionConfig(learn_sigma=True), DiffusionConfig(prediction="v")]
)
def test_every_sampler_lands_on_what_is_known(name, config):
    """Also where the network says something else, and outside the known region it is what the network makes of it."""
    generator = np.random.default_rng(0)
    known, paint = generator.standard_normal((3, 4, 2, 2)), np.array([[1.0, 0.0], [0.0, 0.0]]).reshape(1, 1, 2, 2)
    denoiser = KnownRegion(Network(config), known, paint * np.ones((3, 1, 1, 1)))
    x_t, labels = a_state()
    times = samplers.time_grid(denoiser.diffusion.schedule, 12)
    found = getattr(samplers, name)(denoiser, x_t, labels, times, noise=lambda: generator.standard_normal(x_t.shape))
    inside = np.broadcast_to(paint == 0, known.shape)
    np.testing.assert_allclose(found[inside], known[inside], atol=1e-6)
    assert np.abs(found[~inside] - known[~inside]).min() > 1e-3


def test_the_known_region_has_the_noise_of_its_time_on_the_way():
    known, states = np.ones((3, 4, 2, 2)), []
    denoiser = KnownRegion(Network(), known, np.zeros((3, 1, 2, 2)))
    schedule, (noise, labels) = denoiser.diffusion.schedule, a_state()
    times = samplers.time_grid(schedule, 7)
    samplers.unipc(denoiser, noise, labels, times, noise=None, watch=lambda t, state: states.append((t, state)))
    for t, state in states:
        np.testing.assert_allclose(state, schedule.alpha(t) * known + schedule.sigma(t) * noise, atol=1e-9)


def test_between_classes_lie_their_mixtures_and_guidance_finds_the_null_class():
    network = Network()
    x_t, _ = a_state()
    between = BetweenClasses(network, 0, 1, (0.0, 0.25, 1.0))
    found = between(x_t, 0.5, np.array([0, 1, 2]))
    first, last = network(x_t, 0.5, np.zeros(3, int)), network(x_t, 0.5, np.ones(3, int))
    np.testing.assert_allclose(found[0], first[0])
    np.testing.assert_allclose(found[1], 0.75 * first[1] + 0.25 * last[1])
    np.testing.assert_allclose(found[2], last[2])
    null = network(x_t, 0.5, np.full(3, 2))
    guided = guide(between, 3.0)(x_t, 0.5, np.array([0, 1, 2]))
    np.testing.assert_allclose(guided, null + 3 * (found - null))
    assert between.class_names == ("a to b, 0.00", "a to b, 0.25", "a to b, 1.00")


def test_what_was_foreseen_is_the_x0_of_each_call():
    network = Network()
    memory = Remembering(network)
    x_t, labels = a_state()
    times = samplers.time_grid(memory.diffusion.schedule, 5)
    found = samplers.ddim(memory, x_t, labels, times, noise=None)
    np.testing.assert_array_equal(found, samplers.ddim(network, x_t, labels, times, noise=None))
    assert len(memory.estimates) == 5
    np.testing.assert_allclose(memory.estimates[-1], found)  # the last step goes all the way to x0
    x0, _ = memory.diffusion.split(network(x_t, 1.0, labels), x_t, 1.0)
    np.testing.assert_array_equal(memory.estimates[0], x0)
