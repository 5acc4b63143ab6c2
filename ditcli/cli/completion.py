"""`ditcli completion`."""

from __future__ import annotations

import click

from ditcli.cli.options import Command

EXAMPLES = """
ditcli completion bash > ~/.local/share/bash-completion/completions/ditcli
ditcli completion zsh > ~/.zfunc/_ditcli
ditcli completion fish > ~/.config/fish/completions/ditcli.fish
eval "$(ditcli completion bash)"
"""


@click.command("completion", cls=Command, epilog=EXAMPLES)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print a script with which Tab completes commands, options, presets, runs and the model's labels.

    Write it to where SHELL looks for such scripts, as below, or evaluate it in the shell's start-up file. For zsh the
    folder must be in $fpath before compinit runs. bash must be 4.4 or newer.
    """
    from click.shell_completion import get_completion_class

    from ditcli.cli.main import cli

    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(cli, {}, "ditcli", "_DITCLI_COMPLETE").source())
