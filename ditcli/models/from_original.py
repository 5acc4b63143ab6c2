"""Files of the original implementations: DiT (facebookresearch/DiT, arXiv 2212.09748) and SiT (arXiv 2401.08740).

Both publish a bare state dict and train to ``{"model", "ema", "opt", "args"}``. Their state dicts have equal keys and
shapes; what the network predicts stands in `args`, else in the file's name alone.
"""

from __future__ import annotations

import math
import re
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditcli.config import DEFAULT_VAE, DiffusionConfig, DiTConfig, ModelConfig
from ditcli.errors import CheckpointError
from ditcli.models.dit import sincos_positions
from ditcli.models.files import is_pickle, read_pickle, read_tensors
from ditcli.progress import say

UNDERSTOOD = (
    "Understood are checkpoints and runs of ditcli, diffusers' DiT pipeline folders (model_index.json with "
    "transformer/, scheduler/ and vae/), and files of the original DiT and SiT (a state dict, or model and ema "
    "beside args)."
)
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # paper table 1
DOWNSAMPLING = 8  # of the Stable Diffusion VAE, which both use


def read_original(path: Path, *, ema: bool = True) -> tuple[ModelConfig, dict[str, Tensor]]:
    """What a file says of its model, and the weights under our names, which are the original's."""
    contents: Any = read_pickle(path) if is_pickle(path) else read_tensors(path)
    args: Any = {}
    state = contents
    if isinstance(contents, dict) and {"model", "ema"} & contents.keys():
        held = [key for key in ("ema", "model") if key in contents]
        if not ema and "model" not in held:
            raise CheckpointError(f"{path} holds averaged weights alone: leave --no-ema out.")
        state = contents[held[0] if ema else "model"]
        found = contents.get("args", {})
        args = vars(found) if isinstance(found, Namespace) else found
    elif not ema:
        raise CheckpointError(f"{path} holds one set of weights, which are its averaged ones: leave --no-ema out.")
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds no state dict of tensors. {UNDERSTOOD}")
    config = _describe(path, state, args if isinstance(args, dict) else {})
    return config, {key: value.float() for key, value in state.items() if key != "pos_embed"}


def _describe(path: Path, state: dict[str, Tensor], args: dict[str, Any]) -> ModelConfig:
    needed = ["pos_embed", "x_embedder.proj.weight", "y_embedder.embedding_table.weight"]
    needed += ["blocks.0.mlp.fc1.weight", "blocks.0.adaLN_modulation.1.weight", "final_layer.linear.weight"]
    dimensions = (3, 4, 2, 2, 2, 2)
    misfit = misfits(
        missing=[key for key in needed if key not in state],
        unexpected=[key for key in sorted(state) if not _is_original(key)],
        reshaped=[
            f"{key} {tuple(state[key].shape)}"
            for key, ndim in zip(needed, dimensions, strict=True)
            if key in state and state[key].ndim != ndim
        ],
    )
    if misfit:
        raise CheckpointError(f"{path} is not understood: {misfit}. {UNDERSTOOD}")
    width, channels, patch_size, _ = state["x_embedder.proj.weight"].shape
    out_channels, rest = divmod(len(state["final_layer.linear.weight"]), patch_size**2)
    side = math.isqrt(state["pos_embed"].shape[1])
    _check_positions(path, state["pos_embed"][0], side, width)
    if rest or out_channels not in (channels, 2 * channels) or channels not in (3, 4):
        raise CheckpointError(f"{path} turns {channels} channels into {out_channels}, which is not understood.")
    num_classes = len(state["y_embedder.embedding_table.weight"]) - 1
    if args.get("num_classes", num_classes) != num_classes:
        raise CheckpointError(f"{path} was trained on {args['num_classes']} classes without a null class.")
    dit = DiTConfig(
        input_size=(side * patch_size,) * 2,
        in_channels=channels,
        out_channels=out_channels,
        patch_size=patch_size,
        width=width,
        depth=1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks.")),
        num_heads=args.get("num_heads") or _num_heads(path, width),
        mlp_ratio=len(state["blocks.0.mlp.fc1.weight"]) / width,
        num_classes=num_classes,
    )
    downsampling = DOWNSAMPLING if channels == 4 else 1
    vae = f"stabilityai/sd-vae-ft-{args['vae']}" if args.get("vae") in ("ema", "mse") else DEFAULT_VAE
    return ModelConfig(
        dit=dit,
        diffusion=_diffusion(path, args, learn_sigma=out_channels > channels),
        codec=vae if channels == 4 else "pixels",
        image_size=side * patch_size * downsampling,
        class_names=tuple(str(i) for i in range(num_classes)),
    )


def _is_original(key: str) -> bool:
    parts = ("x_embedder.", "t_embedder.", "y_embedder.", "blocks.", "final_layer.")
    return key == "pos_embed" or key.startswith(parts)


def _diffusion(path: Path, args: dict[str, Any], *, learn_sigma: bool) -> DiffusionConfig:
    """SiT's where `args` says so or, in a bare state dict, the file's name; else DiT's. Both guide 3 channels."""
    by_name = not args and bool(re.search(r"(?<![a-z])sit(?![a-z])", path.name, re.IGNORECASE))
    if "path_type" not in args and not by_name:
        if not args:
            say(f"{path.name}: taken for a DiT that predicts noise; a SiT has SiT in its file's name.")
        return DiffusionConfig(learn_sigma=learn_sigma, guided_channels=3)
    kind = args.get("path_type", "Linear"), args.get("prediction", "velocity")
    if kind != ("Linear", "velocity"):
        raise CheckpointError(
            f"{path} is a SiT of path {kind[0]} and prediction {kind[1]}: only Linear velocity is read."
        )
    if by_name:
        say(f"{path.name}: taken for a SiT (linear path, velocity), by its name.")
    return DiffusionConfig(schedule="flow", prediction="flow", time_scale=1.0, reversed_time=True, guided_channels=3)


def _num_heads(path: Path, width: int) -> int:
    if width in HEADS:
        return HEADS[width]
    head = 64 if width > 384 else 16
    if width % head:
        raise CheckpointError(f"{path} does not say how many heads attend, and width {width} is none of the paper's.")
    say(
        f"{path.name} does not say how many heads attend, and width {width} is none of the paper's: taking {head} each."
    )
    return width // head


def _check_positions(path: Path, positions: Tensor, side: int, width: int) -> None:
    """The positions are the fixed ones that we compute, so that they need not be kept."""
    if positions.shape == (side**2, width):
        expected = sincos_positions(side, side, width, torch.device("cpu"))
        if torch.allclose(positions.float(), expected, atol=1e-3):
            return
    raise CheckpointError(f"{path} has other positions than DiT's fixed sine and cosine ones (pos_embed). {UNDERSTOOD}")


def misfits(*, missing: list[str], unexpected: list[str], reshaped: Sequence[str] = (), most: int = 4) -> str:
    """The first few keys of each way in which a file does not fit; an empty string for one that does."""
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    told = (
        f"{kind} {', '.join(keys[:most])}" + (f" and {len(keys) - most} more" if len(keys) > most else "")
        for kind, keys in kinds.items()
        if keys
    )
    return "; ".join(told)
