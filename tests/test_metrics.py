"""Frechet and kernel distance, precision and recall, Inception Score, and the statistics below them.

Golden numbers are pytorch-fid's and torch-fidelity's; the rest are laws.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial.distance
import scipy.special
from PIL import Image, ImageDraw, ImageFilter
from safetensors.numpy import load_file

from ditcli.errors import DitcliError
from ditcli.evaluation.features import OnnxFeatures
from ditcli.evaluation.metrics import (
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
    squared_mmd,
)
from ditcli.evaluation.statistics import Accumulator, Statistics

GOLDEN = Path(__file__).parent / "golden"
EXPECTED = json.loads((GOLDEN / "fid_metrics.json").read_text())["expected"]


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return load_file(GOLDEN / "fid_metrics.safetensors")


def gather(*batches: np.ndarray) -> Statistics:
    accumulator = Accumulator(batches[0].shape[1])
    for batch in batches:
        accumulator.update(batch)
    return accumulator.statistics()


def distance(a: np.ndarray, b: np.ndarray) -> float:
    first, second = gather(a), gather(b)
    return frechet_distance(first.mu, first.sigma, second.mu, second.sigma)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def rotation(width: int) -> np.ndarray:
    return np.linalg.qr(normal(99, width, width))[0]


def test_frechet_distance_equals_the_references(golden: dict[str, np.ndarray]) -> None:
    value = distance(golden["in.features_1"], golden["in.features_2"])
    assert value == pytest.approx(EXPECTED["fid_pytorch_fid_float64"], rel=1e-10)
    assert value == pytest.approx(EXPECTED["fid_torch_fidelity_float64_features"], rel=1e-10)


def test_frechet_distance_of_fewer_pictures_than_features(golden: dict[str, np.ndarray]) -> None:
    value = distance(golden["in.features_1"][:40], golden["in.features_2"][:40])
    assert value == pytest.approx(EXPECTED["rank_deficient_first40_rows.fid_exact_psd"], rel=1e-10)
    assert value == pytest.approx(EXPECTED["rank_deficient_first40_rows.fid_pytorch_fid"], rel=1e-5)


@pytest.mark.parametrize("count", [2, 50, 400])
def test_frechet_distance_to_itself_is_zero(count: int) -> None:
    features = 5 + 10 * normal(0, count, 100)
    assert distance(features, features) < 1e-6


def test_frechet_distance_of_diagonal_gaussians_in_closed_form() -> None:
    rng = np.random.default_rng(0)
    mu1, mu2 = rng.standard_normal((2, 30))
    deviation1, deviation2 = rng.uniform(0, 3, (2, 30))
    expected = np.sum((mu1 - mu2) ** 2) + np.sum((deviation1 - deviation2) ** 2)
    value = frechet_distance(mu1, np.diag(deviation1**2), mu2, np.diag(deviation2**2))
    assert value == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_between_points_is_that_of_their_places() -> None:
    zero = np.zeros((3, 3))
    assert frechet_distance(np.zeros(3), zero, np.array([1.0, 2.0, 2.0]), zero) == pytest.approx(9, rel=1e-12)


def test_frechet_distance_equals_the_matrix_square_root() -> None:
    a, b = gather(normal(0, 80, 20) @ normal(1, 20, 20)), gather(1 + normal(2, 90, 20) @ normal(3, 20, 20))
    root = scipy.linalg.sqrtm(a.sigma @ b.sigma).real
    expected = np.sum((a.mu - b.mu) ** 2) + np.trace(a.sigma + b.sigma - 2 * root)
    assert frechet_distance(a.mu, a.sigma, b.mu, b.sigma) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("count", [20, 200])
def test_frechet_distance_is_symmetric_and_sees_no_rotation(count: int) -> None:
    a, b = normal(0, count, 40) @ normal(1, 40, 40), 0.3 + normal(2, 150, 40) @ normal(3, 40, 40)
    value = distance(a, b)
    assert value > 1
    assert distance(b, a) == pytest.approx(value, rel=1e-7)
    assert distance(a @ rotation(40), b @ rotation(40)) == pytest.approx(value, rel=1e-7)
    assert distance(2 * a, 2 * b) == pytest.approx(4 * value, rel=1e-7)


def test_statistics_equal_numpy() -> None:
    features = (1000 + normal(0, 700, 30)).astype(np.float32)
    statistics = gather(*np.array_split(features, 9))
    wide = features.astype(np.float64)
    np.testing.assert_allclose(statistics.mu, wide.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(statistics.sigma, np.cov(wide, rowvar=False), rtol=1e-10, atol=1e-12)
    assert statistics.count == 700


def test_order_and_cuts_and_merging_change_nothing() -> None:
    features = 3 + normal(0, 900, 20)
    once = gather(features)
    shuffled = features[np.random.default_rng(1).permutation(900)]
    parts = []
    for part in np.split(shuffled, [1, 400, 403]):
        parts.append(Accumulator(20))
        for batch in np.array_split(part, 3):
            parts[-1].update(batch)
    a, b, c, d = parts
    c.merge(d)  # a + (b + (c + d)), and into an empty one
    b.merge(c)
    a.merge(b)
    empty = Accumulator(20)
    empty.merge(a)
    empty.merge(Accumulator(20))
    for other in (gather(shuffled), gather(*np.split(shuffled, [1, 2, 500])), a.statistics(), empty.statistics()):
        assert other.count == 900
        np.testing.assert_allclose(other.mu, once.mu, rtol=1e-12)
        np.testing.assert_allclose(other.sigma, once.sigma, rtol=1e-9, atol=1e-12)


def test_wrong_features_are_refused_and_leave_no_trace() -> None:
    accumulator = Accumulator(4)
    accumulator.update(normal(0, 5, 4))
    bad = normal(1, 3, 4)
    bad[1, 2], bad[2, 0] = np.nan, np.inf
    with pytest.raises(DitcliError, match="2 of 3 pictures are NaN"):
        accumulator.update(bad)
    with pytest.raises(DitcliError, match="width 4"):
        accumulator.update(normal(0, 3, 5))
    with pytest.raises(DitcliError, match="width 4"):
        accumulator.merge(Accumulator(5))
    np.testing.assert_array_equal(accumulator.statistics().sigma, gather(normal(0, 5, 4)).sigma)


@pytest.mark.parametrize("count", [0, 1])
def test_one_picture_has_no_statistics(count: int) -> None:
    with pytest.raises(DitcliError, match="at least 2 pictures"):
        gather(normal(0, count, 4))


def test_statistics_come_back_from_their_file(tmp_path: Path) -> None:
    accumulator = Accumulator(6)
    accumulator.update(normal(0, 50, 6))
    statistics = accumulator.statistics("inception 6726825d")
    statistics.save(tmp_path / "real.npz")
    loaded = Statistics.load(tmp_path / "real.npz")
    np.testing.assert_array_equal(loaded.mu, statistics.mu)
    np.testing.assert_array_equal(loaded.sigma, statistics.sigma)
    assert (loaded.count, loaded.extractor) == (50, "inception 6726825d")
    assert [path.name for path in tmp_path.iterdir()] == ["real.npz"]


def test_statistics_of_other_tools_are_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "adm.npz", mu=np.zeros(3, np.float32), sigma=np.eye(3, dtype=np.float32), mu_s=np.zeros(7))
    loaded = Statistics.load(tmp_path / "adm.npz")
    assert loaded.mu.dtype == loaded.sigma.dtype == np.float64
    assert (loaded.count, loaded.extractor) == (None, None)


def test_files_that_are_no_statistics_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.npz"
    for content, sentence in (
        ({"arr_0": np.zeros((2, 8, 8, 3))}, "no `mu` and `sigma`"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, "no mean and covariance"),
        ({"mu": np.zeros(3), "sigma": np.full((3, 3), np.nan)}, "NaN"),
        ({"mu": np.array([None]), "sigma": np.eye(1)}, "cannot be read"),
    ):
        np.savez(path, **content)
        with pytest.raises(DitcliError, match=sentence):
            Statistics.load(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DitcliError, match="cannot be read"):
        Statistics.load(path)
    np.save(tmp_path / "array.npy", np.zeros(3))
    for name in ("array.npy", "missing.npz"):
        with pytest.raises(DitcliError, match="cannot be read"):
            Statistics.load(tmp_path / name)


def test_kernel_distance_equals_the_references(golden: dict[str, np.ndarray]) -> None:
    mean, deviation = kernel_distance(golden["in.features_1"], golden["in.features_2"], subset_size=50)
    assert mean == pytest.approx(EXPECTED["kid_mean_float64"], rel=1e-8)
    assert deviation == pytest.approx(EXPECTED["kid_std_float64"], rel=1e-8)


def test_squared_mmd_equals_the_references(golden: dict[str, np.ndarray]) -> None:
    x, y = (golden[f"in.features_{i}"].astype(np.float64) for i in (1, 2))
    assert squared_mmd(x, y) == pytest.approx(EXPECTED["kid_whole_set_float64"], rel=1e-8)
    rows = zip(golden["kid.indices_1"], golden["kid.indices_2"], strict=True)
    values = [squared_mmd(x[first], y[second]) for first, second in rows]
    np.testing.assert_allclose(values, golden["kid.mmd_per_subset_f64"], rtol=1e-8, atol=1e-12)


def test_kernel_distance_is_unbiased() -> None:
    values = [squared_mmd(x, y) for x, y in normal(0, 400, 2, 20, 5)]
    assert min(values) < 0 < max(values)
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(400)
    shifted = [squared_mmd(x, y + 0.5) for x, y in normal(1, 400, 2, 20, 5)]
    assert np.mean(shifted) > 10 * np.std(shifted) / np.sqrt(400)


def test_precision_and_recall_equal_the_references(golden: dict[str, np.ndarray]) -> None:
    fake, real = golden["in.features_1"], golden["in.features_2"]
    expected = EXPECTED["prc: generated=features_1, real=features_2"]
    precision, recall = precision_recall(real, fake)
    assert round(precision * 300) == round(expected["precision"] * 300)
    assert round(recall * 300) == round(expected["recall"] * 300)
    assert precision_recall(fake, real) == (recall, precision)


def test_precision_and_recall_equal_plain_distances() -> None:
    real, fake = normal(0, 60, 6), 0.4 + 1.2 * normal(1, 50, 6)
    between = scipy.spatial.distance.cdist(fake, real)
    for k in (1, 3, 5):
        real_radii, fake_radii = (np.sort(scipy.spatial.distance.cdist(x, x))[:, k] for x in (real, fake))
        precision = (between <= real_radii).any(axis=1).mean()
        recall = (fake_radii >= between.T).any(axis=1).mean()
        assert precision_recall(real, fake, k=k) == (precision, recall)


def test_precision_and_recall_of_copies_and_of_strangers() -> None:
    real = 100 + normal(0, 80, 16)
    assert precision_recall(real, real[::-1]) == (1, 1)
    # Five of each leave balls of radius 0, in which the copies still lie.
    assert precision_recall(np.tile(real, (5, 1)), np.repeat(real, 5, axis=0)) == (1, 1)
    assert precision_recall(real, real + 50) == (0, 0)


@pytest.mark.parametrize("metric", [kernel_distance, precision_recall])
def test_features_that_cannot_be_compared_are_refused(metric) -> None:
    with pytest.raises(DitcliError, match="one extractor"):
        metric(normal(0, 9, 4), normal(0, 9, 5))
    with pytest.raises(DitcliError, match="NaN"):
        metric(normal(0, 9, 4), np.full((9, 4), np.nan))


def test_too_few_pictures_are_refused() -> None:
    with pytest.raises(DitcliError, match="subsets of 1000 from 9 pictures"):
        kernel_distance(normal(0, 20, 4), normal(0, 9, 4))
    with pytest.raises(DitcliError, match="at least 4 pictures, not 3 fake"):
        precision_recall(normal(0, 9, 4), normal(0, 3, 4))
    with pytest.raises(DitcliError, match="at least 10 pictures"):
        inception_score(normal(0, 9, 4))
    with pytest.raises(DitcliError, match="width 3 and 4"):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(4), np.eye(4))


def test_inception_score_counts_classes() -> None:
    certain = 2000 * np.eye(8, dtype=np.float32)
    assert inception_score(np.tile(certain, (5, 1)), splits=1) == pytest.approx((8, 0))
    assert inception_score(np.tile(certain[:3], (5, 1)), splits=1) == pytest.approx((3, 0))
    assert inception_score(np.zeros((40, 8))) == pytest.approx((1, 0))


def test_inception_score_in_its_own_words() -> None:
    logits = 3 * normal(0, 200, 12)
    p = scipy.special.softmax(logits, axis=1)
    expected = np.exp(scipy.special.rel_entr(p, p.mean(axis=0)).sum(axis=1).mean())
    assert inception_score(logits, splits=1)[0] == pytest.approx(expected, rel=1e-12)
    mean, deviation = inception_score(logits)
    assert 1 < mean < expected  # a small part's own marginal is nearer to its pictures
    assert deviation > 0


def draw(seed: int) -> Image.Image:
    """A coloured shape or two on a coloured ground."""
    rng = np.random.default_rng(seed)
    picture = Image.new("RGB", (64, 64), tuple(rng.integers(0, 256, 3).tolist()))
    pen = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(2, 5))):
        (x0, x1), (y0, y1) = (sorted(rng.integers(0, 64, 2).tolist()) for _ in range(2))
        shape = pen.ellipse if rng.random() < 0.5 else pen.rectangle
        shape((x0, y0, x1, y1), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return picture


def test_distances_rise_with_blur_and_noise(shared: Path) -> None:
    extractor = OnnxFeatures(shared / "weights" / "efficientnet_lite0_features.onnx")
    drawn = [draw(seed) for seed in range(64)]
    real, other = extractor([np.asarray(picture) for picture in drawn[:32]]), drawn[32:]

    def blurred(radius: float) -> list[np.ndarray]:
        return [np.asarray(picture.filter(ImageFilter.GaussianBlur(radius))) for picture in other]

    def noisy(deviation: float) -> list[np.ndarray]:
        rng = np.random.default_rng(0)
        return [
            (np.asarray(picture) + rng.normal(0, deviation, (64, 64, 3))).clip(0, 255).astype(np.uint8)
            for picture in other
        ]

    # Noise beyond 20 grey levels looks all the same to this network.
    for worse in ([blurred(r) for r in (0, 1, 3)], [noisy(d) for d in (0, 3, 10)]):
        features = [extractor(pictures) for pictures in worse]
        frechet = [distance(real, fake) for fake in features]
        kernel = [kernel_distance(real, fake, num_subsets=1, subset_size=32)[0] for fake in features]
        for scores in (frechet, kernel):
            assert all(better < worse for better, worse in itertools.pairwise(scores)), scores
