"""Shorten rows after pooling: project wide ones to fewer columns, scale them to length 1."""

import hashlib
import threading
from collections.abc import Container, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featx.errors import BadValueError, UserError, count, first_line, log
from featx.model.build import SEED

MANY_COLUMNS = 16384

Floats = NDArray[np.float32]


class Projection:
    """A sparse random projection, which keeps the distances between rows nearly as they are.

    The matrix is that of scikit-learn's SparseRandomProjection with a fixed seed. Each row is multiplied on its own, in
    float64 and in the matrix's order, and then rounded: other rows, threads and BLAS change no bit.

    https://scikit-learn.org/stable/modules/random_projection.html#sparse-random-projection

    Args:
        width: Values per row.
        columns: Values per row of the result.

    Attributes:
        digest: SHA-256 of the matrix, which another version of scikit-learn might make differently.
    """

    def __init__(self, width: int, columns: int) -> None:
        transformer = import_projection()(columns, random_state=SEED).fit(np.zeros((1, width)))
        self._matrix = transformer.components_  # (columns, width) float64, in CSR
        kinds = {"indptr": "<i8", "indices": "<i8", "data": "<f8"}
        parts = [np.ascontiguousarray(getattr(self._matrix, name), kind) for name, kind in kinds.items()]
        self.digest = hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()

    def __call__(self, values: Floats) -> Floats:
        """Return the projections ``(B, columns) float32`` of rows ``(B, width) float32``."""
        with np.errstate(over="ignore", invalid="ignore"):  # infinite values are reported when the run ends
            return np.stack([(self._matrix @ row.astype(np.float64)).astype(np.float32) for row in values])


class Reduction:
    """What becomes of the rows of each layer, in any number of threads.

    Args:
        columns: Project rows that are wider to so many columns; None leaves all as they are.
        unit_length: Whether to divide each row by its length. Rows of zeros and rows with values that are not finite
            have none, and stay as they are.

    Attributes:
        widths: Values per row before the projection, of layers that were projected.
    """

    def __init__(self, columns: int | None, unit_length: bool) -> None:
        self.widths: dict[str, int] = {}
        self._columns = columns
        self._unit_length = unit_length
        self._seen: dict[str, int] = {}  # the width of each layer's first rows
        self._projections: dict[int, Projection] = {}  # by width
        self._lock = threading.Lock()

    def __call__(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return each layer's rows ``(B, D) float32`` shortened, on the CPU."""
        if self._columns is None and not self._unit_length:
            return rows
        return {layer: self._shorten(layer, values.cpu().numpy()) for layer, values in rows.items()}

    def identity(self, layer: str) -> dict[str, Any]:
        """Return what decides the values of a layer, once some of its rows have been shortened."""
        found: dict[str, Any] = {"normalize": True} if self._unit_length else {}
        if layer in self.widths:
            found["reduce"] = {"columns": self._columns, "matrix": self._projections[self.widths[layer]].digest}
        return found

    def _shorten(self, layer: str, values: Floats) -> Tensor:
        if projection := self._projection(layer, values.shape[1]):
            values = projection(values)
        return torch.from_numpy(to_unit_length(values) if self._unit_length else values)

    def _projection(self, layer: str, width: int) -> Projection | None:
        if self._columns is None:
            return None
        with self._lock:
            if width != (expected := self._seen.setdefault(layer, width)):
                raise UserError(
                    f"--model.reduce {self._columns}: {width} columns of {layer}, expected {expected} as before. The "
                    "number depends on the image's shape.\nCrop all images to one shape with --data.crop, or use a "
                    "layer after the pooling."
                )
            if width <= self._columns:
                return None
            if width not in self._projections:
                self._projections[width] = Projection(width, self._columns)
            self.widths[layer] = width
            return self._projections[width]


def check_columns(columns: int | None) -> None:
    """Raise UserError if rows cannot be projected to so many columns; None leaves them as they are."""
    if columns is None:
        return
    if columns < 1:
        raise BadValueError(f"--model.reduce {columns}: expected a whole number of at least 1, or null.")
    import_projection()


def warn_of_many_columns(rows: Mapping[str, Tensor], poolable: Container[str]) -> None:
    """Log a warning if rows ``(B, D) float32`` are wide; it names --model.pool for layers that can still be pooled."""
    if many := [layer for layer, values in rows.items() if values.shape[1] > MANY_COLUMNS]:
        sizes = ", ".join(f"{layer} has {count(rows[layer].shape[1], 'column')}" for layer in many)
        pool = "--model.pool avg keeps one per channel, " if any(layer in poolable for layer in many) else ""
        log.warning("%s: %s--model.reduce 1000 projects them to 1,000", sizes, pool)


def import_projection() -> Any:
    """Return scikit-learn's class; raise UserError if it is not installed."""
    try:
        from sklearn.random_projection import SparseRandomProjection
    except ImportError as err:
        raise UserError(
            f"--model.reduce: scikit-learn cannot be imported ({first_line(err)}).\n"
            "Install it: pip install 'featx[reduce]'"
        ) from err
    return SparseRandomProjection


def to_unit_length(values: Floats) -> Floats:
    """Return rows ``(B, D) float32`` of length 1; those of length 0, nan or infinity unchanged."""
    found = values.copy()
    for row in found:  # each on its own, so that the sum's order does not depend on the others
        length = np.sqrt(np.square(row, dtype=np.float64).sum())
        if 0 < length < np.inf:
            row[:] = row.astype(np.float64) / length
    return found
