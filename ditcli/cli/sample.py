"""`ditcli sample`."""

from __future__ import annotations

from typing import Any

import click

from ditcli.cli.options import Command, config_options, given
from ditcli.config import SampleConfig

EXAMPLES = """
ditcli sample --labels male female --cfg 4
ditcli sample --model runs/celeba-dit-b-2-256 --num 16 --grid --out faces
ditcli sample --labels sneaker,bag --sampler ddpm --steps 250 --seed 7 --json
"""


@click.command("sample", cls=Command, epilog=EXAMPLES)
@config_options(SampleConfig)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the images' paths.")
def command(as_json: bool, **options: Any) -> None:
    """Draw images from a trained model.

    Images are written to --out, named by label and seed; the same seed gives the same image whatever the batch size.
    Without --model the newest run in runs/ is taken, without --labels every class.
    """
    config = SampleConfig.from_dict(given(options))
    from ditcli.sampling import sample, to_json

    samples = sample(config)
    if as_json:
        click.echo(to_json(samples))
        return
    for image in samples.images:
        click.echo(image.path)
    if samples.grid:
        click.echo(samples.grid)
