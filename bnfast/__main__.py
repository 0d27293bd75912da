"""`python -m bnfast` is the command `bnfast`."""

import sys

from bnfast.cli import main

if __name__ == "__main__":
    sys.exit(main())
