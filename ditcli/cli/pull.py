"""`ditcli pull`."""

from __future__ import annotations

import click

from ditcli.cli.options import Command

EXAMPLES = """
ditcli pull facebook/DiT-XL-2-256
ditcli pull stabilityai/sd-vae-ft-ema
ditcli pull owner/name@main:subfolder
"""


@click.command("pull", cls=Command, epilog=EXAMPLES)
@click.argument("name")
def command(name: str) -> None:
    """Fetch a model or a VAE from the Hub into the cache, with all that sampling needs.

    NAME is owner/name, owner/name@revision or owner/name:subfolder (or a file). Prints where it lies; from then on it
    works without a network. HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE=1 are honoured.
    """
    from ditcli.sharing import pull

    click.echo(pull(name))
