"""What a model is, in words and numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ditcli import hub, runs
from ditcli.config import CONV_DIT, DIT_SIZES, DiTConfig
from ditcli.models.conv import make_network
from ditcli.models.dit import DiT
from ditcli.models.weights import read_model


def describe(name: str | None) -> dict[str, Any]:
    """All that is known of a model, ready for JSON. Raises as `find_checkpoint` and `load_dit` do."""
    path = hub.find_checkpoint(name)
    config, _ = read_model(path)
    about = read_about(path)
    dit, diffusion = config.dit, config.diffusion
    with torch.device("meta"):
        network = make_network(dit)
    return {
        "model": hub.portable_name(path),
        "kind": _kind(path, adapter=config.lora_rank > 0),
        "architecture": size_name(dit) or "DiT",
        **{name: value for name, value in dit.to_dict().items() if name != "num_classes"},
        "image_size": config.image_size,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "gflops": float(f"{count_flops(network) / 1e9:.4g}"),
        "steps": config.step or None,
        "data": about.get("data"),
        "num_classes": dit.num_classes,
        "classes": list(config.class_names),
        "diffusion": diffusion.to_dict(),
        "codec": config.codec,
        "base": config.base or None,
        "lora_rank": config.lora_rank or None,
    }


def read_about(checkpoint: Path) -> dict[str, Any]:
    """What lies in the config.json of the run that a checkpoint is of, or beside a shared one; else nothing."""
    for folder in (checkpoint.parent.parent, checkpoint.parent):
        if checkpoint.is_file() and runs.is_checkpoint(checkpoint) and (folder / "config.json").is_file():
            return runs.RunDir(folder).read_config()
    return {}


def count_flops(network: DiT) -> int:
    """Multiply-adds of one pass for one image, as the paper counts its Gflops (table 1 and 4)."""
    config = network.config
    x = torch.zeros(1, config.in_channels, *config.input_size, device="meta")
    one = torch.zeros(1, device="meta")
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        network(x, one, one.long())
    return counter.get_total_flops() // 2


def size_name(dit: DiTConfig) -> str | None:
    """`DiT-XL/2`, `conv-dit`, or None for a shape that has no name."""
    if dit.conv_widths:
        return CONV_DIT
    shape = dit.depth, dit.width, dit.num_heads
    return next((f"DiT-{size}/{dit.patch_size}" for size, named in DIT_SIZES.items() if named == shape), None)


def to_text(facts: Mapping[str, Any]) -> str:
    """A line for each fact."""
    lines = []
    for name, value in facts.items():
        if value in (None, [], ()) or name == "num_classes":
            continue
        if name == "classes":
            value = f"{len(value):,}: " + ", ".join(value[:8]) + (" ..." if len(value) > 8 else "")
        elif name == "data":
            value = f"{value['images']:,} images, {value['layout']}"
        elif isinstance(value, dict):
            value = ", ".join(f"{key.replace('_', ' ')} {v}" for key, v in value.items() if v not in (None, False))
        elif isinstance(value, list | tuple):
            value = " x ".join(map(str, value))
        elif name == "gflops":
            value = f"{value} (multiply-adds of one pass)"
        elif isinstance(value, int):
            value = f"{value:,}"
        lines.append((name.replace("_", " "), value))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:{width}}  {value}" for name, value in lines)


def _kind(path: Path, *, adapter: bool) -> str:
    if path.is_dir():
        return "diffusers pipeline"
    if not runs.is_checkpoint(path):
        return "file of the original implementation"
    return "low-rank adapter of ditcli" if adapter else "checkpoint of ditcli"
