"""The control sockets of a daemon: opened with the identity of the user who started it, served after the set-up.

Their paths are removed if the start fails. At the end of a run the file system is out of reach, so the paths stay: the
next program that listens there replaces them (`linux/unix.py`).
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

from ..linux import unix
from ..linux.proc import ephemeral_ports, in_init_userns

if TYPE_CHECKING:
    from ..conf.argv import Options
    from ..flow.context import Context
    from ..ports.forwards import Forwards
    from . import server


def wanted(options: Options) -> bool:
    """Whether the options name a control socket, so that rules may change."""
    return options.conf_path is not None or options.api_socket is not None


class Sockets:
    """The listening sockets that the options name."""

    def __init__(self, options: Options) -> None:
        """Raises Fatal, with nothing left open."""
        self._options = options
        self._origins: list[unix.Origin] = []  # users who may connect: at the start, and after the change of identity
        self._conf: server.Listening | None = None
        self._slirp: server.Listening | None = None
        if not wanted(options):
            return
        from . import json_api, server, slirp  # noqa: F401  # the user that we become may not be able to read files

        self._origins.append(unix.Origin())
        try:
            if options.conf_path is not None:
                self._conf = server.listen(options.conf_path)
            if options.api_socket is not None:
                self._slirp = server.listen(options.api_socket)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Close them, and remove their paths."""
        for listening in (self._conf, self._slirp):
            if listening is not None:
                with suppress(OSError):  # it may belong to root, and our user may be another by now
                    os.unlink(listening.path)
                listening.sock.close()
        for origin in self._origins:
            origin.close()

    def serve(self, ctx: Context, forwards: Forwards) -> None:
        """Serve requests from now on, with changes of `forwards`. The process has its final identity."""
        if not wanted(self._options):
            return
        from . import json_api, server, slirp

        options = self._options
        specs = json_api.Specs(options, ctx, ephemeral_ports())
        sockets: list[tuple[server.Listening, server.Protocol]] = []
        if self._conf is not None:
            sockets.append((self._conf, json_api.Api(ctx, forwards, specs, options.mode)))
        if self._slirp is not None:
            sockets.append((self._slirp, slirp.SlirpApi(ctx, forwards, specs)))
        self._origins.append(unix.Origin())
        server.Control(ctx, sockets, server.Users(self._origins, root=in_init_userns()))
