"""Which recipe makes better pictures of the same compute: presets and their ingredients, trained and scored.

    python scripts/bench_quality.py --data FOLDER --out bench --vae madebyollin/taesd --features features.onnx
    python scripts/bench_quality.py --data FOLDER --out bench --pixels --image-size 32 --budget-seconds 3600
    python scripts/bench_quality.py ... --variants paper fast --add "no flips: base=fast flip=false"

Every variant trains a network of the same shape, on the same pictures, with the batch size and the rate of its own
recipe; rates stay constant after their warm-up, so that the first part of a run is a run of that length. A quarter of
the pictures, chosen by their names, is held out from training. Samples of the averaged weights, unguided, 25 steps of
the same sampler for all, are scored against them: Frechet distance (FD) and kernel distance (KID, unbiased, of
all pictures at once, times 1000) in the features named in the table. `floor` are training pictures themselves, through
the codec and back. `nearest` is the median distance of a sample to the nearest training picture in those features, over
that of a held-out picture: about 1 where the model does not recite, well below where it does.

Runs of a seed take turns, each with a clock of its own that stops when others train or are scored, so that what else
the machine does hits all alike. The first table is at equal images seen, the second at the seconds that `paper` needed
for them: a faster recipe goes on, up to 3 times the images, and a slower one is scored on its way. Where that is within
3 % of the images, the score is not taken twice, and marked =.

The same command goes on where a killed one stopped: scores are lines of FOLDER/results.jsonl, and runs are in
FOLDER/runs. More seeds and variants may be added to a folder later; equal seconds then are of another hour.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality_recipes import SETTINGS, Recipes, read_arguments
from quality_scores import Yardstick
from quality_table import Results, curves, tables

from ditcli.codecs.codec import Codec, numpy_decoder
from ditcli.config import SamplerName, TrainConfig
from ditcli.data.latents import Latents, open_pictures
from ditcli.data.split import PictureSet, some_of, split_off
from ditcli.denoisers.torch_denoiser import as_denoiser
from ditcli.devices import open_device
from ditcli.diffusion.process import Diffusion
from ditcli.doctor.machine import cpu_name
from ditcli.errors import DitcliError, SettingError
from ditcli.evaluation.features import extractor_id
from ditcli.evaluation.sides import spread_labels
from ditcli.files import write_text
from ditcli.images import make_grid, write_png
from ditcli.progress import progress, say, set_verbosity
from ditcli.reporting.nearest import choose_extractor
from ditcli.runs import RunDir
from ditcli.sampling import draw
from ditcli.training.checkpoints import save_checkpoint
from ditcli.training.setup import Setup, cached_latents, make_batches, prepare, start_or_resume
from ditcli.training.state import TrainState, new_state
from ditcli.training.step import Steps

SHARE_HELD_OUT = 0.25
TURNS = 20  # of a run's images
SAVE_EVERY = 5  # turns
MOST = 3  # times the images, at equal seconds
SAME = 0.03
CLOCK_EVERY = 10  # steps on a GPU, which would wait at each
SAMPLER: SamplerName = "dpm++2m"
GRID = (4, 8)  # rows and columns of samples


@dataclass
class Run:
    """A variant in training with a seed; its clock is `state.seconds`."""

    name: str
    setup: Setup
    state: TrainState
    steps: Steps

    @property
    def images(self) -> int:
        return self.state.step * self.setup.config.batch_size

    def goal(self, images: float) -> int:
        """The first step after which so many images were seen."""
        return math.ceil(images / self.setup.config.batch_size - 1e-9)

    def train(self, images: float, seconds: float = math.inf) -> None:
        """Until it has seen so many images or its clock shows so many seconds, whichever comes first."""
        cuda, goal = self.setup.device.type == "cuda", self.goal(images)
        while self.state.step < goal and self.state.seconds < seconds:
            began = time.perf_counter()
            for _ in range(min(CLOCK_EVERY if cuda else 1, goal - self.state.step)):
                self.steps.take()
            if cuda:
                torch.cuda.synchronize(self.setup.device)
            self.state.seconds += time.perf_counter() - began
        self.state.losses.clear()

    def save(self) -> None:
        run, step = self.setup.run, self.state.step
        if step and step not in run.saved_steps():
            model = dataclasses.replace(self.setup.model, step=step)
            save_checkpoint(run, model, self.state.weights(), self.state.tensors(), keep=1)


class Bench:
    """The pictures, their features and all that runs share."""

    def __init__(self, args: argparse.Namespace, recipes: Recipes):
        self.args, self.recipes, self.out = args, recipes, Path(args.out)
        self.extractor = choose_extractor(args.features, None)
        dataset = open_pictures(args.data, label_attr=args.label_attr)
        assert isinstance(dataset, PictureSet)
        self.training, self.held_out = split_off(some_of(dataset, args.most_pictures), SHARE_HELD_OUT)
        for part in self.training, self.held_out:
            if len(part) < 2:
                raise DitcliError(f"{args.data} has {len(dataset)} pictures: too few to hold some of them out.")
        self.yardstick = Yardstick(self.training, self.held_out, self.extractor, args.image_size)
        labels = self.held_out.labels
        counts = [1] if labels is None else np.bincount(labels, minlength=len(dataset.class_names))
        self.labels = spread_labels(counts, args.samples)
        self.latents: dict[bool, Latents] = {}
        self.resident: dict[bool, Any] = {}
        self.codec: Codec | None = None
        self.images = args.images
        for name in recipes:
            self.config(name, 0)  # refuses what does not fit before anything is computed

    def config(self, name: str, seed: int) -> TrainConfig:
        args = self.args
        return TrainConfig.from_dict(
            {"flip": args.flip, **self.recipes[name]}
            | {"data": args.data, "label_attr": args.label_attr, "out": str(self.out / "runs" / f"{slug(name)}-{seed}")}
            | {"vae": args.vae, "pixels": args.vae is None, "image_size": args.image_size, "model": "DiT-S/2"}
            | {"width": args.width, "depth": args.depth, "num_heads": args.num_heads, "patch_size": args.patch_size}
            | {"steps": 1_000_000_000, "lr_schedule": "constant", "sample_every": 0, "seed": seed}
            | {"device": args.device, "precision": args.precision}
        )

    def open(self, name: str, seed: int, *, fresh: bool = False) -> Run:
        """A run as its folder has it, or a fresh one of which nothing is written."""
        set_verbosity("quiet")  # each would tell of the data again
        try:
            setup = prepare(self.config(name, seed))
            self.codec = self.codec or setup.codec
            setup = dataclasses.replace(setup, dataset=self.training, codec=self.codec)
            rest = setup.config, setup.model, setup.device
            state = new_state(*rest, dtype=setup.dtype) if fresh else start_or_resume(setup)
        finally:
            set_verbosity("normal")
        flip = setup.config.flip
        if flip not in self.latents:
            self.latents[flip] = cached_latents(setup)
        diffusion = Diffusion(setup.model.diffusion)
        batches = make_batches(setup, self.latents[flip], diffusion)
        batches.resident = self.resident.setdefault(flip, batches.resident)
        run = Run(name, setup, state, Steps(setup, state, batches, diffusion))
        if setup.device.type == "cuda":  # what is compiled at the first step is on nobody's clock
            run.steps.backward(batches[0])
            state.optimizer.zero_grad(set_to_none=True)
            torch.cuda.synchronize(setup.device)
        return run

    def samples(self, run: Run, num: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Images for the grid, and the features of all `num`."""
        denoiser = as_denoiser(run.state.drawing_network(), run.setup.model, dtype=run.setup.dtype)
        drawn = draw(
            denoiser,
            numpy_decoder(run.setup.codec),
            labels=self.labels[:num],
            seeds=range(num),
            cfg=1.0,
            steps=self.args.sample_steps,
            sampler=SAMPLER,
            batch_size=self.args.sample_batch,
        )
        chosen = set(np.linspace(0, num - 1, math.prod(GRID)).astype(int))
        shown, features, waiting = [], [], []
        for k, image in enumerate(drawn):
            shown += [image] if k in chosen else []
            waiting.append(image)
            if len(waiting) == self.args.sample_batch or k == num - 1:
                features.append(self.extractor(np.stack(waiting)))
                waiting.clear()
        return shown, np.concatenate(features)

    def score(self, run: Run) -> dict[str, float]:
        began = time.perf_counter()
        shown, features = self.samples(run, self.args.samples)
        found = self.yardstick.measure(features) | {"scoring_seconds": time.perf_counter() - began}
        width = GRID[1]
        path = self.out / "samples" / f"{run.setup.run.path.name}.png"
        path.parent.mkdir(exist_ok=True)
        write_png(path, make_grid([shown[i : i + width] for i in range(0, len(shown), width)]))
        return found


def train_seed(bench: Bench, results: Results, seed: int) -> None:
    """All runs of a seed, turn by turn, with their scores."""
    curve, images = bench.args.curve, bench.images
    timed = bench.args.equal_seconds
    points = {name: [*curve, *(["seconds"] if name in timed else [])] for name in bench.recipes}
    todo = [name for name in bench.recipes if any(not results.find(name, seed, at) for at in points[name])]
    runs = [bench.open(name, seed) for name in todo]
    paper = next((run for run in runs if run.name == "paper"), None)
    finished = results.find("paper", seed, 1.0)

    def limit() -> float:
        """The clock of paper's whole run, or of what there is of it."""
        return finished["seconds"] if finished else paper.state.seconds

    def score(run: Run, at: float | str) -> None:
        if not results.find(run.name, seed, at):
            found = {"images": run.images, "seconds": run.state.seconds, **bench.score(run)}
            say(f"{run.name}, seed {seed}: FD {found['fd']:.1f} after {run.images:,} images, {run.state.seconds:.0f} s")
            results.add(run.name, seed, at, found)

    def train(run: Run, share: float, seconds: float) -> None:
        before = min(run.images, images)
        for at in sorted({*(at for at in curve if at <= share), share}):
            run.train(at * images, seconds)
            if at in curve and run.state.step == run.goal(at * images):
                score(run, at)
        advance(min(run.images, images) - before, f"{run.name} {run.images / images:.0%}")

    seen = sum(min(run.images, images) for run in runs)
    with progress(f"training, seed {seed}: images", len(runs) * images, start=seen) as advance:
        for turn in range(1, MOST * TURNS + 1):
            for run in runs:
                if run is paper or run.name not in timed:
                    train(run, min(turn / TURNS, 1.0), math.inf)
                else:  # the others never pass the clock of paper's whole run, which comes first
                    train(run, turn / TURNS, limit())
            if turn % SAVE_EVERY == 0:
                for run in runs:
                    run.save()
        for run in runs:
            near = abs(run.images / images - 1) < max(SAME, run.setup.config.batch_size / images)
            late = run.state.seconds - limit() > 2 * CLOCK_EVERY * run.state.seconds / run.state.step
            if run.name in timed and late and not results.find(run.name, seed, "seconds"):
                raise SettingError(
                    f"{run.setup.run.path} is past the seconds of paper: it cannot be scored at them now."
                )
            if run.name in timed and not near:
                score(run, "seconds")
            train(run, 1.0, math.inf)
            same = results.find(run.name, seed, 1.0)
            if run.name in timed and near and same and not results.find(run.name, seed, "seconds"):
                results.add(run.name, seed, "seconds", same | {"shared": True})
            run.save()


def estimate(bench: Bench, seconds: float, began: float) -> int:
    """The images of a run with which all of it takes about so many seconds, told before it begins."""
    args, rates = bench.args, {}
    for name in bench.recipes:
        run = bench.open(name, args.seeds[0], fresh=True)
        run.train(run.setup.config.batch_size)
        already, clock = run.images, run.state.seconds
        run.train(already + 3 * CLOCK_EVERY * run.setup.config.batch_size, clock + 3.0)
        rates[name] = (run.images - already) / (run.state.seconds - clock)
        say(f"{name}: {rates[name]:.0f} images/s")
    score_began, num = time.perf_counter(), min(args.samples, 2 * args.sample_batch)
    bench.samples(run, num)
    once = (time.perf_counter() - score_began) * args.samples / num + _seconds_to_measure(bench)
    scores = len(args.seeds) * (len(rates) * len(args.curve) + len(args.equal_seconds) - 1)
    # For each image of the budget; a faster recipe goes on at equal seconds.
    each = [max(1 / rate, min(1 / rates["paper"], MOST / rate)) for rate in rates.values()]
    left = seconds - (time.perf_counter() - began) - scores * once
    say(f"{scores} scores of {args.samples:,} samples take {once:.0f} s each, {scores * once:.0f} s in all.")
    images = int(left / (len(args.seeds) * sum(each)))
    images -= images % 100
    if images < 100 * TURNS:
        raise SettingError(
            f"budget-seconds is {seconds:g}, of which {left:.0f} s are left to train {len(args.seeds) * len(rates)} "
            "runs: give more, or fewer --variants, --seeds, --samples or points of the --curve."
        )
    say(f"{images:,} images for each of {len(args.seeds) * len(rates)} runs: about {seconds / 60:.0f} minutes in all.")
    return images


def _seconds_to_measure(bench: Bench) -> float:
    features = bench.yardstick.known[: bench.args.samples]
    bench.yardstick.measure(features[:2])  # which gathers all that is measured against
    began = time.perf_counter()
    bench.yardstick.measure(features)
    return time.perf_counter() - began


def slug(name: str) -> str:
    return re.sub(r"[^\w.]+", "-", name).strip("-")


def check_settings(path: Path, args: argparse.Namespace, bench: Bench) -> dict[str, Any]:
    """What scores depend on besides variant and seed, which a folder keeps; SettingError for other ones."""
    now = {name: getattr(args, name) for name in SETTINGS} | {"features": extractor_id(bench.extractor)}
    if not path.is_file():
        return now
    before = json.loads(path.read_text())
    now["images"] = before["images"] if args.budget_seconds is not None else args.images
    changed = [f"{name} was {before.get(name)!r}, is {now[name]!r}" for name in now if now[name] != before.get(name)]
    if changed:
        raise SettingError(f"{path.parent} has scores of other settings ({'; '.join(changed)}): give another --out.")
    return now


def main(words: Sequence[str] | None = None) -> None:
    began = time.perf_counter()
    args, recipes = read_arguments(words, __doc__)
    if torch.cuda.is_available():
        from torch._dynamo import config as compiler

        compiler.recompile_limit = compiler.accumulated_recompile_limit = 10_000  # all variants have one class of block
    bench = Bench(args, recipes)
    bench.out.mkdir(parents=True, exist_ok=True)
    with RunDir(bench.out).lock():
        settings_file = bench.out / "settings.json"
        settings = check_settings(settings_file, args, bench)
        results = Results(bench.out / "results.jsonl", recipes)
        say(f"{len(bench.training):,} pictures to train on, {len(bench.held_out):,} held out; {bench.extractor.name}")
        if results.find("floor", 0, 1.0) is None:
            codec = bench.open("paper", args.seeds[0], fresh=True).setup.codec
            results.add("floor", 0, 1.0, bench.yardstick.floor(codec, args.samples))
        if "images" not in settings:
            settings["images"] = args.images
            if args.budget_seconds is not None:
                settings["images"] = estimate(bench, args.budget_seconds, began)
            write_text(settings_file, json.dumps(settings, indent=2) + "\n")
        bench.images = settings["images"]
        for seed in args.seeds:
            train_seed(bench, results, seed)
            cuda = open_device(args.device).type == "cuda"
            machine = torch.cuda.get_device_name() if cuda else f"{cpu_name()}, {torch.get_num_threads()} threads"
            about = [
                f"`python {shlex.join(sys.argv)}`",
                f"{machine}; torch {torch.__version__}, Python {platform.python_version()}. {len(bench.training):,} "
                f"pictures to train on, {len(bench.held_out):,} held out; {args.samples:,} samples, unguided, of "
                f"{args.sample_steps} {SAMPLER} steps; features {bench.extractor.name}.",
            ]
            text = tables(results.rows, bench.images, about)
            write_text(bench.out / "table.md", text)
            curves(results.rows, bench.out / "curves.png", bench.extractor.name)
    print(text)


if __name__ == "__main__":
    try:
        main()
    except DitcliError as error:
        sys.exit(f"Error: {error}")
