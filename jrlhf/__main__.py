"""``python -m jrlhf``: the command ``jrlhf``, by the interpreter at hand."""

import sys

from jrlhf.cli import main

if __name__ == "__main__":
    sys.exit(main())
