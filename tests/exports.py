"""Small models with a checkpoint, for the tests that export them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from test_dit import random_dit

from ditcli.codecs.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from ditcli.codecs.autoencoder_tiny import AutoencoderTiny, AutoencoderTinyConfig
from ditcli.codecs.folder import save_codec
from ditcli.config import DiffusionConfig, DiTConfig, ModelConfig
from ditcli.models.weights import RAW
from ditcli.runs import RunDir
from ditcli.training.checkpoints import save_checkpoint

DIT = DiTConfig(
    input_size=(8, 8), in_channels=3, out_channels=3, patch_size=2, width=32, depth=1, num_heads=2, num_classes=2
)
PIXELS = ModelConfig(
    dit=DIT,
    diffusion=DiffusionConfig(schedule="flow", prediction="flow"),
    codec="pixels",
    image_size=8,
    class_names=("cat", "dög"),
    step=7,
)
KL = AutoencoderKLConfig(block_out_channels=(8, 16), norm_num_groups=4, scaling_factor=0.5, shift_factor=0.1)
TINY = AutoencoderTinyConfig(
    encoder_block_out_channels=(8, 8),
    decoder_block_out_channels=(8, 8),
    num_encoder_blocks=(1, 2),
    num_decoder_blocks=(2, 1),
)


def make_run(folder: Path, model: ModelConfig = PIXELS, *, scale: float = 1.0) -> RunDir:
    """A run folder with one checkpoint of random weights; `scale` multiplies those of the first block's MLP."""
    network, raw = random_dit(model.dit), random_dit(model.dit, seed=1)
    with torch.no_grad():
        network.blocks[0].mlp.fc1.weight.mul_(scale)
    run = RunDir(folder)
    state = {RAW + name: value for name, value in raw.state_dict().items()}
    save_checkpoint(run, model, network, state, keep=1)
    run.config_file.write_text(json.dumps({"model": model.to_dict()}))
    return run


def make_latent_run(folder: Path, vae: AutoencoderKLConfig | AutoencoderTinyConfig) -> RunDir:
    """A run of latents with a learned variance, and its VAE with random weights."""
    torch.manual_seed(0)
    save_codec(AutoencoderKL(vae) if isinstance(vae, AutoencoderKLConfig) else AutoencoderTiny(vae), folder / "vae")
    dit = dataclasses.replace(DIT, in_channels=4, out_channels=8)
    diffusion = DiffusionConfig(learn_sigma=True)
    model = dataclasses.replace(PIXELS, dit=dit, diffusion=diffusion, codec=str(folder / "vae"), image_size=16)
    return make_run(folder / "run", model)
