"""Entry points of the commands: `pasta`, also `python -m passt`, and `passt`, also `python -m passt.vm`."""

import gc
import sys
from collections.abc import Sequence

from .namespace import pin


def main(argv: Sequence[str] | None = None) -> int:
    """Run, return the exit status. `argv` is sys.argv by default."""
    gc.disable()  # until the start is over: collections of what stays were a quarter of it
    pin.hold(sys.argv if argv is None else argv)  # before modules are loaded: a namespace may end meanwhile
    quicken_imports()
    import signal

    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # an interrupt ends the process without a traceback
    from .cli import main as run

    return run(argv)


def quicken_imports() -> None:
    """Let the finder of this package look for modules first, where the interpreter has what it needs."""
    try:
        from .lean import finder
    except ImportError:
        pass  # another interpreter, which goes its own way
    else:
        finder.install()


if __name__ == "__main__":
    sys.exit(main())
