"""One pass over a side: its pictures through the extractor into statistics, which are kept by content."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from ditcli.codecs.codec import Codec
from ditcli.data.latents import cache_folder
from ditcli.errors import DataError, DitcliError, UnreadableImageError
from ditcli.evaluation.features import Extractor, extractor_id
from ditcli.evaluation.sides import Picture, Side
from ditcli.evaluation.statistics import Accumulator, Pictures, Statistics
from ditcli.processes import ALONE, Processes
from ditcli.progress import progress, say

BATCH = 32
MOST_NAMED = 5

View = Callable[[list[np.ndarray]], list[np.ndarray]]


def gather(
    side: Side,
    extractor: Extractor,
    *,
    image_size: int | None = None,
    keep_features: bool = False,
    codec: Codec | None = None,
    num_workers: int | None = None,
    processes: Processes = ALONE,
) -> list[Statistics]:
    """Statistics of a side's pictures, and of their reconstructions by a codec where one is given, in one pass.

    Unreadable pictures are left out and named. What was gathered before of the same pictures, with the same extractor
    and treatment, comes from the cache. Of several processes each reads a part, and all return the whole. DitcliError
    for fewer than 2 pictures and for features that are NaN.
    """
    views: list[tuple[str, View]] = [("", lambda images: images)]
    if codec:
        views.append((codec.fingerprint(), lambda images: reconstruct(codec, images)))
    content = side.fingerprint()
    paths: list[Path | None] = [None] * len(views)
    if content is not None:
        keys = [json.dumps([1, content, extractor_id(extractor), image_size, view]) for view, _ in views]
        paths = [cache_folder() / "statistics" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz" for key in keys]
        cached = [_read_cache(path, keep_features, side) for path in paths if path]
        found = [statistics for statistics in cached if statistics]
        if all(processes.collect(len(found) == len(views))):
            say(f"{side.name}: {found[0].count:,} pictures, whose features are known from an earlier run.")
            _report(side.name, found[0].pictures.unreadable if found[0].pictures else ())
            return found
    gathered = _pass(side, extractor, [view for _, view in views], image_size, keep_features, num_workers, processes)
    for statistics, path in zip(gathered, paths, strict=True):
        if path and processes.first:
            _write_cache(path, statistics)
    return gathered


def reconstruct(codec: Codec, images: list[np.ndarray]) -> list[np.ndarray]:
    """uint8 pictures (H, W, 3) -> what is left of each after the codec, without noise in between."""
    decoded = []
    for image in images:
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
        decoded.append(codec.decode(codec.to_latents(codec.encode(pixels)))[0].permute(1, 2, 0).contiguous().numpy())
    return decoded


@dataclass
class Part:
    """What one process gathered; `sums` and `kept` have an entry for each view."""

    sums: list[Accumulator]
    kept: list[list[np.ndarray]]
    sizes: Counter[str] = field(default_factory=Counter)
    num_jpeg: int = 0
    unreadable: list[str] = field(default_factory=list)

    def join(self, other: Part) -> None:
        """Take in the part that follows this one."""
        for accumulator, later in zip(self.sums, other.sums, strict=True):
            accumulator.merge(later)
        for rows, later_rows in zip(self.kept, other.kept, strict=True):
            rows += later_rows
        self.sizes += other.sizes
        self.num_jpeg += other.num_jpeg
        self.unreadable += other.unreadable


def _pass(
    side: Side,
    extractor: Extractor,
    views: list[View],
    image_size: int | None,
    keep_features: bool,
    num_workers: int | None,
    processes: Processes,
) -> list[Statistics]:
    part = Part([Accumulator(extractor.width) for _ in views], [[] for _ in views])
    indices = processes.part(len(side))
    pictures = side.read(indices, image_size, num_workers or os.cpu_count() or 1)
    with progress(f"features of {side.name}", len(indices)) as advance:
        for batch in _batches(pictures):
            good = [picture for picture in batch if isinstance(picture, Picture)]
            part.unreadable += [str(picture) for picture in batch if isinstance(picture, UnreadableImageError)]
            part.sizes.update(f"{width}x{height}" for width, height in (picture.size for picture in good))
            part.num_jpeg += sum(picture.is_jpeg for picture in good)
            images = [picture.pixels for picture in good]
            for view, accumulator, rows in zip(views, part.sums, part.kept, strict=True):
                if images:
                    features = extractor(_together(view(images)))
                    accumulator.update(features)
                    rows += [features] if keep_features else []
            advance(len(batch), f"{len(part.unreadable):,} unreadable" if part.unreadable else "")
    whole, *others = processes.collect(part)
    for other in others:
        whole.join(other)
    _report(side.name, whole.unreadable)
    count = whole.sums[0].count
    if count < 2:
        left_out = f" ({len(whole.unreadable):,} could not be read)" if whole.unreadable else ""
        raise DataError(f"{side.name} has {count} usable pictures{left_out}, but a score needs at least 2.")
    facts = Pictures(
        side.name, side.layout, count, dict(whole.sizes), whole.num_jpeg, image_size, tuple(whole.unreadable)
    )
    return [
        accumulator.statistics(
            extractor_id(extractor), pictures=facts, features=np.concatenate(rows) if keep_features else None
        )
        for accumulator, rows in zip(whole.sums, whole.kept, strict=True)
    ]


def _batches(
    pictures: Iterator[Picture | UnreadableImageError],
) -> Iterator[list[Picture | UnreadableImageError]]:
    while batch := list(islice(pictures, BATCH)):
        yield batch


def _together(images: list[np.ndarray]) -> np.ndarray | list[np.ndarray]:
    """One array where all pictures are of one size, which extractors compute faster."""
    return np.stack(images) if len({image.shape for image in images}) == 1 else images


def _report(name: str, unreadable: Sequence[str]) -> None:
    if unreadable:
        more = f", and {len(unreadable) - MOST_NAMED:,} more" if len(unreadable) > MOST_NAMED else ""
        say(f"Left out {len(unreadable):,} unreadable of {name}: {'; '.join(unreadable[:MOST_NAMED])}{more}")


def _read_cache(path: Path, need_features: bool, side: Side) -> Statistics | None:
    """What was kept of the same pictures, perhaps under another name."""
    if not path.is_file():
        return None
    try:
        statistics = Statistics.load(path, features=need_features)
    except DitcliError:  # cut or damaged: made again
        return None
    if statistics.pictures is None or (statistics.features is None and need_features):
        return None
    return replace(statistics, pictures=replace(statistics.pictures, source=side.name, layout=side.layout))


def _write_cache(path: Path, statistics: Statistics) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        statistics.save(path)
    except OSError as error:
        say(f"Note: the features could not be kept in {cache_folder()} ({error.strerror or error}).")
