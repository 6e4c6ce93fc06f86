"""A connection to a control socket: a request and its answer are a line of JSON each.

Any failure is a message for the user of the command (`Fatal`), with advice if there is any.
"""

from __future__ import annotations

import json
import os
import socket
from typing import TYPE_CHECKING, Any

from ..linux import stdio
from ..log import Fatal

if TYPE_CHECKING:
    from types import TracebackType

TIMEOUT = 60.0  # s until the server must have answered
IN_C = b"basil:s\0"  # a passt or pasta in C begins so, before it is asked

Json = dict[str, Any]


class Connection:
    """A connection to a control socket."""

    def __init__(self, path: str, *, debug: bool = False) -> None:
        """Raises Fatal."""
        self._path = path
        self._debug = debug
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.settimeout(TIMEOUT)
        _become_owner(path)
        try:
            self._sock.connect(path)
        except OSError as e:
            self._sock.close()
            raise Fatal(f"Couldn't connect to {path}: {e.strerror or e}{_advice(e)}") from None
        self._file = self._sock.makefile("rb")

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self._file.close()
        self._sock.close()

    def ask(self, request: Json) -> Json:
        """The answer to a request. Raises Fatal, with the server's error."""
        line = json.dumps(request)
        try:
            self._log(">", line)
            self._sock.sendall(line.encode() + b"\n")
        except OSError:
            pass  # the server has closed the connection, perhaps after an error message
        try:
            if self._file.peek(len(IN_C)).startswith(IN_C):  # no line follows
                raise Fatal(f"{self._path}: this is the socket of a program in C: use the pesto that is beside it")
            answered = self._file.readline()
        except TimeoutError:
            raise Fatal(f"{self._path}: no answer within {TIMEOUT:.0f} s") from None
        except OSError as e:
            raise Fatal(f"{self._path}: {e.strerror}") from None
        self._log("<", answered.decode(errors="replace").rstrip())
        try:
            answer = json.loads(answered)
            ok = answer["ok"]
        except (ValueError, TypeError, KeyError):
            raise Fatal(f"{self._path}: {_not_an_answer(answered)}") from None
        if not ok:
            raise Fatal(*answer.get("errors", [answer["error"]]))
        return answer  # type: ignore[no-any-return]

    def _log(self, sign: str, line: str) -> None:
        if self._debug:
            stdio.write_error(f"{sign} {line}")


def _become_owner(path: str) -> None:
    """Root takes the identity of the socket's owner: a server in a user namespace does not know root outside."""
    try:
        if os.geteuid() == 0:
            os.seteuid(os.stat(path).st_uid)
    except OSError:
        pass  # connecting will fail, too, or succeed nevertheless


def _advice(e: OSError) -> str:
    if isinstance(e, FileNotFoundError):
        return ": pasta and passt create it when they are started with -c"
    if isinstance(e, ConnectionRefusedError):
        return ": no program listens there any more, or it is not a socket"
    if isinstance(e, PermissionError):
        return ": connect as the user who started the program"
    if isinstance(e, BlockingIOError):
        return ": too many clients wait"
    return ""


def _not_an_answer(answered: bytes) -> str:
    return "this is not a control socket (-c)" if answered else "the connection was closed without an answer"
