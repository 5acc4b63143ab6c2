"""The idx files of MNIST and its relatives (http://yann.lecun.com/exdb/mnist), gzipped or not."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ditcli.errors import DataError

_UINT8 = 8
_CHUNK_BYTES = 1 << 24


def read_idx(path: Path, num_dimensions: int) -> np.ndarray:
    """The uint8 array of an idx file: (N, H, W) pictures or (N,) labels.

    Raises `DataError` when it is damaged, of another type or shape, or not as long as its header says.
    """
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"  # by content: unpacked files often keep the name of the packed one
            raw.seek(0)
            with gzip.open(raw) if packed else raw as file:
                return _read(file, path, num_dimensions)  # type: ignore[arg-type]
    except (OSError, EOFError, zlib.error) as error:  # a broken gzip stream raises any of the three
        raise DataError(f"{path} cannot be read ({error}); it is damaged or truncated, fetch it again.") from error


def _read(file: BinaryIO, path: Path, num_dimensions: int) -> np.ndarray:
    header = file.read(4 + 4 * num_dimensions)
    if header[:4] != bytes([0, 0, _UINT8, num_dimensions]):
        start = header[:4].hex() or "nothing"
        raise DataError(f"{path} is no idx file of bytes in {num_dimensions} dimensions: it starts with {start}.")
    if len(header) < 4 + 4 * num_dimensions:
        raise DataError(f"{path} is truncated: it ends within its header; fetch it again.")
    shape = tuple(int(length) for length in np.frombuffer(header, dtype=">u4", offset=4))
    # In pieces, so that a header that lies cannot ask for more memory than the file fills.
    values, missing = bytearray(), math.prod(shape)
    while missing and (piece := file.read(min(missing, _CHUNK_BYTES))):
        values += piece
        missing -= len(piece)
    size = "×".join(map(str, shape))
    if missing:
        raise DataError(
            f"{path} is truncated: its header says {size}, but {missing:,} bytes are missing; fetch it again."
        )
    if file.read(1):
        raise DataError(f"{path} holds more than the {size} bytes of its header; fetch it again.")
    if not values:
        raise DataError(f"{path} is empty: its header says {size}.")
    return np.frombuffer(bytes(values), dtype=np.uint8).reshape(shape)
