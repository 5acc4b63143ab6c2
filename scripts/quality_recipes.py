"""What bench_quality.py compares: budgets, recipes with their ingredients, and its command line."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
from collections.abc import Sequence
from typing import Any

from ditcli.config import PRESETS, TrainConfig
from ditcli.devices import open_device
from ditcli.errors import SettingError

Recipes = dict[str, dict[str, Any]]

# Of every variant; what is given on the command line comes before it.
BUDGETS: dict[str, dict[str, Any]] = {
    "cpu": {"width": 128, "depth": 6, "num_heads": 2, "image_size": 128, "images": 32_000, "seeds": [0, 1],
            "curve": [1.0], "seconds": 3600, "sample_batch": 50},
    "gpu": {"width": 384, "depth": 12, "num_heads": 6, "image_size": 128, "images": 400_000, "seeds": [0, 1],
            "curve": [0.25, 0.5, 1.0], "seconds": 600, "sample_batch": 500},
}  # fmt: skip
# What a recipe does not decide here: shape, data, length, what is written on the way.
FIXED = frozenset(
    "data out image_size vae pixels model width depth num_heads patch_size steps lr_schedule seed device precision "
    "log_every checkpoint_every keep_checkpoints sample_every sample_num sample_cfg sample_steps".split()
)
# What scores depend on besides the recipe, and a folder of them keeps.
SETTINGS = (
    *("data", "label_attr", "vae", "image_size", "flip", "most_pictures", "samples", "sample_steps", "curve"),
    *("width", "depth", "num_heads", "patch_size", "device", "precision"),
)
PAPER = TrainConfig()
PEER = "paper with rate"  # the fair one: the recipe of 2022 as fast as it goes here
RATE = ("batch_size", "lr", "warmup_steps")
FAST = {key: value for key, value in PRESETS["fast"].items() if key not in FIXED}
# Fields that make sense together alone are one ingredient; each other field of `fast` is one of its own.
TOGETHER = {"rate": RATE, "flow": ("schedule", "prediction")}


def ingredients() -> dict[str, tuple[str, ...]]:
    """Names and fields of what `fast` has and `paper` does not."""
    together = {name: tuple(f for f in fields if f in FAST) for name, fields in TOGETHER.items()}
    known = {field for fields in together.values() for field in fields}
    found = together | {field: (field,) for field in FAST if field not in known}
    return {name: fields for name, fields in found.items() if any(FAST[f] != getattr(PAPER, f) for f in fields)}


def variants() -> Recipes:
    """Names and recipes, as settings of `ditcli train`."""
    found = {"paper": {}, "fast": FAST}
    for name, fields in ingredients().items():
        found[f"fast without {name}"] = FAST | {f: getattr(PAPER, f) for f in fields}
        found[f"paper with {name}"] = {f: FAST[f] for f in fields}
    return found


def read_variant(text: str) -> tuple[str, dict[str, Any]]:
    """`name: base=fast key=value ...` -> name and recipe; values as in JSON, or words."""
    name, colon, words = text.partition(":")
    settings: dict[str, Any] = {}
    for word in shlex.split(words):
        key, _, value = word.partition("=")
        try:
            settings[key.replace("-", "_")] = json.loads(value)
        except ValueError:
            settings[key.replace("-", "_")] = value
    base = settings.pop("base", "paper")
    known = {f.name for f in dataclasses.fields(TrainConfig)} - FIXED
    wrong = [key for key in settings if key not in known]
    if not colon or not settings or wrong or base not in variants():
        raise SettingError(
            f"--add {text!r} must be 'name: key=value ...' with settings of ditcli train and, perhaps, base=fast"
            + (f"; {', '.join(wrong)} cannot be set here." if wrong else ".")
        )
    return name.strip(), variants()[base] | settings


def read_arguments(words: Sequence[str] | None, description: str) -> tuple[argparse.Namespace, Recipes]:
    known = variants()
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of pictures, as for ditcli train")
    parser.add_argument("--out", required=True, help="folder of runs, scores and tables")
    parser.add_argument("--label-attr", default=TrainConfig.label_attr, help="CelebA attribute of the classes")
    codec = parser.add_mutually_exclusive_group()
    codec.add_argument("--vae", default="madebyollin/taesd")
    codec.add_argument("--pixels", dest="vae", action="store_const", const=None)
    parser.add_argument(
        "--budget", choices=BUDGETS, help="network, images and seeds, where not given (default: device's)"
    )
    parser.add_argument(
        "--budget-seconds",
        type=float,
        nargs="?",
        const=0.0,
        metavar="S",
        help="as many images as about so many seconds allow, or as many seconds as the budget names",
    )
    parser.add_argument("--images", type=int, help="of a run")
    for name in ("--image-size", "--width", "--depth", "--num-heads"):
        parser.add_argument(name, type=int)
    parser.add_argument("--patch-size", type=int, help="default: 2 of latents, 4 of pixels")
    parser.add_argument("--no-flip", dest="flip", action="store_false", help="pictures have a left and a right")
    parser.add_argument("--most-pictures", type=int, default=12_000, help="of a larger folder these, by their names")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--curve", type=float, nargs="+", help="shares of the images at which runs are scored")
    parser.add_argument("--equal-seconds", nargs="+", metavar="NAME", help="recipes of the second table (default: all)")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="of " + "; ".join(known))
    parser.add_argument(
        "--add", action="append", default=[], metavar="'NAME: KEY=VALUE ...'", help="a variant of your own"
    )
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--sample-steps", type=int, default=25)
    parser.add_argument("--sample-batch", type=int)
    parser.add_argument("--features", help="ONNX file, inception, dinov2 or pixels, as for ditcli report")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    args = parser.parse_args(words)
    args.budget = args.budget or ("gpu" if open_device(args.device).type == "cuda" else "cpu")
    for name, value in BUDGETS[args.budget].items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    args.budget_seconds = args.seconds if args.budget_seconds == 0 else args.budget_seconds
    args.patch_size = args.patch_size or (2 if args.vae else 4)
    args.curve = sorted({*args.curve, 1.0})
    chosen = args.variants or [name for name in known if name == PEER or not name.startswith("paper with")]
    for name in chosen:
        if name not in known:
            parser.error(f"there is no variant {name!r}: give some of {'; '.join(known)}, or --add it")
    # `paper` comes first: its clock is the others' limit.
    recipes = {name: known[name] for name in dict.fromkeys(["paper", *chosen])} | dict(map(read_variant, args.add))
    args.equal_seconds = list(dict.fromkeys(["paper", *(args.equal_seconds or recipes)]))
    return args, recipes
