"""Training a VAE: the losses are the papers', a cut run is a whole run, and diffusers opens the result."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from safetensors.torch import load_file

from ditcli.cli.main import cli
from ditcli.codecs.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from ditcli.codecs.codec import normalise
from ditcli.codecs.folder import open_codec, read_autoencoder, save_codec
from ditcli.codecs.reconstruct import measure_latents
from ditcli.codecs.vq_model import Codebook, VQModel, VQModelConfig
from ditcli.config import VAE_PRESETS, TrainConfig, TrainVaeConfig
from ditcli.data.folders import open_dataset
from ditcli.errors import CheckpointError, DataError, ModelNotFoundError, ResumeError, SettingError
from ditcli.hub import find_checkpoint, find_codec
from ditcli.runs import RunDir, newest_run, read_model_config, state_file
from ditcli.training.metrics import read_metrics
from ditcli.training.train import train
from ditcli.training.vae.discriminator import Discriminator, generator_loss, hinge_loss, smallest_image
from ditcli.training.vae.objective import adaptive_weight, backward, draw_latents
from ditcli.training.vae.train import VaeRow, VaeTraining, ValidationRow, train_vae
from ditcli.training.writer import Writer

TINY = {
    "data": "fashion-mnist",
    "image_size": 16,
    "widths": [8, 16],
    "layers_per_block": 1,
    "norm_groups": 4,
    "num_codes": 16,
    "lpips": "none",
    "gan_start": 3,
    "gan_width": 8,
    "gan_layers": 2,
    "steps": 7,
    "batch_size": 8,
    "lr": 1e-3,
    "log_every": 2,
    "checkpoint_every": 4,
    "sample_every": 4,
    "holdout": 5,
    "sample_num": 3,
    "precision": "fp32",
    "device": "cpu",
}


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DITCLI_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def tiny(out: Path, **changes) -> TrainVaeConfig:
    return TrainVaeConfig.from_dict(TINY | {"out": str(out)} | changes)


# The losses


def small_networks(kind: str = "kl"):
    torch.manual_seed(0)
    shape = {"block_out_channels": (8, 16), "norm_num_groups": 4, "latent_channels": 4}
    if kind == "vq":
        return VQModel(VQModelConfig(**shape, num_vq_embeddings=16)), Discriminator(8, 2)
    return AutoencoderKL(AutoencoderKLConfig(**shape)), Discriminator(8, 2)


def test_gradients_are_those_of_the_whole_loss_at_once(tmp_path):
    """As latent diffusion computes them: one sum, one backward pass, the adaptive weight held fixed."""
    network, judge = small_networks()
    config = tiny(tmp_path, kl_weight=0.1, gan_weight=0.5)
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    eps = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2))

    mean, logvar = network.encode(images).chunk(2, dim=1)
    reconstruction = network.decode(mean + (logvar / 2).exp() * eps)
    distance = F.l1_loss(reconstruction, images)
    fake = -judge(reconstruction).mean()
    last = network.decoder.conv_out.weight
    norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (distance, fake)]
    weight = 0.5 * norms[0] / (norms[1] + 1e-4)
    posterior = torch.distributions.Normal(mean, (logvar / 2).exp())
    divergence = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0, 1)).sum()
    loss = distance + 0.1 * divergence / images.numel() + weight.detach() * fake
    expected = torch.autograd.grad(loss, list(network.parameters()))
    hinge = 0.5 * (F.relu(1 - judge(images)) + F.relu(1 + judge(reconstruction.detach()))).mean()
    expected_judge = torch.autograd.grad(hinge, list(judge.parameters()))

    losses = backward(
        network, images, eps, config, perceptual=None, discriminator=judge, share=1.0, dtype=torch.float32
    )
    for parameter, gradient in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4)
    for parameter, gradient in zip(judge.parameters(), expected_judge, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(losses.gan_weight, weight)
    torch.testing.assert_close(losses.total, distance + 0.1 * divergence / images.numel())
    torch.testing.assert_close(losses.discriminator, hinge)


def test_the_adaptive_weight_is_a_ratio_of_gradient_norms():
    network, _ = small_networks()
    images = network.decode(torch.randn(1, 4, 8, 8))
    gradient = torch.rand_like(images)
    assert adaptive_weight(network, images, gradient, gradient / 7).item() == pytest.approx(7, rel=1e-2)
    assert adaptive_weight(network, images, gradient, 0 * gradient).item() == 1e4  # its bound


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_micro_batches_together_are_the_batch(tmp_path, kind):
    config = tiny(tmp_path, kind=kind, kl_weight=0.1)
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    eps = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    gradients = []
    for size in (6, 2):
        network, _ = small_networks(kind)
        for start in range(0, 6, size):
            part = slice(start, start + size)
            backward(
                network,
                images[part],
                eps[part],
                config,
                perceptual=None,
                discriminator=None,
                share=size / 6,
                dtype=torch.float32,
            )
        gradients.append([parameter.grad for parameter in network.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_hinge_losses():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert hinge_loss(real, fake).item() == pytest.approx(0.5 * (0.25 + 0.5))
    assert generator_loss(fake).item() == 1.5


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_smallest_image_a_discriminator_can_judge(layers):
    side = smallest_image(layers)
    logits = Discriminator(8, layers)(torch.zeros(2, 3, side, side))
    assert min(logits.shape[2:]) >= 1
    with pytest.raises(RuntimeError):
        Discriminator(8, layers)(torch.zeros(2, 3, side - 2**layers, side - 2**layers))


# The codebook


def test_the_codebook_gives_the_nearest_vector():
    codebook = Codebook(16, 4)
    z = torch.randn(2, 4, 3, 5) * 0.1
    flat = z.permute(0, 2, 3, 1).reshape(-1, 4)
    nearest = torch.cdist(flat, codebook.embedding.weight).argmin(dim=1)
    assert torch.equal(codebook.indices(z).flatten(), nearest)
    assert torch.equal(codebook(codebook(z)), codebook(z))


def test_the_gradient_passes_straight_through_the_codebook():
    network, _ = small_networks("vq")
    z = torch.randn(1, 4, 8, 8, requires_grad=True)
    network.decode(z).square().sum().backward()
    quantised = network.quantize(z.detach()).detach().requires_grad_()
    network.decoder(network.post_quant_conv(quantised)).square().sum().backward()
    torch.testing.assert_close(z.grad, quantised.grad, atol=1e-4, rtol=1e-3)  # z + (q - z) is q but for rounding
    assert network.quantize.embedding.weight.grad is None  # the codebook learns from its own loss alone


def test_the_codebooks_loss_draws_both_sides():
    """VQ-VAE, equation 3: vectors are drawn to latents, and latents, less strongly, to vectors."""
    network, _ = small_networks("vq")
    z = torch.randn(1, 4, 8, 8, requires_grad=True)
    network.codebook_loss(z, 0.25).backward()
    towards = 2 * (z - network.quantize(z)).detach() / z.numel()
    torch.testing.assert_close(z.grad, 0.25 * towards)
    total = network.quantize.embedding.weight.grad.sum(dim=0)
    torch.testing.assert_close(total, -towards.sum(dim=(0, 2, 3)))


@torch.no_grad()
def test_a_random_vq_model_equals_diffusers(tmp_path):
    from diffusers import VQModel as Reference

    torch.manual_seed(0)
    config = VQModelConfig(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=2,
        latent_channels=4,
        num_vq_embeddings=12,
        scaling_factor=1.3,
    )
    network = VQModel(config)
    network.quantize.embedding.weight.normal_()
    save_codec(network, tmp_path)
    reference = Reference.from_pretrained(tmp_path).eval()
    assert reference.config.scaling_factor == 1.3
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    z = reference.encode(images).latents
    torch.testing.assert_close(network.encode(images), z, atol=5e-5, rtol=0)
    torch.testing.assert_close(network.decode(z), reference.decode(z).sample, atol=1e-4, rtol=0)
    again = read_autoencoder(tmp_path)
    assert again.config == config
    assert torch.equal(again.decode(z), network.decode(z))
    reference.save_pretrained(tmp_path / "theirs")
    assert torch.equal(read_autoencoder(tmp_path / "theirs").decode(z), network.decode(z))


# Runs


def assert_same_run(one: RunDir, other: RunDir) -> None:
    """Weights, optimisers, discriminator and what diffusers opens are equal to the bit."""
    paths = one.newest_checkpoint(), other.newest_checkpoint()
    files = [paths, tuple(state_file(path) for path in paths)]
    files.append(tuple(run.vae / "diffusion_pytorch_model.safetensors" for run in (one, other)))
    for first, second in files:
        expected, found = load_file(first), load_file(second)
        assert expected.keys() == found.keys()
        assert [k for k in expected if k != "seconds" and not torch.equal(expected[k], found[k])] == []
    assert (one.vae / "config.json").read_text() == (other.vae / "config.json").read_text()


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_n_steps_equal_half_stop_resume_half(tmp_path, kind):
    whole = train_vae(tiny(tmp_path / "whole", kind=kind))
    train_vae(tiny(tmp_path / "halves", kind=kind, steps=5))
    halves = train_vae(tiny(tmp_path / "halves", kind=kind))
    assert_same_run(whole, halves)
    assert [row.step for row in read_metrics(whole.metrics_file, VaeRow)] == [2, 4, 6, 7]
    assert [row.step for row in read_metrics(whole.validation_file, ValidationRow)] == [4, 7]
    assert [row.step for row in read_metrics(halves.validation_file, ValidationRow)] == [4, 5, 7]
    rows = read_metrics(whole.metrics_file, VaeRow)
    assert rows[0].gan_weight == 0 < rows[2].gan_weight
    with pytest.raises(ResumeError, match="kl-weight"):
        train_vae(tiny(tmp_path / "halves", kind=kind, kl_weight=0.5))


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Sixty steps on the embedded pictures; a discriminator would still make them worse."""
    out = tmp_path_factory.mktemp("runs") / "vae"
    return train_vae(tiny(out, steps=60, sample_every=30, gan_start=1000, log_every=10, beta1=0.9, beta2=0.99, lr=5e-3))


def test_reconstructions_get_better(learnt):
    early, late = read_metrics(learnt.validation_file, ValidationRow)
    assert late.psnr > early.psnr > 5
    rows = read_metrics(learnt.metrics_file, VaeRow)
    assert rows[-1].distance < 0.7 * rows[0].distance
    assert all(row.loss == pytest.approx(row.distance + 1e-6 * row.prior, rel=1e-4) for row in rows)
    assert (learnt.samples / "step-00000060.png").is_file()
    assert learnt.loss_file.is_file()


def test_latents_of_the_result_have_mean_0_and_variance_1(learnt):
    codec = open_codec(find_codec(str(learnt.path)))
    images = open_dataset("fashion-mnist")
    batch = torch.from_numpy(np.stack([images.load(i, 16) for i in range(300)])).permute(0, 3, 1, 2)
    mean, std = measure_latents(codec, codec.encode(batch))
    assert (mean, std) == pytest.approx((0, 1), abs=0.05)


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_diffusers_opens_the_result(learnt, tmp_path, kind):
    from diffusers import AutoencoderKL as Reference
    from diffusers import VQModel as VQReference

    run = learnt if kind == "kl" else train_vae(tiny(tmp_path / "vq", kind="vq"))
    reference = (Reference if kind == "kl" else VQReference).from_pretrained(run.vae).eval()
    codec = open_codec(run.path)
    images = torch.from_numpy(open_dataset("fashion-mnist").load(0, 16)).permute(2, 0, 1)[None]
    with torch.no_grad():
        encoded = reference.encode(normalise(images))
        moments = encoded.latent_dist.parameters if kind == "kl" else encoded.latents
        z = moments[:, :4]
        theirs = ((reference.decode(z).sample + 1) * 127.5).clamp(0, 255)
    torch.testing.assert_close(codec.encode(images), moments, atol=1e-4, rtol=1e-4)
    latents = (z - codec.config.shift_factor) * codec.config.scaling_factor
    assert (codec.decode(latents).float() - theirs).abs().max() < 0.6
    assert reference.config.scaling_factor == codec.config.scaling_factor


def test_held_out_pictures_are_never_trained_on(tmp_path):
    config = tiny(tmp_path / "run", holdout=7, batch_size=32)
    training = VaeTraining.open(config, RunDir(Path(config.out)), Writer())
    assert len(training.held_out) == 7
    assert not set(training.held_out) & set(training.rows)
    assert sorted([*training.held_out, *training.rows]) == list(range(len(training.pixels)))
    assert torch.equal(training.images(3), training.images(3))
    assert not torch.equal(training.images(3), training.images(4))


def test_a_vae_run_is_a_codec_and_no_dit(learnt, tmp_path, monkeypatch):
    options = {"data": "fashion-mnist", "image_size": 16, "vae": str(learnt.path), "model": "DiT-S/2", "width": 32}
    options |= {"depth": 1, "num_heads": 2, "batch_size": 8, "steps": 2, "sample_num": 1, "sample_steps": 2}
    run = train(TrainConfig.from_dict(options | {"out": str(tmp_path / "dit"), "device": "cpu"}))
    assert read_model_config(run.newest_checkpoint()).codec == str(learnt.path)
    assert (run.samples / "step-00000002.png").is_file()
    with pytest.raises(CheckpointError, match="--vae"):
        read_model_config(find_checkpoint(str(learnt.path)))
    with pytest.raises(ModelNotFoundError, match="run of a DiT"):
        find_codec(str(run.path))
    with pytest.raises(ModelNotFoundError, match="no trained model"):
        newest_run(learnt.path.parent)
    with pytest.raises(ResumeError, match="not of `ditcli train-vae`"):
        train_vae(tiny(run.path))


def test_too_small_an_image_for_the_discriminator_is_refused(tmp_path):
    with pytest.raises(SettingError, match="gan-layers"):
        train_vae(tiny(tmp_path, gan_layers=3))
    with pytest.raises(SettingError, match="holdout"):
        train_vae(tiny(tmp_path / "x", holdout=60_000))
    with pytest.raises(SettingError, match="multiple of 4"):
        tiny(tmp_path, widths=[8, 8, 8], image_size=18)
    with pytest.raises(SettingError, match="norm-groups"):
        tiny(tmp_path, widths=[8, 10])


def test_latents_are_refused(tmp_path):
    for name, held in (("manifest", {"class_names": [], "vae": "x", "image_size": 8}), ("names", [])):
        (tmp_path / f"{name}.json").write_text(json.dumps(held))
    with pytest.raises(DataError, match="holds latents, not pictures"):
        train_vae(tiny(tmp_path / "run", data=str(tmp_path)))


def test_presets_hold():
    for values in VAE_PRESETS.values():
        config = TrainVaeConfig.from_dict(values)
        assert not config.gan_weight or config.image_size >= smallest_image(config.gan_layers)


# From the command line


def test_without_lpips_weights_an_error_says_how_to_go_on(tmp_path):
    result = CliRunner().invoke(cli, ["train-vae", "--data", "fashion-mnist", "--out", str(tmp_path)])
    assert isinstance(result.exception, ModelNotFoundError)
    assert "--lpips none" in str(result.exception)


def test_real_pictures_from_the_command_line(shared, tmp_path):
    """Train with LPIPS and a config file, then encode with the run, train a DiT on the latents and draw from it."""
    file = tmp_path / "my.toml"
    file.write_text("widths = [8, 16]\nnorm-groups = 4\nlayers-per-block = 1\ngan-width = 8\ngan-layers = 2\n")
    run, data = str(tmp_path / "vae"), str(shared / "data" / "odd_images")
    options = ["--lpips", str(shared / "weights" / "lpips_squeeze"), "--steps", "4", "--gan-start", "2"]
    options += ["--image-size", "32", "--holdout", "4", "--batch-size", "4", "--lr", "1e-3", "--log-every", "1"]
    words = ["train-vae", "--data", data, "--config", str(file), "--out", run, *options]
    result = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert result.stdout.splitlines() == [run]
    assert f"ditcli train --data {data} --vae {run} --image-size 32" in result.stderr
    rows = read_metrics(RunDir(Path(run)).metrics_file, VaeRow)
    assert all(row.lpips > 0.1 for row in rows)
    assert all(row.loss == pytest.approx(row.distance + row.lpips, abs=1e-4) for row in rows)
    assert read_metrics(RunDir(Path(run)).validation_file, ValidationRow)[-1].lpips > 0.1
    saved = json.loads((tmp_path / "vae" / "config.json").read_text())
    assert saved["train-vae"]["widths"] == [8, 16]

    latents, dit = str(tmp_path / "latents"), str(tmp_path / "dit")
    words = ["encode", "--data", data, "--vae", run, "--image-size", "32", "--out", latents]
    assert CliRunner().invoke(cli, words, catch_exceptions=False).stdout.splitlines() == [latents]
    words = ["train", "--data", latents, "--out", dit, "--model", "DiT-S/2", "--depth", "1", "--width", "32"]
    words += ["--num-heads", "2", "--steps", "2", "--batch-size", "4", "--sample-every", "0"]
    assert CliRunner().invoke(cli, words, catch_exceptions=False).stdout.splitlines() == [dit]
    words = ["sample", "--model", dit, "--steps", "2", "--out", str(tmp_path / "samples")]
    (picture,) = CliRunner().invoke(cli, words, catch_exceptions=False).stdout.splitlines()
    assert Path(picture).is_file()


def test_the_latents_drawn_follow_the_posterior():
    """Of a KL network: mean + standard deviation times noise, with latent diffusion's bounds on the log-variance."""
    network, _ = small_networks()
    config = TrainVaeConfig.from_dict(TINY)
    moments = torch.cat([torch.full((1, 4, 2, 2), 3.0), torch.full((1, 4, 2, 2), 100.0)], dim=1)
    z, _ = draw_latents(network, moments, torch.ones(1, 4, 2, 2), replace(config, kl_weight=0.0), values=12)
    torch.testing.assert_close(z, torch.full((1, 4, 2, 2), 3.0 + float(np.exp(10))))
