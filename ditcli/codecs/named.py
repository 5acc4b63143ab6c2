"""A codec by the name that users and checkpoints give it."""

from __future__ import annotations

import torch

from ditcli.codecs.codec import Codec
from ditcli.codecs.folder import open_codec
from ditcli.codecs.pixels import PixelCodec
from ditcli.config import TILE
from ditcli.hub import find_codec


def open_named_codec(name: str, *, device: torch.device, dtype: torch.dtype = torch.float32, tile: int = TILE) -> Codec:
    """`pixels`, or the VAE of a folder, run or Hub repository on `device`, computing in `dtype`."""
    if name == "pixels":
        return PixelCodec()
    return open_codec(find_codec(name), name=name, device=device, dtype=dtype, tile=tile)
