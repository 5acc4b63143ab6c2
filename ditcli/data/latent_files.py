"""Writing and reading the files of a folder of latents, picture by picture, so that a killed process goes on."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ditcli.codecs.codec import Codec
from ditcli.data.folders import ImageDataset
from ditcli.errors import DataError, UnreadableImageError
from ditcli.files import remove_partials, write_text
from ditcli.processes import ALONE, Processes
from ditcli.progress import progress

MANIFEST = "manifest.json"
PROGRESS = "progress.json"
PICTURES = "moments"  # Folder of the files of single pictures.


@dataclass
class Progress:
    """How far an encoding came: the moments of the first `read` pictures are on disk, but for the unreadable ones."""

    read: int = 0
    unreadable: list[tuple[int, str, str]] = field(default_factory=list)  # index, name, reason

    @property
    def num_kept(self) -> int:
        return self.read - len(self.unreadable)

    def kept(self) -> list[int]:
        """Indices of the pictures whose moments are on disk."""
        left_out = {index for index, _, _ in self.unreadable}
        return [index for index in range(self.read) if index not in left_out]


def encode_into(
    folder: Path,
    dataset: ImageDataset,
    codec: Codec,
    *,
    image_size: int,
    both: bool,
    strict: bool,
    num_workers: int,
    batch_size: int,
    num: int | None = None,
    shard_size: int | None = None,
    per_image: bool = False,
    about: Callable[[dict[str, Any]], dict[str, Any]] = lambda manifest: {},
    watch: Callable[[list[str], Tensor, Tensor], Any] = lambda names, images, moments: None,
    note: Callable[[list[Any]], object] = lambda seen: None,
    processes: Processes = ALONE,
) -> None:
    """Encode the first `num` pictures into a folder, from where an earlier call stopped; the manifest comes last.

    `watch` sees the names, uint8 images (n, 3, H, W) and moments (n, M, h, w) of a batch, and `note` what it returned
    for the batches before they are noted as done; `about` sees the manifest and gives what to add to it. Of several
    processes each encodes a batch at a time, and the first writes. Raises DataError when no picture could be read, with
    `strict` UnreadableImageError for the first that cannot, and OSError when the disk is full.
    """
    total = min(num or len(dataset), len(dataset))
    _, height, width = codec.latent_shape(image_size, image_size)
    row = (1 + both, codec.moments_channels, height, width)
    if processes.first:
        remove_partials(folder)
    done = processes.agree(_read_progress(folder) if processes.first else Progress())
    if processes.first and not per_image:
        _cut(folder, done.num_kept, np.empty((1, *row), codec.moments_dtype), shard_size)
    written, names = done.num_kept, picture_files(dataset.names) if per_image else []
    starts = range(done.read, total, batch_size)
    mine = starts[processes.rank :: processes.num]
    indices = chain.from_iterable(range(start, min(start + batch_size, total)) for start in mine)
    with progress(f"encoding with {codec.name}", total, start=done.read) as advance:
        pictures = _read(dataset, indices, image_size, num_workers, 2 * batch_size)
        for _ in starts[:: processes.num]:
            parts = processes.collect(_encode(list(islice(pictures, batch_size)), dataset, codec, both, watch))
            unreadable = [error for part in parts for error in part.unreadable]
            if unreadable and strict:
                raise UnreadableImageError(*unreadable[0][1:])
            done.unreadable += unreadable
            if processes.first:
                for part in parts:
                    if per_image:
                        _write_pictures(folder, [names[index] for index in part.indices], part.moments)
                    else:
                        _append(folder, written, part.moments, shard_size)
                    written += len(part.indices)
                note([part.seen for part in parts if part.indices])
            num_read = sum(part.num_read for part in parts)
            done.read += num_read
            if processes.first:
                write_text(folder / PROGRESS, json.dumps(asdict(done)))
            advance(num_read, f"{len(done.unreadable)} unreadable" if done.unreadable else "")
    kept = done.kept()
    if not kept:
        _, name, reason = done.unreadable[0]
        raise DataError(f"none of the {total} pictures could be read; the first is {name}: {reason}.")
    if not processes.first:
        return
    files = [names[index] for index in kept] if per_image else [path.name for path in _shards(folder)]
    if dataset.labels is not None:
        np.save(folder / "labels.npy", dataset.labels[kept])
    write_text(folder / "names.json", json.dumps([dataset.names[index] for index in kept]))
    manifest: dict[str, Any] = {
        "num": len(kept),
        "shape": row,
        "dtype": codec.moments_dtype.name,
        "per_image": per_image,
        "files": files,
        "class_names": dataset.class_names,
        "unreadable": [(name, reason) for _, name, reason in done.unreadable],
    }
    write_text(folder / MANIFEST, json.dumps(manifest | about(manifest), indent=1))
    (folder / PROGRESS).unlink()


@dataclass
class Part:
    """What became of a batch: moments (n, F, M, h, w) of the pictures that could be read, and why others could not."""

    num_read: int
    indices: list[int]
    moments: np.ndarray
    unreadable: list[tuple[int, str, str]]
    seen: Any = None


def _encode(
    batch: list[tuple[int, np.ndarray | UnreadableImageError]],
    dataset: ImageDataset,
    codec: Codec,
    both: bool,
    watch: Callable[[list[str], Tensor, Tensor], Any],
) -> Part:
    unreadable = [
        (index, error.name, error.reason) for index, error in batch if isinstance(error, UnreadableImageError)
    ]
    good = [(index, image) for index, image in batch if isinstance(image, np.ndarray)]
    part = Part(len(batch), [index for index, _ in good], np.empty(0, codec.moments_dtype), unreadable)
    if good:
        images = torch.from_numpy(np.stack([image for _, image in good])).permute(0, 3, 1, 2)
        encoded = [codec.encode(picture) for picture in ([images, images.flip(-1)] if both else [images])]
        part.moments = torch.stack(encoded, dim=1).numpy().astype(codec.moments_dtype)
        part.seen = watch(
            [dataset.names[index] for index in part.indices], images, torch.from_numpy(part.moments[:, 0])
        )
    return part


def _write_pictures(folder: Path, names: Iterable[str], moments: np.ndarray) -> None:
    for name, values in zip(names, moments, strict=True):
        path = folder / PICTURES / name
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, values)


def picture_files(names: Any) -> list[str]:
    """`a/b.jpg` -> `a/b.npy`; `a/b.jpg.npy` where another picture differs in its suffix only."""
    stems = [str(Path(name).with_suffix("")) for name in names]
    times = Counter(stems)
    return [f"{stem if times[stem] == 1 else name}.npy" for stem, name in zip(stems, names, strict=True)]


@dataclass(frozen=True)
class Moments:
    """Moments (N, F, M, h, w) in one or more files, as far as an array of them is needed: shape, rows, all of it."""

    files: list[Path]
    shape: tuple[int, ...]
    dtype: np.dtype
    starts: np.ndarray  # The first row of each file.
    shards: list[np.ndarray] | None  # Mapped files; None where each holds one picture and is opened when it is read.

    @classmethod
    def open(cls, folder: Path, manifest: dict[str, Any]) -> Moments:
        """DataError where a file is missing, of another shape or outside the folder."""
        try:
            return cls._open(folder, manifest)
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise DataError(f"the latents in {folder} are damaged ({error}): encode the pictures again.") from error

    @classmethod
    def _open(cls, folder: Path, manifest: dict[str, Any]) -> Moments:
        row, per_image = tuple(manifest["shape"]), manifest["per_image"]
        files = [folder / (PICTURES if per_image else "") / name for name in manifest["files"]]
        outside = [name for name in manifest["files"] if Path(name).is_absolute() or ".." in Path(name).parts]
        if outside:
            raise DataError(
                f"{folder / MANIFEST} names {outside[0]!r}, which leads out of the folder: do not trust it."
            )
        missing = [file for file in files if not file.is_file()]
        if missing:
            raise DataError(f"{missing[0]} is missing: the latents in {folder} are not whole. Encode them again.")
        dtype = np.dtype(manifest["dtype"])
        shape = (manifest["num"], *row)
        if per_image:
            return cls(files, shape, dtype, np.arange(len(files)), None)
        shards = [np.load(file, mmap_mode="r") for file in files]
        lengths = [len(shard) for shard in shards]
        if sum(lengths) != shape[0] or any(shard.shape[1:] != row or shard.dtype != dtype for shard in shards):
            raise DataError(f"the files in {folder} do not hold what {MANIFEST} says: encode the pictures again.")
        return cls(files, shape, dtype, np.cumsum([0, *lengths[:-1]]), shards)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, place: tuple[int, int] | slice) -> np.ndarray:
        """Row and flip -> (M, h, w); rows from and to -> (n, F, M, h, w)."""
        if isinstance(place, slice):
            rows = [self._row(row) for row in range(*place.indices(len(self)))]
            return np.stack(rows) if rows else np.empty((0, *self.shape[1:]), self.dtype)
        row, flip = place
        return self._row(row)[flip]

    def _row(self, row: int) -> np.ndarray:
        file = int(np.searchsorted(self.starts, row, side="right")) - 1
        if self.shards is None:
            return np.load(self.files[file], mmap_mode="r")
        return self.shards[file][row - self.starts[file]]


def _read_progress(folder: Path) -> Progress:
    if not (folder / PROGRESS).is_file():
        return Progress()
    return Progress(**json.loads((folder / PROGRESS).read_text()))


def _shard_file(folder: Path, shard: int, shard_size: int | None) -> Path:
    return folder / (f"moments-{shard:05}.npy" if shard_size else "moments.npy")


def _append(folder: Path, start: int, moments: np.ndarray, shard_size: int | None) -> None:
    """Write rows from row `start` on. Written, not mapped: on a full disk a mapped file kills the process."""
    while len(moments):
        shard, offset = divmod(start, shard_size) if shard_size else (0, start)
        part = moments[: shard_size - offset] if shard_size else moments
        path = _shard_file(folder, shard, shard_size)
        with path.open("r+b" if path.is_file() else "w+b") as file:
            header = _write_header(file, offset + len(part), part)
            file.seek(header + offset * part[0].nbytes)
            file.write(np.ascontiguousarray(part).data)
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
        start, moments = start + len(part), moments[len(part) :]


def _write_header(file: BinaryIO, num: int, rows: np.ndarray) -> int:
    """The .npy header of `num` rows, of the same length for any number; returns that length."""
    file.seek(0)
    header = {
        "descr": np.lib.format.dtype_to_descr(rows.dtype),
        "fortran_order": False,
        "shape": (num, *rows.shape[1:]),
    }
    np.lib.format.write_array_header_1_0(file, header)
    return file.tell()


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("moments*.npy"))


def _cut(folder: Path, num: int, row: np.ndarray, shard_size: int | None) -> None:
    """Take back what a killed process wrote beyond the rows that it noted."""
    for shard, path in enumerate(_shards(folder)):
        rows = min(num - shard * shard_size, shard_size) if shard_size else num
        if rows <= 0:
            path.unlink()
            continue
        with path.open("r+b") as file:
            file.truncate(_write_header(file, rows, row) + rows * row.nbytes)


def _read(
    dataset: ImageDataset, indices: Iterable[int], image_size: int, num_workers: int, ahead: int
) -> Iterator[tuple[int, np.ndarray | UnreadableImageError]]:
    """Each picture's index with the picture, or with why there is none; threads are so many `ahead`."""

    def load(index: int) -> tuple[int, np.ndarray | UnreadableImageError]:
        try:
            return index, dataset.load(index, image_size)
        except UnreadableImageError as error:
            return index, error

    with ThreadPoolExecutor(num_workers) as pool:
        later = iter(indices)
        waiting = [pool.submit(load, index) for index in islice(later, ahead)]
        try:
            while waiting:
                done = waiting.pop(0)
                waiting += [pool.submit(load, index) for index in islice(later, 1)]
                yield done.result()
        finally:
            for future in waiting:
                future.cancel()
