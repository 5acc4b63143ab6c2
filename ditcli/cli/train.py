"""`ditcli train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ditcli.cli.options import Command, config_options, devices_option, load_config, preset_option, share, words_of
from ditcli.config import PRESETS, TrainConfig, default_preset

EXAMPLES = """
ditcli train --data ./photos --preset small
ditcli train --data ./celeba --vae madebyollin/taesd --image-size 128 --model DiT-S/2
ditcli train --data ./photos --pixels --image-size 64 --model DiT-S/4 --steps 20000
ditcli train --data ./mnist --preset mnist
ditcli train --data ./dogs --from facebook/DiT-XL-2-256 --lora-rank 8 --micro-batch 4
ditcli train --data ./imagenet --model DiT-XL/2 --preset paper --devices 8
ditcli train --data ./celeba --config my.toml --lr 2e-4 --dry-run
"""


@click.command("train", cls=Command, epilog=EXAMPLES)
@config_options(TrainConfig)
@devices_option
@preset_option(
    PRESETS, default=f"fast: {words_of(PRESETS['fast'])}; with --from, --shard, conv-dit or another diffusion paper"
)
@click.option(
    "--config",
    "file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    envvar="DITCLI_TRAIN_CONFIG",
    help="TOML file of options.",
)
@click.option("--dry-run", is_flag=True, help="Settle everything, open the data, print sizes and exit.")
def command(devices: int | None, preset: str | None, file: Path | None, dry_run: bool, **options: Any) -> None:
    """Train a DiT on a folder of images.

    Understood: the CelebA layout, class subfolders, metadata.jsonl or metadata.csv with file_name and label, MNIST idx
    files, and a flat folder without labels. Latents are encoded once and cached. To resume, run the same command again.
    The defaults below are the paper's; without --preset those of fast come first (see there).
    Several machines: torchrun --nnodes 2 --nproc-per-node 8 --rdzv-endpoint HOST:PORT -m -- ditcli train ...
    Options may also come from the environment (DITCLI_TRAIN_LR) or from a TOML file, in this order.
    """
    config = load_config(TrainConfig, options, presets=PRESETS, preset=preset, file=file, default=default_preset)
    if not config.data:
        raise click.UsageError("Missing option '--data': the folder of images to train on.")
    if dry_run:
        from ditcli.training.setup import describe, prepare

        click.echo(json.dumps(describe(prepare(config)), indent=2))
        return
    share(devices, config.device)
    from ditcli.progress import say
    from ditcli.training.train import train

    run = train(config)
    click.echo(run.path)
    say(f"Draw from it with: ditcli sample --model {run.path}")
