"""`ditcli export-onnx`."""

from __future__ import annotations

from typing import Any

import click

from ditcli.cli.options import Command, config_options, given
from ditcli.config import ExportConfig

EXAMPLES = """
ditcli export-onnx
ditcli export-onnx --model runs/celeba-dit-b-2-256 --out faces --dtype fp16
ditcli sample --model faces --labels male female
"""


@click.command("export-onnx", cls=Command, epilog=EXAMPLES)
@config_options(ExportConfig)
def command(**options: Any) -> None:
    """Write a trained model as ONNX files, which sample without torch.

    denoiser.onnx is the network and decoder.onnx the decoder of its VAE; models of pixels need none. They take any
    batch size, height and width, and know their labels and noise schedule. Before they get their names they are
    compared with PyTorch.
    """
    config = ExportConfig.from_dict(given(options))
    from ditcli.export import export_onnx

    export = export_onnx(config)
    for path in export.files:
        click.echo(path)
    click.echo(f"Draw from it with: ditcli sample --model {export.files[0].parent}", err=True)
