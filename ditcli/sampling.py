"""Seeds and labels in, image files out."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

import ditcli
from ditcli.config import SampleConfig, SamplerName, suggest
from ditcli.denoisers.opening import encode_picture, find_model, is_export, open_guide, open_model
from ditcli.diffusion import samplers
from ditcli.diffusion.denoiser import Denoiser
from ditcli.diffusion.guidance import guide
from ditcli.diffusion.wrappers import BetweenClasses
from ditcli.drawing import Decode, Drawing, choose_sampler, generate
from ditcli.errors import SettingError, UnreadableImageError
from ditcli.images import make_grid, read_image, read_png_metadata, write_gif, write_png
from ditcli.memory import fitting_batch
from ditcli.outputs import PictureArchive
from ditcli.processes import Processes, join
from ditcli.progress import progress, say
from ditcli.starts import Photo, Start, read_photo

BLOCK = 16  # pictures that a process draws between two hand-overs to the one that writes an archive
MOST_FRAMES = 24  # of a trajectory: each is decoded
# What decides a picture besides its label, its seed and the model.
SETTINGS = (
    *("cfg", "cfg_interval", "cfg_rescale", "cfg_channels", "guide_model", "sampler", "steps", "shift"),
    *("eta", "order", "cache", "strength", "ema", "vae", "precision", "adapter"),
)


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
    nor on the runtime. `advance(n)` is called as n steps are done, of ``steps * len(labels)`` in all.
    """
    drawings = generate(
        guide(denoiser, cfg),
        decode,
        choose_sampler(sampler, eta=eta),
        samplers.time_grid(denoiser.diffusion.schedule, steps, denoiser.diffusion.config.spacing),
        labels=labels,
        starts=[Start(seed) for seed in seeds],
        batch_size=batch_size,
        advance=advance,
    )
    return (drawing.image for drawing in drawings)


def find_labels(wanted: Sequence[str], class_names: Sequence[str]) -> list[int]:
    """Class indices of names, comma-separated names, or numbers, each once; all classes when none is wanted.

    A name may be in any case; one that is exact comes first. Of a class with several names ("tench, Tinca tinca") each
    will do. Raises SettingError that lists the known names and suggests the nearest.
    """
    index = {name.lower(): i for i, name in enumerate(class_names)} | {name: i for i, name in enumerate(class_names)}
    for alias, classes in _aliases(class_names).items():
        if len(classes) == 1:
            index.setdefault(alias, classes[0])
    if wanted and not class_names:
        raise SettingError("labels were given, but the model was trained without labels: leave --labels out.")
    found = []
    for word in wanted:
        for part in [word] if word.strip().lower() in index else word.split(","):
            name = part.strip() if part.strip() in index else part.strip().lower()
            if name not in index and not (name.isdecimal() and int(name) < len(class_names)):
                known = ", ".join(class_names[:20]) + (f" and {len(class_names) - 20} more" * (len(class_names) > 20))
                raise SettingError(
                    f"the model has no label {part.strip()!r}; it knows {known}.{suggest(name, class_names)}"
                )
            found.append(index[name] if name in index else int(name))
    return list(dict.fromkeys(found)) or list(range(len(class_names)))


def _aliases(class_names: Sequence[str]) -> dict[str, list[int]]:
    """Each of a class's names, in small letters, and the classes that have it."""
    aliases: dict[str, list[int]] = {}
    for i, name in enumerate(class_names):
        for part in name.lower().split(","):
            aliases.setdefault(part.strip(), []).append(i)
    return aliases


@dataclass(frozen=True)
class Sample:
    path: str
    label: str | None
    seed: int


@dataclass(frozen=True)
class Samples:
    """What `sample` wrote: `images` in a folder, or all in one `archive`; beside them a grid, GIFs and strips."""

    model: str
    step: int
    images: list[Sample]
    grid: str | None = None
    archive: str | None = None
    animations: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Picture:
    """One to draw: the network's label and the user's, its randomness, and its file's name without suffix."""

    label: int
    name: str | None
    start: Start
    stem: str


@dataclass(frozen=True)
class Job:
    """All that is settled before the first network call."""

    rows: list[list[Picture]]
    facts: dict[str, Any]
    photo: Photo | None
    generate: Callable[[list[Picture], Callable[[int], object]], Iterator[Drawing]]
    num_steps: int

    @property
    def pictures(self) -> list[Picture]:
        return [picture for row in self.rows for picture in row]

    def facts_of(self, picture: Picture) -> dict[str, Any]:
        start = asdict(picture.start) if picture.start.to_seed is not None else {"seed": picture.start.seed}
        return {"label": picture.name, **start, **self.facts}

    def draw(self, pictures: list[Picture], mine: list[Picture], already: int) -> Iterator[tuple[Picture, Drawing]]:
        """Those of the pictures that are this process's, one by one, with a progress bar."""
        say(
            f"Sampling {len(pictures)} images from {self.facts['model']} (step {self.facts['step']:,})"
            + (f"; {already} are already there." if already else ".")
        )
        total = len(mine) * self.num_steps
        with progress("sampling", total) as advance:
            drawings = self.generate(mine, lambda count: advance(count, ""))
            for picture, drawing in zip(mine, drawings, strict=True):
                paste = self.photo.paste if self.photo else lambda image: image
                yield picture, Drawing(paste(drawing.image), [paste(frame) for frame in drawing.frames])


def sample(config: SampleConfig) -> Samples:
    """Draw `num` images per label and write them as PNGs named by label and seed, with the settings in their metadata.

    Image k of every label has seed ``config.seed + k``: rows of a grid share their starting noise. Images that are
    there already with the same settings are not drawn again, so a run that was stopped goes on with the same command.
    Several processes share the drawing.
    Raises ResumeError for an .npz that was made, or begun, with other settings.
    """
    processes = join(config.device)
    job = _prepare(config)
    out = Path(config.out)
    if out.suffix == ".npz":
        return _write_archive(job, out, processes)
    return _write_folder(job, out, config, processes)


def to_json(samples: Samples) -> str:
    return json.dumps(asdict(samples), indent=2)


def file_names(labels: Sequence[str]) -> list[str]:
    """Labels as parts of files' names: other characters than letters, digits and `._-` become hyphens.

    Where two would be the same, in any case, their numbers follow.
    """
    words = [re.sub(r"[^\w.-]+", "-", label).strip("-.") or "label" for label in labels]
    count = Counter(word.lower() for word in words)
    return [f"{word}-{i}" if count[word.lower()] > 1 else word for i, word in enumerate(words)]


def _prepare(config: SampleConfig) -> Job:
    checkpoint = find_model(config.model or config.adapter, config.backend)
    denoiser, decode, model = open_model(checkpoint, config)
    weaker = open_guide(config.guide_model, checkpoint, config) if config.guide_model else None
    names = denoiser.class_names
    if config.cache > 1:
        if is_export(checkpoint) or config.backend == "jax":
            raise SettingError(f"cache is {config.cache}, but only the torch backend sees single blocks: leave it out.")
        from ditcli.denoisers.forecast import cache_blocks

        denoiser = cache_blocks(denoiser, config.cache)
        weaker = cache_blocks(weaker, config.cache) if weaker else None
    classes = find_labels(config.labels, names) or [0]
    rows = _plan(config, classes, names)
    if config.cfg_channels is not None and config.cfg_channels > denoiser.input_shape[0]:
        raise SettingError(f"cfg-channels is {config.cfg_channels}, but the model has {denoiser.input_shape[0]}.")
    spacing = config.spacing or denoiser.diffusion.config.spacing
    times = samplers.time_grid(denoiser.diffusion.schedule, config.steps, spacing, shift=config.shift)

    photo, init, paint = None, None, None
    strength = (0.6 if config.mask is None else 1.0) if config.strength is None else config.strength
    if config.init is not None:
        photo = read_photo(config.init, config.mask, model.image_size)
        init = encode_picture(photo.pixels, config.vae or model.codec, config.device)
        paint = photo.latent_mask(*init.shape[1:])
        times = samplers.from_strength(times, strength)

    # A model without labels has nothing to compare with but a weaker model.
    scale = config.cfg if names or weaker else 1.0
    if config.interpolate == "labels":
        shares = tuple(k / (config.num - 1) for k in range(config.num))
        denoiser = BetweenClasses(denoiser, classes[0], classes[1], shares)
        weaker = BetweenClasses(weaker, classes[0], classes[1], shares) if weaker else None
    passes = (1 if scale == 1 or weaker else 2) * (2 if config.interpolate == "labels" else 1)
    fitting = fitting_batch(denoiser, model.dit, passes=passes)
    guided = guide(
        denoiser,
        scale,
        channels=config.cfg_channels,
        interval=config.cfg_interval,
        rescale=config.cfg_rescale,
        weaker=weaker,
    )
    solve = choose_sampler(config.sampler, eta=config.eta, order=config.order or 4)

    def draw_some(pictures: list[Picture], advance: Callable[[int], object]) -> Iterator[Drawing]:
        return generate(
            guided,
            decode,
            solve,
            times,
            labels=[picture.label for picture in pictures],
            starts=[picture.start for picture in pictures],
            batch_size=config.batch_size if isinstance(config.batch_size, int) else fitting,
            init=init,
            paint=paint,
            num_frames=MOST_FRAMES if config.trajectory else 0,
            advance=advance,
        )

    settings = {key: getattr(config, key) for key in SETTINGS} | {"cfg": scale, "cfg_interval": [*config.cfg_interval]}
    settings["spacing"] = spacing
    if photo:
        settings |= {"init": config.init, "mask": config.mask, "strength": strength, "pixels": photo.digest()}
    saved = checkpoint.stat().st_mtime_ns  # a new model of the same name draws other pictures
    facts = settings | {"model": str(checkpoint), "step": model.step, "saved": saved}
    return Job(rows, facts, photo, draw_some, len(times) - 1)


def _plan(config: SampleConfig, classes: list[int], names: Sequence[str]) -> list[list[Picture]]:
    """The rows of the grid: a walk, or the seeds of a label."""
    seed, shares = config.seed, [k / max(config.num - 1, 1) for k in range(config.num)]
    words = file_names(names)
    if config.interpolate == "labels":
        if len(names) < 2 or len(classes) != 2:
            raise SettingError(
                f"a walk between labels needs two of them, but there are {len(classes) if names else 0}: "
                + ("name them with --labels." if len(names) > 1 else "use --interpolate seeds.")
            )
        first, last = (names[label] for label in classes)
        stem = f"{words[classes[0]]}-{words[classes[1]]}_seed{seed}"
        return [[Picture(k, f"{first} to {last}", Start(seed), f"{stem}_{k:03}") for k in range(config.num)]]
    rows = []
    for label in classes:
        name = names[label] if names else None
        prefix = f"{words[label]}_" if name else ""
        if config.interpolate == "seeds":
            end = seed + 1 if config.to_seed is None else config.to_seed
            stem = f"{prefix}seed{seed}-{end}"
            rows.append(
                [Picture(label, name, Start(seed, end, share), f"{stem}_{k:03}") for k, share in enumerate(shares)]
            )
        else:
            seeds = range(seed, seed + config.num)
            rows.append([Picture(label, name, Start(s), f"{prefix}seed{s}") for s in seeds])
    return rows


def _write_archive(job: Job, path: Path, processes: Processes) -> Samples:
    """The first process writes; all draw a block of the pictures in turn, so that they come in their order."""
    pictures = job.pictures
    labels = [picture.label for picture in pictures] if pictures[0].name is not None else None
    facts = job.facts | {"labels": sorted({picture.name or "" for picture in pictures}), "seed": pictures[0].start.seed}
    archive = None
    if processes.first:
        path.parent.mkdir(parents=True, exist_ok=True)
        archive = PictureArchive(path, num=len(pictures), labels=labels, facts=facts)
    done = processes.agree(archive.done if archive else 0)
    size = BLOCK if processes.num > 1 else 1
    blocks = [pictures[start : start + size] for start in range(done, len(pictures), size)]
    mine = list(chain.from_iterable(blocks[processes.rank :: processes.num]))
    drawn = job.draw(pictures[done:], mine, done)
    for _ in blocks[:: processes.num]:
        images = processes.collect([drawing.image for _, drawing in islice(drawn, size)])
        for image in chain.from_iterable(images):
            if archive:
                archive.append(image)
    assert next(drawn, None) is None
    if archive:
        archive.finish()
    return Samples(job.facts["model"], job.facts["step"], [], archive=str(path))


def _write_folder(job: Job, out: Path, config: SampleConfig, processes: Processes) -> Samples:
    out.mkdir(parents=True, exist_ok=True)
    paths = {picture: out / f"{picture.stem}.png" for picture in job.pictures}
    todo = []
    if processes.first:
        todo = [picture for picture, path in paths.items() if not _is_drawn(path, job.facts_of(picture), config)]
    todo = processes.agree(todo)
    part = processes.part(len(todo))
    animations = []
    for picture, drawing in job.draw(todo, todo[part.start : part.stop], len(paths) - len(todo)):
        if config.trajectory:
            frames = [*drawing.frames[:-1], drawing.image]  # what is foreseen at last is the image
            write_gif(_beside(paths[picture], "path.gif"), frames, 1500 // len(frames))
            write_png(_beside(paths[picture], "path.png"), make_grid([frames]))
        facts = {"Software": f"ditcli {ditcli.__version__}", "ditcli": json.dumps(job.facts_of(picture))}
        write_png(paths[picture], drawing.image, facts)
    if config.trajectory:
        animations += [str(_beside(path, f"path.{kind}")) for path in paths.values() for kind in ("gif", "png")]

    grid = None
    processes.collect(None)  # all pictures are there
    if processes.first and (config.grid or config.interpolate):
        rows = [[np.asarray(read_image(paths[picture])) for picture in row] for row in job.rows]
        if config.interpolate:
            for row, images in zip(job.rows, rows, strict=True):
                path = out / f"{row[0].stem.removesuffix('_000')}.gif"
                write_gif(path, images + images[-2:0:-1], 100)
                animations.append(str(path))
        if config.grid:
            grid = str(out / "grid.png")
            write_png(grid, make_grid(rows, [row[0].name for row in job.rows if row[0].name]), {})
    written = [Sample(str(path), picture.name, picture.start.seed) for picture, path in paths.items()]
    return Samples(job.facts["model"], job.facts["step"], written, grid, animations=animations)


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(f"{path.stem}_{ending}")


def _is_drawn(path: Path, facts: dict[str, Any], config: SampleConfig) -> bool:
    """Whether the file is there and says that it was drawn with these facts."""
    if not path.exists() or (config.trajectory and not _beside(path, "path.png").exists()):
        return False
    try:
        return json.loads(read_png_metadata(path).get("ditcli", "null")) == facts
    except (UnreadableImageError, ValueError):
        return False
