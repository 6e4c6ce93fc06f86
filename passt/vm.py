"""`python -m passt.vm` is `passt`."""

import sys

from .cli import main

sys.exit(main(["passt", *sys.argv[1:]]))
