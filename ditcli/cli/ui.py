"""`ditcli ui`."""

from __future__ import annotations

from typing import Any

import click

from ditcli.cli.options import Command, config_options, given
from ditcli.config import UiConfig

EXAMPLES = """
ditcli ui
ditcli ui --model runs/celeba-dit-b-2-256 --device cuda
ditcli ui --model onnx --port 8080
"""


@click.command("ui", cls=Command, epilog=EXAMPLES)
@config_options(UiConfig)
def command(**options: Any) -> None:
    """Serve a page on which to choose labels, guidance, steps and seed, and see the picture form.

    Prints the address to open in a browser; Ctrl-C ends it. The page is for this machine alone, asks nothing of the
    network, and names the command line of each picture. Needs gradio: pip install 'ditcli[ui]'.
    """
    config = UiConfig.from_dict(given(options))
    from ditcli.page import serve

    serve(config, tell=click.echo)
