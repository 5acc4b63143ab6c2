"""The preset `mnist` trained in JAX, into a run that `ditcli sample` draws from in torch, ONNX Runtime and JAX alike.

    python scripts/mnist_jax.py MNIST [--out runs/mnist-jax] [--steps 7500]

Settings, data, batches, noise and the first weights are those of `ditcli train --preset mnist`; the network, its
gradient and the optimiser are JAX's. MNIST is the folder of the idx files. A run is trained in one go.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from ditcli.config import PRESETS, TrainConfig
from ditcli.data.latents import load_latents
from ditcli.diffusion.process import Diffusion
from ditcli.errors import ResumeError
from ditcli.models.jax_dit import apply
from ditcli.progress import progress
from ditcli.runs import RunDir
from ditcli.training.batches import Batches
from ditcli.training.checkpoints import write_weights
from ditcli.training.ema import ema_decay
from ditcli.training.loop import learning_rate
from ditcli.training.setup import open_run, prepare
from ditcli.training.state import new_state

Tensors = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mnist")
    parser.add_argument("--out", default="runs/mnist-jax")
    parser.add_argument("--steps", type=int, default=PRESETS["mnist"]["steps"])
    args = parser.parse_args()
    config = TrainConfig.from_dict(PRESETS["mnist"] | {"data": args.mnist, "out": args.out, "steps": args.steps})
    print(train_in_jax(config).path)


def train_in_jax(config: TrainConfig) -> RunDir:
    """Mean squared error, AdamW and an average of the weights, as `ditcli train` has them; the average is written."""
    assert config.loss == "mse"
    assert not config.clip_grad
    setup = prepare(replace(config, device="cpu", precision="fp32"))  # torch's part: pictures, noise, first weights
    if setup.run.model_steps():
        raise ResumeError(f"{setup.run.path} holds a run already: give another --out.")
    open_run(setup.run, setup.config, setup.model, setup.dataset, setup.device)
    latents = load_latents(
        setup.dataset, setup.codec, image_size=config.image_size, flip=config.flip, num_workers=os.cpu_count() or 1
    )
    diffusion, dit = Diffusion(setup.model.diffusion), setup.model.dit
    batches = Batches(latents, setup.codec, diffusion, config, num_classes=dit.num_classes, device=setup.device)
    first = new_state(setup.config, setup.model, setup.device).model.state_dict()
    weights = {name: jnp.asarray(value.numpy()) for name, value in first.items()}
    average = jax.tree.map(jnp.copy, weights)
    rates = jnp.asarray([learning_rate(config, step) for step in range(config.steps)])
    optimizer = optax.adamw(
        lambda count: rates[count], b1=config.beta1, b2=config.beta2, weight_decay=config.weight_decay
    )
    moments = optimizer.init(weights)

    def loss_of(weights: Tensors, batch: Tensors) -> jax.Array:
        output = apply(weights, dit, batch["x_t"], batch["time"], batch["labels"])
        return jnp.square(output - batch["target"]).mean()

    @partial(jax.jit, donate_argnums=(0, 1, 2))
    def take_step(weights: Tensors, average: Tensors, moments: Any, batch: Tensors, decay: float) -> tuple[Any, ...]:
        loss, gradients = jax.value_and_grad(loss_of)(weights, batch)
        updates, moments = optimizer.update(gradients, moments, weights)
        weights = optax.apply_updates(weights, updates)
        return weights, optax.incremental_update(weights, average, 1 - decay), moments, loss

    with progress("training", config.steps) as advance:
        for step in range(config.steps):
            batch = batches[step]
            x0, eps = batch.x0.numpy(), batch.eps.numpy()
            arrays = {
                "x_t": diffusion.add_noise(x0, eps, batch.t),
                "target": diffusion.target(x0, eps, batch.t),
                "time": np.asarray(diffusion.network_time(batch.t), dtype=np.float32),
                "labels": batch.labels.numpy(),
            }
            decay = ema_decay(config.ema_decay, step, warmup=config.ema_warmup)
            weights, average, moments, loss = take_step(weights, average, moments, arrays, decay)
            advance(1, f"loss {loss:.4f}" if step % config.log_every == 0 else "")

    tensors = {name: torch.from_numpy(np.array(value)) for name, value in average.items()}
    write_weights(setup.run.checkpoint_file(config.steps), tensors, replace(setup.model, step=config.steps))
    return setup.run


if __name__ == "__main__":
    main()
