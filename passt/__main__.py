"""Entry points of the commands: `pasta`, also `python -m passt`, and `passt`, also `python -m passt.vm`."""

import signal
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run, return the exit status. `argv` is sys.argv by default."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # an interrupt ends the process without a traceback
    from .cli import main as run

    return run(argv)


if __name__ == "__main__":
    sys.exit(main())
