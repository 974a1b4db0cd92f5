"""``python -m jcompress``, the command."""

import sys

from jcompress.cli import main

if __name__ == "__main__":
    sys.exit(main())
