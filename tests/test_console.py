"""How every command behaves on a terminal and in a pipe: streams, exit codes, --quiet, --verbose, colours, faults."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import torch
from console import ditcli
from exports import make_run

from ditcli.cli import main
from ditcli.cli.main import COMMANDS, cli

MODULE = [sys.executable, "-m", "ditcli"]
SAMPLE = ["sample", "--model", "run", "--steps", "1", "--labels", "cat", "--device", "cpu"]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a model in `run`."""
    make_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DITCLI_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_stdout_has_results_alone_and_quiet_leaves_nothing_else(capfd) -> None:
    done = ditcli(capfd, *SAMPLE)
    assert (done.code, done.out) == (0, "samples/cat_seed0.png\n")
    assert "Sampling 1 images" in done.err
    assert ditcli(capfd, *SAMPLE, "--quiet", "--seed", "1") == (0, "samples/cat_seed1.png\n", "")
    assert ditcli(capfd, *SAMPLE, "-q", "--seed", "1") == (0, "samples/cat_seed1.png\n", "")


def test_quiet_keeps_errors(capfd) -> None:
    done = ditcli(capfd, "sample", "--model", "nowhere", "-q")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("Error: there is no 'nowhere'")


def test_verbose_tells_settings_with_their_source_times_and_causes(capfd, monkeypatch, place) -> None:
    monkeypatch.setenv("DITCLI_SAMPLE_SEED", "3")
    done = ditcli(capfd, *SAMPLE, "--verbose")
    assert (done.code, done.out) == (0, "samples/cat_seed3.png\n")
    lines = done.err.splitlines()
    assert all(re.match(r"\[ *\d+\.\d\d s\] ", line) for line in lines), done.err
    told = [line.partition("] ")[2] for line in lines]
    assert "steps: 1 (command line)" in told
    assert "seed: 3 (environment)" in told
    assert not any(line.startswith("cfg:") for line in told)  # a default

    (place / "broken.safetensors").write_bytes(b"\x10" + bytes(7) + b"{garbage garbage")
    words = ["sample", "--model", "broken.safetensors"]
    assert "Caused by SafetensorError" in ditcli(capfd, *words, "-v").err
    assert "Caused by" not in ditcli(capfd, *words).err


def test_quiet_and_verbose_exclude_each_other(capfd) -> None:
    done = ditcli(capfd, *SAMPLE, "-q", "-v")
    assert (done.code, done.out) == (2, "")
    assert "exclude each other" in done.err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_both_and_says_so(command: str) -> None:
    found = cli.get_command(click.Context(cli), command)
    assert found is not None
    assert {"quiet", "verbose"} <= {parameter.name for parameter in found.params}
    assert isinstance(found.help, str)
    assert found.epilog, "help ends with examples"


@pytest.mark.parametrize("colours", [True, False])
def test_no_color_on_a_terminal(colours: bool) -> None:
    """The progress bar of a terminal is coloured, and is not with NO_COLOR."""
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"} | ({} if colours else {"NO_COLOR": "1"})
    terminal, other_end = pty.openpty()
    words = [*MODULE, *SAMPLE, "--steps", "20"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=other_end, env=environment) as process:
        os.close(other_end)
        told = b""
        try:
            while part := os.read(terminal, 4096):
                told += part
        except OSError:  # the other end is closed: Linux says EIO
            pass
    os.close(terminal)
    assert process.returncode == 0
    assert b"sampling" in told
    foreground = re.findall(rb"\x1b\[(?:[\d;]*;)?(?:3|4|9)[0-8](?:;[\d;]*)?m", told)
    assert bool(foreground) == colours


@pytest.mark.parametrize("words", [["train", "--help"], [*SAMPLE, "--num", "3"], ["sample", "--model", "nowhere"]])
def test_a_broken_pipe_ends_quietly(words: list[str]) -> None:
    """Whoever reads has gone before the first line is written."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*MODULE, *words], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 1
    assert not re.search("Traceback|BrokenPipe|Exception", done.stderr)
    assert "broken pipe" not in done.stderr.lower()


def test_results_that_cannot_be_written_are_an_error() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*MODULE, "train", "--help"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "Error: the system: No space left on device.\n")


def test_debug_shows_the_traceback_and_without_it_no_user_sees_one() -> None:
    words = [*MODULE, "sample", "--model", "nowhere"]
    plain = subprocess.run(words, capture_output=True, text=True)
    debug = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"DITCLI_DEBUG": "1"})
    assert (plain.returncode, debug.returncode) == (1, 1)
    assert "Traceback" not in plain.stderr
    assert "Traceback" in debug.stderr


TOO_LARGE = "Error: there is not enough memory: a smaller --batch-size needs less."


def failure(function: Callable[[], object]) -> Exception:
    with pytest.raises(RuntimeError) as raised:
        function()
    return raised.value


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (KeyError("x"), 1, "Error: KeyError: 'x'. This is a fault of ditcli; DITCLI_DEBUG=1 shows where."),
        (MemoryError(), 1, TOO_LARGE),
        (failure(lambda: torch.empty(2**60)), 1, TOO_LARGE),
        (RuntimeError("BFCArena ... Failed to allocate memory for requested buffer of size 451584000"), 1, TOO_LARGE),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), 1, TOO_LARGE),
        (KeyboardInterrupt(), 130, "Error: interrupted."),
        (PermissionError(13, "Permission denied", "a/b"), 1, "Error: a/b: Permission denied."),
    ],
)
def test_a_fault_of_ours_is_a_sentence_too(capfd, monkeypatch, error, code, sentence) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr("ditcli.info.describe", fail)
    done = ditcli(capfd, "info", "run")
    assert (done.code, done.out, done.err.strip()) == (code, "", sentence)


def test_json_is_one_object_on_stdout(capfd) -> None:
    for words in (["info", "run", "--json"], [*SAMPLE, "--json"]):
        assert isinstance(json.loads(ditcli(capfd, *words).out), dict)


def test_the_exit_code_of_wrong_words_is_two(capfd) -> None:
    for words in (
        ["no-such-command"],
        ["train", "--no-such-option"],
        ["sample", "--steps", "many"],
        ["info", "a", "b"],
    ):
        done = ditcli(capfd, *words)
        assert (done.code, done.out) == (2, ""), words
        assert done.err.count("Error: ") == 1
    assert main.cli.get_command(click.Context(main.cli), "no-such-command") is None
