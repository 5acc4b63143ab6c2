"""`ditcli report`."""

from __future__ import annotations

from typing import Any

import click

from ditcli.cli.options import Command, config_options, given
from ditcli.config import ReportConfig

EXAMPLES = """
ditcli report runs/celeba-dit-b-2-256
ditcli report runs/celeba-dit-b-2-256 --features dinov2
ditcli report runs/first runs/second --out both.html
"""


@click.command("report", cls=Command, epilog=EXAMPLES)
@click.argument("runs", nargs=-1, metavar="[RUN...]")
@config_options(ReportConfig)
def command(runs: tuple[str, ...], **options: Any) -> None:
    """Write a run's page anew, or one that compares several runs, and print its path.

    The page shows samples, curves, scores, the nearest training images and settings, and needs neither other files nor
    a network. `ditcli train` writes it as it goes. RUN is a folder or a name in runs/; without one the newest is taken.
    """
    from ditcli.reporting.workflow import report

    click.echo(report(runs, ReportConfig.from_dict(given(options))))
