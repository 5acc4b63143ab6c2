"""Every sampler against the reference implementations, and the laws that a solver keeps: order, exactness, its grid."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from math import cos, log2

import numpy as np
import pytest
import torch
from golden import load_golden, reference_dit

from ditcli.config import DiffusionConfig
from ditcli.denoisers.torch_denoiser import TorchDenoiser
from ditcli.diffusion import samplers
from ditcli.diffusion.guidance import guide
from ditcli.diffusion.process import Diffusion
from ditcli.diffusion.samplers.ode import adams_bashforth
from ditcli.diffusion.samplers.times import noise_level, time_of
from ditcli.diffusion.schedule import cosine, flow, linear_beta

PROCESSES = {
    "linear-eps": Diffusion(DiffusionConfig()),
    "linear-v": Diffusion(DiffusionConfig(prediction="v")),
    "cosine-x0": Diffusion(DiffusionConfig(schedule="cosine", num_timesteps=500, prediction="x0")),
    "flow": Diffusion(DiffusionConfig(schedule="flow", prediction="flow")),
    "flow-x0": Diffusion(DiffusionConfig(schedule="flow", prediction="x0")),
}
MULTISTEP = {f"lms{order}": partial(samplers.linear_multistep, order=order) for order in (1, 2, 3, 4)}
DETERMINISTIC = {
    "ddim": samplers.ddim,
    "euler": samplers.euler,
    "heun": samplers.heun,
    "midpoint": samplers.midpoint,
    "rk4": samplers.runge_kutta_4,
    "dpm++2m": samplers.dpm_solver,
    "dpm++2m-heun": partial(samplers.dpm_solver, variant="heun"),
    "unipc": samplers.unipc,
    **MULTISTEP,
}
STOCHASTIC = {
    "ddpm": samplers.ddpm,
    "ddim-eta1": partial(samplers.ddim, eta=1.0),
    "dpm++2m-sde": samplers.dpm_solver_sde,
}
CALLS = {"heun": 2, "midpoint": 2, "rk4": 4}


class Network:
    """A denoiser of `function(x_t, t, network_time)`."""

    class_names = ()
    input_shape = (4, 6, 6)

    def __init__(self, diffusion: Diffusion, function):
        self.diffusion, self.function, self.calls = diffusion, function, 0

    def __call__(self, x_t, t, labels):
        self.calls += 1
        return self.function(x_t, t, self.diffusion.network_time(t))


def point_mass(process: Diffusion, point) -> Network:
    """The exact denoiser of data that is a single point; at t = 0 it has the noise of the line that led there."""
    latest = []

    def output(x_t, t, _):
        alpha, sigma = process.schedule.alpha(t), process.schedule.sigma(t)
        latest[:] = [(x_t - alpha * point) / sigma] if sigma else latest
        return process.target(point + 0 * x_t, latest[0], t)

    return Network(process, output)


def gaussian(process: Diffusion, spread: float) -> Network:
    """The exact denoiser of data from N(0, spread^2)."""

    def output(x_t, t, _):
        alpha, sigma = process.schedule.alpha(t), process.schedule.sigma(t)
        x0 = (alpha * spread**2 / (alpha**2 * spread**2 + sigma**2)) * x_t
        eps = (sigma / (alpha**2 * spread**2 + sigma**2)) * x_t
        return process.target(x0, eps, t)

    return Network(process, output)


def run(sampler, denoiser, x_t, times, noise=None, watch=None):
    return sampler(denoiser, x_t, np.zeros(len(x_t), np.int64), times, noise=noise, watch=watch)


# Against the references

DIFFUSERS = {
    "ddim": samplers.ddim,
    "ddim_v": samplers.ddim,
    "ddim_trailing": samplers.ddim,
    "dpmpp2m_epsilon": samplers.dpm_solver,
    "dpmpp2m_v_prediction": samplers.dpm_solver,
    "dpmpp2m_heun": partial(samplers.dpm_solver, variant="heun"),
    "unipc": samplers.unipc,
    "unipc_v": samplers.unipc,
    "heun": samplers.heun,
    "heun_v": samplers.heun,
    "flow_euler_shift1": samplers.euler,
    "flow_euler_shift3": samplers.euler,
}


@pytest.mark.parametrize("case", DIFFUSERS)
def test_trajectories_equal_those_of_diffusers(shared, case):
    tensors, description = load_golden(shared, "schedulers")
    facts = description["cases"][case]
    named = {"epsilon": "eps", "v_prediction": "v", None: "flow"}
    prediction = named[facts["full_config"].get("prediction_type")]
    schedule = "flow" if prediction == "flow" else "linear"
    process = Diffusion(DiffusionConfig(schedule=schedule, prediction=prediction))
    visited = [t for i, t in enumerate(facts["timesteps"]) if i == 0 or t != facts["timesteps"][i - 1]]
    if prediction == "flow":
        times = [float(sigma) for sigma in tensors[f"{case}.sigmas"]]
    else:
        times = [(t + 1) / 1000 for t in visited] + [0.0]
    denoiser = Network(process, lambda x, t, network_time: 0.3 * x * cos(network_time / 1000) + 0.1)
    start = tensors["in.x_T"]
    expected, scale = tensors[f"{case}.x"][1:], lambda t: 1.0
    if case.startswith("heun"):  # in x / alpha, with the state between its two calls
        scale, start = process.schedule.alpha, start * facts["init_noise_sigma"] * process.schedule.alpha(1.0)
        expected = torch.cat([expected[1::2], expected[-1:]])
    states = []
    run(DIFFUSERS[case], denoiser, start, times, watch=lambda t, state: states.append(state / scale(t)))
    assert denoiser.calls == facts["model_calls"]
    bound = description["tolerance_max_abs"][f"{case}.x"]
    torch.testing.assert_close(torch.stack(states), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("case", ["ddim", "ddim_trailing"])
def test_leading_and_trailing_grids_are_those_of_diffusers(shared, case):
    facts = load_golden(shared, "schedulers")[1]["cases"][case]
    spacing = facts["full_config"]["timestep_spacing"]
    grid = samplers.time_grid(linear_beta(1000), 10, spacing)
    assert [round(t * 1000) - 1 for t in grid[:-1]] == facts["timesteps"]
    for steps in (1, 3, 7, 999, 1000):
        grid = samplers.time_grid(linear_beta(1000), steps, spacing)
        assert len(grid) == steps + 1
        assert 1 >= grid[0] > grid[-2] >= 0.001 or steps == 1


@pytest.mark.parametrize("points", [10, 11])
@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        ("euler", samplers.euler),
        ("heun2", samplers.heun),
        ("midpoint", samplers.midpoint),
        ("rk4", samplers.runge_kutta_4),
        ("euler_cfg", samplers.euler),
    ],
)
def test_trajectories_equal_those_of_sit(shared, name, sampler, points):
    """SiT's time runs the other way, from noise at 0 to data at 1, unscaled, and its velocity with it."""
    tensors, description = load_golden(shared, "sit_transport")
    model = reference_dit(tensors, description)

    def velocity(x, network_time, labels):
        return -model(x, 1 - network_time / 1000, labels)[:, :4]

    process = Diffusion(DiffusionConfig(schedule="flow", prediction="flow"))
    module = torch.nn.Module()
    module.forward, module.weight = velocity, torch.nn.Parameter(torch.zeros(1))
    denoiser = TorchDenoiser(module, process, (4, 8, 8), tuple("0123456789"))
    if name.endswith("cfg"):
        denoiser = guide(denoiser, description["cfg_scale"], channels=3)
    times = [float(1 - t) for t in np.linspace(0, 1, points)]
    states = [tensors["in.z"]]
    sampler(denoiser, tensors["in.z"], tensors["in.y"], times, noise=None, watch=lambda t, state: states.append(state))
    bound = description["tolerance_max_abs"][f"out.ode_{name}_n{points}"]
    torch.testing.assert_close(torch.stack(states), tensors[f"out.ode_{name}_n{points}"], rtol=0, atol=bound)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_the_stochastic_solver_equals_that_of_diffusers():
    schedulers = pytest.importorskip("diffusers.schedulers.scheduling_dpmsolver_multistep")
    reference = schedulers.DPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++", beta_start=1e-4, beta_end=0.02, final_sigmas_type="zero"
    )
    reference.set_timesteps(8)
    generator = torch.Generator().manual_seed(0)
    start, *noises = torch.randn((9, 2, 4, 6, 6), generator=generator)

    def output(x, network_time):
        return 0.3 * x * cos(network_time / 1000) + 0.1

    expected, x = [], start
    for i, t in enumerate(reference.timesteps):
        x = reference.step(output(x, t.item()), t, x, variance_noise=noises[i]).prev_sample
        expected.append(x)
    denoiser = Network(PROCESSES["linear-eps"], lambda x, t, network_time: output(x, network_time))
    times, states, fresh = [(t.item() + 1) / 1000 for t in reference.timesteps], [], iter(noises)
    run(samplers.dpm_solver_sde, denoiser, start, [*times, 0.0], lambda: next(fresh), lambda t, s: states.append(s))
    bound = 5e-5 * max(state.abs().max().item() for state in expected)
    torch.testing.assert_close(torch.stack(states), torch.stack(expected), rtol=0, atol=bound)


# Laws


@pytest.mark.parametrize(
    ("name", "order"),
    [
        *[("ddim", 1), ("euler", 1), ("heun", 2), ("midpoint", 2), ("rk4", 4), ("dpm++2m", 2), ("dpm++2m-heun", 2)],
        *[("unipc", 2), ("lms1", 1), ("lms2", 2), ("lms3", 3), ("lms4", 4)],
    ],
)
@pytest.mark.parametrize("process", ["linear-eps", "linear-v", "flow"])
def test_the_error_falls_with_the_order(process, name, order):
    """Gaussian data has a linear ODE whose solution is known: its scale is that of x_t at every time."""
    process, spread, (begin, end) = PROCESSES[process], 0.4, (0.8, 0.2)

    def width(t: float) -> float:
        return float(np.hypot(process.schedule.alpha(t) * spread, process.schedule.sigma(t)))

    counts = (15, 30, 60) if name == "rk4" else (60, 120, 240)  # soon the former's error is that of float64
    errors = []
    for steps in counts:
        times = [float(t) for t in np.linspace(begin, end, steps + 1)]
        if name in ("lms3", "lms4"):  # they start with an Euler step: let it be as long as the others squared
            step = times[0] - times[1]
            times[1:1] = [begin - step * 2.0**-k for k in range(round(-log2(step)) + 1, 0, -1)]
        found = run(DETERMINISTIC[name], gaussian(process, spread), np.ones((1, 1, 1, 1)), times)
        errors.append(abs(float(found[0, 0, 0, 0]) - width(end) / width(begin)))
    slopes = [log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert slopes[-1] > order - 0.35, slopes
    if name in ("ddim", "euler"):
        assert slopes[-1] < 1.3


@pytest.mark.parametrize("name", [*DETERMINISTIC, *STOCHASTIC])
@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("steps", [1, 2, 7, 30])
def test_an_exact_denoiser_of_a_point_lands_on_it(process, name, steps):
    process, generator = PROCESSES[process], np.random.default_rng(0)
    point, x_t = generator.standard_normal((2, 1, 3, 2, 2))
    spacings = ["uniform", "quadratic"]
    spacings += ["karras", "leading", "trailing"] if process.schedule.num_steps else []
    for spacing in spacings:
        times = samplers.time_grid(process.schedule, steps, spacing)
        sampler = (DETERMINISTIC | STOCHASTIC)[name]
        found = run(sampler, point_mass(process, point), x_t, times, lambda: generator.standard_normal(x_t.shape))
        np.testing.assert_allclose(found, point, atol=1e-6)


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("process", PROCESSES)
def test_every_sampler_makes_the_calls_it_says_and_visits_every_time(process, name):
    process, visited = PROCESSES[process], []
    denoiser = gaussian(process, 0.5)
    times = samplers.time_grid(process.schedule, 6)
    run(DETERMINISTIC[name], denoiser, np.ones((1, 1, 1, 1)), times, watch=lambda t, state: visited.append(t))
    assert visited == times[1:]
    per_step = CALLS.get(name, 1)
    ends_in_data = process.config.prediction == "flow"
    assert denoiser.calls == 6 * per_step - (0 if ends_in_data else per_step - 1)


@pytest.mark.parametrize("name", [*DETERMINISTIC, *STOCHASTIC])
def test_numpy_and_torch_agree_and_stay_in_float32(name):
    process = PROCESSES["flow" if name in CALLS else "linear-v"]
    times = samplers.time_grid(process.schedule, 9)
    start, *noises = np.random.default_rng(0).standard_normal((10, 2, 1, 4, 4), dtype=np.float32)
    sampler = (DETERMINISTIC | STOCHASTIC)[name]
    found = []
    for convert in (np.asarray, torch.from_numpy):
        fresh = iter(noises)
        result = run(sampler, gaussian(process, 0.5), convert(start), times, lambda f=fresh, c=convert: c(next(f)))
        found.append(np.asarray(result))
    assert found[0].dtype == found[1].dtype == np.float32
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)


@pytest.mark.parametrize("process", PROCESSES)
def test_euler_is_ddim_and_the_multistep_method_of_order_one(process):
    process, x_t = PROCESSES[process], np.random.default_rng(0).standard_normal((3, 1, 2, 2))
    times = samplers.time_grid(process.schedule, 12)
    expected = run(samplers.ddim, gaussian(process, 0.5), x_t, times)
    for sampler in (samplers.euler, MULTISTEP["lms1"]):
        np.testing.assert_allclose(run(sampler, gaussian(process, 0.5), x_t, times), expected, rtol=1e-9)


@pytest.mark.parametrize("name", STOCHASTIC)
@pytest.mark.parametrize("process", ["linear-eps", "flow"])
def test_fresh_noise_keeps_the_spread_of_the_data(process, name):
    process, generator = PROCESSES[process], np.random.default_rng(0)
    x_t = generator.standard_normal((20_000, 1, 1, 1))
    times = samplers.time_grid(process.schedule, 200)
    found = run(STOCHASTIC[name], gaussian(process, 0.5), x_t, times, lambda: generator.standard_normal(x_t.shape))
    assert abs(found.std() - 0.5) < 0.02
    assert abs(np.corrcoef(found.ravel(), x_t.ravel())[0, 1]) < 0.5  # where it came from is half forgotten


def test_adams_bashforth_has_the_textbook_weights_and_integrates_cubics_on_any_grid():
    textbook = [[1], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]
    for weights in textbook:
        np.testing.assert_allclose(adams_bashforth([-float(i) for i in range(len(weights))], 1.0), weights)
    nodes, end = [0.3, 0.55, 1.7, 4.0], 0.1
    for power in range(4):
        integral = (end ** (power + 1) - nodes[0] ** (power + 1)) / (power + 1)
        found = sum(w * u**power for w, u in zip(adams_bashforth(nodes, end), nodes, strict=True))
        assert found == pytest.approx(integral)


# Grids


@pytest.mark.parametrize("schedule", [linear_beta(1000), cosine(500), linear_beta(50)])
def test_a_noise_level_has_one_time(schedule):
    for t in np.linspace(1 / schedule.num_steps, 1, 40):
        assert time_of(schedule, noise_level(schedule, float(t))) == pytest.approx(t, rel=1e-9)
    assert time_of(flow(), noise_level(flow(), 0.3)) == pytest.approx(0.3)


@pytest.mark.parametrize("spacing", ["uniform", "quadratic", "karras", "leading", "trailing"])
@pytest.mark.parametrize("schedule", [linear_beta(1000), cosine(500)])
def test_a_grid_falls_within_the_steps_of_a_schedule(schedule, spacing):
    for steps in (1, 2, 3, 10, 123, schedule.num_steps):
        grid = samplers.time_grid(schedule, steps, spacing)
        assert len(grid) == steps + 1
        assert all(a > b for a, b in pairwise(grid))
        assert grid[-1] == 0.0
        assert grid[0] <= 1
        assert grid[-2] >= 1 / schedule.num_steps * (1 - 1e-9)
        assert all(type(t) is float for t in grid)


def test_the_karras_grid_is_its_definition():
    schedule = linear_beta(1000)
    levels = [noise_level(schedule, t) for t in samplers.time_grid(schedule, 20, "karras")[:-1]]
    roots = np.array(levels) ** (1 / 7)
    np.testing.assert_allclose(np.diff(roots), np.diff(roots)[0], rtol=1e-6)
    assert levels[0] == pytest.approx(noise_level(schedule, 1.0))
    assert levels[-1] == pytest.approx(noise_level(schedule, 0.001))


def test_a_shift_multiplies_every_noise_level():
    plain, shifted = samplers.time_grid(flow(), 10), samplers.time_grid(flow(), 10, shift=3.0)
    assert (shifted[0], shifted[-1]) == (1.0, 0.0)
    for t, moved in zip(plain[1:-1], shifted[1:-1], strict=True):
        assert noise_level(flow(), moved) == pytest.approx(3 * noise_level(flow(), t))


@pytest.mark.parametrize(
    ("schedule", "settings", "reason"),
    [
        (flow(), {"spacing": "karras"}, "boundless at t = 1"),
        (flow(), {"spacing": "leading"}, "has no steps"),
        (flow(), {"spacing": "trailing"}, "has no steps"),
        (linear_beta(1000), {"shift": 3.0}, "fixed noise level"),
        (linear_beta(5), {"spacing": "karras"}, "has only 5"),
    ],
)
def test_a_refused_grid_says_why(schedule, settings, reason):
    with pytest.raises(ValueError, match=reason):
        samplers.time_grid(schedule, 10, **settings)


def test_strength_takes_the_end_of_a_grid():
    times = samplers.time_grid(flow(), 10)
    assert samplers.from_strength(times, 1.0) == times
    assert samplers.from_strength(times, 0.0) == [0.0]
    assert samplers.from_strength(times, 0.6) == times[4:]
