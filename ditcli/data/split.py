"""Pictures that training never sees: a part of a data set, chosen by their names alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ditcli.data.folders import ArrayDataset, FileDataset

PictureSet = ArrayDataset | FileDataset


def split_off(dataset: PictureSet, share: float) -> tuple[PictureSet, PictureSet]:
    """The pictures to train on, and about `share` of all that are held out.

    It depends on a picture's name in the folder and on nothing else: pictures that come or go move no other.
    """
    held_out = np.array([place(name) < share for name in dataset.names], dtype=bool)
    return subset(dataset, np.flatnonzero(~held_out)), subset(dataset, np.flatnonzero(held_out))


def some_of(dataset: PictureSet, num: int) -> PictureSet:
    """At most `num` pictures, in their order, picked by their names: more of them are these and others."""
    # By another order than the split's, so that a split of some has the share of held-out pictures too.
    order = sorted(range(len(dataset)), key=lambda i: place(f"some {dataset.names[i]}"))
    return subset(dataset, sorted(order[:num]))


def subset(dataset: PictureSet, indices: Sequence[int] | np.ndarray) -> PictureSet:
    """The data set of some of the pictures, of the same classes."""
    names = [dataset.names[i] for i in indices]
    labels = None if dataset.labels is None else dataset.labels[indices]
    if isinstance(dataset, ArrayDataset):
        return replace(dataset, names=names, labels=labels, images=dataset.images[indices])
    return replace(dataset, names=names, labels=labels)


def place(name: str) -> float:
    """A number in [0, 1) that a name's SHA-1 gives it."""
    digest = hashlib.sha1(name.encode("utf-8", "surrogatepass"), usedforsecurity=False).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
