"""Rows as points: which are nearest to which, and how they lie in a plane."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

Floats = NDArray[np.float32]
Indices = NDArray[np.intp]

NEAREST = 10
DIRECTIONS = 50  # principal components, on which t-SNE and k-means work
BLOCK = 30_000_000  # distances in memory at once


def nearest(values: Floats) -> tuple[Indices, Floats]:
    """Return for each row the nearest others and their Euclidean distances, the nearest first.

    Every pair is looked at. Candidates come from squared lengths and products, whose difference is inexact where rows
    are alike: six more than asked are taken, and their distances computed from the values themselves. Of scikit-learn's
    NearestNeighbors, brute has that inexactness in its distances, and the trees take 45 times as long.

    Args:
        values: ``(N, D) float32``.

    Returns:
        ``(N, K) int`` and ``(N, K) float32``, K the lesser of ``NEAREST`` and N - 1.
    """
    total = len(values)
    most, candidates = min(NEAREST, total - 1), min(NEAREST + 6, total - 1)
    near, distances = np.zeros((total, most), np.intp), np.zeros((total, most), np.float32)
    if not most:
        return near, distances
    centred = values - values.mean(axis=0)
    squares = np.einsum("nd,nd->n", centred, centred)
    step = max(1, BLOCK // total)
    for start in tqdm(range(0, total, step), "nearest", leave=False, disable=None if total > 5_000 else True):
        rows = np.arange(start, min(start + step, total))
        squared = squares - 2 * (centred[rows] @ centred.T)  # (rows, N), but for each row's own square
        squared[rows - start, rows] = np.inf
        found = np.sort(np.argpartition(squared, candidates - 1)[:, :candidates])
        exact = np.stack([np.linalg.norm(values[found[row - start]] - values[row], axis=1) for row in rows])
        order = np.argsort(exact, kind="stable")[:, :most]
        near[rows] = np.take_along_axis(found, order, 1)
        distances[rows] = np.take_along_axis(exact, order, 1)
    return near, distances


def usual_distance(values: Floats) -> float:
    """Return the median distance of two rows, from some 500 of them."""
    from sklearn.metrics.pairwise import euclidean_distances

    some = values[:: -(-len(values) // 500)].astype(np.float64)
    pairs = euclidean_distances(some)[np.triu_indices(len(some), 1)]
    return float(np.median(pairs)) if pairs.size else 0.0


def find_twins(near: Indices, distances: Floats, limit: float) -> dict[tuple[int, ...], float]:
    """Return the pairs of rows that are nearer than a limit with their distances, the nearest first."""
    found = zip(*np.nonzero(distances <= limit), strict=True)
    pairs = {tuple(sorted((int(row), int(near[row, at])))): float(distances[row, at]) for row, at in found}
    return dict(sorted(pairs.items(), key=lambda pair: (pair[1], pair[0])))


def flatten(values: Floats, kind: str) -> tuple[Floats, Floats, str]:
    """Put rows into the plane, near ones near each other.

    Args:
        values: ``(N, D) float32``.
        kind: ``pca``, or ``tsne`` after https://www.jmlr.org/papers/v9/vandermaaten08a.html.

    Returns:
        The points, ``(N, 2) float32``; the rows' first principal components, ``(N, up to 50) float32``; and in words
        how points were made.
    """
    if len(values) < 3:
        points = np.zeros((len(values), 2), np.float32)
        points[:, 0] = np.arange(len(values))
        return points, points, "side by side"
    from sklearn.decomposition import PCA

    model = PCA(min(DIRECTIONS, *values.shape), random_state=0)
    with np.errstate(invalid="ignore"):  # rows that are all the same have no variance to divide by
        parts = model.fit_transform(values).astype(np.float32)
    if parts.shape[1] < 2:
        parts = np.pad(parts, ((0, 0), (0, 1)))
    if kind == "pca":
        share = float(np.nan_to_num(model.explained_variance_ratio_[:2].sum()))
        words = f"PCA: the two directions in which the rows differ most, {share:.0%} of the variance"
        return parts[:, :2], parts, words
    from sklearn.manifold import TSNE

    model = TSNE(init="pca", perplexity=min(30, (len(values) - 1) / 3), random_state=0)
    words = "t-SNE: neighbours are close together; distances between groups mean little"
    return model.fit_transform(parts), parts, words


def choose(parts: Floats, wanted: set[int], most: int) -> Sequence[int]:
    """Return the wanted rows, and for each of as many clusters as there is room for the one nearest to its middle."""
    from sklearn.cluster import MiniBatchKMeans

    clusters = max(1, most - len(wanted))
    model = MiniBatchKMeans(clusters, random_state=0, n_init=1, batch_size=4 * clusters).fit(parts)
    from_middle = np.linalg.norm(parts - model.cluster_centers_[model.labels_], axis=1)
    order = np.lexsort((from_middle, model.labels_))
    first = np.unique(model.labels_[order], return_index=True)[1]
    return sorted({*wanted, *map(int, order[first])})
