"""`ditcli push`."""

from __future__ import annotations

import sys
from typing import Any

import click

from ditcli.cli.options import Command, config_options, given
from ditcli.config import PushConfig

EXAMPLES = """
ditcli push runs/celeba-dit-b-2-256 me/celeba-dit --license mit --dry-run
ditcli push runs/celeba-dit-b-2-256 me/celeba-dit --license mit --private
"""


@click.command("push", cls=Command, epilog=EXAMPLES)
@click.argument("run")
@click.argument("repo")
@config_options(PushConfig)
def command(**options: Any) -> None:
    """Share RUN (a run or checkpoint) as the Hub repository REPO (owner/name).

    Uploads the averaged weights, the config, a sample grid, the metrics and a model card; a VAE that is a local folder
    goes with them. Prints the repository's page, or the folder with --dry-run. `ditcli sample --model owner/name` takes
    it back.
    """
    if not options["license"] and sys.stdin.isatty():
        options["license"] = click.prompt("Licence of the weights (mit, apache-2.0, cc-by-4.0 ...)", err=True)
    config = PushConfig.from_dict(given(options))
    from ditcli.sharing import push

    click.echo(push(config))
