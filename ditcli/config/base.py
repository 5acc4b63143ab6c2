"""What every config shares: options with help texts, strict reading, checks that name the field."""

from __future__ import annotations

import dataclasses
import difflib
import keyword
from collections.abc import Sequence
from dataclasses import field
from typing import Any, Literal, Self, get_args

from ditcli.errors import SettingError

Loss = Literal["mse", "l1"]
Precision = Literal["auto", "bf16", "fp32"]
WhenDiskFull = Literal["stop", "go-on"]


def option(default: Any, help: str, *, choices: Any = None) -> Any:
    """A dataclass field that is also a command-line option; `choices` is a ``Literal`` or a tuple of strings."""
    choices = get_args(choices) or choices
    return field(default=default, metadata={"help": help, "choices": choices})


def suggest(word: str, known: Sequence[str]) -> str:
    """`" Did you mean 'x'?"` for the nearest known word, or an empty string."""
    near = difflib.get_close_matches(word.lower(), [k.lower() for k in known], n=1)
    original = {k.lower(): k for k in known}
    return f" Did you mean {original[near[0]]!r}?" if near else ""


class Config:
    """What all configs share: strict reading from a dictionary and checks that name the field."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from a dictionary whose keys may use hyphens or underscores; an unknown key is a ValueError."""
        known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
        values = {key.replace("-", "_"): value for key, value in values.items()}
        values = {f"{key}_" if keyword.iskeyword(key) else key: value for key, value in values.items()}  # `from`
        for key in values:
            if key not in known:
                hint = suggest(key, known) or f" Known: {', '.join(known)}."
                raise SettingError(f"unknown setting {key!r} in {cls.__name__}.{hint}")
        lists = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
        return cls(**(values | lists))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    def _check(self, name: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise SettingError(
                f"{name.strip('_').replace('_', '-')} is {getattr(self, name)!r}, but must be {allowed}."
            )

    def _check_types(self) -> None:
        """Each value has the type its annotation names (an int passes for a float), and is one of its choices."""
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            kinds = [kind.strip() for kind in str(f.type).split("|")]
            if value is None and ("None" in kinds or f.default is None):
                continue
            choices = f.metadata.get("choices")
            if choices:
                hint = suggest(value, choices) if isinstance(value, str) else ""
                self._check(f.name, value in choices, f"one of {', '.join(choices)}.{hint}".rstrip("."))
                continue
            if "float" in kinds and isinstance(value, int) and not isinstance(value, bool):
                object.__setattr__(self, f.name, float(value))
                continue
            named = {"int": int, "float": float, "str": str, "bool": bool}
            allowed = [named[kind] for kind in kinds if kind in named]
            if allowed:
                self._check(f.name, type(value) in allowed, " or ".join(kind.__name__ for kind in allowed))

    def _check_at_least(self, minimum: float, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            self._check(name, value is None or value >= minimum, f"at least {minimum}")


def check_training(config: Any) -> None:
    """The settings that every training has: its length, batches, optimiser, average and intervals."""
    config._check_at_least(1, "image_size", "steps", "batch_size", "num_workers")
    config._check_at_least(1, "log_every", "checkpoint_every", "sample_num")
    config._check_at_least(0, "seed", "warmup_steps", "weight_decay", "clip_grad", "keep_checkpoints", "sample_every")
    for name in ("ema_decay", "beta1", "beta2"):
        config._check(name, 0 <= getattr(config, name) < 1, "at least 0 and less than 1")
    config._check("lr", config.lr > 0, "positive")
    if isinstance(config.micro_batch, int):
        config._check_at_least(1, "micro_batch")
        divides = config.batch_size % config.micro_batch == 0
        config._check("micro_batch", divides, f"a divisor of batch-size {config.batch_size}")
