"""Schedules, targets, losses and samplers against the reference implementation, and the laws they must keep."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
import torch
from golden import load_golden, reference_diffusion, reference_dit

from ditcli.config import DiffusionConfig
from ditcli.denoisers.torch_denoiser import TorchDenoiser
from ditcli.diffusion import samplers
from ditcli.diffusion.guidance import guide
from ditcli.diffusion.process import Diffusion
from ditcli.diffusion.schedule import cosine, flow, linear_beta
from ditcli.diffusion.variational import Chain, variational_bound

SCHEDULES = {"linear": linear_beta(), "linear-250": linear_beta(250), "cosine": cosine(500), "flow": flow()}
PROCESSES = [
    Diffusion(DiffusionConfig(schedule=schedule, prediction=prediction))
    for schedule, prediction in product(["linear", "cosine", "flow"], ["eps", "x0", "v", "flow"])
    if (schedule, prediction) != ("flow", "eps")
]


def process_id(process: Diffusion) -> str:
    return f"{process.config.schedule}-{process.config.prediction}"


@pytest.mark.parametrize("name", ["full", "50", "ddim25", "full_cosine"])
def test_tables_equal_the_reference(shared, name):
    tensors, _ = load_golden(shared, "diffusion_schedule")
    schedule = cosine(1000) if name == "full_cosine" else linear_beta(1000)
    steps = tensors[f"{name}.timestep_map"].numpy() if f"{name}.timestep_map" in tensors else np.arange(1000)
    chain = Chain.of(schedule, (steps + 1) / 1000)
    found = {
        "betas": chain.betas,
        "alphas_cumprod": schedule.alpha(chain.times) ** 2,
        "posterior_variance": chain.posterior_variance,
        "posterior_log_variance_clipped": chain.posterior_log_variance,
        "posterior_mean_coef1": chain.posterior_of_x0,
        "posterior_mean_coef2": chain.posterior_of_x_t,
    }
    for key, table in found.items():
        if f"{name}.{key}" in tensors:
            np.testing.assert_allclose(table, tensors[f"{name}.{key}"].numpy(), rtol=1e-12, err_msg=key)


@pytest.mark.parametrize("name", ["50", "full"])
def test_the_time_grid_is_the_references(shared, name):
    expected = load_golden(shared, "diffusion_schedule")[0][f"{name}.timestep_map"].numpy()
    grid = samplers.time_grid(linear_beta(1000), len(expected))
    assert grid[-1] == 0.0
    process = Diffusion(DiffusionConfig())
    network_times = [process.network_time(t) for t in reversed(grid[:-1])]
    np.testing.assert_allclose(network_times, expected, atol=1e-9)


@pytest.mark.parametrize("name", ["main", "nosigma"])
@pytest.mark.parametrize("respacing", ["full", "50"])
def test_training_losses_equal_the_reference(shared, name, respacing):
    tensors, description = load_golden(shared, f"diffusion_training_losses_{name}")
    bound = description["tolerance_max_abs"]
    model, diffusion = reference_dit(tensors, description), Diffusion(reference_diffusion(description))
    steps = np.arange(1000) if respacing == "full" else np.array([round(i * 999 / 49) for i in range(50)])
    chain, index = Chain.of(diffusion.schedule, (steps + 1) / 1000), tensors[f"{respacing}.t"].numpy()
    times = chain.times[index]
    x0, eps = tensors["in.x_start"], tensors["in.noise"]

    x_t = diffusion.add_noise(x0, eps, times)
    torch.testing.assert_close(x_t, tensors[f"{respacing}.x_t"], rtol=0, atol=bound[f"{respacing}.x_t"])
    with torch.no_grad():
        network_time = torch.from_numpy(diffusion.network_time(times)).float()
        output = model(x_t, network_time, tensors["in.y"])
    mse = (output[:, :4] - diffusion.target(x0, eps, times)).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(mse, tensors[f"{respacing}.mse"], rtol=0, atol=bound[f"{respacing}.mse"])
    if name == "main":
        predicted_x0, _ = diffusion.split(output, x_t, times)
        vb = variational_bound(chain, index, x0, x_t, predicted_x0, output[:, 4:])
        torch.testing.assert_close(vb, tensors[f"{respacing}.vb"], rtol=0, atol=bound[f"{respacing}.vb"])
        loss = tensors[f"{respacing}.loss"]
        torch.testing.assert_close(mse + vb, loss, rtol=0, atol=bound[f"{respacing}.loss"])


CASES = [(spacing, case) for spacing in ("10", "ddim10") for case in ("p_sample", "ddim_eta0", "ddim_eta1")]
CASES += [("10", "p_sample_clip")]
CASES += [(spacing, case) for spacing in ("10", "ddim10") for case in ("p_sample_cfg3", "ddim_eta0_cfg3")]


@pytest.mark.parametrize(("spacing", "case"), CASES)
def test_trajectories_equal_the_reference(shared, spacing, case):
    tensors, description = load_golden(shared, "diffusion_sampling")
    model, diffusion = reference_dit(tensors, description), Diffusion(reference_diffusion(description))
    denoiser = TorchDenoiser(model, diffusion, (4, 8, 8), tuple("0123456789"))
    recorded = iter(tensors["in.noise_seq"])
    if case.endswith("_cfg3"):
        denoiser = guide(denoiser, description["cfg_scale"], channels=3)
        recorded = (noise[:4] for noise in tensors["in.noise_seq_cfg"])
    steps = tensors[f"{spacing}.timestep_map"].tolist()
    times = [(step + 1) / 1000 for step in reversed(steps)] + [0.0]
    states: list[torch.Tensor] = []
    common = {"noise": lambda: next(recorded), "watch": lambda t, state: states.append(state)}
    if case.startswith("ddim"):
        samplers.ddim(denoiser, tensors["in.z"], tensors["in.y"], times, eta=float("eta1" in case), **common)
    else:
        samplers.ddpm(denoiser, tensors["in.z"], tensors["in.y"], times, clip="clip" in case, **common)
    bound = description["tolerance_max_abs"][f"{spacing}.{case}"]
    torch.testing.assert_close(torch.stack(states), tensors[f"{spacing}.{case}"], rtol=0, atol=bound)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_runs_from_data_to_noise(name):
    schedule = SCHEDULES[name]
    times = np.linspace(0, 1, 501)
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    assert (alpha[0], sigma[0]) == (1, 0)
    assert alpha[-1] < 0.01
    assert sigma[-1] > 0.999
    assert (np.diff(alpha) < 0).all()
    assert (np.diff(sigma[:-1]) > 0).all()
    if name != "flow":
        np.testing.assert_allclose(alpha**2 + sigma**2, 1, atol=1e-12)
    for t, a, s in zip(times, alpha, sigma, strict=True):  # a float is treated as an array of one
        assert schedule.alpha(float(t)) == a
        assert type(schedule.alpha(float(t))) is float
        assert schedule.sigma(float(t)) == s


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_posterior_composes_to_the_marginal(name):
    """Drawing x_s from q(x_s | x_t, x0) with x_t from q(x_t | x0) gives q(x_s | x0)."""
    schedule = SCHEDULES[name]
    for t, s in [(0.9, 0.5), (0.5, 0.496), (0.1, 0.02), (0.3, 0.0)]:
        of_x0, of_x_t, variance, step_variance = schedule.posterior(t, s)
        assert of_x0 + of_x_t * schedule.alpha(t) == pytest.approx(schedule.alpha(s), rel=1e-9)
        assert variance + (of_x_t * schedule.sigma(t)) ** 2 == pytest.approx(
            schedule.sigma(s) ** 2, rel=1e-9, abs=1e-12
        )
        assert 0 <= variance <= step_variance


@pytest.mark.parametrize("process", PROCESSES, ids=process_id)
def test_split_inverts_target(process):
    generator = np.random.default_rng(0)
    x0, eps = generator.standard_normal((2, 6, 3, 4, 4))
    t = np.array([0.01, 0.1, 0.3, 0.5, 0.8, 0.95])
    for times in (t, *t.tolist()):
        x_t = process.add_noise(x0, eps, times)
        found = process.split(process.target(x0, eps, times), x_t, times)
        np.testing.assert_allclose(found[0], x0, atol=1e-9)
        np.testing.assert_allclose(found[1], eps, atol=1e-9)


class PointMass:
    """The exact denoiser of a data distribution that is a single point."""

    class_names = ()

    def __init__(self, diffusion: Diffusion, point: np.ndarray):
        self.diffusion, self.point, self.input_shape = diffusion, point, point.shape

    def __call__(self, x_t, t, labels):
        alpha, sigma = self.diffusion.schedule.alpha(t), self.diffusion.schedule.sigma(t)
        return self.diffusion.target(self.point, (x_t - alpha * self.point) / sigma, t) + 0 * x_t


@pytest.mark.parametrize("sampler", [samplers.ddim, samplers.ddpm])
@pytest.mark.parametrize("process", PROCESSES, ids=process_id)
@pytest.mark.parametrize("steps", [1, 7, 40])
def test_an_exact_denoiser_of_a_point_lands_on_it(process, sampler, steps):
    generator = np.random.default_rng(0)
    point = generator.standard_normal((3, 4, 4))
    denoiser = PointMass(process, point)
    x_t = generator.standard_normal((2, 3, 4, 4))
    times = samplers.time_grid(process.schedule, steps)
    found = sampler(denoiser, x_t, np.zeros(2), times, noise=lambda: generator.standard_normal(x_t.shape))
    np.testing.assert_allclose(found, np.broadcast_to(point, found.shape), atol=1e-5)


def test_ddpm_gives_the_data_its_variance():
    """On Gaussian data of standard deviation 0.5 the exact denoiser is linear; a thousand steps keep the spread."""
    process = Diffusion(DiffusionConfig())

    class Gaussian(PointMass):
        def __call__(self, x_t, t, labels):
            alpha, sigma = process.schedule.alpha(t), process.schedule.sigma(t)
            return sigma * x_t / (alpha**2 * 0.25 + sigma**2)  # E[eps | x_t]

    generator = np.random.default_rng(0)
    shape = (20_000, 1, 1, 1)
    times = samplers.time_grid(process.schedule, 1000)
    denoiser = Gaussian(process, np.zeros(shape[1:]))
    start = generator.standard_normal(shape)
    for sampler in (samplers.ddpm, samplers.ddim):
        found = sampler(denoiser, start, np.zeros(len(start)), times, noise=lambda: generator.standard_normal(shape))
        assert abs(found.std() - 0.5) < 0.02


def test_guidance_of_one_is_the_denoiser_itself_and_scale_is_linear():
    process = Diffusion(DiffusionConfig())
    calls = []

    class Labels(PointMass):
        class_names = ("a", "b")

        def __call__(self, x_t, t, labels):
            calls.append(len(x_t))
            return labels.reshape(-1, 1, 1, 1) + 0 * x_t

    denoiser = Labels(process, np.zeros((1, 2, 2)))
    assert guide(denoiser, 1.0) is denoiser
    output = guide(denoiser, 4.0)(np.zeros((3, 1, 2, 2)), 0.5, np.array([0, 1, 2]))
    assert calls == [6]  # one doubled batch
    np.testing.assert_allclose(output[:, 0, 0, 0], [2 + 4 * (0 - 2), 2 + 4 * (1 - 2), 2])


@pytest.mark.parametrize("name", ["linear", "cosine", "linear-250"])
def test_a_network_with_an_error_of_one_percent_gives_the_data_its_spread(name):
    """Dividing by cosine's last alpha, 5e-5, would multiply that error by hundreds: a spread of 1.6 instead of 0.5."""
    schedule = SCHEDULES[name]
    config = DiffusionConfig(schedule=name.split("-")[0], num_timesteps=schedule.num_steps)
    generator = np.random.default_rng(0)

    class Inexact(PointMass):
        def __call__(self, x_t, t, labels):
            alpha, sigma = schedule.alpha(t), schedule.sigma(t)
            exact = sigma * x_t / (alpha**2 * 0.25 + sigma**2)  # data of standard deviation 0.5
            return exact + 0.01 * generator.standard_normal(x_t.shape)

    denoiser = Inexact(Diffusion(config), np.zeros((1, 1, 1)))
    start = generator.standard_normal((20_000, 1, 1, 1))
    found = samplers.ddim(denoiser, start, np.zeros(20_000), samplers.time_grid(schedule, 50), noise=lambda: start)
    assert abs(found.std() - 0.5) < 0.04


def test_more_steps_than_the_schedule_has_are_refused():
    with pytest.raises(ValueError, match="has only 500"):
        samplers.time_grid(cosine(500), 501)
    for schedule in SCHEDULES.values():
        for steps in (1, 2, 9, 250):
            grid = samplers.time_grid(schedule, steps)
            assert len(grid) == steps + 1
            assert grid[0] == 1 or schedule.alpha(grid[0]) < 0.01  # cosine's own last alpha is 5e-5
            assert all(a > b for a, b in pairwise(grid))


@pytest.mark.parametrize(
    "wrong", [{"schedule": "flow", "prediction": "eps"}, {"schedule": "sigmoid"}, {"prediction": "z"}]
)
def test_wrong_processes_are_refused(wrong):
    with pytest.raises(ValueError, match=next(reversed(wrong))):
        DiffusionConfig(**wrong)
