"""`ditcli sample`."""

from __future__ import annotations

from typing import Any

import click

from ditcli.cli.options import Command, config_options, devices_option, given, share
from ditcli.config import SampleConfig

EXAMPLES = """
ditcli sample --model demo --labels sneaker bag --cfg 3
ditcli sample --labels male female --cfg 4
ditcli sample --model runs/celeba-dit-b-2-256 --num 16 --grid --out faces
ditcli sample --labels sneaker,bag --sampler ddpm --steps 250 --seed 7 --json
ditcli sample --sampler unipc --steps 10 --cfg 3 --cfg-interval 0.2 0.8 --trajectory
ditcli sample --labels male female --interpolate labels --num 16 --grid
ditcli sample --labels female --init photo.jpg --mask mask.png --num 4
ditcli sample --num 25000 --cfg 1.5 --out samples.npz --devices 8
"""


@click.command("sample", cls=Command, epilog=EXAMPLES)
@config_options(SampleConfig)
@devices_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the images' paths.")
def command(devices: int | None, as_json: bool, **options: Any) -> None:
    """Draw images from a trained model.

    Images are written to --out, named by label and seed; the same seed gives the same image whatever the batch size.
    Without --model the newest run in runs/ is taken, without --labels every class. Images that are there already with
    the same settings are not drawn again: to resume, run the same command again.
    """
    config = SampleConfig.from_dict(given(options))
    share(devices, config.device)
    from ditcli.sampling import sample, to_json

    samples = sample(config)
    if as_json:
        click.echo(to_json(samples))
        return
    for image in samples.images:
        click.echo(image.path)
    for path in (*samples.animations, samples.grid, samples.archive):
        if path:
            click.echo(path)
