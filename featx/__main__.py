"""``python -m featx``, which torchrun starts."""

from featx.cli import run

if __name__ == "__main__":
    run()
