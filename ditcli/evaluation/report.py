"""What `ditcli fid` says of two sides: the numbers, how they came about, and what makes them hard to compare."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ditcli.config import FidConfig
from ditcli.evaluation.statistics import Pictures, Statistics

# With fewer pictures than features the covariance is guesswork, and the distance reads higher the fewer there are.
FEWEST_FOR_FID = 10_000


@dataclass(frozen=True)
class Score:
    """`name` tells the features; `deviation` is over the subsets of KID or the parts of the Inception Score."""

    name: str
    value: float
    deviation: float | None = None
    subset_size: int | None = None


@dataclass(frozen=True)
class Scores:
    """What `score` found. `floor` is the codec's: real pictures against their reconstructions."""

    scores: dict[str, Score]
    floor: dict[str, Score]
    real: Pictures
    fake: Pictures | None
    extractor: dict[str, str | int]
    notes: tuple[str, ...] = ()
    saved: str | None = None


def to_json(scores: Scores) -> str:
    return json.dumps(asdict(scores), indent=2)


def to_text(scores: Scores) -> str:
    """The numbers, a line each, then how they came about."""
    lines = [(score.name, _number(key, score)) for key, score in scores.scores.items()]
    lines += [(f"{score.name} of the VAE alone", _number(key, score)) for key, score in scores.floor.items()]
    for name, pictures in ("real", scores.real), ("fake", scores.fake):
        if pictures:
            lines.append((name, describe(pictures)))
    extractor = scores.extractor
    lines.append(
        ("features", f"{extractor['name']}, sha256 {str(extractor['sha256'])[:16]}, resize {extractor['resize']}")
    )
    if scores.saved:
        lines.append(("saved", scores.saved))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:{width}}  {value}" for name, value in lines)


def describe(pictures: Pictures) -> str:
    """`./celeba (CelebA layout): 4,559 pictures, 178x218, JPEG; centre square resized to 128x128`."""
    parts = [f"{pictures.count:,} pictures" if pictures.count else "unknown number of pictures"]
    if pictures.sizes:
        most = sorted(pictures.sizes, key=lambda size: -pictures.sizes[size])
        parts.append(most[0] if len(most) == 1 else f"{len(most)} sizes, most often {most[0]}")
        if pictures.num_jpeg:
            parts.append("JPEG" if pictures.num_jpeg == pictures.count else f"{pictures.num_jpeg:,} JPEG")
    if pictures.unreadable:
        parts.append(f"{len(pictures.unreadable):,} unreadable left out")
    text = f"{pictures.source} ({pictures.layout}): {', '.join(parts)}"
    if not pictures.sizes:
        return text
    size = f"{pictures.image_size}x{pictures.image_size}"
    if pictures.image_size is None or list(pictures.sizes) == [size]:
        return text + "; as they are"
    return text + f"; centre square resized to {size} (Pillow bicubic, antialiased)"


def _number(key: str, score: Score) -> str:
    digits = {"fid": 4, "kid": 6}.get(key, 4)
    text = f"{score.value:.{digits}f}"
    if score.deviation is not None:
        text += f" ± {score.deviation:.{digits}f}"
    return text + (f" (subsets of {score.subset_size:,})" if score.subset_size else "")


def sizes_seen(pictures: Pictures | None) -> list[str]:
    """Sizes in which the extractor got the pictures."""
    if pictures is None:
        return []
    return [f"{pictures.image_size}x{pictures.image_size}"] if pictures.image_size else sorted(pictures.sizes)


def find_notes(config: FidConfig, metrics: Sequence[str], real: Statistics, fake: Statistics | None) -> list[str]:
    """What makes these numbers hard to compare."""
    notes = []
    sides = [(config.real, real)] + ([(config.fake or "", fake)] if fake else [])
    for name, side in sides:
        if side.extractor is None:
            notes.append(f"{name} does not say which extractor made it: it must have been this one.")
        if side.pictures and side.pictures.image_size:
            smaller = [
                size for size in side.pictures.sizes if min(map(int, size.split("x"))) < side.pictures.image_size
            ]
            if smaller:
                notes.append(f"{name} has pictures that were enlarged, such as {smaller[0]}: they are less sharp.")
    if fake:
        counts = [side.count for _, side in sides if side.count is not None]
        if "fid" in metrics and min(counts, default=FEWEST_FOR_FID) < FEWEST_FOR_FID:
            kid = "look at KID, which is not biased" if "kid" in metrics else "--metrics kid has no such bias"
            notes.append(
                f"the Frechet distance of only {min(counts):,} pictures reads too high and depends on their number "
                f"(below {FEWEST_FOR_FID:,}): {kid}."
            )
        seen = [sizes_seen(side.pictures) for _, side in sides]
        if all(seen) and seen[0] != seen[1]:
            notes.append(
                f"the two sides differ in size ({_some(seen[0])} and {_some(seen[1])}), which the score counts as a "
                "difference of the pictures: make them equal with --image-size."
            )
        jpegs = [name for name, side in sides if side.pictures and side.pictures.num_jpeg > side.pictures.count / 2]
        if all(seen) and len(jpegs) == 1:
            notes.append(f"only {jpegs[0]} is of JPEG files, whose artefacts count into the score (arXiv 2104.11222).")
    if not config.metrics and fake and "kid" not in metrics:
        notes.append("KID is left out, since one side holds only mu and sigma.")
    return notes


def _some(sizes: list[str]) -> str:
    return sizes[0] if len(sizes) == 1 else f"{sizes[0]} and {len(sizes) - 1:,} more"
