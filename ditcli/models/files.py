"""Tensors in files: safetensors with a hash, and torch's pickles opened so that no code in them runs."""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import re
import shlex
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ditcli.errors import CheckpointError
from ditcli.files import replacing
from ditcli.runs import RunDir, is_run, is_vae_run, state_file

# In the metadata of the files we write: the hash of all else in them.
HASH = "ditcli-sha256"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file with a hash by which `read_tensors` sees whether it is still what was written."""
    whole = {name: value.detach().contiguous() for name, value in tensors.items()}
    with replacing(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode
        save_file(whole, partial, {**metadata, HASH: _hash(whole, metadata)})
        partial.chmod(mode)  # safetensors makes files that only their owner may read


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, or of a pickle that holds nothing else.

    Raises CheckpointError for a damaged file, with what to do instead: what `write_tensors` wrote has the same bytes
    still, and others' files are at least as long as they say.
    """
    if is_pickle(path):
        contents = read_pickle(path)
        if not isinstance(contents, dict) or not all(isinstance(value, Tensor) for value in contents.values()):
            raise CheckpointError(f"{path} holds other things than tensors.")
        return contents
    try:
        return _read(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): {_way_out(path)}") from error


def _read(path: Path) -> dict[str, Tensor]:
    """SafetensorError, OSError or ValueError where it is damaged."""
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata() or {})
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dictionary
    expected = metadata.pop(HASH, None)
    if expected is not None and expected != _hash(tensors, metadata):
        raise ValueError("its SHA-256 is not that of what was written")
    return tensors


def _hash(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, value in sorted(tensors.items()):
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _way_out(path: Path) -> str:
    """What to do about a damaged file: in a run's checkpoints the newest whole one before it may serve."""
    run, name = RunDir(path.parent.parent), re.fullmatch(r"step-(\d+)(?:\.state)?\.safetensors", path.name)
    if name is None or not is_run(run.path):
        return "download or copy it again."
    damaged = run.checkpoint_file(int(name[1]))
    for step in reversed([step for step in run.saved_steps() if step < int(name[1])]):
        former = run.checkpoint_file(step)
        if not (_is_whole(former) and _is_whole(state_file(former))):
            continue
        sample = shlex.join(["ditcli", "sample", "--model", str(former)])
        draw = "" if is_vae_run(run.path) else f"draw from it with `{sample}`, or "
        remove = shlex.join(["rm", str(damaged), str(state_file(damaged))])
        return f"{former} before it is whole: {draw}go on training from it with `{remove}` and the same command again."
    return "there is no whole checkpoint before it. Train anew with another --out."


def _is_whole(path: Path) -> bool:
    try:
        _read(path)
    except (SafetensorError, OSError, ValueError):
        return False
    return True


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
