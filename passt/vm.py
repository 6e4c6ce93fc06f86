"""`python -m passt.vm` is `passt`."""

import sys

from .__main__ import main

sys.exit(main(["passt", *sys.argv[1:]]))
