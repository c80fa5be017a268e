"""What is said goes to stderr, whatever that is by then."""

import io
import sys

from featx.cli import main
from featx.errors import log


def test_notes_go_to_what_stderr_is_by_then(monkeypatch):
    told = io.StringIO()
    monkeypatch.setattr(sys, "stderr", told)
    assert main(["nonsense"]) == 2
    assert "nonsense: no such command" in told.getvalue()
    told.close()
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    log.info("still here")
    assert sys.stderr.getvalue() == "still here\n"
