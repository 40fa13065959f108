"""``python -m curvfast``."""

import sys

from curvfast.cli import main

if __name__ == "__main__":
    sys.exit(main())
