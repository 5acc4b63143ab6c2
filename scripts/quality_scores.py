"""How near samples are to held-out pictures, and how much nearer to those that were trained on, in some features."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ditcli.codecs.codec import Codec
from ditcli.data.split import PictureSet, some_of
from ditcli.evaluation.features import Extractor
from ditcli.evaluation.gather import gather
from ditcli.evaluation.metrics import frechet_distance, squared_distances, squared_mmd
from ditcli.evaluation.sides import FolderSide


@dataclass
class Yardstick:
    """The pictures with their features, which are computed once and kept in the cache."""

    training: PictureSet
    held_out: PictureSet
    extractor: Extractor
    image_size: int

    @cached_property
    def real(self) -> np.ndarray:
        return self._features(self.held_out, "held-out")

    @cached_property
    def known(self) -> np.ndarray:
        return self._features(self.training, "training")

    @cached_property
    def usual_distance(self) -> float:
        return nearest(self.real, self.known)

    def measure(self, features: np.ndarray) -> dict[str, float]:
        """Distances of samples' features (N, D) to the held-out pictures'; `nearest` is a ratio to what is usual."""
        real, fake = self.real.astype(np.float64), features.astype(np.float64)
        moments = [moment for x in (real, fake) for moment in (x.mean(axis=0), np.cov(x, rowvar=False))]
        rng, num = np.random.default_rng(0), min(len(real), len(fake))
        kernel = squared_mmd(*(x[rng.choice(len(x), num, replace=False)] for x in (real, fake)))
        ratio = nearest(features, self.known) / self.usual_distance
        return {"fd": frechet_distance(*moments), "kid": kernel, "nearest": ratio}

    def floor(self, codec: Codec, num: int) -> dict[str, float]:
        """What `num` training pictures get after the codec."""
        found = self.measure(self._features(some_of(self.training, num), "training", codec))
        return {"fd": found["fd"], "kid": found["kid"]}

    def _features(self, pictures: PictureSet, what: str, codec: Codec | None = None) -> np.ndarray:
        side = FolderSide(f"{what} pictures", pictures)
        gathered = gather(side, self.extractor, image_size=self.image_size, keep_features=True, codec=codec)[-1]
        assert gathered.features is not None
        return gathered.features


def nearest(features: np.ndarray, others: np.ndarray) -> float:
    """Median distance to the nearest of the others."""
    squares = [block.min(axis=1) for _, block in squared_distances(features.astype(float), others.astype(float))]
    return float(np.median(np.sqrt(np.concatenate(squares).clip(min=0))))
