"""Tensors from files: safetensors, and torch's pickles opened so that no code in them runs."""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ditcli.errors import CheckpointError


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, or of a pickle that holds nothing else."""
    if is_pickle(path):
        contents = read_pickle(path)
        if not isinstance(contents, dict) or not all(isinstance(value, Tensor) for value in contents.values()):
            raise CheckpointError(f"{path} holds other things than tensors.")
        return contents
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): download or copy it again.") from error


def is_pickle(path: Path) -> bool:
    """Whether the file is torch's zip, or a bare pickle; safetensors begin with the size of their header."""
    try:
        with path.open("rb") as file:
            head = file.read(8)
            return head.startswith(b"PK\x03\x04") or (head.startswith(b"\x80") and any(head[4:]))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}).") from error


def read_pickle(path: Path) -> Any:
    """What a `.pt` or `.bin` file holds, by `weights_only=True`: tensors, plain values and argparse's Namespace alone.

    Raises CheckpointError for one that names any other class or function, before anything of it runs.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        asks = f"it asks for {found[1]}" if found else "it is no plain pickle of tensors"
        raise CheckpointError(
            f"{path} is refused, and nothing of it was run: {asks}, but only tensors and plain values are read. "
            "Ask its author for a state dict or a safetensors file."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} is damaged ({error}): download or copy it again.") from error
