"""`ditcli find-lr`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from ditcli.cli.options import Command, config_options, given, load_config, preset_option
from ditcli.config import PRESETS, FindLrConfig, TrainConfig, default_preset

EXAMPLES = """
ditcli find-lr --data ./celeba --vae madebyollin/taesd --image-size 128 --model DiT-S/2
ditcli find-lr --data ./photos --pixels --image-size 64 --batch-size 64 --out rates.png
ditcli train --data ./photos --pixels --image-size 64 --batch-size 64 --lr auto
"""


@click.command("find-lr", cls=Command, epilog=EXAMPLES)
@config_options(FindLrConfig)
@config_options(TrainConfig, without=FindLrConfig.WITHOUT_EFFECT)
@preset_option(PRESETS, default="as of ditcli train")
@click.option(
    "--config",
    "file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="TOML file of options of `ditcli train`.",
)
def command(preset: str | None, file: Path | None, **options: Any) -> None:
    """Find a learning rate: raise it step by step until the loss no longer falls, and take a tenth of the best.

    Takes the options of `ditcli train` that decide what a step is. A fresh model is trained for the test alone; the
    rate is printed, and the curve drawn. `ditcli train --lr auto` does the same and goes on with what it found.
    """
    own = {field.name for field in dataclasses.fields(FindLrConfig)}
    ramp = FindLrConfig.from_dict({name: value for name, value in given(options).items() if name in own})
    options = {name: value for name, value in options.items() if name not in own}
    config = load_config(TrainConfig, options, presets=PRESETS, preset=preset, file=file, default=default_preset)
    if not config.data:
        raise click.UsageError("Missing option '--data': the folder of images to train on.")
    from ditcli.progress import say
    from ditcli.training.find_lr import find_lr

    found = find_lr(config, ramp)
    say(f"The curve is in {ramp.out}; train with --lr {found.suggested:g}.")
    click.echo(f"{found.suggested:g}")
