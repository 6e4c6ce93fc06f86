"""Control sockets: UNIX sockets by which programs of the host query and change the state of the process.

The sockets are opened at start, with the identity of the user who started the process, and served by the loop. The
format of requests is that of the socket's protocol (`api.py`, `slirp.py`): a request is a line, or all data up to the
client's shutdown(2). An answer consists of pieces, which are generated when the output buffer has room.

Access. The path has mode 0700. The credentials of each client are read as well. A client is accepted if its user is
the one who started the process, the one that the process runs as, or root of the machine (not root of a user namespace
that the process is in). Any other client is disconnected and counted. The guest can reach a UNIX socket of the host
only through a shared file system.

The effect of a client on other clients and on traffic is bounded:

    limit                              consequence
    ---------------------------------  -------------------------------------------------------------------------------
    CLIENTS_MAX clients                the next one gets an error and is disconnected
    no descriptor left                 likewise (`flow/spare.py`)
    Protocol.request_max bytes         an error answers a longer request, and the client is disconnected
    REQUESTS of a client in a turn     its other requests wait for the next turn of the loop
    OUTPUT_MAX bytes unsent            no request is read and no output generated until they are sent
    REQUEST_TIME                       a client with an incomplete request is disconnected, counted from its first byte
    IDLE_TIME                          a client that sends no request, or does not read its answer, is disconnected
    an invalid request                 an error says what is wrong; then the client is disconnected
    an internal error                  ends the client's connection; the log has it

Requests are handled between turns of the loop, where descriptors can be closed at once. So a descriptor that a request
closes is closed before the answer.
"""

from __future__ import annotations

import socket
import typing
from collections.abc import Container, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from .. import log
from ..calls import calls
from ..drops import Drop
from ..flow.context import Context
from ..flow.spare import Spare
from ..lean.tuples import NamedTuple
from ..linux import unix
from ..linux.accepting import ACCEPTED, accept
from ..linux.nspool import new_socket
from ..loop.each import each, record
from ..loop.reactor import EPOLLIN, EPOLLOUT, TYPE_CONTROL, TYPE_CONTROL_LISTEN, ref_data

CLIENTS_MAX = 16
REQUESTS = 8  # of one client, in one turn
READ_MAX = 65536  # bytes
OUTPUT_MAX = 65536  # bytes
OUTPUT_TURN = 1 << 18  # bytes sent to one client in one turn
REQUEST_TIME = 10.0  # s
IDLE_TIME = 60.0  # s

CALLS = calls("accept4", "recvfrom", "sendto", "close")

BACKLOG = 128  # clients that wait while the loop is busy; beyond that, a non-blocking client is refused at once


class InvalidRequest(Exception):
    """An invalid request and the reason. The client gets an error and is disconnected."""


class Protocol(typing.Protocol):
    """The protocol of a socket."""

    request_max: int  # bytes
    single: bool  # the answer ends the connection

    def answer(self, request: bytes, now: float) -> Iterable[bytes]:
        """Pieces of the answer to a request, a line without its end. Raises InvalidRequest, also while iterated."""

    def refusal(self, why: str) -> bytes:
        """The error for a client that is disconnected."""


class Listening(NamedTuple):
    """A socket that was opened at start. Its path is removed if the start fails."""

    sock: socket.socket
    path: str


def listen(path: str) -> Listening:
    """Open a control socket. Raises Fatal."""
    return Listening(unix.listen_at(path, BACKLOG), path)


class Users:
    """Users who may connect: those of `origins`, and user 0 if `root` says that it is root of the machine."""

    def __init__(self, origins: Sequence[unix.Origin], *, root: bool) -> None:
        self._origins = origins
        self._root = root

    def __contains__(self, uid: object) -> bool:
        return (uid == 0 and self._root) or any(uid == origin.uid() for origin in self._origins)


class Client:
    """A connected client."""

    __slots__ = ("began", "closing", "deadline", "ended", "fd", "input", "output", "pieces", "protocol", "sock")

    def __init__(self, sock: Any, protocol: Protocol, now: float) -> None:
        self.sock = sock
        self.fd: int = sock.fileno()
        self.protocol = protocol
        self.input = bytearray()
        self.output = bytearray()
        self.pieces: Iterator[bytes] | None = None  # of the current answer
        self.ended = False  # end of file was read
        self.closing = False  # the connection ends when `output` is sent
        self.began = 0.0  # time of the first byte of an incomplete request; 0: there is none
        self.deadline = now + IDLE_TIME

    def has_request(self) -> bool:
        """Whether `input` holds a complete request, or one that is too long."""
        waiting = self.input
        return b"\n" in waiting or len(waiting) > self.protocol.request_max or (self.ended and bool(waiting))

    def take(self) -> bytes:
        """The next request. Raises InvalidRequest if it is too long."""
        end = self.input.find(b"\n")
        line = bytes(self.input if end < 0 else self.input[:end])
        del self.input[: len(line) + 1]
        if len(line) > self.protocol.request_max:
            raise InvalidRequest(f"too large message: a request has at most {self.protocol.request_max} bytes")
        return line

    def has_output(self) -> bool:
        """Whether a part of the current answer is unsent."""
        return bool(self.output) or self.pieces is not None


Connected = tuple[int, Client]  # with its place in the list


class Control:
    """The sockets, each with its protocol, and their clients. `users` are the user ids that may connect."""

    def __init__(self, ctx: Context, sockets: Sequence[tuple[Listening, Protocol]], users: Container[int]) -> None:
        self._ctx = ctx
        self._sockets = sockets
        self._users = users
        self._clients: list[Client | None] = [None] * CLIENTS_MAX
        self._ready: dict[int, Client] = {}  # clients with an event in this turn
        self._spare = Spare(ctx)
        self._timer = ctx.timers.services.new(self._expire)
        self._next = 0.0  # when the timer fires; 0 while it is not armed
        ctx.reactor.handle(TYPE_CONTROL_LISTEN, self._accept)
        ctx.reactor.handle(TYPE_CONTROL, self._event)
        for i, (listening, _) in enumerate(sockets):
            ctx.reactor.watch(listening.sock.fileno(), TYPE_CONTROL_LISTEN, i, EPOLLIN)

    def close(self) -> None:
        """Disconnect all clients and stop listening."""
        each(self._connected(), self._drop, self._fault_at)
        each((listening.sock for listening, _ in self._sockets), self._retire, self._fault_at_listener)
        self._spare.close()

    # Connecting ------------------------------------------------------------------------------------------------------

    def _accept(self, ref: int, events: int, now: float) -> None:
        listening, protocol = self._sockets[ref_data(ref)]
        try:
            fd, _, _ = accept(listening.sock.fileno())
        except BlockingIOError:
            return  # the client has disconnected
        except OSError as e:
            log.warn_ratelimited("control", f"Couldn't accept a client of the control socket: {e.strerror}", now)
            self._spare.accept_failed(listening.sock.fileno(), e, now, partial(self._no_descriptor, protocol))
            return
        sock: Any = new_socket(socket.AF_UNIX, ACCEPTED, 0, fd)
        why = self._reject(sock, now)
        free = next((i for i, client in enumerate(self._clients) if client is None), -1)
        if not why and free < 0:
            self._ctx.drops[Drop.CONTROL_TOO_MANY] += 1
            why = f"there are {CLIENTS_MAX} clients already"
        if why:
            _refuse(sock, protocol, why)
            return
        client = self._clients[free] = Client(sock, protocol, now)
        self._ctx.reactor.watch(fd, TYPE_CONTROL, free, EPOLLIN)
        self._arm(client.deadline)

    def _no_descriptor(self, protocol: Protocol, fd: int) -> None:
        """Refuse a client on the spare descriptor `fd`."""
        self._ctx.drops[Drop.CONTROL_NO_DESCRIPTOR] += 1
        _refuse(new_socket(socket.AF_UNIX, ACCEPTED, 0, fd), protocol, "there is no descriptor left")

    def _reject(self, sock: Any, now: float) -> str:
        """The reason why a new client is refused; empty if it is accepted."""
        pid, uid = 0, -1
        try:
            pid, uid, _ = unix.credentials(sock)
            if uid in self._users:
                return ""
        except OSError as e:
            why = f"its credentials cannot be read: {e.strerror}"
        else:
            why = "connect as the user who started it"
        self._ctx.drops[Drop.CONTROL_NOT_ALLOWED] += 1
        text = f"Client of the control socket, UID {uid}, PID {pid}: not allowed"
        log.info_ratelimited("control peer", text, now)
        return f"user {uid} is not allowed: {why}"

    # Requests --------------------------------------------------------------------------------------------------------

    def _event(self, ref: int, events: int, now: float) -> None:
        i = ref_data(ref)
        client = self._clients[i]
        assert client is not None, "its descriptor was retired when it left the list"
        if not self._ready:
            self._ctx.reactor.between_turns(self._serve)
        self._ready[i] = client

    def _serve(self, now: float) -> None:
        """Serve all clients that have an event in this turn."""
        ready, self._ready = self._ready, {}
        each(ready.items(), self._turn, self._fault_at, now)

    def _turn(self, one: Connected, now: float) -> None:
        try:
            connected = self._serve_client(one[1], now)
        except OSError:  # the connection has failed
            connected = False
        if not connected:
            self._drop(one)

    def _fault_at(self, one: Connected, e: Exception) -> None:
        """An internal error ends the connection of the client whose request caused it."""
        client = one[1]
        record(self._ctx.drops, "a request to the control socket", e)
        _send_last(client.sock, client.protocol.refusal(f"internal error, see the log: {e!r}"))
        self._drop(one)

    def _serve_client(self, client: Client, now: float) -> bool:
        """Read, answer, write, within the limits. Returns False when the connection is to end. Raises OSError."""
        if not (client.has_output() or client.closing or client.has_request()):
            data = client.sock.recv(READ_MAX)
            client.input += data
            client.ended = not data
        written = self._write(client, now)
        for _ in range(REQUESTS):
            if not written or client.closing or not client.has_request():
                break
            self._answer(client, now)
            self._generate(client)
            written = client.pieces is None and len(client.output) < OUTPUT_MAX
        self._write(client, now)
        more = not client.closing and client.has_request()
        if not client.has_output() and not more:
            if client.closing or client.ended:
                return False
            client.began = (client.began or now) if client.input else 0.0
            client.deadline = client.began + REQUEST_TIME if client.input else now + IDLE_TIME
        self._ctx.reactor.change(client.fd, EPOLLOUT if client.has_output() or more else EPOLLIN)
        self._arm(client.deadline)
        return True

    def _answer(self, client: Client, now: float) -> None:
        client.began = 0.0
        try:
            request = client.take()
            if request.strip():
                client.pieces = iter(client.protocol.answer(request, now))
                client.closing = client.protocol.single
        except InvalidRequest as e:
            self._invalid(client, str(e))

    def _invalid(self, client: Client, why: str) -> None:
        """End the connection with an error."""
        self._ctx.drops[Drop.CONTROL_GARBAGE] += 1
        client.pieces = None
        client.output += client.protocol.refusal(why)
        client.closing = True

    def _write(self, client: Client, now: float) -> bool:
        """Generate and send the rest of the answer; False if the socket or the limit stops it. Raises OSError."""
        left = OUTPUT_TURN
        while left > 0:
            self._generate(client)
            if not client.output:
                return True
            try:
                sent = client.sock.send(client.output)
            except BlockingIOError:
                return False
            del client.output[:sent]
            client.deadline = now + IDLE_TIME
            left -= sent
        return False

    def _generate(self, client: Client) -> None:
        """Append the next pieces of the answer to `output`, up to OUTPUT_MAX."""
        try:
            while client.pieces is not None and len(client.output) < OUTPUT_MAX:
                client.output += next(client.pieces)
        except StopIteration:
            client.pieces = None
        except InvalidRequest as e:
            self._invalid(client, str(e))

    # Disconnecting ---------------------------------------------------------------------------------------------------

    def _connected(self) -> list[Connected]:
        return [(i, client) for i, client in enumerate(self._clients) if client is not None]

    def _drop(self, one: Connected) -> None:
        i, client = one
        self._clients[i] = None
        self._ready.pop(i, None)
        self._ctx.reactor.retire(client.fd, client.sock)

    def _arm(self, deadline: float) -> None:
        if not self._next or deadline < self._next:
            self._next = deadline
            self._ctx.timers.services.arm(self._timer, deadline)

    def _expire(self, now: float) -> None:
        """Disconnect clients whose deadline has passed."""
        self._next = 0.0
        each(self._connected(), self._expire_one, self._fault_at, now)

    def _expire_one(self, one: Connected, now: float) -> None:
        client = one[1]
        if client.deadline <= now:
            self._ctx.drops[Drop.CONTROL_TOO_SLOW] += 1
            self._drop(one)
        else:
            self._arm(client.deadline)

    def _retire(self, listener: socket.socket) -> None:
        self._ctx.reactor.retire(listener.fileno(), listener)

    def _fault_at_listener(self, listener: socket.socket, e: Exception) -> None:
        record(self._ctx.drops, "the end of a control socket", e)


def _refuse(sock: Any, protocol: Protocol, why: str) -> None:
    _send_last(sock, protocol.refusal(why))
    sock.close()


def _send_last(sock: Any, line: bytes) -> None:
    """Send an error before the connection ends; a failure does not matter."""
    try:
        sock.send(line)
    except OSError:
        pass  # the client has disconnected, or does not read
