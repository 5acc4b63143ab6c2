"""One side of a comparison: pictures of a folder, a zip, an .npz of ADM's suite or a model, read in order."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol, cast

import numpy as np
from PIL import Image

from ditcli import hub, runs
from ditcli.config import FidConfig, SampleConfig
from ditcli.data.folders import (
    EMBEDDED,
    LEFT_OUT_FOLDERS,
    OTHER_SUFFIXES,
    PICTURE_SUFFIXES,
    ArrayDataset,
    FileDataset,
    ImageDataset,
    open_dataset,
)
from ditcli.errors import DataError, ModelNotFoundError, SettingError, UnreadableImageError
from ditcli.images import MAX_FILE_BYTES, fit_square, looks_like_picture, read_image

READ_AHEAD = 64
# Pictures are compressed already. What unpacks to more than this is made to fill the memory, unless it is small.
MOST_UNPACKED = 100
SMALL_ARCHIVE = 1 << 28


@dataclass(frozen=True)
class Picture:
    """`pixels` uint8 (H, W, 3) as the extractor gets them; `size` is the (width, height) that the picture had."""

    pixels: np.ndarray
    size: tuple[int, int]
    is_jpeg: bool = False


class Side(Protocol):
    """A source of pictures."""

    @property
    def name(self) -> str:
        """What the user called it."""

    @property
    def layout(self) -> str:
        """What it turned out to be, in words."""

    def __len__(self) -> int: ...

    def fingerprint(self) -> str | None:
        """Changes when a picture does; None where results are not worth keeping."""

    def read(self, part: range, image_size: int | None, num_workers: int) -> Iterator[Picture | UnreadableImageError]:
        """A part of the pictures, in order: their centre squares resized to `image_size`, or as they are for None."""


def open_side(name: str, config: FidConfig) -> Side:
    """The pictures that a name leads to; DataError where there are none. Statistics are no pictures."""
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".npz":
        return ArraySide(name, path)
    if path.is_file() and zipfile.is_zipfile(path):
        return ZipSide(name, path)
    if path.is_file() and path.suffix == ".zip":
        raise DataError(f"{name} is no zip archive, or a damaged one: download or copy it again.")
    if name in EMBEDDED and not path.exists():
        return FolderSide(name, open_dataset(name))
    try:
        # A folder here comes before a run of that name in runs/.
        checkpoint = hub.find_checkpoint(str(path.resolve()) if path.exists() else name)
    except ModelNotFoundError as error:
        if path.is_dir() and not runs.is_run(path):
            return FolderSide(name, open_dataset(name))
        if path.exists():
            raise
        raise DataError(f"there is no {name}: give a folder, a .zip, an .npz, a run or a checkpoint.") from error
    return ModelSide(name, checkpoint, config)


@dataclass(frozen=True)
class FolderSide:
    """Pictures in any layout that training reads."""

    name: str
    dataset: ImageDataset

    @property
    def layout(self) -> str:
        return self.dataset.layout

    def __len__(self) -> int:
        return len(self.dataset)

    def fingerprint(self) -> str:
        return self.dataset.fingerprint()

    def read(self, part: range, image_size: int | None, num_workers: int) -> Iterator[Picture | UnreadableImageError]:
        dataset = self.dataset

        def load(index: int) -> Picture:
            if isinstance(dataset, ArrayDataset):
                return _treat(Image.fromarray(dataset.images[index]).convert("RGB"), image_size)
            path = cast(FileDataset, dataset).folder / dataset.names[index]
            image = read_image(path, dataset.names[index])
            with path.open("rb") as file:
                return _treat(image, image_size, file.read(3))

        return _read_ahead(load, part, num_workers)


@dataclass(frozen=True)
class ZipSide:
    """Pictures in a zip. They are unpacked one by one, into memory: no name in it ever becomes a path."""

    name: str
    path: Path
    layout = "zip"

    def __len__(self) -> int:
        return len(self._members())

    def fingerprint(self) -> str:
        facts = [(member.filename, member.CRC, member.file_size) for member in self._members()]
        return hashlib.sha256(repr(facts).encode("utf-8", "surrogatepass")).hexdigest()

    def read(self, part: range, image_size: int | None, num_workers: int) -> Iterator[Picture | UnreadableImageError]:
        members = self._members()
        with zipfile.ZipFile(self.path) as archive:

            def load(index: int) -> Picture:
                member = members[index]
                try:
                    if member.file_size > MAX_FILE_BYTES:
                        raise ValueError(f"larger than {MAX_FILE_BYTES >> 30} GB")
                    data = archive.read(member)
                # RuntimeError is for a password, NotImplementedError for an unknown compression.
                except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError) as error:
                    raise UnreadableImageError(member.filename, str(error)) from error
                return _treat(read_image(data, member.filename), image_size, data)

            yield from _read_ahead(load, part, num_workers)

    def _members(self) -> list[zipfile.ZipInfo]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                members = [member for member in archive.infolist() if _is_picture(archive, member)]
        except (zipfile.BadZipFile, OSError) as error:
            raise DataError(f"{self.name} cannot be read as a zip: {error}") from error
        unpacked = sum(member.file_size for member in members)
        if unpacked > max(SMALL_ARCHIVE, MOST_UNPACKED * self.path.stat().st_size):
            raise DataError(
                f"{self.name} claims to unpack to {unpacked / 1e9:,.0f} GB, more than {MOST_UNPACKED} times its size: "
                "no pictures do. Unpack it yourself if you trust it, and give the folder."
            )
        if not members:
            raise DataError(f"there are no pictures in {self.name}.")
        return sorted(members, key=lambda member: member.filename)


def _is_picture(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bool:
    """As in a folder: by its suffix, or by its first bytes where that says nothing."""
    *folders, name = member.filename.split("/")
    if (
        not name
        or name.startswith(".")
        or any(f in LEFT_OUT_FOLDERS or (f.startswith(".") and f != "..") for f in folders)
    ):
        return False
    stem, _, suffix = name.rpartition(".")
    if stem and suffix.lower() in PICTURE_SUFFIXES | OTHER_SUFFIXES:
        return suffix.lower() in PICTURE_SUFFIXES
    try:
        with archive.open(member) as file:
            return looks_like_picture(file.read(16))
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError):
        return False


@dataclass(frozen=True)
class ArraySide:
    """`arr_0` of an .npz, uint8 (N, H, W, 3), as ADM's suite stores samples. Streamed: it may be larger than memory."""

    name: str
    path: Path
    layout = "arr_0 of an .npz"

    def __len__(self) -> int:
        return self._header()[0][0]

    def fingerprint(self) -> str:
        with zipfile.ZipFile(self.path) as archive:
            return f"{self._header()} {archive.getinfo('arr_0.npy').CRC}"

    def read(self, part: range, image_size: int | None, num_workers: int) -> Iterator[Picture | UnreadableImageError]:
        (_, height, width, _), start = self._header()
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
                file.seek(start + part.start * height * width * 3)
                for _ in part:
                    data = file.read(height * width * 3)
                    image = Image.fromarray(np.frombuffer(data, np.uint8).reshape(height, width, 3))
                    yield _treat(image, image_size)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
            raise DataError(f"{self.name} is damaged: {error}") from error

    def _header(self) -> tuple[tuple[int, ...], int]:
        """The array's shape, and where in its member it begins."""
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, fortran, dtype = read(file)
                start = file.tell()
        except KeyError as error:
            raise DataError(
                f"{self.name} holds neither pictures (arr_0) nor statistics (mu and sigma): give an .npz of ADM's "
                "suite, or one made with --save-stats."
            ) from error
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
            raise DataError(f"{self.name} cannot be read as an .npz: {error}") from error
        if dtype != np.uint8 or fortran or len(shape) != 4 or shape[3] != 3 or 0 in shape[1:]:
            raise DataError(f"arr_0 of {self.name} is {dtype} {shape}, but pictures are uint8 (N, height, width, 3).")
        return shape, start


class ModelSide:
    """Pictures that a model draws: number k has seed ``seed + k``; labels come as often as `label_counts` says."""

    def __init__(self, name: str, checkpoint: Path, config: FidConfig) -> None:
        from ditcli.denoisers.opening import open_model

        self.name, self.config = name, config
        chosen = {key: getattr(config, key) for key in ("cfg", "sampler", "steps", "device", "precision")}
        self.denoiser, self.decode, model = open_model(checkpoint, SampleConfig(model=str(checkpoint), **chosen))
        self.step = model.step
        if config.cfg != 1 and not self.denoiser.class_names:
            raise SettingError(f"cfg is {config.cfg:g}, but {name} was trained without labels: leave --cfg out.")
        self.label_counts: np.ndarray = np.ones(max(1, len(self.denoiser.class_names)))

    def follow_labels(self, dataset: ImageDataset) -> None:
        """Draw each class as often as a data set of the same classes has it."""
        if dataset.labels is not None and dataset.class_names == self.denoiser.class_names:
            self.label_counts = np.bincount(dataset.labels, minlength=len(dataset.class_names))

    @property
    def layout(self) -> str:
        config = self.config
        how = f"{config.steps} steps of {config.sampler}, precision {config.precision}"
        return f"model of step {self.step:,}, cfg {config.cfg:g}, {how}"

    def __len__(self) -> int:
        return self.config.num

    def fingerprint(self) -> None:
        return None

    def read(self, part: range, image_size: int | None, num_workers: int) -> Iterator[Picture | UnreadableImageError]:
        from ditcli.sampling import draw

        config = self.config
        drawn = draw(
            self.denoiser,
            self.decode,
            labels=spread_labels(self.label_counts, config.num)[part.start : part.stop],
            seeds=[config.seed + k for k in part],
            cfg=config.cfg,
            steps=config.steps,
            sampler=config.sampler,
            batch_size=config.batch_size,
        )
        for image in drawn:
            yield _treat(Image.fromarray(image), image_size)


def spread_labels(counts: Sequence[float] | np.ndarray, num: int) -> list[int]:
    """`num` labels, each as often as its count asks, to within one."""
    shares = np.cumsum(counts) / np.sum(counts)
    return np.searchsorted(shares, (np.arange(num) + 0.5) / num).tolist()


def _treat(image: Image.Image, image_size: int | None, head: bytes = b"") -> Picture:
    pixels = np.array(image) if image_size is None else fit_square(image, image_size)
    return Picture(pixels, image.size, head.startswith(b"\xff\xd8\xff"))


def _read_ahead(
    load: Callable[[int], Picture], part: range, num_workers: int
) -> Iterator[Picture | UnreadableImageError]:
    """load(0), load(1), ... in order, by threads that run a little ahead of the extractor."""

    def attempt(index: int) -> Picture | UnreadableImageError:
        try:
            return load(index)
        except UnreadableImageError as error:
            return error

    with ThreadPoolExecutor(num_workers) as pool:
        later = iter(part)
        waiting = deque(pool.submit(attempt, index) for index in islice(later, READ_AHEAD))
        try:
            while waiting:
                done = waiting.popleft()
                waiting.extend(pool.submit(attempt, index) for index in islice(later, 1))
                yield done.result()
        finally:
            for future in waiting:
                future.cancel()
