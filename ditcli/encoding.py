"""`ditcli encode` and `ditcli decode`: a folder of pictures into latents, and latents into pictures."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditcli.codecs.codec import Codec
from ditcli.codecs.named import open_named_codec
from ditcli.codecs.reconstruct import perceptual_distance, psnr
from ditcli.config import DEFAULT_VAE, DecodeConfig, EncodeConfig
from ditcli.data.folders import ImageDataset
from ditcli.data.latent_files import MANIFEST, Moments, encode_into
from ditcli.data.latents import (
    Latents,
    check_space,
    measure,
    open_latents,
    open_pictures,
    report_unreadable,
    same_weights,
    warn_of_scale,
)
from ditcli.devices import choose_dtype, open_device
from ditcli.errors import DataError, DitcliError, ModelNotFoundError, ResumeError, UnreadableImageError
from ditcli.files import replacing, write_text
from ditcli.hub import find_lpips, lasting_codec_name
from ditcli.images import read_png_metadata, write_png
from ditcli.models.lpips import LPIPS, load_lpips
from ditcli.processes import join
from ditcli.progress import progress, say

SETTINGS = "settings.json"
SCORES = "reconstructions.csv"
PAIRS = "reconstructions"


@dataclass(frozen=True)
class Encoded:
    """What `encode` wrote; the means are None where nothing was reconstructed or there is no LPIPS."""

    path: Path
    num: int
    psnr: float | None
    lpips: float | None


def encode(config: EncodeConfig) -> Encoded:
    """Encode a folder of pictures into `config.out`, or go on where an earlier call stopped.

    Everything is written to OUT.partial, which takes its name when it is whole. Raises ResumeError where either holds
    the results of other settings, DataError for a disk that is too small and where no picture can be read.
    """
    out, processes = Path(config.out), join(config.device)
    device = open_device(config.device)
    perceptual = None
    if config.reconstruct and config.lpips != "none":
        perceptual = load_lpips(find_lpips(config.lpips)).to(device)
        perceptual.check_size(config.image_size)
    dataset = open_pictures(config.data, label_attr=config.label_attr)
    say(f"{config.data}: {dataset.layout}; {dataset.summary()}")
    name = config.vae or DEFAULT_VAE
    codec = open_named_codec(name, device=device, dtype=choose_dtype(config.precision, device), tile=config.tile)
    codec.latent_shape(config.image_size, config.image_size)
    both = config.flip and not codec.flip_equivariant
    settings = _settings(config, dataset, codec)
    partial = out.with_name(f"{out.name}.partial")
    whole = False
    if processes.first:
        whole = _open_folders(out, partial, settings)
        if not whole:
            instead = "make room, or give another --out."
            check_space(partial, dataset, codec, image_size=config.image_size, both=both, instead=instead)
    if processes.agree(whole):
        return _encoded(out)

    def describe(manifest: dict[str, Any]) -> dict[str, Any]:
        latents = Latents(Moments.open(partial, manifest), None, ())
        mean, std = measure(latents, codec)
        say(f"Latents have mean {mean:.3f} and standard deviation {std:.3f}.")
        warn_of_scale(mean, std, codec)
        digest = hashlib.sha256(json.dumps([settings, manifest["num"]]).encode()).hexdigest()
        return {
            "vae": lasting_codec_name(name),
            "codec": same_weights(codec),
            "image_size": config.image_size,
            "latents_mean": mean,
            "latents_std": std,
            "fingerprint": digest,
        }

    try:
        if processes.first:
            write_text(partial / SETTINGS, json.dumps(settings, indent=1))
        scores = _Scores(partial, dataset.names, codec, perceptual) if config.reconstruct else None
        encode_into(
            partial,
            dataset,
            codec,
            image_size=config.image_size,
            both=both,
            strict=config.strict,
            num_workers=config.num_workers or os.cpu_count() or 1,
            batch_size=config.batch_size,
            num=config.num,
            shard_size=config.shard_size,
            per_image=config.per_image,
            about=describe,
            watch=scores if scores else lambda names, images, moments: None,
            note=scores.note if scores else lambda seen: None,
            processes=processes,
        )
        if processes.first:
            if out.is_dir():
                out.rmdir()
            partial.rename(out)
        processes.collect(None)  # the others wait until it is there
    except OSError as error:
        raise DitcliError(
            f"the latents could not be written to {partial} ({error.strerror}): make room and run the same command "
            "again, it goes on from there."
        ) from error
    return _encoded(out)


def _open_folders(out: Path, partial: Path, settings: dict[str, Any]) -> bool:
    """Whether `out` is whole already; if not, `partial` is there, and empty or begun with the same settings."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        _check_same(out, settings)
        say(f"{out} is already whole.")
        return True
    if partial.exists():
        _check_same(partial, settings)
        say(f"Going on with {partial}.")
    else:
        partial.mkdir(parents=True)
    return False


class _Scores:
    """Writes pictures beside their reconstructions, and how alike they are, batch by batch."""

    def __init__(self, folder: Path, names: Sequence[str], codec: Codec, perceptual: LPIPS | None):
        self.folder, self.codec, self.perceptual = folder, codec, perceptual
        self.paths = dict(zip(names, picture_paths(folder / PAIRS, names), strict=True))
        self.rows = {row[0]: row for row in _read_scores(folder)}

    def __call__(self, names: list[str], images: Tensor, moments: Tensor) -> list[tuple[str, float, float]]:
        others = self.codec.decode(self.codec.to_latents(moments))
        ratios = psnr(images, others).tolist()
        distances = [math.nan] * len(names)
        if self.perceptual:
            distances = perceptual_distance(self.perceptual, images, others).tolist()
        for i, name in enumerate(names):
            pair = torch.cat([images[i], others[i]], dim=2).permute(1, 2, 0).contiguous().numpy()
            self.paths[name].parent.mkdir(parents=True, exist_ok=True)
            write_png(self.paths[name], pair)
        return list(zip(names, ratios, distances, strict=True))

    def note(self, batches: list[list[tuple[str, float, float]]]) -> None:
        """Write down what was found of batches, by whichever process."""
        self.rows |= {row[0]: row for rows in batches for row in rows}
        with replacing(self.folder / SCORES) as partial, partial.open("w", newline="") as file:
            csv.writer(file).writerows([("name", "psnr", "lpips"), *self.rows.values()])


def _read_scores(folder: Path) -> list[tuple[str, float, float]]:
    if not (folder / SCORES).is_file():
        return []
    with (folder / SCORES).open(newline="") as file:
        return [(name, float(ratio), float(distance)) for name, ratio, distance in list(csv.reader(file))[1:]]


def _encoded(out: Path) -> Encoded:
    manifest = json.loads((out / MANIFEST).read_text())
    if manifest["unreadable"]:
        report_unreadable(f"{name}: {reason}" for name, reason in manifest["unreadable"])
    means: list[float | None] = [None, None]
    rows = _read_scores(out)
    if rows:
        found = np.array([row[1:] for row in rows]).mean(axis=0)
        means = [None if math.isnan(value) else float(value) for value in found]
    return Encoded(out, manifest["num"], means[0], means[1])


def _settings(config: EncodeConfig, dataset: ImageDataset, codec: Codec) -> dict[str, Any]:
    """All that decides what is written."""
    chosen = ("image_size", "flip", "num", "shard_size", "per_image", "reconstruct", "tile")
    facts = {name: getattr(config, name) for name in chosen}
    return facts | {"images": dataset.fingerprint(), "vae": codec.fingerprint(), "lpips": config.lpips != "none"}


def _check_same(folder: Path, settings: dict[str, Any]) -> None:
    path = folder / SETTINGS
    if not path.is_file():
        if folder.name.endswith(".partial") and not any(folder.iterdir()):
            return
        raise ResumeError(f"{folder} is there already and holds no latents: give another --out.")
    before = json.loads(path.read_text())
    changed = [name for name in settings if before.get(name) != settings[name]]
    if changed:
        names = ", ".join(name.replace("_", "-") for name in changed)
        raise ResumeError(
            f"{folder} was made with other settings ({names}): give the former ones, another --out, or delete it."
        )


def decode(latents: str, config: DecodeConfig) -> list[Path]:
    """Write the pictures of latents as PNGs under their names; those already written from the same are left.

    `latents` is a folder of `ditcli encode`, or an .npy file of moments or scaled latents (N, C, h, w) or (C, h, w).
    Raises ModelNotFoundError where there is none.
    """
    device = open_device(config.device)
    source = Path(latents)
    dataset = open_latents(source)
    if dataset is None and not (source.is_file() and source.suffix == ".npy"):
        raise ModelNotFoundError(
            f"{latents} holds no latents: give a folder that `ditcli encode` wrote, or an .npy file."
        )
    if dataset is None and config.vae is None:
        raise DataError(f"{latents} does not say which VAE it was made with: give --vae.")
    name = config.vae or (dataset.vae if dataset else "")
    codec = open_named_codec(name, device=device, dtype=choose_dtype(config.precision, device), tile=config.tile)
    names: list[str]
    if dataset:
        names, moments = list(dataset.names), dataset.moments()
        digest, read = dataset.fingerprint(), _reader(moments)
        channels = moments.shape[2]
    else:
        rows = _read_array(source)
        rows = rows[None] if rows.ndim == 3 else rows
        if rows.ndim != 4:
            raise DataError(
                f"{latents} has the shape {rows.shape}, but must be (N, C, h, w) or (C, h, w): of what `ditcli encode` "
                "wrote give the whole folder."
            )
        names = [f"{source.stem}.npy" if len(rows) == 1 else f"{source.stem}-{i:05}.npy" for i in range(len(rows))]
        digest, read = hashlib.sha256(rows.tobytes()).hexdigest(), rows.__getitem__
        channels = rows.shape[1]
    if channels not in (codec.moments_channels, codec.latent_channels):
        raise DataError(
            f"{latents} has {channels} channels, but the VAE {codec.name} has {codec.latent_channels}: "
            "give the one it was made with to --vae."
        )
    facts = {"ditcli": json.dumps({"latents": digest, "vae": codec.fingerprint()})}
    paths = picture_paths(Path(config.out), names[: config.num])
    with progress(f"decoding with {codec.name}", len(paths)) as advance:
        for start in range(0, len(paths), config.batch_size):
            batch = range(start, min(start + config.batch_size, len(paths)))
            todo = [i for i in batch if _metadata(paths[i]) != facts]
            if todo:
                z = torch.from_numpy(np.stack([read(i) for i in todo]))
                scaled = not dataset and channels != codec.moments_channels
                images = codec.decode(z.float() if scaled else codec.to_latents(z)).permute(0, 2, 3, 1)
                for i, image in zip(todo, images.contiguous().cpu().numpy(), strict=True):
                    paths[i].parent.mkdir(parents=True, exist_ok=True)
                    write_png(paths[i], image, facts)
            advance(len(batch), "")
    return paths


def picture_paths(out: Path, names: Sequence[str]) -> list[Path]:
    """`a/b.jpg` -> `OUT/a/b.png`; `OUT/a/b.jpg.png` where two names differ in their suffix only."""
    paths = [_inside(out, name).with_suffix(".png") for name in names]
    times = Counter(paths)
    return [
        path.with_name(f"{PurePosixPath(name).name}.png") if times[path] > 1 else path
        for path, name in zip(paths, names, strict=True)
    ]


def _read_array(path: Path) -> np.ndarray:
    try:
        rows = np.load(path)
    except (ValueError, EOFError) as error:
        raise DataError(f"{path} is damaged or no .npy file of numbers: write it again with numpy.save.") from error
    if rows.dtype.kind not in "fiu":
        raise DataError(f"{path} holds {rows.dtype}, but latents are numbers.")
    return rows


def _reader(moments: Moments) -> Callable[[int], np.ndarray]:
    return lambda row: moments[row, 0]


def _inside(folder: Path, name: str) -> Path:
    """The path of a name in a folder; DataError where it leads out of it."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise DataError(
            f"the latents name a picture {name!r}, which leads out of the folder: they are not to be trusted."
        )
    return folder / path


def _metadata(path: Path) -> dict[str, str]:
    try:
        return read_png_metadata(path) if path.is_file() else {}
    except UnreadableImageError:
        return {}
