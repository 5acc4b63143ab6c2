"""`ditcli fid`."""

from __future__ import annotations

from typing import Any

import click

from ditcli.cli.options import Command, config_options, devices_option, given, share
from ditcli.config import FidConfig

EXAMPLES = """
ditcli fid --real ./celeba --fake ./out
ditcli fid --real ./celeba --fake runs/celeba-dit-b-2-256 --num 10000 --metrics fid,kid,pr --devices 4
ditcli fid --real ./celeba --image-size 128 --save-stats celeba-128.npz
ditcli fid --real celeba-128.npz --fake samples.zip --json
ditcli fid --real ./celeba --fake ./out --features efficientnet.onnx --codec madebyollin/taesd
ditcli fid --real ./celeba --fake ./out --features dinov2 --metrics fid,pr
"""


@click.command("fid", cls=Command, epilog=EXAMPLES)
@config_options(FidConfig)
@devices_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def command(devices: int | None, as_json: bool, **options: Any) -> None:
    """Score pictures against real ones: FID, KID, Inception Score, precision and recall.

    Either side is a folder in any layout that `ditcli train` reads, a .zip of pictures, an .npz of ADM's suite (arr_0,
    or mu and sigma), statistics written with --save-stats, or a model, from which pictures are drawn. Real pictures are
    cropped and resized to the fakes' size, as in training. Features of a folder are computed once and kept.
    """
    config = FidConfig.from_dict(given(options))
    if not config.real:
        raise click.UsageError("Missing option '--real': the pictures to score against.")
    share(devices, config.device)
    from ditcli.evaluation.report import to_json, to_text
    from ditcli.evaluation.score import score
    from ditcli.progress import say

    scores = score(config)
    if scores is None:  # another process of the same score
        return
    for note in scores.notes:
        say(f"Note: {note}")
    click.echo(to_json(scores) if as_json else to_text(scores))
