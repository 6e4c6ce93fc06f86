"""Servers for the real programs to talk to: HTTP with bytes made up as they go, files, DNS, SSH, iperf3."""

from __future__ import annotations

import contextlib
import errno
import http.server
import itertools
import socket
import socketserver
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

from bench.content import Bytes

from ..support import wait_for
from .support import Namespace

_PORTS = itertools.cycle(range(2000, 9000))
ATTEMPTS = 3  # ports that a server is started at


class _Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """An HTTP server on a socket that listens already, in whatever namespace."""

    daemon_threads = True

    def __init__(self, listener: socket.socket) -> None:
        super().__init__(("", 0), Bytes, bind_and_activate=False)
        self.socket.close()
        self.socket = listener


@contextlib.contextmanager
def bytes_server(where: Namespace, address: str) -> Iterator[int]:
    """A server of `Bytes`; its port."""
    listener = where.listen(address)
    port: int = listener.getsockname()[1]
    with _Server(listener) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield port
        server.shutdown()
        thread.join()


class EndedError(AssertionError):
    """A server ended before it listened."""


LISTEN = "0A"  # state in /proc/net/tcp, proc_net_tcp(5)


def _wait_for_port(server: subprocess.Popen[str], port: int) -> None:
    """Wait until `server` listens on `port` of any address. A connection would tell as well, but programs with one
    client at a time (iperf3) take it for theirs, and reset the next one.
    """
    tables = [Path(f"/proc/{server.pid}/net/{name}") for name in ("tcp", "tcp6")]

    def listening() -> bool:
        if server.poll() is not None:
            raise EndedError(f"{server.args!r} ended with status {server.returncode}")
        try:
            rows = [line.split() for table in tables for line in table.read_text().splitlines()[1:]]
        except OSError:  # it ended just now
            return False
        return any(int(row[1].rpartition(":")[2], 16) == port and row[3] == LISTEN for row in rows)

    wait_for(listening, f"{server.args!r} listens")


def _free_port(where: Namespace, address: str) -> int:
    """A free port outside the range of ephemeral ports, so that no client gets it meanwhile."""
    while True:
        port = next(_PORTS)
        with where.make_socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as sock:
            try:
                sock.bind((address, port))
            except OSError as e:
                if e.errno != errno.EADDRINUSE:
                    raise
            else:
                return port


@contextlib.contextmanager
def running(where: Namespace, address: str, *command: str) -> Iterator[int]:
    """A server program whose arguments have `{port}` in them; its port, once it listens there.

    A port that was free may have been taken when the program binds it: another one is tried then.
    """
    for attempt in range(ATTEMPTS):
        port = _free_port(where, address)
        with where.popen(*(word.format(port=port) for word in command), stdout=subprocess.DEVNULL) as server:
            try:
                _wait_for_port(server, port)
            except EndedError:
                if attempt + 1 < ATTEMPTS:
                    continue
                raise
            yield port
            return


@contextlib.contextmanager
def files_server(where: Namespace, directory: Path) -> Iterator[int]:
    """The files below `directory` over HTTP, on the loopback address; the port."""
    httpd = ("busybox", "httpd", "-f", "-p", "127.0.0.1:{port}", "-h", str(directory))
    with running(where, "127.0.0.1", *httpd) as port:
        yield port


@contextlib.contextmanager
def dns_server(where: Namespace, address: str) -> Iterator[int]:
    """A name server that knows `name.test`, and `long.test`, whose text does not fit in a datagram; the port."""
    records = ["--address=/name.test/192.0.2.77", "--address=/name.test/2001:db8::77"]
    records += [f"--txt-record=long.test,{str(i) * 200}" for i in range(8)]
    flags = [
        "-k",
        "-p",
        "{port}",
        "--no-resolv",
        "--no-hosts",
        "--no-daemon",
        "--bind-interfaces",
        "-u",
        "root",
        "-x",
        "",
    ]
    with running(where, address, "dnsmasq", *flags, "--listen-address", address, *records) as port:
        yield port


SSHD = """
ListenAddress 127.0.0.1:{port}
HostKey {directory}/host_key
AuthorizedKeysFile {directory}/user_key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin yes
"""


@contextlib.contextmanager
def ssh_server(where: Namespace, directory: Path) -> Iterator[int]:
    """An SSH server with keys of its own in `directory`, where `user_key` opens it; the port."""
    where.run("mkdir", "-p", "/run/sshd")
    for name in ("host_key", "user_key"):
        where.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{directory}/{name}")
    port = _free_port(where, "127.0.0.1")
    config = directory / "sshd_config"
    config.write_text(SSHD.format(port=port, directory=directory))
    with where.popen("/usr/sbin/sshd", "-D", "-f", str(config), stderr=subprocess.DEVNULL) as server:
        _wait_for_port(server, port)
        yield port
