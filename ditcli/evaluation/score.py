"""`ditcli fid`: two sides in, scores out, with all that one must know to compare them with others'."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch

from ditcli.codecs.codec import Codec
from ditcli.codecs.named import open_named_codec
from ditcli.config import FidConfig
from ditcli.devices import open_device
from ditcli.errors import DitcliError, SettingError
from ditcli.evaluation.extractors import open_extractor
from ditcli.evaluation.features import Extractor, extractor_id, result_name
from ditcli.evaluation.gather import gather
from ditcli.evaluation.inception import InceptionFeatures
from ditcli.evaluation.metrics import frechet_distance, inception_score, kernel_distance, precision_recall
from ditcli.evaluation.report import Score, Scores, find_notes, sizes_seen
from ditcli.evaluation.sides import FolderSide, ModelSide, Side, open_side
from ditcli.evaluation.statistics import Pictures, Statistics
from ditcli.processes import join

KID_SUBSET = 1000  # of torch-fidelity


def score(config: FidConfig) -> Scores | None:
    """Score the fake side against the real one. Raises SettingError or another DitcliError that says what to mend.

    Of several processes the first returns the scores, the others None.
    """
    processes = join(config.device)
    real = _open(config.real, config)
    fake = _open(config.fake, config) if config.fake else None
    metrics = _settle(config, real, fake)
    if isinstance(real, FolderSide) and isinstance(fake, ModelSide):
        fake.follow_labels(real.dataset)
    device = open_device(config.device)
    codec = open_named_codec(config.codec, device=device, dtype=torch.float32) if config.codec else None
    extractor = open_extractor(config.features, weights=config.weights, resize=config.resize, device=device)
    for name, side in (config.real, real), (config.fake, fake):
        if isinstance(side, Statistics):
            _check_extractor(str(name), side, extractor)

    keep = not {"kid", "pr"}.isdisjoint(metrics)

    def statistics(
        side: Side | Statistics, image_size: int | None, keep: bool, codec: Codec | None
    ) -> list[Statistics]:
        if isinstance(side, Statistics):
            return [side]
        return gather(
            side,
            extractor,
            image_size=image_size,
            keep_features=keep,
            codec=codec,
            num_workers=config.num_workers,
            processes=processes,
        )

    # The fakes first: the real pictures are made as large as they are.
    fakes = statistics(fake, config.image_size, keep or "is" in metrics, None)[0] if fake else None
    image_size = config.image_size or (_square_size(fakes.pictures) if fakes else None)
    reals, *reconstructed = statistics(real, image_size, keep or config.save_stats is not None, codec)
    if not processes.first:
        return None
    if config.save_stats:
        path = Path(config.save_stats).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        reals.save(path)
    return Scores(
        scores=compare(reals, fakes, metrics, extractor) if fakes else {},
        floor=compare(reals, reconstructed[0], [m for m in metrics if m != "is"], extractor) if reconstructed else {},
        real=_pictures(config.real, reals),
        fake=_pictures(str(config.fake), fakes) if fakes else None,
        extractor={
            "name": extractor.name,
            "sha256": extractor.weights_sha256,
            "width": extractor.width,
            "resize": extractor.resize,
        },
        notes=tuple(find_notes(config, metrics, reals, fakes)),
        saved=config.save_stats,
    )


def compare(real: Statistics, fake: Statistics, metrics: list[str], extractor: Extractor) -> dict[str, Score]:
    """The metrics of `METRICS` by name; precision and recall apart. All but FID need the features themselves."""
    scores = {}
    for metric in metrics:
        if metric == "fid":
            distance = frechet_distance(real.mu, real.sigma, fake.mu, fake.sigma)
            scores["fid"] = Score(result_name(extractor), distance)
            continue
        assert fake.features is not None
        if metric == "is":
            assert isinstance(extractor, InceptionFeatures)
            scores["is"] = Score(result_name(extractor, "is"), *inception_score(extractor.logits(fake.features)))
            continue
        assert real.features is not None
        if metric == "kid":
            size = subset_size(real.features, fake.features)
            found = kernel_distance(real.features, fake.features, subset_size=size)
            scores["kid"] = Score(result_name(extractor, "kid"), *found, subset_size=size)
        else:
            for name, value in zip(
                ("precision", "recall"), precision_recall(real.features, fake.features), strict=True
            ):
                scores[name] = Score(result_name(extractor, name), value)
    return scores


def subset_size(real: np.ndarray, fake: np.ndarray) -> int:
    """torch-fidelity's 1000; of fewer pictures half of them, so that subsets still differ. The mean hardly changes."""
    fewest = min(len(real), len(fake))
    return KID_SUBSET if fewest >= KID_SUBSET else max(2, fewest // 2)


def _open(name: str, config: FidConfig) -> Side | Statistics:
    path = Path(name).expanduser()
    if path.suffix == ".npz" and path.is_file() and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if "mu.npy" in archive.namelist():
                return Statistics.load(path)
    return open_side(name, config)


def _settle(config: FidConfig, real: Side | Statistics, fake: Side | Statistics | None) -> list[str]:
    """The metrics asked for, or those that the two sides allow. SettingError for what they do not."""
    if isinstance(real, Statistics) and (config.codec or config.save_stats):
        option = "codec" if config.codec else "save-stats"
        raise SettingError(f"{option} needs pictures, but {config.real} holds statistics: leave it out.")
    if not isinstance(real, ModelSide) and not isinstance(fake, ModelSide):
        for name in FidConfig.OF_MODELS:
            if getattr(config, name) != getattr(FidConfig, name):
                raise SettingError(
                    f"{name.replace('_', '-')} is {getattr(config, name)!r}, but neither side is a model to draw "
                    "from: leave it out."
                )
    bare = {
        name: isinstance(side, Statistics) and side.features is None for name, side in (("real", real), ("fake", fake))
    }
    if not config.metrics:
        return ["fid"] if any(bare.values()) else ["fid", "kid"]
    for metric in config.metrics:
        for name in {"fid": (), "is": ("fake",)}.get(metric, ("real", "fake")):
            if bare[name]:
                raise SettingError(
                    f"metrics has {metric!r}, which needs every picture's features, but {getattr(config, name)} holds "
                    "only mu and sigma: give the pictures, statistics made with --save-stats, or --metrics fid."
                )
    return list(config.metrics)


def _check_extractor(name: str, side: Statistics, extractor: Extractor) -> None:
    if len(side.mu) != extractor.width:
        raise DitcliError(
            f"{name} holds features of width {len(side.mu)}, but those of {extractor.name} have {extractor.width}: "
            "use the extractor that it was made with."
        )
    if side.extractor is not None and side.extractor != extractor_id(extractor):
        raise DitcliError(
            f"{name} was made with {side.extractor}, but this is {extractor_id(extractor)}: use the same on both sides."
        )


def _pictures(name: str, statistics: Statistics) -> Pictures:
    return statistics.pictures or Pictures(name, "statistics", statistics.count or 0)


def _square_size(pictures: Pictures | None) -> int | None:
    """The side of a side's pictures where they all are squares of one size."""
    sizes = sizes_seen(pictures)
    if len(sizes) != 1:
        return None
    width, _, height = sizes[0].partition("x")
    return int(width) if width == height else None
