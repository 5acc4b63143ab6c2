"""Before the first step: data, codec, model, device and run folder settled once."""

from __future__ import annotations

import json
import math
import platform
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import ditcli
from ditcli.codecs.codec import Codec
from ditcli.codecs.named import open_named_codec
from ditcli.config import ModelConfig, TrainConfig
from ditcli.data.folders import ImageDataset, open_dataset
from ditcli.devices import choose_dtype, open_device
from ditcli.errors import ResumeError
from ditcli.models.dit import DiT
from ditcli.progress import say
from ditcli.runs import RUNS, RunDir
from ditcli.training.checkpoints import remove_leftovers
from ditcli.training.state import TrainState, load_state, new_state


@dataclass(frozen=True)
class Setup:
    """Everything that is settled before the first step."""

    config: TrainConfig
    model: ModelConfig
    run: RunDir
    dataset: ImageDataset
    codec: Codec
    device: torch.device
    dtype: torch.dtype


def prepare(config: TrainConfig) -> Setup:
    """Open the data and the codec, and settle model, device and run folder. Nothing is written."""
    device = open_device(config.device)
    dataset = open_dataset(config.data, label_attr=config.label_attr)
    say(f"{config.data}: {dataset.layout}; {dataset.summary()}")
    dtype = choose_dtype(config.precision, device)
    codec = open_named_codec(config.codec, device=device, dtype=dtype)
    shape = codec.latent_shape(config.image_size, config.image_size)
    model = ModelConfig(
        dit=config.dit(input_shape=shape, num_classes=len(dataset.class_names)),
        diffusion=config.diffusion(),
        codec=str(Path(config.codec).resolve()) if Path(config.codec).is_dir() else config.codec,
        image_size=config.image_size,
        class_names=dataset.class_names,
    )
    run = RunDir(Path(config.out) if config.out else _default_folder(config))
    return Setup(config, model, run, dataset, codec, device, dtype)


def describe(setup: Setup) -> dict[str, object]:
    """Sizes of a run, before it starts; memory is an estimate of the weights, the optimiser and the activations."""
    config, dit = setup.config, setup.model.dit
    with torch.device("meta"):
        parameters = sum(p.numel() for p in DiT(dit).parameters())
    tokens = math.prod(dit.input_size) // dit.patch_size**2
    # Kept for the backward pass of a block: about 12 numbers per token and width besides the MLP's hidden layer twice.
    kept = dit.width * (12 + 2 * dit.mlp_ratio) * (2 if setup.dtype == torch.bfloat16 else 4)
    activations = (config.micro_batch or config.batch_size) * tokens * dit.depth * kept
    return {
        "run": str(setup.run.path),
        "images": len(setup.dataset),
        "classes": list((dit.num_classes and setup.model.class_names) or ()),
        "input": [dit.in_channels, *dit.input_size],
        "parameters": parameters,
        "device": str(setup.device),
        "precision": "bf16" if setup.dtype == torch.bfloat16 else "fp32",
        "steps": config.steps,
        "epochs": round(config.steps * config.batch_size / len(setup.dataset), 2),
        "memory_gb": round((20 * parameters + activations) / 1e9, 2),
    }


def start_or_resume(setup: Setup) -> TrainState:
    """A fresh state in a new run folder, or the last checkpoint's. Raises ResumeError for a run of other settings."""
    config, run = setup.config, setup.run
    if not run.config_file.is_file():
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        run.samples.mkdir(exist_ok=True)
        _write_config(setup)
        return new_state(config, setup.model, setup.device)
    _check_same_settings(setup)
    remove_leftovers(run)
    steps = run.saved_steps()
    _write_config(setup)
    if not steps:
        return new_state(config, setup.model, setup.device)
    say(f"Going on with {run.path} from step {steps[-1]:,}.")
    return load_state(run.checkpoint_file(steps[-1]), config, setup.device)


def _check_same_settings(setup: Setup) -> None:
    saved = setup.run.read_config()
    before = TrainConfig.from_dict(saved["train"]).to_dict()
    now = _comparable(setup.config).to_dict()
    changed = [name for name in now if name not in TrainConfig.RESUMABLE and now[name] != before[name]]
    if changed:
        lines = [f"  {name.replace('_', '-')}: {before[name]!r} there, {now[name]!r} now" for name in changed]
        raise ResumeError(
            f"{setup.run.path} holds a run of other settings:\n" + "\n".join(lines) + "\n"
            "Give the former ones to go on with it, or another --out to start anew."
        )
    if saved["data"]["fingerprint"] != setup.dataset.fingerprint():
        say(f"Note: the pictures in {setup.config.data} changed since the run began.")


def _write_config(setup: Setup) -> None:
    values = {
        "train": _comparable(setup.config).to_dict(),
        "model": setup.model.to_dict(),
        "data": {
            "layout": setup.dataset.layout,
            "images": len(setup.dataset),
            "classes": list(setup.dataset.class_names),
            "fingerprint": setup.dataset.fingerprint(),
        },
        "command": sys.argv,
        "device": str(setup.device),
        "versions": {
            "ditcli": ditcli.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
    }
    partial = setup.run.path / ".config.json.partial"
    partial.write_text(json.dumps(values, indent=2) + "\n")
    partial.rename(setup.run.config_file)


def _comparable(config: TrainConfig) -> TrainConfig:
    """The same however the data folder was spelled."""
    return replace(config, data=str(Path(config.data).resolve())) if Path(config.data).exists() else config


def _default_folder(config: TrainConfig) -> Path:
    data = Path(config.data).resolve().name if Path(config.data).exists() else config.data
    return RUNS / f"{data}-{config.model.replace('/', '-')}-{config.image_size}".lower()
