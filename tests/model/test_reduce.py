"""Rows become shorter: a projection that is the same everywhere, and rows of length 1."""

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import loader
from sklearn.random_projection import SparseRandomProjection
from tiny import Tiny, run

import featx
from featx import FeatureExtractor
from featx.errors import BadValueError, UserError
from featx.model.reduce import Projection, Reduction, to_unit_length

ROWS = np.random.default_rng(0).standard_normal((7, 3000)).astype(np.float32)


@pytest.fixture(scope="module")
def projection():
    return Projection(3000, 50)


def test_a_projection_is_scikit_learns(projection):
    expected = SparseRandomProjection(50, random_state=0).fit(ROWS.astype(np.float64)).transform(ROWS)
    found = projection(ROWS)
    assert found.dtype == np.float32 and np.allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_distances_hardly_change(projection):
    scaled = ROWS * np.arange(1, 8, dtype=np.float32)[:, None]
    before, after = (np.linalg.norm(values[:, None] - values, axis=2) for values in (scaled, projection(scaled)))
    assert np.corrcoef(before.ravel(), after.ravel())[0, 1] > 0.95
    assert np.allclose(before, after, rtol=0.4)


def test_neither_other_rows_nor_threads_change_a_bit(projection):
    whole = projection(ROWS)
    with ThreadPoolExecutor(4) as threads:
        parts = list(threads.map(lambda i: Projection(3000, 50)(ROWS[i : i + 1]), range(len(ROWS))))
    assert np.concatenate(parts).tobytes() == whole.tobytes()
    assert Projection(3000, 50).digest == projection.digest != Projection(3001, 50).digest


def test_values_that_are_not_finite_reach_only_the_columns_that_contain_them(projection):
    row = ROWS[:1].copy()
    row[0, 5] = np.nan
    bad = np.isnan(projection(row)[0])
    assert 0 < bad.sum() < 25 and np.array_equal(projection(row)[0, ~bad], projection(ROWS[:1])[0, ~bad])
    row[:] = np.finfo(np.float32).max
    assert np.isinf(projection(row)).any(), "and no warning"


def test_only_wider_layers_are_projected():
    reduction = Reduction(50, False)
    rows = {"wide": torch.from_numpy(ROWS), "as wide": torch.from_numpy(ROWS[:, :50])}
    found = reduction(rows)
    assert found["wide"].shape == (7, 50) and torch.equal(found["as wide"], rows["as wide"])
    assert reduction.widths == {"wide": 3000} and reduction.identity("as wide") == {}
    assert reduction.identity("wide") == {"reduce": {"columns": 50, "matrix": Projection(3000, 50).digest}}
    with pytest.raises(UserError, match=r"--model.reduce 50: 2999 columns of wide, expected 3000 as before"):
        reduction({"wide": torch.from_numpy(ROWS[:, 1:])})


def test_rows_have_length_1_unless_they_have_no_length():
    rows = ROWS[:6].copy()
    rows[0], rows[1, 3], rows[2, 3], rows[3], rows[4] = 0, np.nan, np.inf, 1e-40, 3e38
    found = to_unit_length(rows)
    assert np.array_equal(found[:3], rows[:3], equal_nan=True)
    assert np.allclose(np.linalg.norm(found[3:].astype(np.float64), axis=1), 1, rtol=1e-6, atol=0)
    assert np.allclose(found[5] * np.linalg.norm(rows[5]), rows[5], rtol=1e-5)


def extract(photos, batch_size=16, **options):
    model = FeatureExtractor(arch="squeezenet1_1", weights="random", **options)
    model.configure_model()
    data, batches = loader(photos, batch_size=batch_size, num_workers=0, crop=64)
    model.try_out(data.first_batch(model.preprocessing))
    outputs = [model.predict_step(batch) for batch in batches]
    return model, {layer: torch.cat([output[layer] for output in outputs]).numpy() for layer in model.layers}


def test_rows_are_those_of_the_layer_pooled_projected_and_scaled(three_photos):
    layers = ["features.2", "classifier"]
    plain, whole = extract(three_photos, layer=layers)
    model, found = extract(three_photos, layer=layers, reduce=1000, normalize=True)
    expected = to_unit_length(Projection(whole["features.2"].shape[1], 1000)(whole["features.2"]))
    assert found["features.2"].tobytes() == expected.tobytes()
    assert found["classifier"].tobytes() == to_unit_length(whole["classifier"]).tobytes()  # it has 1,000 columns
    same = plain.identity("classifier", "32-true")
    assert model.identity("classifier", "32-true") == same | {"normalize": True}
    assert "reduce" not in same and "normalize" not in same
    assert model.identity("features.2", "32-true")["reduce"]["columns"] == 1000


def test_rows_are_reduced_without_a_trial_too(three_photos):
    model = FeatureExtractor("features.2", arch="squeezenet1_1", weights="random", reduce=10)
    model.configure_model()
    _, batches = loader(three_photos, num_workers=0, crop=64)
    assert next(iter(model.predict_step(batch) for batch in batches))["features.2"].shape == (3, 10)


def test_what_cannot_be_reduced_is_refused_before_anything_is_read(monkeypatch):
    for columns in (0, -5):
        with pytest.raises(BadValueError, match=f"--model.reduce {columns}: expected a whole number of at least 1"):
            FeatureExtractor(reduce=columns).check()
    monkeypatch.setitem(sys.modules, "sklearn.random_projection", None)
    with pytest.raises(UserError, match=r"--model.reduce.*: scikit-learn cannot be imported.*\n.*featx\[reduce\]"):
        FeatureExtractor(reduce=1000).check()
    FeatureExtractor(normalize=True).check()


class Dark(Tiny):
    """Rows of zeros for the first and the last images."""

    def build_network(self):
        return torch.nn.Sequential(*super().build_network(), torch.nn.Threshold(0.5, 0), torch.nn.ReLU())


def test_rows_of_zeros_are_counted_and_reported_by_layer(photos, tmp_path, caplog):
    plain = run(photos, tmp_path / "plain", layer=["2", "4"], model=Dark).records
    assert not caplog.text.count("zeros") and plain["4"]["remarks"] == {}
    _, values = featx.load(tmp_path / "plain" / "4.csv")
    zeros = int((~values.any(axis=1)).sum())
    assert 0 < zeros < len(values)

    class Unit(Dark):
        def __init__(self, layer):
            super().__init__(layer, normalize=True)

    records = run(photos, tmp_path / "unit", layer=["2", "4"], model=Unit).records
    assert records["2"]["remarks"] == {} and records["4"]["remarks"]["zero_row"]["images"] == zeros
    assert f"4: {zeros} images with a row of zeros, which cannot have length 1 (" in caplog.text
    _, found = featx.load(tmp_path / "unit" / "4.csv")
    assert np.array_equal(found, to_unit_length(values))
    caplog.clear()
    _, rows = featx.extract(photos, "4", model=Dark, normalize=True, num_workers=0, batch_size=8)
    assert np.array_equal(rows, found) and caplog.text.count(f"4: {zeros} images with a row of zeros") == 1
    with pytest.raises(BadValueError, match=r"Differences:\n  network: Unit -> Dark\n  normalize: true -> f"):
        run(photos, tmp_path / "unit", layer="4", model=Dark)
