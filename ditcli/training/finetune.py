"""Fine-tuning: what a run takes from its source, what starts afresh, and what stays as it is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from ditcli import hub, runs
from ditcli.codecs.codec import Codec
from ditcli.codecs.named import open_named_codec
from ditcli.config import CONV_DIT, DIT_SIZES, DiTConfig, ModelConfig, TrainConfig
from ditcli.errors import SettingError
from ditcli.models.dit import DiT
from ditcli.models.lora import DOWN, UP, add_adapters
from ditcli.models.weights import load_dit
from ditcli.progress import say

TABLE = "y_embedder.embedding_table.weight"


@dataclass(frozen=True)
class Source:
    """The model that a run starts from; `name` leads to it from anywhere."""

    name: str
    network: DiT
    model: ModelConfig
    names_its_codec: bool


def open_source(config: TrainConfig, run: runs.RunDir) -> Source | None:
    """The model that `--from` names, or the one that the run began from where it goes on; None without `--from`."""
    if config.from_ is None:
        return None
    name = config.from_
    if run.saved_steps():  # a run that is fine-tuned may have got further since
        name = run.read_config().get("model", {}).get("base") or name
    path = hub.find_checkpoint(name)
    network, model = load_dit(path)
    return Source(hub.portable_name(path), network, model, path.is_dir() or runs.is_checkpoint(path))


def settle(config: TrainConfig, source: Source) -> TrainConfig:
    """The config with the source's settings where it left them open; SettingError where it contradicts them."""
    dit, diffusion = source.model.dit, source.model.diffusion
    theirs: dict[str, Any] = {
        name: getattr(dit, name)
        for name in (
            *("depth", "width", "num_heads", "patch_size", "mlp_ratio", "conditioning", "conv_widths"),
            *("mlp", "rope", "qk_norm"),
        )
    }
    theirs |= {name: getattr(diffusion, name) for name in ("schedule", "num_timesteps", "prediction", "learn_sigma")}
    given = {name: getattr(config, name) for name in theirs} | (config.model_shape() if config.model else {})
    clashes = [
        f"{name.replace('_', '-')} is {value!r}, but {theirs[name]!r} there"
        for name, value in given.items()
        if value not in (None, theirs[name])
    ]
    if clashes:
        raise SettingError(
            f"these settings contradict {config.from_}: {'; '.join(clashes)}. A fine-tuned model keeps the network and "
            "the diffusion of its source: leave them out."
        )
    if not config.pixels and not config.vae:
        pixels = source.model.codec == "pixels"
        theirs |= {"pixels": pixels, "vae": None if pixels else source.model.codec}
    image_size = config.image_size or source.model.image_size
    return replace(config, **theirs, model=config.model or _size_of(dit), image_size=image_size)


def check_codec(config: TrainConfig, source: Source, codec: Codec) -> None:
    """SettingError for another codec whose latents have as many channels: the network would take them for its own."""
    theirs = source.model.codec
    if codec.latent_channels != source.model.dit.in_channels or not source.names_its_codec or config.codec == theirs:
        return
    if open_named_codec(theirs, device=torch.device("cpu")).fingerprint() != codec.fingerprint():
        raise SettingError(
            f"vae is {config.codec!r}, but {config.from_} was trained on the latents of {theirs!r}: leave it out."
        )


def tuned_model(
    source: Source, config: TrainConfig, *, shape: tuple[int, int, int], class_names: tuple[str, ...], codec: str
) -> ModelConfig:
    """The source's model for other inputs (channels, height, width) and classes."""
    channels, *size = shape
    dit = source.model.dit
    return replace(
        source.model,
        dit=replace(
            dit,
            input_size=(size[0], size[1]),
            in_channels=channels,
            out_channels=channels * (dit.out_channels // dit.in_channels),
            num_classes=len(class_names),
        ),
        codec=codec,
        image_size=config.image_size,
        class_names=class_names,
        step=0,
        base=source.name,
        lora_rank=config.lora_rank,
    )


def carry_over(source: Source, network: DiT, class_names: tuple[str, ...]) -> set[str]:
    """Give a fresh network the source's weights where they fit; returns the names of those that stay fresh.

    The label table is new, each row the source's null class and a little noise, and its last row is that null class; it
    is the source's where the classes are the same.
    """
    theirs, ours = source.network.state_dict(), network.state_dict()
    fresh = {name for name, value in ours.items() if theirs[name].shape != value.shape} | {TABLE}
    if class_names == source.model.class_names:
        fresh.remove(TABLE)
    network.load_state_dict({name: value for name, value in theirs.items() if name not in fresh}, strict=False)
    if TABLE in fresh:
        with torch.no_grad():
            table, null = network.y_embedder.embedding_table.weight, theirs[TABLE][-1]
            table += null.to(table)
            table[-1] = null
    return fresh


def say_what_is_new(source: Source, model: ModelConfig) -> None:
    """Tell what a new run does not take from its source."""
    theirs, ours = source.model.dit, model.dit
    if source.model.class_names != model.class_names:
        say(f"The label table is new: {ours.num_classes} classes beside the null class of {source.name}.")
    if theirs.in_channels != ours.in_channels:
        say(
            f"The source has {theirs.in_channels} latent channels, the codec {ours.in_channels}: the patch embedding "
            "and the head start afresh."
        )
    if theirs.input_size != ours.input_size:
        before, now = ("x".join(map(str, dit.input_size)) for dit in (theirs, ours))
        say(f"The source's input is {before}, this run's {now}: positions are computed anew.")


def choose_trainable(network: DiT, config: TrainConfig, fresh: set[str]) -> set[str]:
    """Add adapters and freeze what is asked for; returns the names of the weights that belong into a checkpoint.

    That is all of them, or with adapters these and what is not the source's. Raises SettingError for a pattern that
    matches nothing, and where nothing is left to train.
    """
    if config.lora_rank:
        add_adapters(network, config.lora_rank)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name in fresh | {TABLE} or name.endswith((DOWN, UP)))
    names = [name for name, _ in network.named_parameters()]
    for pattern in config.freeze:
        matched = [name for name in names if fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")]
        if not matched:
            parts = sorted({name.split(".")[0] for name in names})
            raise SettingError(
                f"freeze is {pattern!r}, which matches no parameter: they begin with {', '.join(parts)}, as in "
                f"{names[-1]}."
            )
        for name in matched:
            network.get_parameter(name).requires_grad_(False)
    trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
    if not trainable:
        raise SettingError(f"freeze is {' '.join(config.freeze)!r}, which leaves nothing to train.")
    if not config.lora_rank:
        return set(names)
    return {name for name in names if name in fresh | {TABLE} or name.endswith((DOWN, UP))}


def unfrozen(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def _size_of(dit: DiTConfig) -> str:
    """The named size that comes nearest; depth, width and heads are settled beside it."""
    if dit.conv_widths:
        return CONV_DIT
    nearest = min(DIT_SIZES, key=lambda size: abs(DIT_SIZES[size][1] - dit.width))
    return f"DiT-{nearest}/{dit.patch_size}"
