"""Pictures encoded once: a memory-mapped cache of moments, keyed by the pictures, the codec and the size."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import torch

from ditcli.codecs.codec import Codec
from ditcli.data.folders import ImageDataset
from ditcli.errors import DataError, UnreadableImageError
from ditcli.progress import progress, say

BATCH = 32
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Latents:
    """Moments (N, F, M, h, w) on disk, F being 2 where flipped pictures are encoded too, and labels (N,) or None."""

    moments: np.ndarray
    labels: np.ndarray | None
    unreadable: tuple[str, ...]


def cache_folder() -> Path:
    """`$DITCLI_CACHE`, or `ditcli` in the user's cache folder."""
    if "DITCLI_CACHE" in os.environ:
        return Path(os.environ["DITCLI_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "ditcli"


def load_latents(
    dataset: ImageDataset, codec: Codec, *, image_size: int, flip: bool, strict: bool = False, num_workers: int = 1
) -> Latents:
    """The data set as the codec sees it, encoded now unless it was before.

    Unreadable pictures are left out and named; with `strict` the first raises UnreadableImageError. The folder gets its
    name only when it is whole, so an interrupted one is never read. A codec whose encoding of a flipped picture is the
    flipped encoding needs no second one: F is then 1. Raises DataError when no picture is left or the disk is too full.
    """
    both = flip and not codec.flip_equivariant
    key = [1, dataset.fingerprint(), codec.fingerprint(), image_size, both]
    folder = cache_folder() / "latents" / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    if not (folder / MANIFEST).is_file():
        _build(folder, dataset, codec, image_size=image_size, both=both, strict=strict, num_workers=num_workers)
    manifest = json.loads((folder / MANIFEST).read_text())
    unreadable = tuple(f"{name}: {reason}" for name, reason in manifest["unreadable"])
    if unreadable:
        _report(unreadable)
        if strict:
            raise UnreadableImageError(*manifest["unreadable"][0])
    try:
        moments = np.load(folder / "moments.npy", mmap_mode="r")[: manifest["num"]]
        labels = None if dataset.labels is None else np.load(folder / "labels.npy")
    except (OSError, ValueError) as error:
        raise DataError(f"the cached latents in {folder} are damaged ({error}): remove that folder.") from error
    return Latents(moments, labels, unreadable)


def _build(
    folder: Path, dataset: ImageDataset, codec: Codec, *, image_size: int, both: bool, strict: bool, num_workers: int
) -> None:
    _, height, width = codec.latent_shape(image_size, image_size)
    shape = (len(dataset), 1 + both, codec.moments_channels, height, width)
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    _remove_abandoned(folder)
    partial.mkdir(parents=True)
    try:
        _check_space(partial, int(np.prod(shape)) * codec.moments_dtype.itemsize)
        moments = np.lib.format.open_memmap(partial / "moments.npy", "w+", codec.moments_dtype, shape)
        kept: list[int] = []
        unreadable: list[tuple[str, str]] = []
        with progress(f"encoding with {codec.name}", len(dataset)) as advance:
            pictures = _read(dataset, image_size, strict, num_workers)
            while batch := list(islice(pictures, BATCH)):
                unreadable += [
                    (error.name, error.reason) for _, error in batch if isinstance(error, UnreadableImageError)
                ]
                good = [(index, image) for index, image in batch if isinstance(image, np.ndarray)]
                if good:
                    images = torch.from_numpy(np.stack([image for _, image in good])).permute(0, 3, 1, 2)
                    rows = slice(len(kept), len(kept) + len(good))
                    moments[rows, 0] = codec.encode(images).numpy()
                    if both:
                        moments[rows, 1] = codec.encode(images.flip(-1)).numpy()
                    kept += [index for index, _ in good]
                advance(len(batch), f"{len(unreadable)} unreadable" if unreadable else "")
        if not kept:
            _report([f"{name}: {reason}" for name, reason in unreadable])
            raise DataError(f"none of the {len(dataset)} pictures could be read.")
        moments.flush()
        if dataset.labels is not None:
            np.save(partial / "labels.npy", dataset.labels[kept])
        _write_synced(partial / MANIFEST, json.dumps({"num": len(kept), "unreadable": unreadable}))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _read(
    dataset: ImageDataset, image_size: int, strict: bool, num_workers: int
) -> Iterator[tuple[int, np.ndarray | UnreadableImageError]]:
    """Each picture's index with the picture, or with why there is none; a few batches are read ahead by threads."""

    def load(index: int) -> tuple[int, np.ndarray | UnreadableImageError]:
        try:
            return index, dataset.load(index, image_size)
        except UnreadableImageError as error:
            if strict:
                raise
            return index, error

    with ThreadPoolExecutor(num_workers) as pool:
        indices = iter(range(len(dataset)))
        waiting = [pool.submit(load, index) for index in islice(indices, 2 * BATCH)]
        try:
            while waiting:
                done = waiting.pop(0)
                waiting += [pool.submit(load, index) for index in islice(indices, 1)]
                yield done.result()
        finally:
            for future in waiting:
                future.cancel()


def _remove_abandoned(folder: Path) -> None:
    """Clear what killed processes left of this cache."""
    for left in folder.parent.glob(f"{folder.name}.partial-*"):
        pid = int(left.name.rpartition("-")[2])
        if pid == os.getpid() or not psutil.pid_exists(pid):
            shutil.rmtree(left, ignore_errors=True)


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"the latents take {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free in {cache_folder()}: "
            "set DITCLI_CACHE to a folder on another disk."
        )


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _report(unreadable: Iterable[str], most: int = 10) -> None:
    names = list(unreadable)
    say(f"Left out {len(names)} unreadable image{'s' if len(names) > 1 else ''}:")
    for line in names[:most]:
        say(f"  {line}")
    if len(names) > most:
        say(f"  and {len(names) - most} more")
