"""A control socket with answers made up beforehand, and calls of the client."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from pathlib import Path
from typing import Any

from passt.pesto import command as pesto

Json = dict[str, Any]


class Server:
    """A control socket with answers made up beforehand."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.asked: list[Json] = []
        self.answers: list[bytes] = []
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.bind(self.path)
        self._sock.listen()
        self._thread = threading.Thread(target=self._serve)

    def will(self, *answers: Json | bytes) -> None:
        self.answers = [a if isinstance(a, bytes) else json.dumps(a).encode() + b"\n" for a in answers]
        self._thread.start()

    def _serve(self) -> None:
        try:
            sock, _ = self._sock.accept()
        except OSError:
            return  # closed before a client came
        with sock, sock.makefile("rb") as file:
            for answer in self.answers:
                if not (line := file.readline()):
                    return  # the client has ended
                self.asked.append(json.loads(line))
                sock.sendall(answer)

    def close(self) -> None:
        if self._thread.ident is not None:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)  # accept(2) waits no longer
            self._thread.join()
        self._sock.close()


def call(*words: str) -> int:
    return pesto.main(["pesto", *words])


FLOW: Json = {
    "index": 7,
    "protocol": "tcp",
    "path": "tap",
    "direction": "guest",
    "guest": "192.0.2.2:40000",
    "peer": "192.0.2.1:80",
    "host": "127.0.0.1:80",
    "state": "established",
    "bytes_to_guest": 1234,
    "bytes_to_host": 5_000_000,
    "age": 61.0,
    "idle": 0.1,
    "rtt": 0.0123,
    "snd_wnd": 65536,
    "rcv_wnd": None,
}
