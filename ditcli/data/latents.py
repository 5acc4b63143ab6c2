"""Pictures encoded once: moments in .npy files, in a folder of their own or in the cache.

A folder of latents holds `manifest.json`, `names.json`, `labels.npy` where there are classes, and the moments: float16
(N, F, M, h, w) in one `moments.npy` or in shards, or one file (F, M, h, w) per picture. F is 2 where flipped pictures
are encoded too, and M twice the latents' channels for a VAE with variance.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from ditcli.codecs.codec import Codec
from ditcli.codecs.reconstruct import measure_latents
from ditcli.config import TrainConfig
from ditcli.data.folders import ImageDataset, open_dataset
from ditcli.data.latent_files import MANIFEST, Moments, encode_into
from ditcli.errors import CheckpointError, DataError, SettingError, UnreadableImageError
from ditcli.hub import cache_folder
from ditcli.processes import ALONE, Processes
from ditcli.progress import say

BATCH = 32
# Pictures whose latents are measured.
MEASURED = 256
FIT = (0.7, 1.4)  # Standard deviations for which a noise schedule made for 1 still does.


@dataclass(frozen=True)
class Latents:
    """Moments (N, F, M, h, w) on disk, F being 2 where flipped pictures are encoded too, and labels (N,) or None."""

    moments: np.ndarray | Moments
    labels: np.ndarray | None
    unreadable: tuple[str, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class EncodedDataset(ImageDataset):
    """What `ditcli encode` wrote."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def vae(self) -> str:
        """The codec's name."""
        return self.manifest["vae"]

    @property
    def image_size(self) -> int:
        return self.manifest["image_size"]

    def moments(self) -> Moments:
        """(N, F, M, h, w), on disk."""
        return Moments.open(self.folder, self.manifest)

    def load(self, index: int, size: int) -> np.ndarray:
        raise DataError(f"{self.folder} holds latents, not pictures: give the folder that they were encoded from.")

    def num_bytes(self) -> int:
        return self.moments().nbytes

    def fingerprint(self) -> str:
        """Of the pictures and of the codec."""
        return self.manifest["fingerprint"]


def open_latents(folder: Path) -> EncodedDataset | None:
    """The latents in a folder; None where there are none, CheckpointError where their manifest is damaged."""
    if not (folder / MANIFEST).is_file():
        return None
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        names = json.loads((folder / "names.json").read_text())
        labels = np.load(folder / "labels.npy") if manifest["class_names"] else None
        return EncodedDataset(
            layout=f"latents of {manifest['vae']} at {manifest['image_size']} pixels",
            names=names,
            labels=labels,
            class_names=tuple(manifest["class_names"]),
            folder=folder,
            manifest=manifest,
        )
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise CheckpointError(f"{folder / MANIFEST} is damaged ({error}): encode the pictures again.") from error


def open_pictures(path_or_name: str, *, label_attr: str = TrainConfig.label_attr) -> ImageDataset:
    """`open_dataset`, but DataError for latents, whose folder may hold pictures too: their reconstructions."""
    if open_latents(Path(path_or_name)) is not None:
        raise DataError(f"{path_or_name} holds latents, not pictures: give the folder that they were encoded from.")
    return open_dataset(path_or_name, label_attr=label_attr)


def load_latents(
    dataset: ImageDataset,
    codec: Codec,
    *,
    image_size: int,
    flip: bool,
    strict: bool = False,
    num_workers: int = 1,
    processes: Processes = ALONE,
) -> Latents:
    """The data set as the codec sees it: what `ditcli encode` wrote, or encoded now unless it was before.

    Unreadable pictures are left out and named; with `strict` the first raises UnreadableImageError. The folder gets its
    name only when it is whole, so an interrupted one is never read. A codec whose encoding of a flipped picture is the
    flipped encoding needs no second one: F is then 1. Several processes share the work. Raises DataError when no
    picture is left or the disk is too full, SettingError for latents of another codec, size or flip.
    """
    if isinstance(dataset, EncodedDataset):
        return _check_encoded(dataset, codec, image_size=image_size, flip=flip)
    both = flip and not codec.flip_equivariant
    key = [2, dataset.fingerprint(), codec.fingerprint(), image_size, both]
    folder = cache_folder() / "latents" / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    if not processes.agree((folder / MANIFEST).is_file()):
        _build(
            folder,
            dataset,
            codec,
            image_size=image_size,
            both=both,
            strict=strict,
            num_workers=num_workers,
            processes=processes,
        )
    manifest = json.loads((folder / MANIFEST).read_text())
    unreadable = tuple(f"{name}: {reason}" for name, reason in manifest["unreadable"])
    if unreadable:
        report_unreadable(unreadable)
        if strict:
            raise UnreadableImageError(*manifest["unreadable"][0])
    try:
        moments = np.load(folder / "moments.npy", mmap_mode="r")
        labels = None if dataset.labels is None else np.load(folder / "labels.npy")
    except (OSError, ValueError) as error:
        raise DataError(f"the cached latents in {folder} are damaged ({error}): remove that folder.") from error
    return Latents(moments, labels, unreadable)


def _check_encoded(dataset: EncodedDataset, codec: Codec, *, image_size: int, flip: bool) -> Latents:
    if same_weights(codec) != dataset.manifest["codec"]:
        raise SettingError(
            f"the latents in {dataset.folder} were made with the VAE {dataset.vae}, not with {codec.name}: "
            f"leave --vae out, give --vae {dataset.vae}, or encode the pictures again."
        )
    if image_size != dataset.image_size:
        raise SettingError(
            f"image-size is {image_size}, but the pictures of {dataset.folder} were encoded at {dataset.image_size}."
        )
    moments = dataset.moments()
    if flip and moments.shape[1] == 1 and not codec.flip_equivariant:
        raise SettingError(
            f"{dataset.folder} has no flipped pictures: train with --no-flip, or encode again with --flip."
        )
    return Latents(moments, dataset.labels, ())


def same_weights(codec: Codec) -> str:
    """What latents of equal codecs have in common, whatever the precision they were computed in."""
    return codec.fingerprint().partition("-")[0]


def measure(latents: Latents, codec: Codec) -> tuple[float, float]:
    """Mean and standard deviation of the latents of a few hundred pictures, taken evenly from all."""
    num = len(latents.moments)
    rows = np.unique(np.linspace(0, num - 1, min(num, MEASURED)).astype(int))
    moments = np.stack([latents.moments[row, 0] for row in rows])
    return measure_latents(codec, torch.from_numpy(moments))


def warn_of_scale(mean: float, std: float, codec: Codec) -> None:
    """Tell the user when latents are far from mean 0 and variance 1, for which noise schedules are made."""
    if codec.name == "pixels" or (FIT[0] <= std <= FIT[1] and abs(mean) <= 0.5 * std):
        return
    config = getattr(codec, "config", None)
    scale, shift = getattr(config, "scaling_factor", 1.0), getattr(config, "shift_factor", None) or 0.0
    say(
        f"Warning: on these pictures the latents of {codec.name} have mean {mean:.3g} and deviation {std:.3g}, "
        "far from 0 and 1: noise covers them too early or too late, and samples suffer. In the config.json of the VAE "
        f"a scaling_factor of {scale / std:.4g} and a shift_factor of {shift + mean / scale:.4g} would make them fit."
    )


def _build(
    folder: Path,
    dataset: ImageDataset,
    codec: Codec,
    *,
    image_size: int,
    both: bool,
    strict: bool,
    num_workers: int,
    processes: Processes,
) -> None:
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    instead = "set DITCLI_CACHE to a folder on another disk."
    try:
        if processes.first:
            _remove_abandoned(folder)
            partial.mkdir(parents=True)
            check_space(partial, dataset, codec, image_size=image_size, both=both, instead=instead)
        encode_into(
            partial,
            dataset,
            codec,
            image_size=image_size,
            both=both,
            strict=strict,
            num_workers=num_workers,
            batch_size=BATCH,
            processes=processes,
        )
        if processes.first:
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        processes.collect(None)  # the others wait until it is there
    except OSError as error:
        raise DataError(
            f"the latents could not be written to {cache_folder()} ({error.strerror}): make room, or {instead}"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    """Clear what killed processes left of this cache."""
    for left in folder.parent.glob(f"{folder.name}.partial-*"):
        pid = int(left.name.rpartition("-")[2])
        if pid == os.getpid() or not psutil.pid_exists(pid):
            shutil.rmtree(left, ignore_errors=True)


def check_space(
    folder: Path, dataset: ImageDataset, codec: Codec, *, image_size: int, both: bool, instead: str
) -> None:
    """DataError where the latents will not fit on the disk of a folder."""
    shape = (len(dataset), 1 + both, codec.moments_channels, *codec.latent_shape(image_size, image_size)[1:])
    needed = int(np.prod(shape)) * codec.moments_dtype.itemsize
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"the latents take {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free in {folder.parent}: "
            f"{instead}"
        )


def report_unreadable(unreadable: Iterable[str], most: int = 10) -> None:
    """Name the pictures that were left out."""
    names = list(unreadable)
    say(f"Left out {len(names)} unreadable image{'s' if len(names) > 1 else ''}:")
    for line in names[:most]:
        say(f"  {line}")
    if len(names) > most:
        say(f"  and {len(names) - most} more")
