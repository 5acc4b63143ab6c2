"""Seeds and labels in, images out: starting noise per image, guidance, sampler, decoding."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import ditcli
from ditcli import hub
from ditcli.config import SampleConfig, SamplerName, suggest
from ditcli.diffusion import samplers
from ditcli.diffusion.denoiser import Denoiser
from ditcli.diffusion.guidance import guide
from ditcli.errors import SettingError
from ditcli.images import make_grid, write_png
from ditcli.progress import progress, say

Decode = Callable[[np.ndarray], np.ndarray]  # float32 latents (N, C, h, w) -> uint8 images (N, H, W, 3)


def draw(
    denoiser: Denoiser,
    decode: Decode,
    *,
    labels: Sequence[int],
    seeds: Sequence[int],
    cfg: float,
    steps: int,
    sampler: SamplerName = "ddim",
    eta: float = 0.0,
    batch_size: int = 16,
    advance: Callable[[int], object] = lambda count: None,
) -> Iterator[np.ndarray]:
    """One uint8 image (H, W, 3) for each label and seed; the null class is ``len(denoiser.class_names)``.

    All randomness of an image comes from its own seed, through numpy, so it does not depend on the batch it is drawn in
    nor on the runtime. `advance(n)` is called as n network calls are done, of ``steps * len(labels)`` in all.
    """
    guided = guide(denoiser, cfg)
    times = samplers.time_grid(denoiser.diffusion.schedule, steps)
    run = samplers.ddpm if sampler == "ddpm" else partial(samplers.ddim, eta=eta)
    for start in range(0, len(labels), batch_size):
        batch = slice(start, start + batch_size)
        generators = [np.random.default_rng(seed) for seed in seeds[batch]]

        def noise(generators: list[np.random.Generator] = generators) -> Any:
            shape = denoiser.input_shape
            return denoiser.from_numpy(np.stack([g.standard_normal(shape, dtype=np.float32) for g in generators]))

        chosen = denoiser.from_numpy(np.array(labels[batch], dtype=np.int64))
        x0 = run(guided, noise(), chosen, times, noise=noise, watch=lambda t, x: advance(len(x)))
        yield from decode(denoiser.to_numpy(x0))


def find_labels(wanted: Sequence[str], class_names: Sequence[str]) -> list[int]:
    """Class indices of names (in any case), comma-separated names, or numbers; all classes when none is wanted.

    Raises ValueError that lists the known names and suggests the nearest.
    """
    index = {name.lower(): i for i, name in enumerate(class_names)}
    if wanted and not class_names:
        raise SettingError("labels were given, but the model was trained without labels: leave --labels out.")
    found = []
    for word in wanted:
        for part in [word] if word.strip().lower() in index else word.split(","):
            name = part.strip().lower()
            if name not in index and not (name.isdigit() and int(name) < len(class_names)):
                known = ", ".join(class_names[:20]) + (f" and {len(class_names) - 20} more" * (len(class_names) > 20))
                raise SettingError(
                    f"the model has no label {part.strip()!r}; it knows {known}.{suggest(name, class_names)}"
                )
            found.append(index[name] if name in index else int(name))
    return found or list(range(len(class_names)))


@dataclass(frozen=True)
class Sample:
    path: str
    label: str | None
    seed: int


@dataclass(frozen=True)
class Samples:
    """What `sample` wrote."""

    model: str
    step: int
    images: list[Sample]
    grid: str | None


def sample(config: SampleConfig) -> Samples:
    """Draw `num` images per label and write them as PNGs named by label and seed, with the settings in their metadata.

    Image k of every label has seed ``config.seed + k``: rows of a grid share their starting noise.
    """
    checkpoint = hub.find_checkpoint(config.model)
    denoiser, decode, step = _open(checkpoint, config)
    names = denoiser.class_names
    classes = find_labels(config.labels, names) or [0]
    if config.steps > (denoiser.diffusion.schedule.num_steps or config.steps):
        samplers.time_grid(denoiser.diffusion.schedule, config.steps)  # says why not
    pairs = [(label, config.seed + k) for label in classes for k in range(config.num)]
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)

    settings = {key: getattr(config, key) for key in ("cfg", "sampler", "steps", "eta", "ema")}
    say(f"Sampling {len(pairs)} images from {checkpoint} (step {step:,}).")
    written, images = [], []
    with progress("sampling", len(pairs) * config.steps) as advance:
        drawn = draw(
            denoiser,
            decode,
            labels=[label for label, _ in pairs],
            seeds=[seed for _, seed in pairs],
            cfg=config.cfg,
            steps=config.steps,
            sampler=config.sampler,
            eta=config.eta,
            batch_size=config.batch_size,
            advance=lambda count: advance(count, ""),
        )
        for (label, seed), image in zip(pairs, drawn, strict=True):
            name = names[label] if names else None
            path = out / (f"{file_name(name)}_seed{seed}.png" if name else f"seed{seed}.png")
            facts = {"label": name, "seed": seed, **settings, "model": str(checkpoint), "step": step}
            write_png(path, image, {"Software": f"ditcli {ditcli.__version__}", "ditcli": json.dumps(facts)})
            written.append(Sample(str(path), name, seed))
            images += [image] if config.grid else []
    grid = None
    if config.grid:
        rows = [images[start : start + config.num] for start in range(0, len(images), config.num)]
        grid = str(out / "grid.png")
        write_png(grid, make_grid(rows, [names[label] for label in classes] if names else ()), {})
    return Samples(str(checkpoint), step, written, grid)


def to_json(samples: Samples) -> str:
    return json.dumps(asdict(samples), indent=2)


def file_name(label: str) -> str:
    """A label as part of a file's name: other characters than letters, digits and `._-` become hyphens."""
    return re.sub(r"[^\w.-]+", "-", label).strip("-.") or "label"


def _open(checkpoint: Path, config: SampleConfig) -> tuple[Denoiser, Decode, int]:
    """The torch runtime of a checkpoint, and its codec."""
    import torch

    from ditcli.codecs.codec import numpy_decoder
    from ditcli.codecs.named import open_named_codec
    from ditcli.denoisers.torch_denoiser import open_denoiser
    from ditcli.devices import choose_dtype, open_device

    device = open_device(config.device)
    dtype = choose_dtype(config.precision, device)
    denoiser, model = open_denoiser(checkpoint, ema=config.ema, device=device, dtype=dtype)
    codec = open_named_codec(config.vae or model.codec, device=device, dtype=torch.float32)
    return denoiser, numpy_decoder(codec), model.step
