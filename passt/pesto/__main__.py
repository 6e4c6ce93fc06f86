"""`python -m passt.pesto` is `pesto`."""

import sys

from .command import main

sys.exit(main())
