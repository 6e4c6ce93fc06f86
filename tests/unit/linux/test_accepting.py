"""Clients come with their address, and their descriptors are ready for the loop."""

from __future__ import annotations

import os
import socket

import pytest

from passt import addr
from passt.linux.accepting import accept


@pytest.mark.parametrize(
    ("listening", "client"), [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("::", "127.0.0.1"), ("::", "::1")]
)
def test_accept_tells_who_comes(listening: str, client: str) -> None:
    family = socket.AF_INET6 if ":" in listening else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as server:
        server.setblocking(False)
        if listening == "::":
            server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        server.bind((listening, 0))
        server.listen()
        for _ in range(2):  # nothing of the first is left for the second
            with socket.create_connection((client, server.getsockname()[1])) as c:
                fd, peer, port = accept(server.fileno())
                assert (peer, port) == (addr.packed(client), c.getsockname()[1])
                assert not os.get_blocking(fd) and not os.get_inheritable(fd)
                os.close(fd)
        with pytest.raises(BlockingIOError):
            accept(server.fileno())


def test_accept_says_what_is_wrong() -> None:
    with socket.socket() as s, pytest.raises(OSError, match="accept4: Invalid argument"):
        accept(s.fileno())
