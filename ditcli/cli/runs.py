"""`ditcli runs`."""

from __future__ import annotations

from pathlib import Path

import click

from ditcli.cli.options import Command

EXAMPLES = """
ditcli runs
ditcli runs show
ditcli runs show celeba-dit-b-2-256 --json
ditcli runs --root /data/runs
"""


@click.command("runs", cls=Command, epilog=EXAMPLES)
@click.argument("show", required=False, type=click.Choice(["show"]))
@click.argument("run", required=False)
@click.option("--root", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Their folder.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(show: str | None, run: str | None, root: Path, as_json: bool) -> None:
    """List the runs with step, loss, best score and age, the newest first.

    `ditcli runs show RUN` tells all of one: RUN is its folder or its name in runs/; without it the newest is taken.
    """
    from ditcli.progress import say
    from ditcli.reporting.summary import list_text, read_summaries, read_summary, show_text, to_json
    from ditcli.runs import find_run, find_runs

    if show:
        summary = read_summary(find_run(run, root))
        click.echo(to_json(summary) if as_json else show_text(summary))
        return
    runs = find_runs(root)
    summaries = read_summaries(runs)
    if not runs:
        say(f"There is no run in {root}/ yet: begin one with `ditcli train --data FOLDER`.")
    if summaries or as_json:
        click.echo(to_json(summaries) if as_json else list_text(summaries))
