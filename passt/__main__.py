"""`python -m passt` is `pasta`."""

import sys

from .cli import main

sys.exit(main())
