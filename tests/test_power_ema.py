"""Averages that were not tracked are those that would have been."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tiny import assert_same_run, run_tiny

from ditcli.cli.main import cli
from ditcli.config import EmaConfig
from ditcli.errors import ModelNotFoundError, SettingError
from ditcli.models.files import read_tensors
from ditcli.models.weights import load_dit
from ditcli.runs import RunDir, state_file
from ditcli.training.power_ema import (
    SIGMAS,
    PowerAverages,
    exponent,
    power_decay,
    reconstruct,
    snapshot_file,
    snapshot_steps,
    solve,
)


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory):
    os.environ["DITCLI_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    del os.environ["DITCLI_CACHE"]


def direct(weights: list[torch.Tensor], sigma_rel: float) -> torch.Tensor:
    """The average of the weights after each step, by the definition of its profile: tau^gamma over (k - 1, k]."""
    edges = (np.arange(len(weights) + 1) / len(weights)) ** (exponent(sigma_rel) + 1)
    return sum(float(share) * weight.double() for share, weight in zip(np.diff(edges), weights, strict=True))


def test_exponents_decays_and_coefficients_are_those_of_the_reference():
    """Numbers of NVlabs/edm2 training/phema.py at d8299d3: std_to_exp, power_function_beta and the coefficients."""
    found = [exponent(sigma) for sigma in (0.05, 0.07, 0.1, 0.2)]
    assert found == pytest.approx([16.972198602303447, 11.244939447857924, 6.937203937601809, 1.8262137798958404])
    assert power_decay(0.05, 1000) == pytest.approx(0.9821795062966565, rel=1e-12)
    assert power_decay(0.1, 1000) == pytest.approx(0.9920902726450789, rel=1e-12)
    steps, sigmas = np.repeat([100.0, 200, 300, 400], 2), np.tile(SIGMAS, 4)
    near = [1.870172736059191e-08, -4.5939870751597263e-07, 8.35073934947453e-05, -0.0005680480605871114]
    near += [0.010685739328585214, -0.04392123564681014, 0.4345671401857437, 0.5991533374965538]
    assert solve(steps, sigmas, 400, 0.07)[0] == pytest.approx(near, abs=1e-9)
    far = [-0.000562035107942407, 0.001944069303754636, -0.013147865594997863, 0.038019966635525246]
    far += [-0.07795837215021036, 0.20040864007962375, -0.2640619707998659, 1.115357567634113]
    assert solve(steps, sigmas, 400, 0.15)[0] == pytest.approx(far, abs=1e-9)


def test_the_width_of_a_profile_is_sigma_rel():
    tau = (np.arange(200_000) + 0.5) / 200_000
    for sigma in (0.03, 0.1, 0.25):
        profile = tau ** exponent(sigma)
        mean = np.average(tau, weights=profile)
        assert np.sqrt(np.average((tau - mean) ** 2, weights=profile)) == pytest.approx(sigma, rel=1e-3)


def test_an_average_that_was_stored_is_found_again_and_more_snapshots_fit_better():
    misfits = []
    for num in (2, 8, 32):
        steps = np.repeat(np.arange(1, num + 1) * 3200.0 / num, 2)
        sigmas = np.tile(SIGMAS, num)
        found, misfit = solve(steps, sigmas, 3200, SIGMAS[0])
        assert found == pytest.approx(np.eye(2 * num)[-2], abs=1e-6)
        assert misfit < 1e-6
        found, misfit = solve(steps, sigmas, 3200, 0.07)
        assert found.sum() == pytest.approx(1.0)
        misfits.append(misfit)
    assert misfits[0] > misfits[1] > misfits[2]
    assert misfits[2] < 0.01


@pytest.mark.parametrize("sigma_rel", [0.04, 0.05, 0.07, 0.1, 0.15])
def test_any_average_of_a_random_walk_is_reconstructed_as_if_it_had_been_tracked(sigma_rel):
    torch.manual_seed(0)
    network, steps, every = torch.nn.Linear(8, 8).double(), 640, 20
    averages, weights, stored = PowerAverages(network), [], []
    for step in range(1, steps + 1):
        with torch.no_grad():
            network.weight += torch.randn_like(network.weight)
        averages.update(step)
        weights.append(network.weight.detach().clone())
        if step % every == 0:
            stored += [averages.values[f"ema-{sigma}.weight"].clone() for sigma in SIGMAS]
    for sigma, found in zip(SIGMAS, stored[-2:], strict=True):  # what is tracked has the profile
        torch.testing.assert_close(found, direct(weights, sigma), rtol=1e-9, atol=1e-9)
    ends = np.repeat(np.arange(every, steps + 1, every, dtype=float), 2)
    for last in (steps, steps // 2):  # ends at any snapshot
        num = 2 * last // every
        coefficients, _ = solve(ends[:num], np.tile(SIGMAS, num // 2), last, sigma_rel)
        found = sum(float(c) * value for c, value in zip(coefficients, stored, strict=False))
        expected = direct(weights[:last], sigma_rel)
        apart = direct(weights[:last], 0.05) - direct(weights[:last], 0.10)
        assert (found - expected).norm() < 0.05 * apart.norm()


def test_the_command_writes_the_average_that_training_would_have_tracked(tmp_path):
    settings = {"steps": 12, "checkpoint_every": 1, "keep_checkpoints": 0, "ema_snapshot_every": 2}
    run = run_tiny(tmp_path / "run", **settings)
    assert snapshot_steps(run) == [2, 4, 6, 8, 10, 12]
    done = CliRunner().invoke(cli, ["ema", str(run.path), "--sigma-rel", "0.07"], catch_exceptions=False)
    path = run.path / "ema-0.07.safetensors"
    assert done.stdout.strip() == str(path)
    found, (model, config) = read_tensors(path), load_dit(path)
    raw = [read_tensors(state_file(run.checkpoint_file(step))) for step in range(1, 13)]
    assert config.step == 12
    for name, value in found.items():
        weights = [state[f"model.{name}"] for state in raw]
        if torch.equal(weights[0], weights[-1]):  # what is not trained
            assert torch.equal(value, weights[-1])
            continue
        error = (value - direct(weights, 0.07)).norm() / (weights[-1] - weights[0]).double().norm()
        assert error < 5e-3, name
    assert torch.equal(model.state_dict()[name], value)
    earlier = reconstruct(
        EmaConfig(run=str(run.path), sigma_rel=0.05, step=8, out=str(tmp_path / "a" / "b.safetensors"))
    )
    stored = read_tensors(snapshot_file(run, 8))
    for name, value in read_tensors(earlier).items():
        torch.testing.assert_close(value, stored.get(f"ema-0.05.{name}", value), atol=1e-6, rtol=1e-6)


def test_snapshots_do_not_depend_on_how_a_run_is_cut(tmp_path):
    settings = {"ema_snapshot_every": 5, "checkpoint_every": 5, "log_every": 5}
    whole, cut = run_tiny(tmp_path / "whole", **settings), RunDir(tmp_path / "cut")
    run_tiny(cut.path, steps=10, **settings)
    snapshot_file(cut, 10).unlink()  # as if killed just before
    snapshot_file(cut, 5).with_name("step-00000011.safetensors").write_bytes(b"of what comes again")
    run_tiny(cut.path, **settings)
    assert_same_run(whole, cut)
    assert snapshot_steps(whole) == snapshot_steps(cut) == [5, 10, 12]
    for step in (5, 10, 12):
        one, other = (read_tensors(snapshot_file(run, step)) for run in (whole, cut))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_cannot_be_reconstructed_is_named(tmp_path):
    run = run_tiny(tmp_path / "run", steps=1)
    with pytest.raises(ModelNotFoundError, match="--ema-snapshot-every"):
        reconstruct(EmaConfig(run=str(run.path)))
    with pytest.raises(ModelNotFoundError, match="there is no run nowhere"):
        reconstruct(EmaConfig(run="nowhere"))
    for sigma_rel in (0.0, 0.3):
        with pytest.raises(SettingError, match=f"sigma-rel is {sigma_rel}"):
            EmaConfig(sigma_rel=sigma_rel)
    run = run_tiny(tmp_path / "other", steps=2, ema_snapshot_every=1)
    with pytest.raises(SettingError, match="the last are those of 1, 2"):
        reconstruct(EmaConfig(run=str(run.path), step=3))
