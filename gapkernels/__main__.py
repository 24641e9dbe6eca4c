"""`python -m gapkernels`, which torchrun can start: the `gapkernels` command."""

import sys

from gapkernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
