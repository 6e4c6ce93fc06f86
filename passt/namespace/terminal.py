"""Sharing the terminal with a command, as a shell does.

pasta, its helper processes and the command are one process group, the one that the shell put in the foreground. Keys
(Ctrl-C, Ctrl-\\, Ctrl-Z) send their signals to all of them: pasta must outlive an interrupt, which the command may
handle, and stops and continues together with the command.

An interactive shell as the command creates a group of its own and takes the terminal. After its end, the terminal's
foreground group does not exist any more, and only pasta can restore it: a background group that tries is stopped
(SIGTTOU), unless it ignores that signal.
"""

from __future__ import annotations

import os
import signal
import termios

from .. import PASTA
from ..calls import one_of

CALLS = (
    *one_of("ioctl", 1, termios.TIOCGPGRP, termios.TIOCSPGRP, mode=PASTA),
    *one_of("kill", 1, 0, mode=PASTA),  # signal 0: whether the group exists
)


class Terminal:
    """The controlling terminal, if there is one, and whether our group was in its foreground at start."""

    def __init__(self, path: str = "/dev/tty") -> None:
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError:
            self._fd = -1  # there is none
        self._group = os.getpgrp()
        self._was_ours = self.is_ours()
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # for `restore`

    def _foreground(self) -> int:
        """The foreground process group; 0 when there is no terminal."""
        if self._fd < 0:
            return 0
        try:
            return os.tcgetpgrp(self._fd)
        except OSError:
            return 0  # it was hung up

    def is_ours(self) -> bool:
        """Whether keys reach our process group."""
        return self._foreground() == self._group

    def restore(self) -> None:
        """Take the foreground back from a group that is gone, if it was ours."""
        group = self._foreground()
        if not self._was_ours or not group or group == self._group or _exists(group):
            return
        try:
            os.tcsetpgrp(self._fd, self._group)
        except OSError:
            pass  # it was hung up: there is nothing to restore


def _exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
