"""Command-line options made from configs: a field is an option of the same name with hyphens."""

from __future__ import annotations

import dataclasses
import os
import platform
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

import ditcli
from ditcli import processes
from ditcli.config import Config, suggest
from ditcli.errors import SettingError
from ditcli.progress import say, say_more, set_verbosity

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

Function = TypeVar("Function", bound=Callable[..., Any])
AnyConfig = TypeVar("AnyConfig", bound=Config)
VERBOSITY, UNFINISHED = "ditcli.verbosity", "ditcli.unfinished"
SOURCES = {
    click.core.ParameterSource.COMMANDLINE: "command line",
    click.core.ParameterSource.ENVIRONMENT: "environment",
}
TYPES = {"int": click.INT, "float": click.FLOAT} | dict.fromkeys(("str", "int | str", "float | str"), click.STRING)


class Words(click.types.StringParamType):
    """Text that Tab completes by what it is for."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from ditcli.cli.complete import complete_words

        return complete_words(ctx, param, incomplete)


WORDS = Words()


class Command(click.Command):
    """A command whose options of many values take all words up to the next option: ``--labels male female``.

    Each has --quiet and --verbose, and help that ends with examples.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        for param in self.params:
            if param.type is click.STRING:
                param.type = WORDS
        quiet, verbose = "Tell nothing but errors and results.", "Tell more: settings, times, and the causes of errors."
        for letter, name, help in (("q", "quiet", quiet), ("v", "verbose", verbose)):
            names = [f"-{letter}", f"--{name}"]
            self.params.append(click.Option(names, is_flag=True, expose_value=False, callback=_remember, help=help))

    def invoke(self, ctx: click.Context) -> Any:
        set_verbosity(ctx.meta.get(VERBOSITY, "normal") if processes.is_first() else "quiet")
        say_more(f"ditcli {ditcli.__version__}, Python {platform.python_version()}, {platform.platform()}")
        say_more(f"in {os.getcwd()}")
        for name, value in ctx.params.items():
            source = ctx.get_parameter_source(name)
            if value not in (None, ()) and source in SOURCES:
                say_more(f"{name.replace('_', '-')}: {value} ({SOURCES[source]})")
        result = super().invoke(ctx)
        say_more("Done.")
        return result

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        many = {name for param in self.params if getattr(param, "multiple", False) for name in param.opts}
        spread: list[str] = []
        current = None
        for position, word in enumerate(args):
            if word == "--":
                spread += args[position:]
                break
            if word.startswith("-"):
                current = word if word in many else None
                spread += [] if current else [word]
            else:
                spread += [current, word] if current else [word]
        if ctx.resilient_parsing:  # Tab was pressed
            ctx.meta[UNFINISHED] = next((param for param in self.params if current in param.opts), None)
        for name in many.intersection(args):
            if name not in spread and not ctx.resilient_parsing:
                raise click.BadOptionUsage(name, f"Option {name!r} requires at least one value.", ctx)
        return super().parse_args(ctx, spread)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Options, or a further value of the last one where that takes many."""
        unfinished = ctx.meta.get(UNFINISHED)
        if unfinished and not incomplete.startswith("-"):
            return unfinished.shell_complete(ctx, incomplete)
        return super().shell_complete(ctx, incomplete)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The examples, as they were written."""
        if self.epilog:
            formatter.write_paragraph()
            formatter.write("Examples:\n")
            with formatter.indentation():
                for line in self.epilog.strip().splitlines():
                    formatter.write(f"  {line.strip()}\n")


def _remember(ctx: click.Context, option: click.Parameter, given: bool) -> None:
    if given and ctx.meta.setdefault(VERBOSITY, option.name) != option.name:
        raise click.UsageError("--quiet and --verbose exclude each other: give one of them.", ctx)


def config_options(config_class: type[Config], *, without: Sequence[str] = ()) -> Callable[[Function], Function]:
    """Decorate a command with an option for each field of a config; an option that is not given is None."""

    def decorate(function: Function) -> Function:
        for field in reversed(dataclasses.fields(config_class)):  # type: ignore[arg-type]
            if "help" in field.metadata and field.name not in without:  # others are arguments
                function = _option(field)(function)
        return function

    return decorate


def devices_option(function: Function) -> Function:
    """Decorate a command with `--devices`; its body calls `share` when its config stands."""
    return click.option(
        "--devices",
        type=click.IntRange(min=1),
        help="Share the work among so many GPUs of this machine, or on a CPU among so many processes.  [default: 1]",
    )(function)


def preset_option(presets: dict[str, dict[str, Any]], *, default: str = "") -> Callable[[Function], Function]:
    """Decorate a command with `--preset`; `default` says which there is without."""
    help = "A saved set of the options above." + (f"  [default: {default}]" if default else "")
    return click.option("--preset", type=click.Choice(list(presets)), help=help)


def words_of(values: dict[str, Any]) -> str:
    """Settings as one would give them: ``--rope --lr 0.002``."""
    words = (f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}") for name, value in values.items())
    return " ".join(words)


def share(devices: int | None, device: str) -> None:
    """Run the command in a process per device, and exit as they do; this returns in each of them, and without any.

    Raises SettingError where another number of them was started by torchrun.
    """
    if processes.started():
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        if devices not in (None, here):
            raise SettingError(f"devices is {devices}, but torchrun started {here} processes here: leave it out.")
    elif devices is not None and devices > 1:
        sys.exit(processes.start(devices, device))


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, on the command line or in the environment."""
    return {name: value for name, value in options.items() if value not in (None, ())}


def load_config(
    config_class: type[AnyConfig],
    options: dict[str, Any],
    *,
    presets: dict[str, dict[str, Any]],
    preset: str | None,
    file: Path | None,
    default: Callable[[dict[str, Any]], str] | None = None,
) -> AnyConfig:
    """Flag before environment before file before preset before default; `default` names the preset of what is given."""
    values = (_read(config_class, file) if file else {}) | given(options)
    if default and not preset:
        preset = default(values)
        if not processes.started():
            say(f"Recipe: --preset {preset}, since none was given.")
    return config_class.from_dict((presets[preset] if preset else {}) | values)


def _option(field: dataclasses.Field[Any]) -> Callable[[Function], Function]:
    key = field.name.rstrip("_")  # `from_`, since `from` is a word of Python's
    name = key.replace("_", "-")
    kind = str(field.type).replace(" | None", "")
    help = field.metadata["help"]
    if field.default not in (None, "", ()) and "[default:" not in help:
        shown: Any = (name if field.default else f"no-{name}") if kind == "bool" else field.default
        shown = " ".join(map(str, shown)) if kind.startswith("tuple") else shown
        help = f"{help}  [default: {shown}]"
    if kind == "bool":
        return click.option(f"--{name}/--no-{name}", key, default=None, help=help)
    if kind == "tuple[float, float]":
        return click.option(f"--{name}", key, nargs=2, type=click.FLOAT, metavar="LO HI", help=help)
    if kind.startswith("tuple"):
        numbers = "int" in kind
        metavar, type = ("N...", click.INT) if numbers else ("NAME...", click.STRING)
        return click.option(f"--{name}", key, multiple=True, metavar=metavar, type=type, help=help)
    choices = field.metadata["choices"]
    return click.option(f"--{name}", key, type=click.Choice(choices) if choices else TYPES[kind], help=help)


def _read(config_class: type[Config], file: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(file.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingError(f"{file} is not TOML: {error}") from error
    values = {key.replace("-", "_"): value for key, value in values.items()}
    known = [field.name.rstrip("_") for field in dataclasses.fields(config_class)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise SettingError(f"{file} has an unknown setting {key!r}.{suggest(key, known)}")
    return values
