"""The `ditcli` command: its subcommands are imported only when they run."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import time

import click

import ditcli
from ditcli import processes
from ditcli.config import suggest
from ditcli.errors import DitcliError, Interrupted
from ditcli.progress import say_more

# Name: (module in ditcli.cli, one line of help). Listing them here keeps `ditcli --help` from importing any.
COMMANDS = {
    "train": ("train", "Train a DiT on a folder of images."),
    "find-lr": ("find_lr", "Find a learning rate for a training."),
    "sample": ("sample", "Draw images from a trained model."),
    "export-onnx": ("export_onnx", "Write a trained model as ONNX files, which sample without torch."),
    "fid": ("fid", "Score pictures against real ones: FID, KID and more."),
    "train-vae": ("train_vae", "Train a VAE on a folder of images."),
    "encode": ("encode", "Encode a folder of images into latents."),
    "decode": ("decode", "Decode latents into images."),
    "pull": ("pull", "Fetch a model or a VAE from the Hub into the cache."),
    "push": ("push", "Share a run on the Hub, with a model card."),
    "runs": ("runs", "List the runs, or show one: step, loss, score, age."),
    "report": ("report", "Write a run's page: samples, curves, scores, nearest training images."),
    "info": ("info", "Say what a model is: architecture, size, training, diffusion, codec."),
    "ui": ("ui", "Serve a page on this machine on which pictures are seen to form."),
    "doctor": ("doctor", "Check this machine: packages, GPUs, runtimes, disk, the Hub, speed."),
    "completion": ("completion", "Print the script with which Tab completes in bash, zsh or fish."),
    "ema": ("ema", "Average a run's weights over another length than in training."),
    "demo": ("demo", "Train a small DiT on the embedded pictures and draw from it, in a few minutes."),
}


EPILOG = {
    "Examples": [
        ("ditcli sample --model demo", "draw from the embedded model, at once"),
        ("ditcli demo", "a model of clothes and a picture from it, in three minutes"),
        ("ditcli train --data ./photos", "train on a folder; the same command resumes"),
        ("ditcli sample --labels cat dog --cfg 4", "draw from the newest run"),
        ("ditcli doctor", "see what this machine can do"),
    ],
    "Environment": [
        (
            "DITCLI_COMMAND_OPTION",
            "any option, as in DITCLI_TRAIN_LR=2e-4; the command line comes first",
        ),
        ("DITCLI_CACHE", "folder of latents and features  [default: ~/.cache/ditcli]"),
        ("DITCLI_DEBUG", "1 shows where an error came from"),
        ("OMP_NUM_THREADS", "threads on a CPU  [default: one for each core]"),
        ("NO_COLOR", "any value: no colours on the terminal"),
        ("HF_HOME, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE", "as the Hub's client reads them"),
    ],
    "Exit codes": [
        ("0", "done; the results are on stdout, all else on stderr"),
        ("1", "failed, and why in one sentence"),
        ("2", "used wrongly: an unknown option or a value out of range; nothing was done"),
        ("130", "interrupted by Ctrl-C; the sentence says how to go on"),
    ],
}
# Where one of several processes fails, the others fail for want of it, or in the same way: in this time the launcher
# ends them before they say so too.
SECONDS_TO_BE_ENDED = 10.0


TOO_LARGE = "there is not enough memory: a smaller --batch-size needs less."
# In small letters, what torch and JAX on a GPU, torch on a CPU, and ONNX Runtime say of an allocation that failed.
OUT_OF_MEMORY = ("out of memory", "defaultcpuallocator", "failed to allocate memory")


class Commands(click.Group):
    """A group that knows its commands by name and line, and imports one when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return importlib.import_module(f"ditcli.cli.{COMMANDS[name][0]}").command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, rows in EPILOG.items():
            with formatter.section(title):
                formatter.write_dl(rows)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-") and not ctx.resilient_parsing:
            ctx.fail(f"there is no command {args[0]!r}.{suggest(args[0], list(COMMANDS))}")
        return super().resolve_command(ctx, args)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(ditcli.__version__, prog_name="ditcli")
def cli() -> None:
    """Train, sample, export and score Diffusion Transformers (arXiv 2212.09748).

    Begin with `ditcli demo`, or `ditcli train --data FOLDER` and then `ditcli sample`.
    """


def run() -> None:
    """Entry point. Exit codes: 0 done, 1 failed, 2 used wrongly, 130 interrupted. DITCLI_DEBUG=1 shows tracebacks."""
    try:
        _run()
    except SystemExit as end:
        processes.leave(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise


def _run() -> None:
    if "_DITCLI_COMPLETE" in os.environ:  # a shell asks what Tab may offer
        importlib.import_module("ditcli.cli.complete").register()
    if not processes.is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        sys.exit(cli.main(standalone_mode=False, prog_name="ditcli", auto_envvar_prefix="DITCLI"))
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        sys.exit(_fail("interrupted.", 130))
    except DitcliError as error:
        if not processes.is_first():
            time.sleep(SECONDS_TO_BE_ENDED)
        if isinstance(error, Interrupted) and not processes.is_first():
            sys.exit(error.exit_code)
        sys.exit(_fail(str(error), error.exit_code))
    except OSError as error:
        sys.exit(_fail(f"{error.filename or 'the system'}: {error.strerror or error}.", 1))
    except MemoryError:
        sys.exit(_fail(TOO_LARGE, 1))
    except ModuleNotFoundError as error:
        cure = f"install it with `pip install {error.name}`. Exported models and `demo` are drawn from without it"
        sys.exit(_fail(f"this needs {error.name}, which is not installed: {cure}.", 1))
    except Exception as error:
        if processes.started():
            time.sleep(SECONDS_TO_BE_ENDED)
        told = " ".join(str(error).split()) or "without a word"
        if any(words in told.lower() for words in OUT_OF_MEMORY):
            sys.exit(_fail(TOO_LARGE, 1))
        sys.exit(_fail(f"{type(error).__name__}: {told}. This is a fault of ditcli; DITCLI_DEBUG=1 shows where.", 1))


def _fail(message: str, code: int) -> int:
    """Tell of the error being handled; the cause of it, and of that, with --verbose."""
    if os.environ.get("DITCLI_DEBUG"):
        raise
    with contextlib.suppress(OSError):  # nobody listens
        click.echo(f"Error: {message}", err=True)
    cause = sys.exception()
    while cause := cause and (cause.__cause__ or cause.__context__):
        say_more(f"Caused by {type(cause).__name__}: {cause}")
    return code
