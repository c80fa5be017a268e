"""The start without ballast: what is not imported, and that the real modules are there for whoever needs them."""

import subprocess
import sys

from conftest import ENV, REPO, launch

from featx.process import start
from featx.process.start import STAND_INS


def python(code, cwd=None):
    """Run code where torch is imported, with stand-ins, and nothing that they stand for is; return what it prints."""
    process = launch(code=code, cwd=cwd)
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out.splitlines()


def test_a_run_imports_none_of_the_ballast(photos, tmp_path):
    code = "import sys, featx.cli as cli; assert cli.main(sys.argv[1:]) == 0; print(*sys.modules)"
    options = ["--data.dir", photos, "--model.arch", "squeezenet1_1", "--model.weights", "random", "--model.layer"]
    line = [sys.executable, "-c", code, "predict", *options, "classifier", "--data.num_workers", "0"]
    env = ENV | {"PYTHONPATH": str(REPO)}
    done = subprocess.run(list(map(str, line)), cwd=tmp_path, env=env, capture_output=True, text=True)
    told = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert "37 rows" in told[0]
    assert {"lightning", "torchvision"} <= set(told[-1].split()) and not set(STAND_INS) & set(told[-1].split())


def test_behind_them_the_real_modules_are_imported():
    code = """
from featx.process.start import stand_ins
with stand_ins():
    import featx.commands.predict
import torch, torch._dynamo, torchvision
from torchvision.ops import roi_align
print(torch._dynamo.__file__, torch._dynamo.OptimizedModule.__module__)
print(torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item())
print(torchvision.ops.roi_align(torch.ones(1, 1, 4, 4), torch.tensor([[0, 0, 0, 2, 2.0]]), 1).item())
"""
    file, module, *values = " ".join(python(code)).split()
    assert file.endswith("__init__.py") and module == "torch._dynamo.eval_frame" and values == ["2.0", "1.0"]


def test_a_name_that_a_stand_in_lacks_is_the_real_modules():
    code = """
from featx.process.start import stand_ins
with stand_ins():
    from torch._dynamo import OptimizedModule, explain
    from torch._dynamo import OptimizedModule as real
print(OptimizedModule.__module__, explain.__module__, real.__module__)
"""
    assert python(code)[0].split() == ["featx.process.start", "torch._dynamo.eval_frame", "torch._dynamo.eval_frame"]


def test_what_was_imported_before_stays():
    code = """
import torch._dynamo
from featx.process.start import stand_ins
before = torch._dynamo
with stand_ins():
    import torch._dynamo as within
print(before is within, before is torch._dynamo)
"""
    assert python(code) == ["True True"]


def test_a_module_that_wants_more_of_them_than_stand_ins_have_is_imported_without(tmp_path):
    (tmp_path / "wants_more.py").write_text("from torch._dynamo import OptimizedModule\nimport torch._dynamo.config\n")
    (tmp_path / "lacks.py").write_text("import nothing_of_this_name\n")
    code = """
from featx.process.start import import_fast
print(import_fast("wants_more").OptimizedModule.__module__)
try:
    import_fast("lacks")
except ImportError as err:
    print(err)
"""
    assert python(code, cwd=tmp_path) == ["torch._dynamo.eval_frame", "No module named 'nothing_of_this_name'"]


def test_an_environment_variable_switches_them_off(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(start, "STAND_INS", {"asked_for": {}})
    (tmp_path / "asked_for.py").touch()
    (tmp_path / "asks.py").write_text("import sys\nfound = 'asked_for' in sys.modules\n")
    for value, found in (("1", False), ("0", True)):
        monkeypatch.setenv("FEATX_PLAIN_START", value)
        monkeypatch.delitem(sys.modules, "asks", raising=False)
        assert start.import_fast("asks").found == found


def test_what_is_not_installed_has_no_stand_in(monkeypatch):
    monkeypatch.setattr(start, "STAND_INS", {"nothing_of_this_name": {}})
    with start.stand_ins():
        assert "nothing_of_this_name" not in sys.modules
