"""Tab, asked of the shells themselves, and help that reads like a manual page."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import click
import pytest
from console import ditcli
from exports import DIT, PIXELS, make_run

from ditcli.cli.main import COMMANDS, cli
from ditcli.config import PRESETS

NAMES = ("cat", "dög", "golden retriever", "tench, Tinca tinca")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A working folder with a run, `ditcli` on the path, and its completion for each shell."""
    place = tmp_path_factory.mktemp("place")
    model = replace(PIXELS, dit=replace(DIT, num_classes=len(NAMES)), class_names=NAMES)
    make_run(place / "runs" / "animals", model)
    (place / "bin").mkdir()
    script = place / "bin" / "ditcli"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ditcli "$@"\n')
    script.chmod(0o755)
    for shell in ("bash", "zsh", "fish"):
        done = subprocess.run([script, "completion", shell], capture_output=True, text=True, check=True)
        (place / shell).write_text(done.stdout)
    return place


def environment(place: Path) -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[1])
    kept = {key: os.environ[key] for key in ("HOME", "LANG", "TERM") if key in os.environ}
    path = f"{place / 'bin'}:/usr/bin:/bin"
    return kept | {"PATH": path, "PYTHONPATH": root, "LC_ALL": "C.UTF-8", "XDG_CONFIG_HOME": str(place)}


def ask_bash(place: Path, *words: str) -> list[str]:
    """What bash would offer for the last word."""
    quoted = " ".join(f"'{word}'" for word in words)
    script = f"""
        source ./bash
        COMP_WORDS=({quoted}) COMP_CWORD={len(words) - 1} COMPREPLY=()
        _ditcli_completion ditcli
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(
        ["bash", "--norc", "-c", script], cwd=place, env=environment(place), capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["tra"], ["train", "train-vae"]),
        (["train", "--preset", ""], list(PRESETS)),
        (["sample", "--labels", "c"], ["cat"]),
        (["sample", "--labels", "cat", ""], ["cat", "dög", r"golden\ retriever", r"tench,\ Tinca\ tinca"]),
        (["sample", "--labels", "cat,D"], ["cat,dög"]),
        (["sample", "--model", "runs/animals", "--labels", "GOLD"], [r"golden\ retriever"]),
        (["sample", "--model", "owner/name", "--labels", ""], [""]),
        (["sample", "--model", "demo", "--labels", "sn"], ["sneaker"]),
        (["sample", "--model", ""], ["runs/animals", "demo"]),
        (["sample", "--sampler", "dpm"], ["dpm++2m", "dpm++2m-sde"]),
        (["sample", "--cfg-int"], ["--cfg-interval"]),
        (["sample", "--labels", "cat", "--sp"], ["--spacing"]),
        (["nonsense", ""], list(COMMANDS)),
    ],
    ids=lambda words: " ".join(words),
)
def test_bash_is_offered(place, words, offered) -> None:
    assert ask_bash(place, "ditcli", *words) == offered


def test_fish_is_offered(place) -> None:
    if not shutil.which("fish"):
        pytest.skip("needs fish")
    ask = "source ./fish; complete -C 'ditcli sample --labels cat g'; complete -C 'ditcli train --preset m'"
    done = subprocess.run(
        ["fish", "--no-config", "-c", ask],
        cwd=place,
        env=environment(place),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["golden retriever", "mnist"]


@pytest.mark.parametrize(
    ("shell", "start"),
    [
        (["bash", "--norc", "-i"], "source ./bash"),
        (["zsh", "-f", "-i"], "autoload -U compinit; compinit -u -D; source ./zsh"),
    ],
    ids=["bash", "zsh"],
)
def test_a_person_presses_tab(place, shell, start) -> None:
    """In a shell on a terminal: the words as Tab left them, echoed instead of run."""
    if not shutil.which(shell[0]):
        pytest.skip(f"needs {shell[0]}")
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(place)
        os.execvpe(shell[0], shell, environment(place) | {"TERM": "dumb", "PS1": "> "})
    try:
        type_and_wait(terminal, f"{start}; echo READ''Y\n", "READY")
        typed = type_and_wait(terminal, "ditcli sample --steps 3 --labels cat gold\t", "retriever")
        assert re.search(r"golden\\ retriever", typed)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(terminal)


def type_and_wait(terminal: int, keys: str, awaited: str, seconds: float = 60) -> str:
    """What the terminal shows until the awaited word is there."""
    os.write(terminal, keys.encode())
    shown, until = "", time.monotonic() + seconds
    while awaited not in shown:
        assert time.monotonic() < until, shown
        if select.select([terminal], [], [], 1)[0]:
            shown += os.read(terminal, 4096).decode(errors="replace")
    return shown


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_a_manual_page(capfd, command) -> None:
    """A sentence of what it does, every option explained, and examples that parse."""
    found = cli.get_command(click.Context(cli), command)
    assert found is not None
    text = ditcli(capfd, command, "--help").out
    assert "Usage: ditcli " + command in text
    assert max(map(len, text.splitlines())) <= 120
    for parameter in found.params:
        if isinstance(parameter, click.Option):
            assert (parameter.help or "").strip(), f"{parameter.opts[0]} of {command} is not explained"
    assert found.help
    assert found.help.split("\n\n")[0].rstrip().endswith(".")


def test_the_first_help_names_environment_and_exit_codes(capfd) -> None:
    text = ditcli(capfd, "--help").out
    for word in ("DITCLI_COMMAND_OPTION", "DITCLI_CACHE", "DITCLI_DEBUG", "NO_COLOR", "Exit codes", "130", "Examples"):
        assert word in text
