"""Does the model recite? The training pictures that are nearest to its samples, in some network's features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ditcli.data.folders import ArrayDataset, FileDataset, ImageDataset, open_dataset
from ditcli.data.latents import open_latents
from ditcli.data.split import subset
from ditcli.errors import DitcliError, SettingError
from ditcli.evaluation.extractors import open_extractor, weights_at_hand
from ditcli.evaluation.features import Extractor
from ditcli.evaluation.gather import gather
from ditcli.evaluation.pixel_features import PixelFeatures
from ditcli.evaluation.sides import FolderSide
from ditcli.images import cut_grid, read_image
from ditcli.reporting.summary import Summary

MOST_SAMPLES, NUM_NEAREST, NUM_COMPARED = 6, 4, 200


@dataclass(frozen=True)
class Neighbour:
    """A training picture, and how far it is from a sample."""

    name: str
    image: np.ndarray
    distance: float


@dataclass(frozen=True)
class Neighbours:
    """Samples of `step` with their nearest training pictures, of `searched` ones, the nearest first.

    `usual` is the median distance of a training picture to the nearest other one.
    """

    step: int
    features: str
    searched: int
    usual: float
    samples: list[tuple[str, np.ndarray, list[Neighbour]]]


@dataclass(frozen=True)
class TrainingPictures:
    """What samples are compared with: `features` (N, D) are of `dataset`'s pictures `readable`."""

    dataset: ImageDataset
    extractor: Extractor
    features: np.ndarray
    readable: list[int]
    image_size: int
    usual: float

    def nearest(self, summary: Summary) -> Neighbours | None:
        """Of a run's newest samples, None where there are none; a sample's mirror image counts as the sample."""
        files = summary.run.sample_files()
        if not files:
            return None
        step = list(files)[-1]
        samples = _choose_samples(summary, files[step], self.image_size)
        images = np.stack([image for _, image in samples])
        straight, mirrored = (
            _distances(self.extractor(some), self.features)
            for some in (images, np.ascontiguousarray(images[:, :, ::-1]))
        )
        found = [
            (label, image, self._neighbours(row))
            for (label, image), row in zip(samples, np.minimum(straight, mirrored), strict=True)
        ]
        return Neighbours(step, self.extractor.name, len(self.features), self.usual, found)

    def _neighbours(self, distances: np.ndarray) -> list[Neighbour]:
        nearest = [(self.readable[i], float(distances[i])) for i in np.argsort(distances)[:NUM_NEAREST]]
        dataset, size = self.dataset, self.image_size
        return [Neighbour(dataset.names[i], dataset.load(i, size), distance) for i, distance in nearest]


def open_pictures(
    dataset: ImageDataset, name: str, extractor: Extractor, *, image_size: int, num: int
) -> TrainingPictures:
    """At most `num` pictures of a data set called `name`, at random, with their features, which are kept in the cache.

    Raises DitcliError where there are no pictures but latents, or fewer than 2.
    """
    if not isinstance(dataset, ArrayDataset | FileDataset):
        raise DitcliError(f"{name} holds latents; the pictures that they were encoded from are not known.")
    if len(dataset) > num:
        dataset = subset(dataset, np.sort(np.random.default_rng(0).choice(len(dataset), num, replace=False)))
    known = gather(FolderSide(name, dataset), extractor, image_size=image_size, keep_features=True)[0]
    assert known.features is not None
    readable = _readable(dataset, known.pictures.unreadable if known.pictures else ())
    return TrainingPictures(dataset, extractor, known.features, readable, image_size, _usual_distance(known.features))


def find_neighbours(summary: Summary, *, features: str | None, weights: str | None, num: int) -> Neighbours | None:
    """Of a run's newest samples, None where there are none yet; `num` of its training pictures are searched.

    `features` None is what the run is scored with, else Inception where its weights need not be fetched, else pixels.
    Raises DitcliError where the training pictures are no longer there, or are none but latents.
    """
    if summary.is_vae or not summary.run.sample_files():
        return None
    settings = summary.settings
    dataset = open_latents(Path(settings["data"])) or open_dataset(settings["data"], label_attr=settings["label_attr"])
    if features is None and settings.get("eval_every"):
        features, weights = settings["eval_features"], settings["eval_weights"]
    extractor = choose_extractor(features, weights)
    image_size = summary.about["model"]["image_size"]
    return open_pictures(dataset, settings["data"], extractor, image_size=image_size, num=num).nearest(summary)


def choose_extractor(features: str | None, weights: str | None) -> Extractor:
    """As `open_extractor`, and `pixels`; None is Inception where its weights need not be fetched, else pixels."""
    if features is None:
        features = "inception" if weights_at_hand() else "pixels"
    if features == "pixels":
        if weights is not None:
            raise SettingError(f"weights is {weights!r}, but must be left out with --features pixels.")
        return PixelFeatures()
    return open_extractor(features, weights=weights)


def _choose_samples(summary: Summary, path: Path, size: int) -> list[tuple[str, np.ndarray]]:
    """Labels and images from a grid, an equal number of each row."""
    rows = cut_grid(np.asarray(read_image(path)), size, summary.settings["sample_num"])[:MOST_SAMPLES]
    names: Sequence[Any] = summary.class_names or [""]
    each = max(1, MOST_SAMPLES // len(rows))
    return [(str(name), image) for name, row in zip(names, rows, strict=False) for image in row[:each]]


def _distances(samples: np.ndarray, real: np.ndarray) -> np.ndarray:
    """(M, D) and (N, D) -> (M, N), in float64: equal pictures are 0 apart."""
    return np.stack([np.linalg.norm(real - sample, axis=1) for sample in samples]).astype(np.float64)


def _usual_distance(real: np.ndarray) -> float:
    """Median, over some of them, of the distance to the nearest other."""
    chosen = np.random.default_rng(0).choice(len(real), min(NUM_COMPARED, len(real)), replace=False)
    squares = np.square(real).sum(axis=1)
    distances = squares[chosen, None] + squares - 2 * real[chosen] @ real.T
    distances[np.arange(len(chosen)), chosen] = np.inf
    return float(np.median(np.sqrt(np.maximum(distances.min(axis=1), 0))))


def _readable(dataset: ImageDataset, unreadable: Sequence[str]) -> list[int]:
    """Indices of the pictures that have features; `unreadable` are names with reasons."""
    if not unreadable:
        return list(range(len(dataset)))
    return [i for i, name in enumerate(dataset.names) if not any(text.startswith(f"{name}: ") for text in unreadable)]
