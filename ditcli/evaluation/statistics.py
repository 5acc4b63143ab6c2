"""What is gathered of one side, batch by batch: mean and covariance of its features in float64, and their file."""

from __future__ import annotations

import dataclasses
import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ditcli.errors import DitcliError
from ditcli.files import replacing


@dataclass(frozen=True)
class Pictures:
    """What a score's reader must know of one side's pictures.

    `sizes` counts them by the size they had ("178x218"), `image_size` is the side of the squares they were made into,
    None where they were left as they are. `unreadable` are names with reasons, of pictures that were left out.
    """

    source: str
    layout: str
    count: int
    sizes: dict[str, int] = field(default_factory=dict)
    num_jpeg: int = 0
    image_size: int | None = None
    unreadable: tuple[str, ...] = ()


@dataclass(frozen=True)
class Statistics:
    """What the metrics need to know of one side.

    `mu` (D,) and `sigma` (D, D), the covariance with N - 1 below, are float64. `count` is None where the file does not
    say it (ADM's and pytorch-fid's do not), as are `extractor`, which names the features and their weights, `pictures`,
    and `features` (N, D), which only the other metrics than the Frechet distance need.
    """

    mu: np.ndarray
    sigma: np.ndarray
    count: int | None = None
    extractor: str | None = None
    pictures: Pictures | None = None
    features: np.ndarray | None = None

    def save(self, path: Path) -> None:
        """Write an .npz with `mu` and `sigma`, as ADM's suite and pytorch-fid read it; whole or not at all."""
        pictures = json.dumps(dataclasses.asdict(self.pictures)) if self.pictures else None
        known: dict[str, Any] = {
            "count": self.count,
            "extractor": self.extractor,
            "pictures": pictures,
            "features": self.features,
        }
        with replacing(path) as partial, partial.open("wb") as file:
            np.savez(file, mu=self.mu, sigma=self.sigma, **{k: v for k, v in known.items() if v is not None})

    @classmethod
    def load(cls, path: Path, *, features: bool = True) -> Statistics:
        """Read an .npz of ours, of ADM's suite or of pytorch-fid; a DitcliError says what is wrong with another.

        `features` may stay in the file.
        """
        keys = ("mu", "sigma", "count", "extractor", "pictures", *(("features",) if features else ()))
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                values = {key: arrays[key] for key in keys if key in arrays}
            pictures = Pictures(**json.loads(str(values["pictures"]))) if "pictures" in values else None
        except (OSError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
            raise DitcliError(f"{path} cannot be read as an .npz of statistics: {error}") from None
        if "mu" not in values or "sigma" not in values:
            raise DitcliError(
                f"{path} holds no `mu` and `sigma`: give a file made with --save-stats, or of ADM's suite."
            )
        mu, sigma = np.asarray(values["mu"], np.float64), np.asarray(values["sigma"], np.float64)
        if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
            raise DitcliError(f"{path}: mu {mu.shape} and sigma {sigma.shape} are no mean and covariance.")
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise DitcliError(f"{path} holds NaN or infinite numbers: make it anew.")
        return cls(
            mu,
            sigma,
            int(values["count"]) if "count" in values else None,
            str(values["extractor"]) if "extractor" in values else None,
            pictures,
            values.get("features"),
        )


class Accumulator:
    """Gathers features (N, width) into their mean and covariance; the order and the cuts matter only to rounding.

    Parts are joined by their means and scatters (Chan, Golub and LeVeque, 1979), which loses nothing to a mean that is
    large against the spread.
    """

    _BLOCK = 256  # rows to wait for: touching the (width, width) scatter costs as much as a hundred of them

    def __init__(self, width: int) -> None:
        self.width = width
        self.count = 0
        self._gathered = 0
        self._mean = np.zeros(width)
        self._scatter = np.zeros((width, width))
        self._waiting: list[np.ndarray] = []

    def update(self, features: np.ndarray) -> None:
        """Take in features (N, width); a DitcliError for another width, or for NaN, leaves the sums as they were."""
        if features.ndim != 2 or features.shape[1] != self.width:
            raise DitcliError(f"features of shape {features.shape} do not fit statistics of width {self.width}.")
        finite = np.isfinite(features).all(axis=1)
        if not finite.all():
            raise DitcliError(
                f"the features of {int((~finite).sum())} of {len(features)} pictures are NaN or infinite: "
                "look at those pictures, and at the extractor's weights."
            )
        self._waiting.append(features.astype(np.float64))
        self.count += len(features)
        if self.count - self._gathered >= self._BLOCK:
            self._gather()

    def merge(self, other: Accumulator) -> None:
        """Take in all that `other` has gathered, as if its pictures had come here."""
        if other.width != self.width:
            raise DitcliError(f"features of width {other.width} do not fit statistics of width {self.width}.")
        self._gather()
        other._gather()
        self._join(other.count, other._mean, other._scatter)
        self.count += other.count

    def statistics(
        self, extractor: str | None = None, *, pictures: Pictures | None = None, features: np.ndarray | None = None
    ) -> Statistics:
        """Mean and covariance so far; a DitcliError for fewer than 2 pictures, which have no covariance."""
        if self.count < 2:
            raise DitcliError(f"statistics need at least 2 pictures, but there are {self.count}: add some.")
        self._gather()
        sigma = self._scatter / (self.count - 1)
        return Statistics(self._mean.copy(), sigma, self.count, extractor, pictures, features)

    def _gather(self) -> None:
        if self._gathered == self.count:
            return
        features = np.concatenate(self._waiting)
        self._waiting = []
        mean = features.mean(axis=0)
        features -= mean
        self._join(len(features), mean, features.T @ features)

    def _join(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        total = self._gathered + count
        if total == 0:
            return
        shift = mean - self._mean
        self._scatter += scatter
        self._scatter += np.outer(shift, shift * (self._gathered * count / total))
        self._mean += shift * (count / total)
        self._gathered = total
