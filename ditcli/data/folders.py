"""A folder of pictures, in any of the usual layouts, as one list of pictures with their classes.

`open_dataset` looks for, in this order:

1. the CelebA layout: `list_attr_celeba.txt` (or Kaggle's `.csv`) beside `img_align_celeba/`, doubled or not;
2. idx files as of MNIST: `train-images-idx3-ubyte` with `train-labels-idx1-ubyte`, gzipped or not;
3. `metadata.jsonl` or `metadata.csv` with `file_name` and, where there are classes, `label`;
4. a flat folder: pictures lie loose in it. Pictures in its subfolders are taken too, and have no classes either: one
   loose picture is enough, so that none is lost, and `summary` says so;
5. class subfolders, named after the classes, searched to any depth.

A folder that holds nothing but one folder stands for that folder (archives often unpack so); of `train`, `val` and
`test` folders `train` is taken. Hidden files, `__MACOSX` and symbolic links out of the folder are left out.
"""

from __future__ import annotations

import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ditcli.config import TrainConfig
from ditcli.data.idx import read_idx
from ditcli.data.labels import Listing, read_attributes, read_metadata
from ditcli.errors import DataError
from ditcli.images import fit_square, load_square, looks_like_picture

EMBEDDED = {"fashion-mnist": Path(__file__).parent / "fashion_mnist"}

# Taken on their word; heic too, so that it is counted as unreadable and not overlooked.
_PICTURES = "jpg jpeg jpe jfif png apng webp gif bmp dib tif tiff ppm pgm pbm pnm pfm avif jp2 j2k jpx heic heif qoi"
# Never opened: they often lie beside pictures, by the million. Raw photos start as a TIFF does.
_OTHERS = """
    txt csv tsv json jsonl xml yaml yml md html htm pdf doc docx xls xlsx ini cfg toml log caption lock tmp part
    py ipynb js css sh db sqlite lmdb mdb mat npy npz pt pth ckpt pkl safetensors onnx bin h5 hdf5 parquet arrow
    tfrecord zip gz tgz tar bz2 xz 7z rar mp4 mov avi mkv webm mp3 wav svg psd xmp url lnk exe
    cr2 cr3 nef nrw arw dng raf orf rw2 pef srw raw 3fr iiq
"""
PICTURE_SUFFIXES, OTHER_SUFFIXES = frozenset(_PICTURES.split()), frozenset(_OTHERS.split())
LEFT_OUT_FOLDERS = frozenset({"__MACOSX", "@eaDir"})
HELD_OUT_SPLITS = frozenset({"val", "valid", "validation", "dev", "test"})
UNDERSTOOD = (
    "the CelebA layout (list_attr_celeba.txt beside img_align_celeba), class subfolders, metadata.jsonl or metadata.csv"
    " with file_name and label, MNIST idx files, or a flat folder of pictures"
)


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageDataset(ABC):
    """Pictures with their classes.

    `layout` says in words how they were found, `notes` what was left out. `names` are unique, `labels` int64 (N,) index
    `class_names`; without classes they are None and empty.
    """

    layout: str
    names: Sequence[str]
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def load(self, index: int, size: int) -> np.ndarray:
        """The picture's centre square: uint8 (size, size, 3). Raises `UnreadableImageError`. Safe with threads."""

    @abstractmethod
    def num_bytes(self) -> int:
        """What the pictures take on disk, or in memory where they have no files of their own."""

    def fingerprint(self) -> str:
        """Hex digest that changes when a name, a label, a class name or a picture does."""
        digest = hashlib.sha256(repr((self.class_names, len(self))).encode("utf-8", "surrogatepass"))
        if self.labels is not None:
            digest.update(self.labels.astype("<i8").tobytes())
        for part in self._content():
            digest.update(part)
        return digest.hexdigest()

    def _content(self) -> Iterator[bytes | memoryview]:
        """What the fingerprint covers besides labels and class names."""
        return iter(())

    def summary(self) -> str:
        """`4,559 images, 2 classes: female 2,517, male 2,042`, and what was left out."""
        text = f"{len(self):,} images" if len(self) != 1 else "1 image"
        if self.labels is None:
            text += ", no classes"
        else:
            counts = np.bincount(self.labels, minlength=len(self.class_names))
            shown = [f"{name} {count:,}" for name, count in zip(self.class_names, counts, strict=True)][:10]
            more = [f"{len(self.class_names) - 10:,} more"] if len(self.class_names) > 10 else []
            text += f", {len(self.class_names):,} {'classes' if len(self.class_names) != 1 else 'class'}: "
            text += ", ".join(shown + more)
        return "; ".join((text, *self.notes))


@dataclass(frozen=True, eq=False, kw_only=True)
class FileDataset(ImageDataset):
    """Pictures in files; `names` are their paths in `folder`, with /."""

    folder: Path

    def load(self, index: int, size: int) -> np.ndarray:
        name = self.names[index]
        return load_square(os.path.join(self.folder, name), size, name)

    def num_bytes(self) -> int:
        paths = (os.path.join(self.folder, name) for name in self.names)
        return sum(os.path.getsize(path) for path in paths if os.path.exists(path))

    def _content(self) -> Iterator[bytes]:
        """Names, sizes and times of change: reading the files would take as long as encoding them."""
        for name in self.names:
            try:
                status = os.stat(os.path.join(self.folder, name))
                yield b"%b\0%d %d\n" % (os.fsencode(name), status.st_size, status.st_mtime_ns)
            except OSError:  # deleted meanwhile
                yield b"%b\0-\n" % os.fsencode(name)


@dataclass(frozen=True, eq=False, kw_only=True)
class ArrayDataset(ImageDataset):
    """Pictures in one uint8 array (N, H, W), grey."""

    images: np.ndarray

    def load(self, index: int, size: int) -> np.ndarray:
        return fit_square(Image.fromarray(self.images[index]).convert("RGB"), size)

    def num_bytes(self) -> int:
        return self.images.nbytes

    def _content(self) -> Iterator[memoryview]:
        yield np.array(self.images.shape, dtype="<i8").data.cast("B")
        yield self.images.data.cast("B")


def open_dataset(path_or_name: str, *, label_attr: str = TrainConfig.label_attr) -> ImageDataset:
    """The pictures of a folder, or of an embedded data set (`fashion-mnist`) where no folder has that name.

    `label_attr` is the attribute that makes the two classes of the CelebA layout. Raises `DataError` when there are no
    pictures, or when their labels make no sense. No picture is opened: unreadable ones are found by `load`.
    """
    folder = Path(path_or_name).expanduser()
    layout = "MNIST idx files"
    if path_or_name in EMBEDDED and not folder.exists():
        folder, layout = EMBEDDED[path_or_name], f"embedded {path_or_name}"
    _check_folder(folder, path_or_name)
    celeba = _open_celeba(folder, label_attr)
    if celeba is not None:
        return celeba
    dataset = _open_idx(folder, layout) or _open_metadata(folder) or _open_pictures(folder)
    if label_attr != TrainConfig.label_attr:
        raise DataError(
            f"label-attr {label_attr!r} is for the CelebA layout, but {path_or_name} is read as {dataset.layout}; "
            "leave it out."
        )
    return dataset


def _check_folder(folder: Path, given: str) -> None:
    if not given:
        raise DataError(f"no data was named: give a folder with pictures, or {' or '.join(EMBEDDED)}.")
    if folder.is_dir():
        return
    if folder.exists():
        archive = folder.suffix.lower() in (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar", ".xz", ".bz2")
        hint = "unpack it first" if archive else "give the folder with the pictures"
        raise DataError(f"{given} is a file, not a folder; {hint}.")
    raise DataError(f"there is no folder {given}; give a folder with pictures, or {' or '.join(EMBEDDED)}.")


def _first_file(folder: Path, *names: str) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _open_celeba(folder: Path, attribute: str) -> ImageDataset | None:
    path = _first_file(folder, "list_attr_celeba.txt", "list_attr_celeba.csv")
    if path is None:
        return None
    attribute, listing = read_attributes(path, attribute)
    pictures = "img_align_celeba"
    if (folder / pictures / pictures).is_dir():  # as Kaggle's archive unpacks
        pictures += f"/{pictures}"
    if not (folder / pictures).is_dir() or not _is_inside(folder, folder / pictures):
        raise DataError(f"{path} needs the folder {pictures} with the pictures beside it.")
    labels = {f"{pictures}/{name}": label for name, label in listing.labels.items()}
    layout = f"CelebA layout ({path.name}, attribute {attribute})"
    return _match(folder, pictures, path, Listing(labels, listing.class_names), layout)


def _open_metadata(folder: Path) -> ImageDataset | None:
    path = _first_file(folder, "metadata.jsonl", "metadata.csv")
    if path is None:
        return None
    listing = read_metadata(path)
    layout = f"pictures listed in {path.name}" + ("" if listing.class_names else ", which has no labels")
    return _match(folder, "", path, listing, layout)


def _match(folder: Path, below: str, path: Path, listing: Listing, layout: str) -> ImageDataset:
    """The pictures that are both listed and there."""
    pictures, notes = _list_pictures(folder, below)
    found = set(pictures)
    names = sorted(name for name in listing.labels if name in found or _is_file_inside(folder, name))
    if not names:
        raise DataError(f"{path} lists {len(listing.labels):,} pictures, but none of them is in {folder / below}.")
    num_missing, num_unlisted = len(listing.labels) - len(names), len(found.difference(names))
    notes += _notes(
        (num_missing, "listed picture is missing", "listed pictures are missing"),
        (num_unlisted, "picture is not listed and left out", "pictures are not listed and left out"),
    )
    labels = [listing.labels[name] for name in names]
    return FileDataset(
        folder=folder,
        layout=layout,
        names=names,
        labels=np.array(labels, dtype=np.int64) if listing.class_names else None,
        class_names=listing.class_names,
        notes=tuple(notes),
    )


def _is_file_inside(folder: Path, name: str) -> bool:
    """For listed files that do not look like pictures, or lie in hidden folders."""
    path = os.path.join(folder, name)
    return os.path.isfile(path) and _is_inside(folder, path)


_IDX_IMAGES = re.compile(r"(?P<split>.*?)[-_.]?images[-.]idx3[-.]ubyte(\.gz)?")


def _open_idx(folder: Path, layout: str) -> ImageDataset | None:
    try:
        matches = [match for name in os.listdir(folder) if (match := _IDX_IMAGES.fullmatch(name))]
    except OSError as error:
        raise DataError(f"{folder} cannot be listed: {(error.strerror or str(error)).lower()}.") from error
    splits: dict[str, Path] = {}
    for match in sorted(matches, key=lambda match: match[0], reverse=True):  # "x" after, so instead of, "x.gz"
        if (folder / match[0]).is_file():
            splits[match["split"]] = folder / match[0]
    if not splits:
        return None
    training = [split for split in splits if "train" in split.lower()] or list(splits)
    if len(training) > 1:
        raise DataError(
            f"{folder} holds several idx sets ({', '.join(sorted(training))}); put one into a folder of its own."
        )
    split = training[0]
    path = splits[split]
    images = read_idx(path, num_dimensions=3)
    names = [f"{split or 'images'}-{i:05d}" for i in range(len(images))]
    layout = f"{layout} ({path.name})"

    unpacked = path.with_name(path.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1"))
    labels_path = _first_file(folder, unpacked.name, unpacked.name + ".gz")
    if labels_path is None:
        return ArrayDataset(layout=layout, names=names, images=images, notes=(f"no {unpacked.name}, so no classes",))
    labels = read_idx(labels_path, num_dimensions=1).astype(np.int64)
    if len(labels) != len(images):
        raise DataError(f"{labels_path} holds {len(labels):,} labels, but {path.name} holds {len(images):,} pictures.")
    class_names = _read_class_names(folder / "class_names.txt", num_classes=int(labels.max()) + 1)
    return ArrayDataset(layout=layout, names=names, images=images, labels=labels, class_names=class_names)


def _read_class_names(path: Path, num_classes: int) -> tuple[str, ...]:
    """One name per line; the numbers where there is no such file."""
    if not path.is_file():
        return tuple(str(i) for i in range(num_classes))
    try:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip())
    except UnicodeDecodeError as error:
        raise DataError(f"{path} cannot be read as UTF-8 text ({error}).") from error
    if len(names) < num_classes:
        raise DataError(f"{path} names {len(names)} classes, but the labels go up to {num_classes - 1}.")
    if len(set(names)) < len(names):
        raise DataError(f"{path} names a class twice; give each its own name.")
    return names


def _open_pictures(given: Path) -> ImageDataset:
    """Class subfolders, or a flat folder."""
    pictures, notes = _list_pictures(given)
    below = ""
    while True:
        here = [name[len(below) :] for name in pictures if name.startswith(below)]
        subfolders = sorted({name.partition("/")[0] for name in here if "/" in name})
        num_loose = sum("/" not in name for name in here)
        if num_loose or not subfolders:
            break
        if "train" in subfolders and HELD_OUT_SPLITS.issuperset(set(subfolders) - {"train"}) and len(subfolders) > 1:
            notes.append(f"of {', '.join(subfolders)} train is taken")
            subfolders = ["train"]
        if len(subfolders) > 1:
            break
        below += subfolders[0] + "/"
    names = [below + name for name in here]
    if not names:
        left_out = f" ({'; '.join(notes)})" if notes else ""
        raise DataError(f"there are no pictures in {given}{left_out}; understood are {UNDERSTOOD}.")
    where = f" {below[:-1]}" if below else ""
    if num_loose:
        if subfolders:
            others = ", ".join(subfolders[:3]) + (", ..." if len(subfolders) > 3 else "")
            notes.insert(0, f"subfolders ({others}) are no classes, as {num_loose:,} of the pictures lie beside them")
        return FileDataset(folder=given, layout=f"flat folder{where}", names=names, notes=tuple(notes))
    index = {name: i for i, name in enumerate(subfolders)}
    labels = np.array([index[name.partition("/")[0]] for name in here], dtype=np.int64)
    return FileDataset(
        folder=given,
        layout="class subfolders" + (f" of{where}" if where else ""),
        names=names,
        labels=labels,
        class_names=tuple(subfolders),
        notes=tuple(notes),
    )


def _list_pictures(folder: Path, below: str = "") -> tuple[list[str], list[str]]:
    """Sorted paths in `folder` of the pictures under `folder/below`, and notes on what was left out."""
    names: list[str] = []
    num_links = 0
    pending = [below + "/" if below else ""]
    while pending:
        prefix = pending.pop()
        try:
            with os.scandir(os.path.join(folder, prefix)) as entries:
                for entry in entries:
                    if entry.name.startswith(".") or entry.name in LEFT_OUT_FOLDERS:
                        continue
                    if entry.is_symlink() and not _is_inside(folder, entry.path):
                        num_links += 1
                    elif entry.is_dir(follow_symlinks=False):  # a link to a folder in here would list it twice
                        pending.append(f"{prefix}{entry.name}/")
                    elif entry.is_file() and _is_picture(entry):
                        names.append(prefix + entry.name)
        except OSError as error:
            raise DataError(f"{folder / prefix} cannot be listed: {(error.strerror or str(error)).lower()}.") from error
    return sorted(names), _notes(
        (num_links, "link out of the folder is left out", "links out of the folder are left out")
    )


def _is_picture(entry: os.DirEntry[str]) -> bool:
    """By its suffix; by its first bytes where that says nothing."""
    stem, _, suffix = entry.name.rpartition(".")
    if stem and suffix.lower() in PICTURE_SUFFIXES:
        return True
    if stem and suffix.lower() in OTHER_SUFFIXES:
        return False
    try:
        with open(entry.path, "rb", buffering=0) as file:
            return looks_like_picture(file.read(16))
    except OSError:
        return False


def _is_inside(folder: Path, path: str | Path) -> bool:
    """Whether a path, its links followed, lies in the folder."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _notes(*counts: tuple[int, str, str]) -> list[str]:
    """Of (count, words for one, words for more) those that are not 0."""
    return [f"{count:,} {one if count == 1 else more}" for count, one, more in counts if count]
