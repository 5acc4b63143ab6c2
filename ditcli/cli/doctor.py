"""`ditcli doctor`."""

from __future__ import annotations

import json
from typing import Any

import click

from ditcli.cli.options import Command, config_options, given
from ditcli.config import DoctorConfig

EXAMPLES = """
ditcli doctor
ditcli doctor --no-speed --json
ditcli doctor --device cuda:1
"""


@click.command("doctor", cls=Command, epilog=EXAMPLES)
@config_options(DoctorConfig)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def command(as_json: bool, **options: Any) -> None:
    """Check this machine: packages, driver, GPUs, both runtimes, disk, the Hub, and how fast it trains.

    Prints a line for each thing that was looked at, and under it what to do where something is wrong. Exit code 1 means
    that something has to be mended; warnings are worth reading, but do not count.
    """
    config = DoctorConfig.from_dict(given(options))
    from ditcli.doctor.examine import examine, is_well, to_dict, to_text

    findings = examine(config)
    click.echo(json.dumps(to_dict(findings), indent=2) if as_json else to_text(findings))
    if not is_well(findings):
        raise click.exceptions.Exit(1)
