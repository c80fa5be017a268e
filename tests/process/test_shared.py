"""What belongs to the whole process: changed by the first thread that needs it, set back by the last."""

import threading
import warnings
from contextlib import contextmanager

import torch

from featx.process.shared import Shared, ignored, on_one_core


def test_the_first_changes_and_the_last_sets_back_in_whatever_order():
    said = []

    @contextmanager
    def change():
        said.append("changed")
        yield
        said.append("set back")

    first, second = (shared := Shared(change)), shared
    first.__enter__()
    second.__enter__()
    first.__exit__()
    assert said == ["changed"]
    second.__exit__()
    assert said == ["changed", "set back"]
    with shared:
        assert said[2:] == ["changed"]
    assert said[2:] == ["changed", "set back"]


def test_filters_that_others_add_meanwhile_stay():
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with ignored(__name__, UserWarning):
            warnings.warn("of this module", UserWarning, stacklevel=1)
            warnings.warn("of another category", FutureWarning, stacklevel=1)
            warnings.filterwarnings("ignore", "theirs")
        warnings.warn("theirs", UserWarning, stacklevel=1)
        warnings.warn("after", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in heard] == ["of another category", "after"]


def test_one_core_is_for_the_thread_that_asks_for_it_alone():
    before, found = torch.get_num_threads(), []
    torch.set_num_threads(3)
    try:
        with on_one_core():
            thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
            thread.start()
            thread.join()
            assert torch.get_num_threads() == 1 and found == [3]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
