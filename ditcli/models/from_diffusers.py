"""diffusers' DiT pipeline folders, as `facebook/DiT-XL-2-256` is one: transformer, scheduler, vae and model_index.json.

diffusers' DiT is not numerically the original: its time frequencies divide by 127, the norm before an MLP has eps 1e-5,
guidance moves all channels and DDIM's steps are spaced `leading`. Its config is kept as it is.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditcli import hub
from ditcli.config import DiffusionConfig, DiTConfig, ModelConfig, Prediction, ScheduleName, Spacing
from ditcli.errors import CheckpointError
from ditcli.models.files import read_tensors
from ditcli.models.from_original import UNDERSTOOD, misfits

PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
SCHEDULES: dict[str, ScheduleName] = {"linear": "linear", "squaredcos_cap_v2": "cosine"}
SPACINGS: dict[str, Spacing] = {"leading": "leading", "trailing": "trailing", "linspace": "uniform"}
# Values of what would change the outputs and is not built in; a key may be absent.
PLAIN_TRANSFORMER = {
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "norm_elementwise_affine": False,
    "attention_bias": True,
    "cross_attention_dim": None,
}
PLAIN_SCHEDULER = {
    "clip_sample": False,
    "thresholding": False,
    "rescale_betas_zero_snr": False,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "trained_betas": None,
}
POSITIONS = "pos_embed.pos_embed"  # Which some versions of diffusers stored, and we compute.

# Ours <- theirs, outside the blocks and in each of them.
EMBEDDERS = {
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table",
}
ENDS = {"x_embedder.proj": "pos_embed.proj", "final_layer.linear": "proj_out_2"}
ENDS |= {"final_layer.adaLN_modulation.1": "proj_out_1"}
BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}


def read_diffusers(folder: Path, *, ema: bool = True) -> tuple[ModelConfig, dict[str, Tensor]]:
    """What a pipeline's folder says of its model, and the weights under our names."""
    if not ema:
        raise CheckpointError(f"{folder} holds one set of weights: leave --no-ema out.")
    index = _read_json(folder / "model_index.json")
    if index.get("_class_name") != "DiTPipeline":
        raise CheckpointError(f"{folder} is a {index.get('_class_name')}, which is not understood. {UNDERSTOOD}")
    transformer = _read_json(folder / "transformer" / "config.json")
    kind = transformer.get("_class_name")
    if kind not in ("DiTTransformer2DModel", "Transformer2DModel"):
        raise CheckpointError(f"{folder / 'transformer'} is a {kind}, which is not understood. {UNDERSTOOD}")
    _check_plain(folder / "transformer" / "config.json", transformer, PLAIN_TRANSFORMER)
    dit = _dit(folder, transformer)
    vae = _read_json(folder / "vae" / "config.json")
    blocks = vae.get("block_out_channels") or vae.get("encoder_block_out_channels") or [0]
    config = ModelConfig(
        dit=dit,
        diffusion=_diffusion(folder / "scheduler" / "scheduler_config.json", dit),
        codec=hub.portable_name(folder),
        image_size=dit.input_size[0] * 2 ** (len(blocks) - 1),
        class_names=_class_names(index.get("id2label"), dit.num_classes),
    )
    name = hub.weights_in(path.name for path in (folder / "transformer").iterdir())
    if name is None:
        raise CheckpointError(f"{folder / 'transformer'} has no {hub.WEIGHTS_NAMES[0]}.")
    path = folder / "transformer" / name
    return config, _rename(path, read_tensors(path), dit)


def _dit(folder: Path, values: dict[str, Any]) -> DiTConfig:
    try:
        size = values["sample_size"]
        return DiTConfig(
            input_size=(size, size),
            in_channels=values["in_channels"],
            out_channels=values.get("out_channels") or values["in_channels"],
            patch_size=values["patch_size"],
            width=values["num_attention_heads"] * values["attention_head_dim"],
            depth=values["num_layers"],
            num_heads=values["num_attention_heads"],
            num_classes=values["num_embeds_ada_norm"],
            frequency_divisor=127,
            mlp_norm_eps=values.get("norm_eps", 1e-5),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / 'transformer' / 'config.json'} is not understood: {error}") from error


def _diffusion(path: Path, dit: DiTConfig) -> DiffusionConfig:
    values = _read_json(path)
    _check_plain(path, values, PLAIN_SCHEDULER)
    steps = values.get("num_train_timesteps", 1000)
    name = values.get("beta_schedule", "linear")
    default_spacing = "leading" if values.get("_class_name") in ("DDIMScheduler", "DDPMScheduler") else "linspace"
    try:
        betas = values.get("beta_start", 1e-4) * steps, values.get("beta_end", 0.02) * steps
        if name == "linear" and any(abs(beta - ours) > 1e-9 for beta, ours in zip(betas, (0.1, 20.0), strict=True)):
            raise ValueError(f"betas from {betas[0] / steps} to {betas[1] / steps}")
        return DiffusionConfig(
            schedule=SCHEDULES[name],
            num_timesteps=steps,
            prediction=PREDICTIONS[values.get("prediction_type", "epsilon")],
            learn_sigma=dit.out_channels == 2 * dit.in_channels,
            spacing=SPACINGS[values.get("timestep_spacing", default_spacing)],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is not understood: {error}.") from error


def _class_names(id2label: Any, num_classes: int) -> tuple[str, ...]:
    """The names, with the number behind one that several classes have; numbers where `save_pretrained` dropped them."""
    if not isinstance(id2label, dict):
        return tuple(str(i) for i in range(num_classes))
    names = [str(id2label.get(str(i), i)) for i in range(num_classes)]
    counts = Counter(names)
    return tuple(f"{name} #{i}" if counts[name] > 1 else name for i, name in enumerate(names))


def _rename(path: Path, state: dict[str, Tensor], dit: DiTConfig) -> dict[str, Tensor]:
    """diffusers' state dict under the original's keys.

    Every block holds its own copy of the embedders. Those of published weights are equal, and one is kept.
    """
    left, missing, differing = dict(state), list[str](), list[str]()

    def take(key: str) -> Tensor:
        if key not in left:
            missing.append(key)
            return torch.zeros(0)
        return left.pop(key).float()

    weights: dict[str, Tensor] = {}
    kinds = ("weight", "bias")
    for ours, theirs in ENDS.items():
        weights |= {f"{ours}.{kind}": take(f"{theirs}.{kind}") for kind in kinds}
    for i in range(dit.depth):
        block, their_block = f"blocks.{i}.", f"transformer_blocks.{i}."
        for ours, theirs in BLOCK.items():
            weights |= {f"{block}{ours}.{kind}": take(f"{their_block}{theirs}.{kind}") for kind in kinds}
        for kind in kinds:
            parts = [take(f"{their_block}attn1.to_{part}.{kind}") for part in "qkv"]
            weights[f"{block}attn.qkv.{kind}"] = torch.cat(parts)
        for ours, theirs in EMBEDDERS.items():
            for kind in kinds[:1] if ours.startswith("y_") else kinds:
                value = take(f"{their_block}norm1.emb.{theirs}.{kind}")
                if not torch.equal(weights.setdefault(f"{ours}.{kind}", value), value):
                    differing.append(f"{their_block}norm1.emb.{theirs}.{kind}")
    misfit = misfits(missing=missing, unexpected=[key for key in left if key != POSITIONS])
    if misfit:
        raise CheckpointError(f"{path} is not understood: {misfit}. {UNDERSTOOD}")
    if differing:
        raise CheckpointError(f"{path} has its own {differing[0]}, but only one that equals block 0's is read.")
    return weights


def _check_plain(path: Path, values: dict[str, Any], plain: dict[str, Any]) -> None:
    for key, value in plain.items():
        if values.get(key, value) != value:
            raise CheckpointError(f"{path} has {key} {values[key]!r}, but only {value!r} is read.")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
        if not isinstance(values, dict):
            raise ValueError("not an object")
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is missing or damaged ({error}).") from error
    return values
