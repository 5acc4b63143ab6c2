"""`ditcli encode`."""

from __future__ import annotations

from typing import Any

import click

from ditcli.cli.options import Command, config_options, devices_option, given, share
from ditcli.config import EncodeConfig

EXAMPLES = """
ditcli encode --data ./celeba --out latents --vae madebyollin/taesd --image-size 128
ditcli encode --data ./photos --out latents --vae runs/my-vae --image-size 64 --shard-size 10000 --devices 4
ditcli encode --data ./photos --out check --num 64 --reconstruct --lpips none
ditcli train --data latents
"""


@click.command("encode", cls=Command, epilog=EXAMPLES)
@config_options(EncodeConfig)
@devices_option
def command(devices: int | None, **options: Any) -> None:
    """Encode a folder of images into latents.

    Writes moments (float16), labels, names and a manifest to --out, which `ditcli train --data` and `ditcli decode`
    take. With --reconstruct every image is written beside its reconstruction, and PSNR and LPIPS are printed.
    To resume, run the same command again.
    """
    config = EncodeConfig.from_dict(given(options))
    for name in ("data", "out"):
        if not getattr(config, name):
            raise click.UsageError(f"Missing option '--{name}'.")
    share(devices, config.device)
    from ditcli.encoding import encode

    encoded = encode(config)
    click.echo(encoded.path)
    if encoded.psnr is not None:
        click.echo(f"PSNR {encoded.psnr:.2f} dB")
    if encoded.lpips is not None:
        click.echo(f"LPIPS {encoded.lpips:.4f}")
