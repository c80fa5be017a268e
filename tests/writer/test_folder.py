"""Whose rows and whose files: what a run takes from a folder, what it replaces there, and what it leaves alone."""

import json
import os
import threading
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import make_image
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from PIL import Image
from tiny import Tiny, run

import featx
from featx import FeatureExtractor, FeatureWriter, ImageFolderDataModule
from featx.cli import main
from featx.data import decode
from featx.data.sources import ImageTree
from featx.errors import BadValueError, UserError
from featx.results import load
from featx.run import prepare
from featx.writer import disk, journal, records
from featx.writer.disk import BusyError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Weighted(FeatureExtractor):
    """A Linear of other weights for each seed."""

    seed = 1

    def build_network(self):
        torch.manual_seed(self.seed)
        return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(12, 4))


class Other(Weighted):
    seed = 2

    @property
    def title(self):
        return "Weighted"


class Stop(Callback):
    """Ends a run after two batches."""

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 2:
            raise KeyError("stopped")


def trainer_of(*callbacks):
    return Trainer(accelerator="cpu", callbacks=list(callbacks), logger=False, enable_progress_bar=False,
                   enable_model_summary=False, enable_checkpointing=False)  # fmt: skip


def predict(photos, model, writer, *callbacks, **data):
    images = ImageFolderDataModule(str(photos), batch_size=8, num_workers=0, **data)
    trainer_of(*callbacks, writer).predict(model, datamodule=images, return_predictions=False)


def leave_unfinished(photos, out, model):
    with pytest.raises(KeyError, match="stopped"):
        predict(photos, model("2"), FeatureWriter(str(out)), Stop())
    assert list(out.glob(".featx/2/*.journal"))


def snapshot(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("unfinished", [True, False], ids=["unfinished", "finished"])
@pytest.mark.parametrize("other", [True, False], ids=["other weights", "the same run"])
def test_files_written_after_the_inspection_are_seen_under_the_lock(photos, tmp_path, unfinished, other):
    out = tmp_path / "out"
    model, data = Weighted("2"), ImageFolderDataModule(str(photos), batch_size=8, num_workers=0)
    writer = FeatureWriter(str(out))
    trainer = trainer_of(writer)
    assert prepare(trainer, model, data, writer)  # nothing is there by now
    between = Other if other else Weighted
    if unfinished:
        leave_unfinished(photos, out, between)
    else:
        predict(photos, between("2"), FeatureWriter(str(out)))
    before, how = snapshot(out), "started" if unfinished else "made"
    if other:
        with pytest.raises(BadValueError, match=rf"was {how} by another run(.|\n)*weights: "):
            trainer.predict(model, datamodule=data, return_predictions=False)
        assert snapshot(out) == before
    else:
        trainer.predict(model, datamodule=data, return_predictions=False)
        assert writer.computed == (37 - 16 if unfinished else 0) and writer.records["2"]["rows"] == 37
    clean = run(photos, tmp_path / "clean", model=Weighted)
    if not other:
        assert (out / "2.csv").read_bytes() == clean.files["2"][0].read_bytes()


def test_rows_without_run_json_are_never_used(photos, tmp_path):
    leave_unfinished(photos, tmp_path, Other)
    (tmp_path / ".featx" / "2" / "run.json").unlink()
    writer = run(photos, tmp_path, model=Weighted)
    assert writer.computed == 37
    assert np.array_equal(
        load(tmp_path / "2.csv")[1], load(run(photos, tmp_path / "c", model=Weighted).files["2"][0])[1]
    )


def test_a_writer_and_a_model_used_again_are_right(photos, three_photos, tmp_path):
    writer, model = FeatureWriter(str(tmp_path / "out")), Weighted("2")
    predict(photos, model, writer)
    assert len(writer.files["2"]) == 1 and writer.computed == 37
    with pytest.raises(BadValueError, match=r"was made by another run(.|\n)*crop: 224 -> 20"):
        predict(three_photos, model, writer, crop=20)
    writer.out_dir = str(tmp_path / "second")
    predict(three_photos, model, writer, crop=20)
    assert writer.records["2"]["rows"] == 3 == writer.computed and writer.records["2"]["identity"]["batch_size"] == 8
    assert writer.records["2"]["identity"]["preprocessing"]["crop"] == 20
    fresh = run(three_photos, tmp_path / "fresh", model=Weighted, data={"crop": 20})
    assert (tmp_path / "second" / "2.csv").read_bytes() == fresh.files["2"][0].read_bytes()
    writer.out_dir = str(tmp_path / "third")
    predict(photos, Other("2"), writer)  # another model
    fresh = run(photos, tmp_path / "other", model=Other)
    assert (tmp_path / "third" / "2.csv").read_bytes() == fresh.files["2"][0].read_bytes()
    assert writer.records["2"]["run"]["stages"]["network"] < 60


def test_a_data_module_used_again_lists_and_distributes_all_images_again(photos, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(20):
        make_image(i, (30, 30)).save(folder / f"{i:02}.png")
    data = ImageFolderDataModule(str(folder), batch_size=8, num_workers=0)
    first = FeatureWriter(str(tmp_path / "out"))
    trainer_of(first).predict(Weighted("2"), datamodule=data, return_predictions=False)
    make_image(20, (30, 30)).save(folder / "20.png")
    with pytest.raises(BadValueError, match="1 image added since that run began"):
        trainer_of(first).predict(Weighted("2"), datamodule=data, return_predictions=False)
    second = FeatureWriter(str(tmp_path / "second"))
    trainer_of(second).predict(Weighted("2"), datamodule=data, return_predictions=False)
    assert second.records["2"]["rows"] == 21
    trainer_of(second).predict(Weighted("2"), datamodule=data, return_predictions=False)  # nothing is left to do
    batches = trainer_of().predict(Weighted("2"), datamodule=data)  # no writer: nobody deals, so all of them
    assert sum(len(rows["2"]) for rows in batches) == 21


@pytest.mark.parametrize("finished", [False, True])
def test_images_in_another_order_are_refused(photos, tmp_path, finished):
    listed = tmp_path / "list.txt"
    names = ImageTree(str(photos)).names[:]
    listed.write_text("\n".join(names))
    stop = nullcontext() if finished else pytest.raises(KeyError, match="stopped")
    with stop:
        predict(photos, Weighted("2"), FeatureWriter(str(tmp_path)), *[Stop()][finished:], files=str(listed))
    listed.write_text("\n".join(reversed(names)))
    with pytest.raises(BadValueError, match="the order of the images changed since that run began"):
        predict(photos, Weighted("2"), FeatureWriter(str(tmp_path)), files=str(listed))


def test_weights_that_changed_between_two_runs_are_refused(photos, tmp_path):
    model = Weighted("2")
    predict(photos, model, FeatureWriter(str(tmp_path)))
    with torch.no_grad():
        model.network[2].bias += 1
    with pytest.raises(BadValueError, match=r"weights: "):
        predict(photos, model, FeatureWriter(str(tmp_path)))


def test_a_network_that_a_precision_converted_is_not_used_for_another_run(photos, tmp_path):
    model = Weighted("2")
    run(photos, tmp_path / "half", model=lambda layer: model, trainer_options={"precision": "bf16-true"})
    with pytest.raises(UserError, match=r"converted its network from torch.float32 to torch.bfloat16.\nCreate a new"):
        run(photos, tmp_path / "whole", model=lambda layer: model)


def test_invalid_file_names_in_a_record_are_refused_and_nothing_is_removed(photos, tmp_path):
    out, victim = tmp_path / "out", tmp_path / "victim" / "thesis.txt"
    victim.parent.mkdir()
    victim.write_text("years of work")
    run(photos, out)
    record = json.loads((out / "2.json").read_text())
    record["files"]["../victim/thesis.txt"] = {"sha256": "0" * 64, "bytes": 13}
    (out / "2.json").write_text(json.dumps(record))
    for overwrite in (False, True):
        with pytest.raises(BadValueError, match=r"2.json: not a record of featx: .*thesis.txt"):
            run(photos, out, overwrite=overwrite)
    assert victim.read_text() == "years of work"


def test_overwrite_removes_what_featx_wrote_and_nothing_else(photos, tmp_path):
    run(photos, tmp_path, shard_rows=8)
    own = {tmp_path / "2" / "2024-notes.txt", tmp_path / "2" / "007.jpg", tmp_path / ".featx" / "2" / "x.journal",
           tmp_path / ".featx" / "2" / "thesis.txt", tmp_path / "2" / "notes.csv"}  # fmt: skip
    for path in own:
        path.write_text("mine")
    assert run(photos, tmp_path, shard_rows=8).computed == 0
    run(photos, tmp_path, shard_rows=16, overwrite=True)
    assert len(list((tmp_path / "2").glob("0*.csv"))) == 3
    run(photos, tmp_path, overwrite=True)
    assert all(path.read_text() == "mine" for path in own) and not list((tmp_path / "2").glob("0*.csv"))


def test_a_users_own_errors_csv_is_not_replaced(photos, tmp_path):
    run(photos, tmp_path)
    (tmp_path / "2.errors.csv").write_text("mine")
    for options in ({"format": ["csv", "npy"]}, {"overwrite": True}):
        with pytest.raises(BadValueError, match=r"2.errors.csv: exists, and no record says that featx wrote it"):
            run(photos, tmp_path, **options)
    assert (tmp_path / "2.errors.csv").read_text() == "mine"


def test_a_key_that_is_added_to_the_identity_changes_no_digest(photos, monkeypatch):
    images = ImageTree(str(photos))
    old = {"network": "alexnet", "value_range": None, "revisions": {"pass": 1}, "versions": {"torch": "2.6"}}
    before = records.digest(old, images)
    monkeypatch.setitem(records.ADDED, "bands", None)
    monkeypatch.setitem(records.ADDED, "revisions.bands", 1)
    new = old | {"bands": None, "revisions": {"pass": 1, "bands": 1}}
    assert records.digest(new, images) == before and records.differences(old, new) == []
    assert records.digest(new | {"bands": [4, 3, 2]}, images) != before
    assert records.differences(old, new | {"bands": [4, 3, 2]}) == ["bands: null -> [4, 3, 2]"]


def test_rows_of_images_that_an_earlier_version_padded_are_continued_with_padding_alone(photos, tmp_path):
    run(photos, tmp_path, data={"resize": 200, "pad": True})
    record = json.loads((tmp_path / "2.json").read_text())
    del record["identity"]["preprocessing"]["pad"]  # which was not an option, and was done
    (tmp_path / "2.json").write_text(json.dumps(record))
    assert run(photos, tmp_path, data={"resize": 200, "pad": True}).computed == 0
    record["identity"]["preprocessing"]["resize"] = None
    (tmp_path / "2.json").write_text(json.dumps(record))
    with pytest.raises(
        BadValueError, match=r"was made by another run. Differences:\n  preprocessing.pad: true -> false"
    ):
        run(photos, tmp_path, data={"resize": None})


def test_images_of_one_colour_are_counted_once_in_a_run_that_was_ended_and_repaired(tmp_path, caplog):
    (tmp_path / "photos").mkdir()
    for i in range(20):
        image = Image.new("RGB", (30, 30), (i, 0, 0)) if i in (3, 9, 18) else make_image(i, (30, 30))
        image.save(tmp_path / "photos" / f"{i:02}.png")
    (tmp_path / "photos" / "10.png").write_bytes(b"broken")
    with pytest.raises(KeyError, match="stopped"):
        predict(tmp_path / "photos", Weighted("1"), FeatureWriter(str(tmp_path)), Stop())
    assert "one single colour" not in caplog.text
    record = run(tmp_path / "photos", tmp_path, layer="1", model=Weighted).records["1"]
    assert record["remarks"] == {"one_colour": {"images": 3, "first": "03.png"}} and record["errors"] == 1
    assert caplog.text.count("3 images of one single colour") == caplog.text.count("(03.png, …)") == 1
    Image.new("RGB", (30, 30)).save(tmp_path / "photos" / "10.png")
    record = run(tmp_path / "photos", tmp_path, layer="1", model=Weighted).records["1"]
    assert record["remarks"] == {"one_colour": {"images": 4, "first": "03.png"}} and record["errors"] == 0


def test_a_crash_while_files_are_removed_leaves_none_without_a_record(photos, tmp_path, monkeypatch):
    run(photos, tmp_path / "made", format=["csv", "npy"])
    remove, removed = disk.remove, []

    def crash(path):
        if len(removed) == 2:
            raise KeyError("crashed")
        removed.append(path)
        remove(path)

    monkeypatch.setattr(disk, "remove", crash)
    with pytest.raises(KeyError, match="crashed"):
        run(photos, tmp_path / "made", format=["csv", "npy"], header=True, overwrite=True)
    monkeypatch.undo()
    assert (tmp_path / "made" / "2.json").exists()
    again = run(photos, tmp_path / "made", format=["csv", "npy"], header=True, overwrite=True)
    assert again.records["2"]["rows"] == 37


def test_a_new_reader_affects_only_images_of_its_kind(tmp_path, monkeypatch):
    for folder, suffix, format in (("jpegs", "jpg", "JPEG"), ("pngs", "png", "PNG"), ("misnamed", "jpg", "PNG")):
        (tmp_path / folder).mkdir()
        for i in range(20):
            make_image(i, (30, 30)).save(tmp_path / folder / f"{i:02}.{suffix}", format)
        run(tmp_path / folder, tmp_path / f"{folder}-made", model=Weighted)
        leave_unfinished(tmp_path / folder, tmp_path / f"{folder}-begun", Weighted)
    monkeypatch.setitem(decode.READERS, "PNG", 2)
    assert run(tmp_path / "jpegs", tmp_path / "jpegs-made", model=Weighted).computed == 0
    assert run(tmp_path / "jpegs", tmp_path / "jpegs-begun", model=Weighted).computed == 4
    for folder in ("pngs", "misnamed"):  # by what they hold, not by their names
        with pytest.raises(BadValueError, match=r"was made by another run. Differences:\n  readers.PNG: 1 -> 2"):
            run(tmp_path / folder, tmp_path / f"{folder}-made", model=Weighted)
        with pytest.raises(BadValueError, match=r"was started by another run. Differences:\n  readers.PNG: 1 -> 2"):
            run(tmp_path / folder, tmp_path / f"{folder}-begun", model=Weighted)


def test_an_unknown_format_of_a_run_is_refused(photos, tmp_path):
    leave_unfinished(photos, tmp_path, Weighted)
    path = tmp_path / ".featx" / "2" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": journal.FORMAT + 1}))
    with pytest.raises(BadValueError, match=rf"run.json: format {journal.FORMAT + 1} is from a newer featx"):
        run(photos, tmp_path, model=Weighted)


def test_a_refused_run_releases_the_folder_at_once(photos, tmp_path):
    run(photos, tmp_path, model=Weighted)
    with pytest.raises(ValueError, match="made by another run") as refused:
        featx.extract(photos, "2", model=Other, out_dir=tmp_path, batch_size=8, num_workers=0)
    assert refused.value.__traceback__ is not None  # the exception is kept, and what it refers to
    assert run(photos, tmp_path, model=Weighted).computed == 0
    line = ["predict", "--data.dir", str(photos), "--writer.out_dir", str(tmp_path), "--model.arch", "squeezenet1_0",
            "--model.weights", "random", "--model.layer", "features.0"]  # fmt: skip
    for words in ("true", "false"):
        assert main([*line, "--model.pool", "avg", "--writer.dry_run", words]) == 0
        assert (run(photos, tmp_path, model=Weighted).computed) == 0


def test_a_second_run_of_the_same_process_is_refused_and_the_first_unharmed(photos, tmp_path):
    refused = []

    class Second(Callback):
        def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            def second():
                try:
                    run(photos, tmp_path, model=Weighted)
                except BusyError as err:
                    refused.append(err)

            thread = threading.Thread(target=second)
            thread.start()
            thread.join()

    predict(photos, Weighted("2"), FeatureWriter(str(tmp_path)), Second())
    assert len(refused) == 5 and len(load(tmp_path / "2.csv")[0]) == 37


def test_a_users_callback_may_have_its_own_stages(photos, tmp_path):
    class Mine(Callback):
        stages = {"warm-up": "done"}  # noqa: RUF012

    writer = FeatureWriter(str(tmp_path))
    predict(photos, Weighted("2"), writer, Mine())
    assert sorted(writer.records["2"]["run"]["stages"]) == ["decode", "disk", "network", "resize", "text", "wait"]


def test_the_versions_of_the_networks_packages_are_in_the_identity(photos, tmp_path):
    pytest.importorskip("timm")
    assert main(["predict", "--data.dir", str(photos), "--writer.out_dir", str(tmp_path), "--model.arch",
                 "timm/test_resnet.r160_in1k", "--model.weights", "random", "--model.layer", "fc"]) == 0  # fmt: skip
    versions = featx.record(tmp_path / "fc.csv")["identity"]["versions"]
    assert "timm" in versions and "featx" not in versions
    assert "timm" not in run(photos, tmp_path / "own").records["2"]["identity"]["versions"]


def test_links_named_like_parts_are_not_followed(photos, tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "out" / ".featx" / "2").mkdir(parents=True)
    (tmp_path / "out" / ".featx" / "2" / "000001-00000.csv").symlink_to(tmp_path / "victim")
    run(photos, tmp_path / "out")
    assert (tmp_path / "victim").read_text() == "mine" and not (tmp_path / "out" / "2.csv").is_symlink()
    os.symlink(tmp_path / "victim", tmp_path / "out" / "1.csv")
    with pytest.raises(BadValueError, match=r"1.csv: exists, and no record"):
        run(photos, tmp_path / "out", layer="1", model=Tiny, overwrite=True)
