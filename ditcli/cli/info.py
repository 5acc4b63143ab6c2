"""`ditcli info`."""

from __future__ import annotations

import json

import click

from ditcli.cli.options import Command

EXAMPLES = """
ditcli info runs/celeba-dit-b-2-256
ditcli info facebook/DiT-XL-2-256 --json
ditcli info DiT-XL-2-256x256.pt
"""


@click.command("info", cls=Command, epilog=EXAMPLES)
@click.argument("model", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(model: str | None, as_json: bool) -> None:
    """Say what MODEL is: architecture, parameters, GFLOPs, training, classes, diffusion and codec.

    MODEL is a run, a checkpoint, a folder or a Hub repository; without it the newest run is taken.
    """
    from ditcli.info import describe, to_text

    facts = describe(model)
    click.echo(json.dumps(facts, indent=2) if as_json else to_text(facts))
