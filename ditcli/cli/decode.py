"""`ditcli decode`."""

from __future__ import annotations

from typing import Any

import click

from ditcli.cli.options import Command, config_options, given
from ditcli.config import DecodeConfig

EXAMPLES = """
ditcli decode latents --out decoded
ditcli decode latents/moments/cat.npy --vae runs/my-vae
"""


@click.command("decode", cls=Command, epilog=EXAMPLES)
@click.argument("latents")
@config_options(DecodeConfig)
def command(latents: str, **options: Any) -> None:
    """Decode latents into PNGs.

    LATENTS is a folder that `ditcli encode` wrote, or an .npy file of moments or scaled latents. Prints the paths of
    the images; those that were already decoded from the same latents are left as they are.
    """
    config = DecodeConfig.from_dict(given(options))
    from ditcli.encoding import decode

    for path in decode(latents, config):
        click.echo(path)
