"""Write ditcli/REFERENCE.md, what every command's `--help` says: python scripts/write_reference.py

A test compares it with `--help`, so run this after a change to an option.
"""

from __future__ import annotations

from pathlib import Path

import click

from ditcli.cli.main import cli

OUT = Path(__file__).resolve().parents[1] / "ditcli" / "REFERENCE.md"
HEAD = """\
# Reference

What `ditcli COMMAND --help` says, written by `scripts/write_reference.py`.
"""


def reference() -> str:
    context = click.Context(cli, info_name="ditcli", terminal_width=110, **cli.context_settings)
    parts = [HEAD, _section("ditcli", cli.get_help(context))]
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        parts.append(_section(f"ditcli {name}", command.get_help(click.Context(command, context, info_name=name))))
    return "\n".join(parts)


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n```text\n{text.rstrip()}\n```\n"


if __name__ == "__main__":
    OUT.write_text(reference())
