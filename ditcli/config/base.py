"""What every config shares: options with help texts, strict reading, checks that name the field."""

from __future__ import annotations

import dataclasses
import difflib
import keyword
import math
from collections.abc import Sequence
from dataclasses import field
from typing import Any, Literal, Self, get_args

from ditcli.errors import SettingError

Loss = Literal["mse", "l1"]
LOGGERS = ("tensorboard", "wandb", "trackio")
Precision = Literal["auto", "bf16", "fp32"]
WhenDiskFull = Literal["stop", "go-on"]

# More of these is a slip of the finger, or made to fill the memory: refused before anything is asked of the machine.
MOST = {
    **dict.fromkeys(("image_size", "input_size", "patch_size", "sample_size"), 16_384),
    **dict.fromkeys(
        ("width", "widths", "conv_widths", "in_channels", "out_channels", "latent_channels", "gan_width"), 65_536
    ),
    **dict.fromkeys(("block_out_channels", "encoder_block_out_channels", "decoder_block_out_channels"), 65_536),
    **dict.fromkeys(("depth", "mlp_ratio", "layers_per_block", "num_encoder_blocks", "num_decoder_blocks"), 1_000),
    **dict.fromkeys(("batch_size", "micro_batch", "num_timesteps", "eval_num"), 1_000_000),
    **dict.fromkeys(("sample_steps", "eval_steps"), 100_000),
    **dict.fromkeys(("num_classes", "num_codes", "num_vq_embeddings"), 10_000_000),
    **dict.fromkeys(("num_workers", "sample_num"), 1_024),
    "gan_layers": 16,
}
LARGEST = 2**63 - 1
MOST_STAGES = 16  # of an autoencoder: each but the last halves the sides


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
        if not isinstance(values, dict):
            raise SettingError(f"{cls.__name__} is {values!r}, but must be settings by name.")
        known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
        values = {key.replace("-", "_"): value for key, value in values.items()}
        values = {f"{key}_" if keyword.iskeyword(key) else key: value for key, value in values.items()}  # `from`
        for key in values:
            if key not in known:
                hint = suggest(key, known) or f" Known: {', '.join(known)}."
                raise SettingError(f"unknown setting {key!r} in {cls.__name__}.{hint}")
        for f in dataclasses.fields(cls):  # type: ignore[arg-type]
            if f.name not in values and f.default is f.default_factory is dataclasses.MISSING:
                raise SettingError(f"{f.name} is missing in {cls.__name__}.")
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
            self._check_size(f.name, value)
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
            if kinds[0].startswith("tuple["):  # tuple[int, ...] or tuple[float, float]
                first, second = kinds[0].removeprefix("tuple[").removesuffix("]").split(", ")
                kind = (int, float) if first == "float" else (named[first],)
                fits = isinstance(value, tuple) and all(type(v) in kind for v in value)
                self._check(f.name, fits and (second == "..." or len(value) == 2), f"a list of {first}, {second}")
                continue
            allowed = [named[kind] for kind in kinds if kind in named]
            if allowed:
                self._check(f.name, type(value) in allowed, " or ".join(kind.__name__ for kind in allowed))

    def _check_size(self, name: str, value: Any) -> None:
        """Numbers are finite and not so large that they would fill the memory."""
        numbers = value if isinstance(value, tuple) else (value,)
        most = MOST.get(name, LARGEST)
        for number in numbers:
            if isinstance(number, float):
                self._check(name, math.isfinite(number), "finite")
            if isinstance(number, int) or (isinstance(number, float) and name in MOST):
                self._check(name, abs(number) <= most, f"at most {most:,}")
        if isinstance(value, tuple) and name in MOST:
            self._check(name, len(value) <= MOST_STAGES, f"at most {MOST_STAGES} numbers")

    def _check_at_most(self, maximum: int, *names: str) -> None:
        for name in names:
            self._check(name, getattr(self, name) <= maximum, f"at most {maximum:,}")

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
    config._check("lr", config.lr == "auto" or config.lr > 0, "positive")
    for name in config.log:
        config._check("log", name in LOGGERS, f"of {', '.join(LOGGERS)}.{suggest(name, LOGGERS)}".rstrip("."))
    if isinstance(config.micro_batch, int):
        config._check_at_least(1, "micro_batch")
        divides = config.batch_size % config.micro_batch == 0
        config._check("micro_batch", divides, f"a divisor of batch-size {config.batch_size}")
