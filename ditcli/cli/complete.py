"""What Tab offers where a command wants words: the model's labels, runs, folders, files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click
from click.shell_completion import BashComplete, CompletionItem, add_completion_class

from ditcli.errors import DitcliError

MODELS = frozenset({"model", "run", "from", "adapter", "guide_model"})
FOLDERS = frozenset({"data", "vae", "codec"})


def complete_words(ctx: click.Context, parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """What the word that was begun may become, by the name of its option or argument."""
    if parameter.name == "labels":
        return [CompletionItem(label) for label in _labels(ctx.params.get("model"), begun)]
    if parameter.name in MODELS and (runs := _runs(begun)):
        return [CompletionItem(run) for run in runs]
    return [CompletionItem(begun, type="dir" if parameter.name in FOLDERS else "file")]


def _labels(model: str | None, begun: str) -> list[str]:
    """Class names of the model that is named, or of the newest run; of a list with commas the last name is begun.

    Nothing is fetched for it: a model of the Hub offers none, nor does an export.
    """
    from ditcli import hub, runs

    if model and model != hub.EMBEDDED and not Path(model).expanduser().exists() and not (runs.RUNS / model).exists():
        return []
    try:
        checkpoint = hub.find_checkpoint(model)
        names = runs.read_model_config(checkpoint).class_names if runs.is_checkpoint(checkpoint) else ()
    except (DitcliError, OSError):
        return []
    former, comma, last = begun.rpartition(",")
    return [former + comma + name for name in names if name.lower().startswith(last.lower())]


def _runs(begun: str) -> list[str]:
    from ditcli import hub, runs

    folders = sorted(runs.RUNS.iterdir()) if runs.RUNS.is_dir() else []
    names = [*(str(folder) for folder in folders if runs.is_run(folder)), hub.EMBEDDED]
    return [name for name in names if name.startswith(begun)]


class _Bash(BashComplete):
    """Inserts words with spaces so that they stay one word, which click leaves to zsh and fish."""

    def format_completion(self, item: CompletionItem[Any]) -> str:
        escaped = re.sub(r"([^\w@%+=:,./~-])", r"\\\1", item.value) if item.type == "plain" else item.value
        return f"{item.type},{escaped.replace(chr(92), chr(92) * 2)}"  # its script reads them once more


def register() -> None:
    """Make click complete for bash in this way."""
    add_completion_class(_Bash)
