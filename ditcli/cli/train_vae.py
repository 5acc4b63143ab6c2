"""`ditcli train-vae`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ditcli.cli.options import Command, config_options, load_config, preset_option
from ditcli.config import VAE_PRESETS, TrainConfig, TrainVaeConfig

EXAMPLES = """
ditcli train-vae --data ./celeba --preset small --lpips ./lpips
ditcli train-vae --data ./photos --image-size 256 --lpips none --out runs/my-vae
ditcli train-vae --data ./photos --kind vq --num-codes 4096 --widths 64 128 256
ditcli train --data ./photos --vae runs/my-vae
"""


@click.command("train-vae", cls=Command, epilog=EXAMPLES)
@config_options(TrainVaeConfig)
@preset_option(VAE_PRESETS)
@click.option(
    "--config", "file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="TOML file of options."
)
def command(preset: str | None, file: Path | None, **options: Any) -> None:
    """Train a VAE on a folder of images, as in latent diffusion.

    Reconstructions are judged by L1 or L2, LPIPS and a discriminator that learns beside them. The result is the folder
    vae/ in the run folder, which `ditcli train --vae RUN` and diffusers open. --preset small is for 64x64 images
    and two CPU cores. To resume, run the same command again.
    """
    config = load_config(TrainVaeConfig, options, presets=VAE_PRESETS, preset=preset, file=file)
    if not config.data:
        raise click.UsageError("Missing option '--data': the folder of images to train on.")
    from ditcli.training.vae.train import train_vae

    run = train_vae(config)
    click.echo(run.path)
    size = "" if config.image_size == TrainConfig.image_size else f" --image-size {config.image_size}"
    click.echo(f"Train with it: ditcli train --data {config.data} --vae {run.path}{size}", err=True)
