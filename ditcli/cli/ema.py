"""`ditcli ema`."""

from __future__ import annotations

from typing import Any

import click

from ditcli.cli.options import Command, config_options, given
from ditcli.config import EmaConfig

EXAMPLES = """
ditcli ema runs/celeba-dit-b-2-256 --sigma-rel 0.07
ditcli ema runs/celeba-dit-b-2-256 --sigma-rel 0.15 --step 200000 --out long.safetensors
"""


@click.command("ema", cls=Command, epilog=EXAMPLES)
@click.argument("run", required=False)
@config_options(EmaConfig)
def command(run: str | None, **options: Any) -> None:
    """Average the weights of RUN over another length than in training.

    RUN is a run that was trained with --ema-snapshot-every, by default the newest. What is written is a checkpoint like
    any other, and its path is printed. Which length is best is seen from scores: `ditcli fid` of each
    (arXiv 2312.02696, section 3.2).
    """
    config = EmaConfig.from_dict(given(options) | {"run": run})
    from ditcli.training.power_ema import reconstruct

    path = reconstruct(config)
    click.echo(path)
    click.echo(f"Draw from it with: ditcli sample --model {path}", err=True)
