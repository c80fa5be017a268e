"""Notes go to what stderr is by then; messages name options on the command line and parameters in Python."""

import io
import sys

import pytest

from featx.cli import main
from featx.data.module import ImageFolderDataModule
from featx.errors import UserError, log, rank


def test_notes_go_to_what_stderr_is_by_then(monkeypatch):
    told = io.StringIO()
    monkeypatch.setattr(sys, "stderr", told)
    assert main(["nonsense"]) == 2
    assert "nonsense: no such command" in told.getvalue()
    told.close()
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    log.info("still here")
    assert sys.stderr.getvalue() == "still here\n"


def test_a_message_names_the_parameter_in_python_and_the_option_on_the_command_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(UserError, "on_command_line", False)
    with pytest.raises(UserError) as err:
        ImageFolderDataModule(str(tmp_path), batch_size=0)
    assert str(err.value) == "batch_size=0: expected a whole number of at least 1."
    with pytest.raises(UserError, match=r"^interpolation=box: expected .* or bicubic with decoder turbo\.\ndecoder ex"):
        ImageFolderDataModule(str(tmp_path), interpolation="box", decoder="turbo")
    assert main(["predict", "--data.dir", str(tmp_path), "--data.batch_size", "0"]) == 2
    assert "--data.batch_size 0: expected a whole number of at least 1." in capsys.readouterr().err


def test_a_torchvision_for_another_torch_is_reported_with_what_to_install(monkeypatch, capsys):
    def fail(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("featx.cli.import_fast", fail)
    assert main(["predict"]) == 2
    words = capsys.readouterr().err
    assert "do not fit together: operator torchvision::nms does not exist\nInstall both from the same place" in words


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, 0),
        ({"RANK": "3", "LOCAL_RANK": "1", "NODE_RANK": "1"}, 3),  # torchrun
        ({"SLURM_PROCID": "2", "LOCAL_RANK": "0"}, 2),
        ({"NODE_RANK": "1"}, 1),  # Lightning's launcher on a second machine
        ({"NODE_RANK": "1", "LOCAL_RANK": "0"}, 1),
        ({"NODE_RANK": "0", "LOCAL_RANK": "1"}, 1),
    ],
)
def test_one_process_of_all_machines_has_rank_0(monkeypatch, variables, expected):
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert rank() == expected
