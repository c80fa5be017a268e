"""``python -m featx``, which torchrun starts."""

import sys

from featx.cli import main

if __name__ == "__main__":
    sys.exit(main())
