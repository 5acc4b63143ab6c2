"""A score of the weights as they are, computed now and then while a DiT is trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from ditcli.config import TrainConfig
from ditcli.data.folders import ImageDataset
from ditcli.denoisers.opening import Decode
from ditcli.diffusion import samplers
from ditcli.diffusion.denoiser import Denoiser
from ditcli.diffusion.schedule import Schedule
from ditcli.evaluation.extractors import open_extractor
from ditcli.evaluation.features import Extractor, extractor_id, result_name
from ditcli.evaluation.gather import BATCH, gather
from ditcli.evaluation.score import compare
from ditcli.evaluation.sides import FolderSide, spread_labels
from ditcli.evaluation.statistics import Accumulator, Statistics
from ditcli.processes import Processes
from ditcli.sampling import draw


@dataclass(frozen=True)
class TrainingScore:
    """`score(denoiser, decode)` -> the distance of `eval_num` samples to the data; lower is better.

    Labels come as often as in the data, and seeds are 0, 1, ...: equal weights, equal scores.
    """

    config: TrainConfig
    real: Statistics
    labels: list[int]
    extractor: Extractor
    processes: Processes

    @property
    def name(self) -> str:
        """What is measured: scores are comparable between equal names."""
        config = self.config
        name = result_name(self.extractor, config.eval_metric)
        return f"{name} of {config.eval_num} samples, cfg {config.eval_cfg:g}, {config.eval_steps} steps"

    def __call__(self, denoiser: Denoiser, decode: Decode) -> float:
        part = self.processes.part(len(self.labels))
        drawn = draw(
            denoiser,
            decode,
            labels=self.labels[part.start : part.stop],
            seeds=part,
            cfg=self.config.eval_cfg if denoiser.class_names else 1.0,
            steps=self.config.eval_steps,
        )
        accumulator, kept = Accumulator(self.extractor.width), []
        for images in _batches(drawn):
            features = self.extractor(np.stack(images))
            accumulator.update(features)
            kept.append(features)
        whole, *others = self.processes.collect(accumulator)
        for other in others:
            whole.merge(other)
        kept = [features for several in self.processes.collect(kept) for features in several]
        fake = whole.statistics(extractor_id(self.extractor), features=np.concatenate(kept))
        return compare(self.real, fake, [self.config.eval_metric], self.extractor)[self.config.eval_metric].value


def open_training_score(
    config: TrainConfig, dataset: ImageDataset, schedule: Schedule, device: torch.device, processes: Processes
) -> TrainingScore:
    """Open the extractor and gather the data's statistics at the model's size, or take them from the cache.

    Raises DitcliError where the extractor cannot be had, before any time goes into training.
    """
    samplers.time_grid(schedule, config.eval_steps)  # says so if these are too many
    extractor = open_extractor(config.eval_features, weights=config.eval_weights, device=device)
    real = gather(
        FolderSide(config.data, dataset),
        extractor,
        image_size=config.image_size,
        keep_features=config.eval_metric == "kid",
        num_workers=config.num_workers,
        processes=processes,
    )[0]
    counts: Any = [1] if dataset.labels is None else np.bincount(dataset.labels, minlength=len(dataset.class_names))
    return TrainingScore(config, real, spread_labels(counts, config.eval_num), extractor, processes)


def _batches(images: Iterator[np.ndarray]) -> Iterator[list[np.ndarray]]:
    while batch := list(islice(images, BATCH)):
        yield batch
