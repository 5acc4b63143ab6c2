"""`ditcli demo`."""

from __future__ import annotations

import click

from ditcli.cli.options import Command
from ditcli.config import DEMO, SampleConfig, TrainConfig


@click.command("demo", cls=Command, epilog="ditcli demo\nditcli demo --out runs/my-demo --steps 2000")
@click.option("--out", default="runs/demo", show_default=True, help="Run folder.")
@click.option("--steps", type=int, help=f"Optimiser steps.  [default: {DEMO['steps']}]")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
def command(out: str, steps: int | None, device: str) -> None:
    """Train a small DiT on the embedded pictures (Fashion-MNIST, ten classes) and draw from it.

    Takes two to three minutes on two CPU cores. Prints the path of a grid with a row for each class.
    """
    config = TrainConfig.from_dict(DEMO | {"out": out, "device": device} | ({} if steps is None else {"steps": steps}))
    from ditcli.sampling import sample
    from ditcli.training.train import train

    run = train(config)
    settings = {"num": 8, "cfg": 2, "steps": 30, "grid": True, "batch_size": 80, "device": device}
    samples = sample(SampleConfig.from_dict({"model": str(run.path), "out": f"{out}/demo"} | settings))
    click.echo(samples.grid)
