"""Time `ditcli fid` beside pytorch-fid and torch-fidelity: the same pictures, the same weights, one run.

    pip install --no-deps --target TOOLS pytorch-fid torch-fidelity torchvision
    python scripts/bench_fid.py TOOLS

The two tools run as they are, with their default batch sizes and reading processes. Both import torchvision, which
does not import beside a CPU build of torch; here two operators that no tool calls are declared by name, and it does.
Pictures are drawn and weights are made from seeds, so the numbers are no FID, but all tools must agree on them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from ditcli.data.folders import open_dataset
from ditcli.evaluation.gather import gather
from ditcli.evaluation.inception import InceptionFeatures
from ditcli.evaluation.metrics import frechet_distance
from ditcli.evaluation.sides import FolderSide

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from golden import inception_state

Features = Callable[[Path], np.ndarray]
Frechet = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], float]


def draw_pictures(folder: Path, num: int, seed: int) -> None:
    """Half JPEG, half PNG, 178x218 as CelebA's: a coloured ground with shapes and some grain."""
    folder.mkdir()
    for i in range(num):
        rng = np.random.default_rng((seed, i))
        picture = Image.new("RGB", (178, 218), tuple(rng.integers(0, 256, 3).tolist()))
        pen = ImageDraw.Draw(picture)
        for _ in range(int(rng.integers(3, 9))):
            (x0, x1), (y0, y1) = (sorted(rng.integers(0, side, 2).tolist()) for side in (178, 218))
            shape = pen.ellipse if rng.random() < 0.5 else pen.rectangle
            shape((x0, y0, x1, y1), fill=tuple(rng.integers(0, 256, 3).tolist()))
        pixels = np.array(picture) + rng.normal(0, 4 + 4 * seed, (218, 178, 3))
        suffix = "jpg" if i % 2 else "png"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:05}.{suffix}")


def files_of(folder: Path) -> list[str]:
    return sorted(map(str, folder.iterdir()))


def open_ditcli(weights: Path, resize: str) -> tuple[Features, Frechet]:
    extractor = InceptionFeatures(weights, resize=resize)  # type: ignore[arg-type]

    def features(folder: Path) -> np.ndarray:
        os.environ["DITCLI_CACHE"] = tempfile.mkdtemp(dir=weights.parent)  # every round reads the pictures anew
        found = gather(FolderSide(str(folder), open_dataset(str(folder))), extractor, keep_features=True)[0].features
        assert found is not None
        return found

    return features, frechet_distance


def open_pytorch_fid(weights: Path) -> tuple[Features, Frechet]:
    from pytorch_fid import fid_score
    from pytorch_fid import inception as network

    network.load_state_dict_from_url = lambda url, progress: torch.load(weights)
    model = network.InceptionV3([3])
    num_workers = min(os.cpu_count() or 1, 8)

    def features(folder: Path) -> np.ndarray:
        return fid_score.get_activations(files_of(folder), model, num_workers=num_workers)

    return features, fid_score.calculate_frechet_distance


def open_torch_fidelity(weights: Path) -> tuple[Features, Frechet]:
    from torch_fidelity.datasets import ImagesPathDataset
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric
    from torch_fidelity.utils import get_featuresdict_from_dataset

    extractor = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights)
    )
    extractor.eval()

    def features(folder: Path) -> np.ndarray:
        dataset = ImagesPathDataset(files_of(folder))
        return get_featuresdict_from_dataset(dataset, extractor, 64, False, False, False)["2048"].numpy()

    def frechet(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
        sides = {"mu": mu1, "sigma": sigma1}, {"mu": mu2, "sigma": sigma2}
        return fid_statistics_to_metric(*sides, False)[KEY_METRIC_FID]

    return features, frechet


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    features = features.astype(np.float64)
    return features.mean(axis=0), np.cov(features, rowvar=False)


def seconds_of(function: Callable[[], object]) -> tuple[float, object]:
    began = time.perf_counter()
    result = function()
    return time.perf_counter() - began, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tools", type=Path, help="folder with pytorch-fid, torch-fidelity and torchvision")
    parser.add_argument("--num", type=int, default=1000, help="pictures")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    sys.path.append(str(options.tools))
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

    with tempfile.TemporaryDirectory() as place:
        weights = Path(place) / "inception.pth"
        torch.save(inception_state(), weights)
        folders = [Path(place) / name for name in ("first", "second")]
        for seed, folder in enumerate(folders):
            draw_pictures(folder, options.num // 2, seed)
        tools = {
            "ditcli": open_ditcli(weights, "torch-fidelity"),
            "ditcli --resize pytorch-fid": open_ditcli(weights, "pytorch-fid"),
            "torch-fidelity 0.4.0": open_torch_fidelity(weights),
            "pytorch-fid 0.3.0": open_pytorch_fid(weights),
        }
        times: dict[str, list[float]] = {name: [] for name in tools}
        found: dict[str, list[np.ndarray]] = {}
        for _ in range(options.rounds):
            for name, (features, _) in tools.items():
                seconds, result = seconds_of(lambda features=features: [features(folder) for folder in folders])
                times[name].append(seconds)
                found[name] = result  # type: ignore[assignment]

    # Of full rank, as with 50,000 pictures: where some directions have no variance the roots are quicker to find.
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((2048, 2048)) * np.geomspace(1, 0.01, 2048)
    gaussians = [moments(rng.standard_normal((5000, 2048)) @ mixing + shift) for shift in (0, 0.1)]
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {options.rounds} rounds, medians\n")
    print("| tool | images/s | distance of the two folders | Frechet distance of 2048 dimensions |")
    print("|---|---|---|---|")
    for name, (_, frechet) in tools.items():
        rate = 2 * (options.num // 2) / statistics.median(times[name])
        first, second = (moments(features) for features in found[name])
        value = frechet_distance(*first, *second)
        runs = [seconds_of(lambda frechet=frechet: frechet(*gaussians[0], *gaussians[1])) for _ in range(3)]
        seconds = statistics.median(seconds for seconds, _ in runs)
        print(f"| {name} | {rate:.1f} | {value:.4f} | {seconds:.2f} s ({runs[0][1]:.4f}) |")
    for ours, theirs in (("ditcli", "torch-fidelity 0.4.0"), ("ditcli --resize pytorch-fid", "pytorch-fid 0.3.0")):
        x, y = (np.concatenate(found[name]) for name in (ours, theirs))
        error = np.abs(x - y).max() / np.abs(y).max()
        print(f"\nFeatures of {ours} and {theirs} differ by {error:.1e} of the largest feature at most.")


if __name__ == "__main__":
    main()
