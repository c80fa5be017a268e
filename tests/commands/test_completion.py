"""The script that ``featx completion`` prints, asked as a shell asks it."""

import shutil
import subprocess

import pytest

from featx.cli import main

pytest.importorskip("shtab")


@pytest.fixture(scope="module")
def script():
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["completion", "bash"]) == 0
    return out.getvalue()


def complete(script: str, *words: str) -> list[str]:
    """Return what bash offers behind these words."""
    line = " ".join(f"'{word}'" for word in words)
    ask = f'COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; {{ _shtab_featx; }} 2>/dev/null; echo "${{COMPREPLY[@]}}"'
    if shutil.which("bash") is None:
        pytest.skip("no bash here")
    return subprocess.run(["bash", "-c", f"{script}\n{ask}"], capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["featx", "pre"], ["predict"]),
        (["featx", "predict", "--writer.f"], ["--writer.format"]),
        (["featx", "predict", "--data.decoder", "t"], ["turbo"]),
        (["featx", "images", "--data.v"], ["--data.value_range"]),
        (["featx", "show", "--map", ""], ["pca", "tsne"]),
    ],
)
def test_bash_offers_what_begins_so(script, words, offered):
    assert complete(script, *words) == offered


def test_another_shell_is_refused_in_words(capsys):
    assert main(["completion", "bsh"]) == 2
    assert "completion bsh: expected bash, zsh, tcsh. Did you mean bash" in capsys.readouterr().err
