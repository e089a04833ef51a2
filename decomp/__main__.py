"""``python -m decomp`` is the command ``decomp``."""

import sys

from decomp.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
