"""Models of pixels, without a VAE: digits of 28 x 28 and pictures of 64 x 64 in patches of 4 and 8."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ditcli.config import SampleConfig, TrainConfig
from ditcli.errors import ResumeError, SettingError
from ditcli.images import read_image
from ditcli.runs import read_model_config
from ditcli.sampling import sample
from ditcli.training.train import train

ROOT = Path(__file__).resolve().parents[1]
TINY = {
    "data": "fashion-mnist", "pixels": True, "width": 32, "depth": 1, "num_heads": 2, "batch_size": 4, "steps": 2,
    "device": "cpu", "precision": "fp32", "sample_every": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("size", "patch", "prediction", "variance"),
    [(28, 2, "eps", True), (28, 4, "x0", False), (64, 4, "x0", False), (64, 8, "eps", True)],
)
def test_digits_and_larger_pictures_train_and_draw(tmp_path, size, patch, prediction, variance):
    config = TrainConfig(image_size=size, patch_size=patch, prediction=prediction, out=str(tmp_path / "run"), **TINY)
    run = train(config)
    model = read_model_config(run.newest_checkpoint())
    assert model.dit.input_size == (size, size)
    assert model.dit.num_tokens == (size // patch) ** 2
    assert (model.codec, model.diffusion.learn_sigma) == ("pixels", variance)
    drawn = sample(SampleConfig(model=str(run.path), labels=("bag",), steps=2, out=str(tmp_path / "drawn")))
    assert read_image(Path(drawn.images[0].path)).size == (size, size)


def test_without_a_named_size_pixels_get_as_many_tokens_as_latents():
    for size, patch in [(28, 2), (32, 2), (64, 4), (128, 8), (256, 16), (512, 32)]:
        config = TrainConfig(data="x", pixels=True, image_size=size)
        assert config.model == f"DiT-B/{patch}"
        assert config.dit(input_shape=(3, size, size), num_classes=2).num_tokens <= 256
    assert TrainConfig(data="x", pixels=True, image_size=64, patch_size=8).model_shape()["patch_size"] == 8
    assert TrainConfig(data="x").model == "DiT-B/2"
    with pytest.raises(SettingError, match="image-size is 30, but must be a multiple of 4, the patch size"):
        TrainConfig(data="x", pixels=True, image_size=30, patch_size=4)


def test_a_patch_of_8_sees_the_whole_of_it(tmp_path):
    """A pixel goes nowhere else than into its own patch, and comes back from it to its own place."""
    import torch
    from test_dit import random_dit

    config = TrainConfig(image_size=64, patch_size=8, **TINY)
    network = random_dit(dataclasses.replace(config.dit(input_shape=(3, 64, 64), num_classes=2), depth=1))
    x = torch.randn(1, 3, 64, 64, requires_grad=True)
    tokens = network.x_embedder(x)
    assert tokens.shape == (1, 64, 32)
    tokens[0, 9].sum().backward()  # the second patch of the second row
    assert x.grad is not None
    seen = x.grad.abs().sum((0, 1)).nonzero()
    assert (seen.min(0).values.tolist(), seen.max(0).values.tolist()) == ([8, 8], [15, 15])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_digits_are_read_as_what_was_asked_for(shared, tmp_path, monkeypatch):
    """A fifth of the preset's training; the whole of it is for scripts/mnist.sh."""
    monkeypatch.setenv("DITCLI_CACHE", str(tmp_path / "cache"))
    mnist, run = str(shared / "data" / "mnist"), str(tmp_path / "run")
    ditcli = [sys.executable, "-m", "ditcli"]
    for words in (
        ["train", "--data", mnist, "--preset", "mnist", "--steps", "1500", "--sample-every", "0", "--out", run],
        ["sample", "--model", run, "--cfg", "3", "--steps", "20", "--num", "10", "--out", f"{run}/digits"],
    ):
        done = subprocess.run([*ditcli, *words], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    reader = [sys.executable, str(ROOT / "scripts" / "read_digits.py"), mnist, f"{run}/digits"]
    done = subprocess.run([*reader, "--at-least", "0.6"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    print(result)
    assert result["drawn"] == 100
    assert result["real"] > 0.97  # what the classifier is worth
    wrong = subprocess.run([*reader, "--at-least", "1.01"], capture_output=True, text=True, cwd=ROOT)
    assert wrong.returncode == 1
    assert "are wanted" in wrong.stderr
    assert np.mean(list(result["of_each_digit"].values())) == pytest.approx(result["right"], abs=0.01)


def test_of_pixels_a_flow_learns_the_picture_unless_told_otherwise():
    flow = {"data": "x", "schedule": "flow", "image_size": 32}
    for changes, expected in (
        ({"pixels": True}, "x0"),
        ({"pixels": True, "prediction": "flow"}, "flow"),
        ({}, "flow"),  # latents
        ({"model": "conv-dit"}, "flow"),
    ):
        assert TrainConfig.from_dict(flow | changes).diffusion().prediction == expected


def test_a_run_of_another_prediction_is_refused_until_that_is_given(tmp_path):
    settings = TINY | {"image_size": 28, "patch_size": 4, "schedule": "flow", "out": str(tmp_path / "run")}
    run = train(TrainConfig(**settings))
    train(TrainConfig(**settings, prediction="x0"))  # what was left open, said
    about = json.loads(run.config_file.read_text())
    about["model"]["diffusion"]["prediction"] = "flow"  # as a version would have left it whose default was another
    about["train"]["prediction"] = None
    run.config_file.write_text(json.dumps(about))
    with pytest.raises(ResumeError, match="prediction: 'flow' there, 'x0' now"):
        train(TrainConfig(**settings))
    train(TrainConfig(**settings, prediction="flow"))
