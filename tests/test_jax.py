"""The JAX runtime beside torch's: the same outputs, the same pictures, the same weights learnt."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from exports import PIXELS, TINY, make_latent_run, make_run
from test_conv import TINY as CONV
from test_dit import MODERN, inputs, random_dit
from test_dit import TINY as DIT

from ditcli.config import Conditioning, SampleConfig, TrainConfig
from ditcli.errors import SettingError
from ditcli.images import load_square
from ditcli.models.files import read_tensors
from ditcli.sampling import sample
from ditcli.training.train import train

jax = pytest.importorskip("jax", reason="needs JAX: pip install 'ditcli[jax]'")

from ditcli.denoisers.jax_denoiser import open_denoiser, open_device  # noqa: E402
from ditcli.models.jax_dit import apply  # noqa: E402

jitted = jax.jit(apply, static_argnames="config")


@pytest.mark.parametrize("parts", [{}, MODERN], ids=["paper", "modern"])
@pytest.mark.parametrize("conv", [False, True], ids=["dit", "conv-dit"])
@pytest.mark.parametrize("conditioning", get_args(Conditioning))
def test_every_network_equals_torch(conditioning, conv, parts):
    config = dataclasses.replace(CONV if conv else DIT, conditioning=conditioning, mlp_norm_eps=1e-5, **parts)
    network = random_dit(config)
    side = 2 * config.stride
    x, t, labels = inputs(config, height=side, width=3 * side)
    weights = {name: jax.numpy.asarray(value.numpy()) for name, value in network.state_dict().items()}
    found = jitted(weights, config, *(jax.numpy.asarray(array.numpy()) for array in (x, t, labels)))
    with torch.no_grad():
        expected = network(x, t, labels)
    assert expected.abs().max() > 0.1
    np.testing.assert_allclose(np.asarray(found), expected.numpy(), rtol=0, atol=2e-5)


def drawn(model: Path, out: Path, **changes) -> np.ndarray:
    settings = {"model": str(model), "out": str(out), "steps": 5, "num": 2, "device": "cpu"} | changes
    images = sample(SampleConfig(**settings)).images
    return np.stack([load_square(Path(image.path), 8) for image in images]).astype(int)


@pytest.mark.parametrize(
    "changes",
    [{}, {"sampler": "unipc", "cfg_rescale": 0.5, "cfg_interval": (0.2, 0.9)}, {"sampler": "ddpm", "cfg": 1.0}],
    ids=["ddim", "unipc", "ddpm"],
)
def test_the_same_pictures_as_torch(tmp_path, changes):
    run = make_run(tmp_path / "run").path
    expected = drawn(run, tmp_path / "torch", **changes)
    assert expected.std() > 20
    found = drawn(run, tmp_path / "jax", backend="jax", **changes)
    assert np.abs(found - expected).max() <= 1
    assert np.abs(found - drawn(run, tmp_path / "raw", ema=False, backend="jax", **changes)).mean() > 5


def test_latents_with_a_learned_variance_and_every_wrapper(tmp_path):
    run = make_latent_run(tmp_path, TINY).path
    walk = {"interpolate": "labels", "num": 3, "sampler": "ddpm", "steps": 4}
    difference = drawn(run, tmp_path / "torch", **walk) - drawn(run, tmp_path / "jax", backend="jax", **walk)
    assert np.abs(difference).mean() < 1


def test_a_denoiser_of_one_device(tmp_path):
    denoiser, config = open_denoiser(make_run(tmp_path / "run").newest_checkpoint(), device="cpu")
    assert denoiser.input_shape == (3, 8, 8)
    assert denoiser.class_names == config.class_names == PIXELS.class_names
    states = denoiser.from_numpy(np.zeros((2, 3, 8, 8), dtype=np.float32))
    output = denoiser(states, 0.5, denoiser.from_numpy(np.array([0, 2])))
    assert output.device == states.device == open_device("cpu")
    assert denoiser.to_numpy(output).shape == (2, 3, 8, 8)
    with pytest.raises(SettingError, match=r"device is 'tpu:9', but JAX .* sees cpu:0"):
        open_device("tpu:9")


def test_what_it_cannot_do_is_refused(tmp_path):
    run = make_run(tmp_path / "run").path
    with pytest.raises(SettingError, match="the jax backend computes in fp32"):
        drawn(run, tmp_path, backend="jax", precision="bf16")
    with pytest.raises(SettingError, match="only the torch backend sees single blocks"):
        drawn(run, tmp_path, backend="jax", cache=2)


def test_training_in_jax_learns_the_weights_that_torch_learns(tmp_path):
    """The same start, batches and noise: after some steps the averages differ by rounding alone."""
    pytest.importorskip("optax", reason="needs optax: pip install 'ditcli[jax]'")
    script = Path(__file__).resolve().parents[1] / "scripts" / "mnist_jax.py"
    spec = importlib.util.spec_from_file_location("mnist_jax", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = TrainConfig.from_dict(
        module.PRESETS["mnist"]
        | {"data": "fashion-mnist", "width": 16, "depth": 1, "num_heads": 2, "batch_size": 8, "steps": 6}
        | {"warmup_steps": 2, "weight_decay": 0.01, "sample_every": 0, "device": "cpu", "precision": "fp32"}
    )
    in_torch = train(dataclasses.replace(config, out=str(tmp_path / "torch")))
    in_jax = module.train_in_jax(dataclasses.replace(config, out=str(tmp_path / "jax")))
    expected, found = (read_tensors(run.newest_checkpoint()) for run in (in_torch, in_jax))
    assert expected.keys() == found.keys()
    first = module.new_state(config, module.prepare(config).model, torch.device("cpu")).model.state_dict()
    for name, value in expected.items():
        # Adam moves a weight whose gradient is rounding by as much as any other.
        close = (found[name] - value).abs() < 1e-5 + 0.02 * (value - first[name]).abs()
        assert close.float().mean() > 0.98, name
    pictures = [
        drawn(in_jax.path, tmp_path / backend, backend=backend, labels=("bag",)) for backend in ("torch", "jax")
    ]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    with pytest.raises(module.ResumeError, match="holds a run already"):
        module.train_in_jax(dataclasses.replace(config, out=str(tmp_path / "jax")))
