"""Distances between two sets of features, in float64 and numpy: Frechet, kernel, precision and recall, Inception Score.

The numbers are those of torch-fidelity 0.4.0 and pytorch-fid 0.3.0, random subsets included.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ditcli.errors import DitcliError

SEED = 2020  # torch-fidelity's, for the subsets of KID and the shuffle of the Inception Score


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Squared Frechet distance of two Gaussians, with means (D,) and covariances (D, D) (arXiv 1706.08500, eq. 6).

    The trace of (sigma1 sigma2)^(1/2) is the sum of the roots of the eigenvalues of A^T sigma2 A, where A A^T = sigma1:
    a symmetric matrix, so no matrix square root and no complex numbers.
    """
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape:
        raise DitcliError(f"features of width {len(mu1)} and {len(mu2)} cannot be compared: use one extractor.")
    mu1, sigma1, mu2, sigma2 = (np.asarray(x, np.float64) for x in (mu1, sigma1, mu2, sigma2))
    root = factor(sigma1)
    eigenvalues = np.linalg.eigvalsh(root.T @ (sigma2 @ root)).clip(min=0)
    distance = np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2 * np.sqrt(eigenvalues).sum()
    return max(float(distance), 0.0)


def factor(sigma: np.ndarray) -> np.ndarray:
    """A (D, R) with A A^T = sigma, where R is the rank: fewer pictures than D leave directions without variance."""
    smallest = len(sigma) * np.finfo(np.float64).eps
    try:
        lower = np.linalg.cholesky(sigma)  # six times as fast as the eigenvectors
        pivots = np.diagonal(lower) ** 2
        if pivots.min() > smallest * pivots.max():
            return lower
    except np.linalg.LinAlgError:
        pass
    variances, axes = np.linalg.eigh(sigma)
    kept = variances > smallest * variances[-1]
    return axes[:, kept] * np.sqrt(variances[kept])


def kernel_distance(
    features1: np.ndarray, features2: np.ndarray, *, num_subsets: int = 100, subset_size: int = 1000, seed: int = SEED
) -> tuple[float, float]:
    """Mean and deviation, over random subsets, of the unbiased squared MMD with the kernel (x.y / D + 1)^3.

    In Inception features this is KID (arXiv 1801.01401). Features are (N, D), with N at least `subset_size`.
    """
    check_features(features1, features2)
    fewest = min(len(features1), len(features2))
    if subset_size < 2 or subset_size > fewest:
        raise DitcliError(
            f"the kernel distance cannot draw subsets of {subset_size} from {fewest} pictures: "
            f"the size must be 2 to {fewest}."
        )
    rng = np.random.RandomState(seed)
    distances = np.empty(num_subsets)
    for i in range(num_subsets):
        rows1 = rng.choice(len(features1), subset_size, replace=False)
        rows2 = rng.choice(len(features2), subset_size, replace=False)
        distances[i] = squared_mmd(features1[rows1].astype(np.float64), features2[rows2].astype(np.float64))
    return float(distances.mean()), float(distances.std())


def squared_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased estimate from float64 (M, D) and (M, D); it may be below 0."""
    m, width = x.shape

    def kernel_sum(dots: np.ndarray) -> float:
        dots = dots / width + 1
        return float(np.vdot(dots * dots, dots))

    # A point's kernel with itself says nothing of the distance: the unbiased estimate leaves the diagonals out.
    diagonals = kernel_sum(np.square(x).sum(axis=1)) + kernel_sum(np.square(y).sum(axis=1))
    within = kernel_sum(x @ x.T) + kernel_sum(y @ y.T) - diagonals
    return within / (m * (m - 1)) - 2 * kernel_sum(x @ y.T) / m**2


def precision_recall(real: np.ndarray, fake: np.ndarray, *, k: int = 3) -> tuple[float, float]:
    """Share of fakes within the real pictures' manifold, and of reals within the fakes' (arXiv 1904.06991).

    The manifold is the union of the balls around the points that reach to their k-th nearest neighbour. Exact, in
    blocks of rows: memory stays at a few hundred MB.
    """
    check_features(real, fake)
    for side, features in ("real", real), ("fake", fake):
        if len(features) <= k:
            raise DitcliError(
                f"precision and recall with k = {k} need at least {k + 1} pictures, not {len(features)} {side}."
            )
    centre = real.mean(axis=0, dtype=np.float64)  # distances stay, and lose less to rounding
    real, fake = real - centre, fake - centre
    radii_real, radii_fake = (
        np.concatenate([np.partition(block, k, axis=1)[:, k] for _, block in squared_distances(x, x)])
        for x in (real, fake)
    )
    precise = 0
    recalled = np.zeros(len(real), bool)
    for rows, block in squared_distances(fake, real):
        precise += int((block <= radii_real).any(axis=1).sum())
        recalled |= (block <= radii_fake[rows, None]).any(axis=0)
    return precise / len(fake), float(recalled.mean())


def inception_score(logits: np.ndarray, *, splits: int = 10, seed: int = SEED) -> tuple[float, float]:
    """Mean and deviation over `splits` parts of exp E KL(p(class | picture) || p(class)) (arXiv 1606.03498).

    `logits` are (N, classes), shuffled by `seed` first: pictures often come sorted by class, and then a part is not
    like the whole.
    """
    if len(logits) < splits:
        raise DitcliError(
            f"the Inception Score needs at least {splits} pictures, one for each part, not {len(logits)}."
        )
    logits = logits[np.random.RandomState(seed).permutation(len(logits))].astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    scores = []
    for part in range(splits):
        rows = log_p[part * len(log_p) // splits : (part + 1) * len(log_p) // splits]
        p = np.exp(rows)
        marginal = p.mean(axis=0)
        log_marginal = np.log(marginal, where=marginal > 0, out=np.zeros_like(marginal))
        scores.append(np.exp((p * (rows - log_marginal)).sum(axis=1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def check_features(features1: np.ndarray, features2: np.ndarray) -> None:
    """DitcliError unless both are finite (N, D) of one width D."""
    if features1.ndim != 2 or features2.ndim != 2 or features1.shape[1] != features2.shape[1]:
        raise DitcliError(
            f"features of shapes {features1.shape} and {features2.shape} cannot be compared: use one extractor."
        )
    if not (np.isfinite(features1).all() and np.isfinite(features2).all()):
        raise DitcliError("some features are NaN or infinite: look at the pictures and at the extractor's weights.")


def squared_distances(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Squared distances between the rows of x and all of y, float64, as (slice of x, (rows, len(y))) blocks."""
    norms_x, norms_y = np.square(x).sum(axis=1), np.square(y).sum(axis=1)
    num_rows = max(1, 2**24 // len(y))
    for start in range(0, len(x), num_rows):
        rows = slice(start, start + num_rows)
        norms = norms_x[rows, None] + norms_y
        distances = norms - 2 * (x[rows] @ y.T)
        # Equal points have distance 0, not the rounding of three sums: else copies would miss each other's balls.
        distances[distances < 1e-13 * norms] = 0
        yield rows, distances
