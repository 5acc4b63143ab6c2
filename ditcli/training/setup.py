"""Before the first step: data, codec, model, device and run folder settled once."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ditcli.codecs.codec import Codec
from ditcli.codecs.named import open_named_codec
from ditcli.config import ModelConfig, TrainConfig, TrainVaeConfig, VaeConfig
from ditcli.data.folders import ImageDataset, open_dataset
from ditcli.data.latents import EncodedDataset, Latents, load_latents, open_latents
from ditcli.devices import choose_dtype, open_device
from ditcli.diffusion.process import Diffusion
from ditcli.errors import CheckpointError, ResumeError, SettingError
from ditcli.files import write_text
from ditcli.hub import is_pinned, lasting_codec_name
from ditcli.memory import kept_per_image
from ditcli.models.conv import make_network
from ditcli.processes import Processes, join
from ditcli.progress import say
from ditcli.runs import RUNS, RunDir
from ditcli.training.batches import Batches
from ditcli.training.checkpoints import remove_leftovers
from ditcli.training.finetune import (
    Source,
    check_codec,
    choose_trainable,
    open_source,
    say_what_is_new,
    settle,
    tuned_model,
    unfrozen,
)
from ditcli.training.record import describe_data, describe_run
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
    processes: Processes
    source: Source | None = None


def prepare(config: TrainConfig) -> Setup:
    """Open the data and the codec, and settle model, device and run folder. Nothing is written."""
    processes = join(config.device)
    check_batch(config, processes)
    device = open_device(config.device)
    dataset = open_latents(Path(config.data)) or open_dataset(config.data, label_attr=config.label_attr)
    if isinstance(dataset, EncodedDataset):
        config = _fit_latents(config, dataset)
    say(f"{config.data}: {dataset.layout}; {dataset.summary()}")
    dtype = choose_dtype(config.precision, device)
    size, name = config.image_size or "", config.model if config.from_ is None else f"from-{Path(config.from_).name}"
    run = RunDir(Path(config.out) if config.out else default_folder(config.data, name, size))
    source = open_source(config, run)
    if source is not None:
        config = settle(config, source)
    codec_name = _codec_of(run, config.codec)
    codec = open_named_codec(codec_name, device=device, dtype=dtype)
    shape = codec.latent_shape(config.image_size, config.image_size)
    names = dataset.class_names
    codec_name = lasting_codec_name(codec_name)
    if source is not None:
        check_codec(config, source, codec)
        model = tuned_model(source, config, shape=shape, class_names=names, codec=codec_name)
        with torch.device("meta"):
            choose_trainable(make_network(model.dit), config, set())  # refuses a pattern before a folder is made
    else:
        model = ModelConfig(
            dit=config.dit(input_shape=shape, num_classes=len(names)),
            diffusion=config.diffusion(),
            codec=codec_name,
            image_size=config.image_size,
            class_names=names,
        )
    return Setup(config, model, run, dataset, codec, device, dtype, processes, source)


def check_batch(config: TrainConfig, processes: Processes) -> None:
    """SettingError where the processes have no part of the batch, or parts that a sharded network cannot take."""
    size, num = config.batch_size, processes.num
    if size < num:
        raise SettingError(f"batch-size is {size}, but must be at least {num}: one image for each process.")
    if config.shard and size % num:
        raise SettingError(f"batch-size is {size}, but with --shard must be a multiple of the {num} processes.")
    if config.shard and num == 1:
        say("Note: there is one process, so --shard has nothing to share.")


def _codec_of(run: RunDir, name: str) -> str:
    """The codec's name; where a run goes on, with the commit it began with, whatever became of the repository since."""
    model = run.read_config().get("model") if run.saved_steps() else None
    lasting = model.get("codec") if isinstance(model, dict) else None
    return lasting if isinstance(lasting, str) and is_pinned(lasting, name) else name


def _fit_latents(config: TrainConfig, dataset: EncodedDataset) -> TrainConfig:
    """What latents were made with is what they are trained with, where the user does not say otherwise."""
    changes: dict[str, Any] = {}
    if config.vae is None and not config.pixels:
        changes["vae"] = dataset.vae
    if config.image_size in (None, TrainConfig.LEFT_TO_SOURCE["image_size"]):
        changes["image_size"] = dataset.image_size
    return replace(config, **changes)


def cached_latents(setup: Setup) -> Latents:
    """The pictures' latents, encoded once."""
    config = setup.config
    return load_latents(
        setup.dataset,
        setup.codec,
        image_size=config.image_size,
        flip=config.flip,
        strict=config.strict,
        num_workers=config.num_workers or os.cpu_count() or 1,
        processes=setup.processes,
    )


def make_batches(setup: Setup, latents: Latents, diffusion: Diffusion) -> Batches:
    """What the steps of a run are shown."""
    return Batches(
        latents,
        setup.codec,
        diffusion,
        setup.config,
        num_classes=setup.model.dit.num_classes,
        device=setup.device,
        processes=setup.processes,
    )


def describe(setup: Setup) -> dict[str, object]:
    """Sizes of a run, before it starts; memory is an estimate of the weights, the optimiser and the activations."""
    config, dit = setup.config, setup.model.dit
    with torch.device("meta"):
        network = make_network(dit)
        parameters = sum(p.numel() for p in network.parameters())
        choose_trainable(network, config, set())
        trainable = sum(p.numel() for p in unfrozen(network))
    micro_batch = config.micro_batch if isinstance(config.micro_batch, int) else config.batch_size
    activations = micro_batch * kept_per_image(dit, setup.dtype.itemsize, checkpointed=config.checkpoint_activations)
    snapshots = math.ceil(config.steps / config.ema_snapshot_every) if config.ema_snapshot_every else 0
    return {
        "run": str(setup.run.path),
        "images": len(setup.dataset),
        "classes": list(setup.model.class_names),
        "input": [dit.in_channels, *dit.input_size],
        "parameters": parameters,
        "trainable": trainable,
        "device": str(setup.device),
        "precision": "bf16" if setup.dtype == torch.bfloat16 else "fp32",
        "steps": config.steps,
        "epochs": round(config.steps * config.batch_size / len(setup.dataset), 2),
        "memory_gb": round((4 * parameters + (24 if snapshots else 16) * trainable + activations) / 1e9, 2),
        "snapshots_gb": round(8 * trainable * snapshots / 1e9, 2),
    }


def start_or_resume(setup: Setup) -> TrainState:
    """A fresh state in a new run folder, or the last checkpoint's. Raises ResumeError for a run of other settings."""
    checkpoint = None
    if setup.processes.first:
        checkpoint = open_run(setup.run, setup.config, setup.model, setup.dataset, setup.device)
    checkpoint = setup.processes.agree(checkpoint)
    rest = (setup.config, setup.model, setup.device, setup.source, setup.processes, setup.dtype)
    if checkpoint is None:
        if setup.source:
            say_what_is_new(setup.source, setup.model)
        return new_state(*rest)
    return load_state(checkpoint, *rest)


def open_run(
    run: RunDir,
    config: TrainConfig | TrainVaeConfig,
    model: ModelConfig | VaeConfig,
    dataset: ImageDataset,
    device: torch.device,
) -> Path | None:
    """Make the run's folder, or check that it holds a run of the same settings; the checkpoint to go on from, if any.

    Raises ResumeError for a run of other settings.
    """
    check_same_settings(run, config, dataset)
    remove_leftovers(run)
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    run.samples.mkdir(exist_ok=True)
    _write_config(run, config, model, dataset, device)
    steps = run.saved_steps()
    if not steps:
        return None
    say(f"Going on with {run.path} from step {steps[-1]:,}.")
    return run.checkpoint_file(steps[-1])


def check_same_settings(run: RunDir, config: TrainConfig | TrainVaeConfig, dataset: ImageDataset) -> None:
    """Raise ResumeError where the folder has checkpoints of other settings, or of pictures of other classes."""
    if not run.saved_steps():
        return
    saved = run.read_config()
    if config.COMMAND not in saved:
        raise ResumeError(f"{run.path} is not of `ditcli {config.COMMAND}`: give another --out.")
    try:
        settled = getattr(config, "LEFT_TO_SOURCE", {})  # of a run begun when there were fewer of these
        before = type(config).from_dict(settled | saved[config.COMMAND]).to_dict() | {
            "classes": saved["data"]["classes"]
        }
        if isinstance(config, TrainConfig):  # one left open was the default of then
            before["prediction"] = saved["model"]["diffusion"]["prediction"]
        fingerprint = saved["data"]["fingerprint"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{run.config_file} is not understood by this version: {error}") from error
    now = _comparable(config).to_dict() | {"classes": list(dataset.class_names)}
    if isinstance(config, TrainConfig):
        now["prediction"] = config.diffusion().prediction
    # The end of a cosine decides every rate on the way.
    free = set(config.RESUMABLE) - ({"steps"} if config.lr_schedule == "cosine" else set())
    changed = [name for name in now if name not in free and now[name] != before[name]]
    if changed:
        lines = [f"  {name.replace('_', '-')}: {before[name]!r} there, {now[name]!r} now" for name in changed]
        raise ResumeError(
            f"{run.path} holds a run of other settings:\n" + "\n".join(lines) + "\n"
            "Give the former ones to go on with it, or another --out to start anew."
        )
    if fingerprint != dataset.fingerprint():
        say(f"Note: the pictures in {config.data} changed since the run began.")


def _write_config(
    run: RunDir,
    config: TrainConfig | TrainVaeConfig,
    model: ModelConfig | VaeConfig,
    dataset: ImageDataset,
    device: torch.device,
) -> None:
    values = {
        config.COMMAND: _comparable(config).to_dict(),
        "model": model.to_dict(),
        "data": describe_data(dataset, Path(config.data)),
        **describe_run(device),
    }
    write_text(run.config_file, json.dumps(values, indent=2) + "\n")


def _comparable(config: Any) -> Any:
    """The same config, with folders by their whole path however they were spelled."""
    paths = {name: getattr(config, name, None) for name in ("data", "vae", "from_")}
    whole = {name: str(Path(path).resolve()) for name, path in paths.items() if path and Path(path).exists()}
    return replace(config, **whole)


def default_folder(data: str, name: str, image_size: int | str) -> Path:
    """`runs/DATA-NAME-SIZE`."""
    folder = Path(data).resolve().name if Path(data).exists() else data
    return RUNS / re.sub(r"[^\w.-]+", "-", f"{folder}-{name}-{image_size}").strip("-").lower()
