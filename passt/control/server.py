"""Control sockets: UNIX sockets at which programs of the host ask what we do, and tell us to do otherwise.

The sockets are opened at start, while we are who started us, and served by the loop. What is said on them is a matter
of their dialects (`api.py`, `slirp.py`): a request is a line, or what there is when the client has shut
down its side; its answer is made of pieces, which are made when there is room for them.

Who may speak. The path has mode 0700. Whoever gets past that is asked for credentials, and cut off, counted, unless it
is who started us, who we are, or root, as long as root is the machine's and not that of a user namespace that we are
in. The guest has no way to a UNIX socket of the host but by a file system that it shares.

What a client can do to others is bounded:

    limit                              consequence
    ---------------------------------  -------------------------------------------------------------------------------
    CLIENTS_MAX clients                the next one is told so, and cut off
    no descriptor left                 likewise (`flow/spare.py`)
    Dialect.request_max bytes          a longer request is told so, and the client cut off
    REQUESTS of a client in a turn     the rest has its turn when others had theirs: traffic, too
    OUTPUT_MAX bytes not taken         nothing more is made or read before they are taken
    REQUEST_TIME                       the client is cut off: it has not finished its request, counted from its start
    IDLE_TIME                          likewise: it asks nothing, or does not take its answer
    garbage                            one line says what is wrong with it; then likewise
    a fault of ours                    ends this client, and is told to the log

Requests are handled between turns of the loop. There descriptors can be closed at once, so what was closed on behalf of
a client is closed when it has its answer.
"""

from __future__ import annotations

import socket
from collections.abc import Container, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

from .. import log
from ..calls import calls
from ..flow.context import Context
from ..flow.spare import Spare
from ..linux import unix
from ..linux.nspool import new_socket
from ..linux.syscall import accept
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

BACKLOG = 128  # who comes while we are busy: a client that may not wait is refused at once beyond that
_TYPE = socket.SOCK_STREAM | socket.SOCK_NONBLOCK


class Garbage(Exception):
    """What makes no sense as a request, and why: the client is told, and cut off."""


class Dialect(Protocol):
    """What is said on a socket."""

    request_max: int  # bytes
    single: bool  # the answer ends the conversation

    def answer(self, request: bytes, now: float) -> Iterable[bytes]:
        """Pieces of the answer to a request, a line without its end. Raises Garbage, as the pieces may."""

    def refusal(self, why: str) -> bytes:
        """What a client is told that is cut off."""


class Listening(NamedTuple):
    """A socket as it was opened at start. Its path is removed if we do not come to serve it."""

    sock: socket.socket
    path: str


def listen(path: str) -> Listening:
    """Open a control socket. Raises Fatal."""
    return Listening(unix.listen_at(path, BACKLOG), path)


class Users:
    """Who may speak: those of `origins`, and the user 0 if `root` says that it is the machine's."""

    def __init__(self, origins: Sequence[unix.Origin], *, root: bool) -> None:
        self._origins = origins
        self._root = root

    def __contains__(self, uid: object) -> bool:
        return (uid == 0 and self._root) or any(uid == origin.uid() for origin in self._origins)


class Client:
    """One who is connected."""

    __slots__ = ("began", "closing", "deadline", "dialect", "ended", "fd", "input", "output", "pieces", "sock")

    def __init__(self, sock: Any, dialect: Dialect, now: float) -> None:
        self.sock = sock
        self.fd: int = sock.fileno()
        self.dialect = dialect
        self.input = bytearray()
        self.output = bytearray()
        self.pieces: Iterator[bytes] | None = None  # of the answer that is being given
        self.ended = False  # it says nothing more
        self.closing = False  # it is told nothing more than what is in `output`
        self.began = 0.0  # when it said the first byte of a request that is not whole yet; 0: there is none
        self.deadline = now + IDLE_TIME

    def has_request(self) -> bool:
        """Whether there is something to be answered, or to be found too long, without more of it being read."""
        waiting = self.input
        return b"\n" in waiting or len(waiting) > self.dialect.request_max or (self.ended and bool(waiting))

    def take(self) -> bytes:
        """The next request. Raises Garbage if it is too long."""
        end = self.input.find(b"\n")
        line = bytes(self.input if end < 0 else self.input[:end])
        del self.input[: len(line) + 1]
        if len(line) > self.dialect.request_max:
            raise Garbage(f"too large message: a request has at most {self.dialect.request_max} bytes")
        return line

    def waits(self) -> bool:
        """Whether it has to take something before it is told more."""
        return bool(self.output) or self.pieces is not None


Connected = tuple[int, Client]  # with its place in the list


class Control:
    """The sockets, each with its dialect, and those who are connected. `users` are the ids that may be."""

    def __init__(self, ctx: Context, sockets: Sequence[tuple[Listening, Dialect]], users: Container[int]) -> None:
        self._ctx = ctx
        self._sockets = sockets
        self._users = users
        self._clients: list[Client | None] = [None] * CLIENTS_MAX
        self._ready: dict[int, Client] = {}  # those who have an event in this turn
        self._spare = Spare(ctx)
        self._timer = ctx.timers.services.new(self._expire)
        self._next = 0.0  # when the timer fires; 0 while it is not armed
        ctx.reactor.handle(TYPE_CONTROL_LISTEN, self._accept)
        ctx.reactor.handle(TYPE_CONTROL, self._event)
        for i, (listening, _) in enumerate(sockets):
            ctx.reactor.watch(listening.sock.fileno(), TYPE_CONTROL_LISTEN, i, EPOLLIN)

    def close(self) -> None:
        """Cut everybody off."""
        each(self._connected(), self._drop, self._fault_at)
        each((listening.sock for listening, _ in self._sockets), self._retire, self._fault_at_listener)
        self._spare.close()

    # Coming ----------------------------------------------------------------------------------------------------------

    def _accept(self, ref: int, events: int, now: float) -> None:
        listening, dialect = self._sockets[ref_data(ref)]
        try:
            fd, _, _ = accept(listening.sock.fileno())
        except BlockingIOError:
            return  # it has gone again
        except OSError as e:
            log.warn_ratelimited("control", f"Couldn't accept a client of the control socket: {e.strerror}", now)
            self._spare.accept_failed(listening.sock.fileno(), e, now, partial(self._no_descriptor, dialect))
            return
        sock: Any = new_socket(socket.AF_UNIX, _TYPE, 0, fd)
        why = self._reject(sock, now)
        free = next((i for i, client in enumerate(self._clients) if client is None), -1)
        if not why and free < 0:
            self._ctx.drops["control: too many clients"] += 1
            why = f"there are {CLIENTS_MAX} clients already"
        if why:
            _turn_away(sock, dialect, why)
            return
        client = self._clients[free] = Client(sock, dialect, now)
        self._ctx.reactor.watch(fd, TYPE_CONTROL, free, EPOLLIN)
        self._arm(client.deadline)

    def _no_descriptor(self, dialect: Dialect, fd: int) -> None:
        """There is none for a client, but for as long as it takes to say so."""
        self._ctx.drops["control: no descriptor"] += 1
        _turn_away(new_socket(socket.AF_UNIX, _TYPE, 0, fd), dialect, "there is no descriptor left")

    def _reject(self, sock: Any, now: float) -> str:
        """Why the client of a new connection may not speak; empty if it may."""
        pid, uid = 0, -1
        try:
            pid, uid, _ = unix.credentials(sock)
            if uid in self._users:
                return ""
        except OSError as e:
            why = f"its credentials are not known: {e.strerror}"
        else:
            why = "ask as who started it"
        self._ctx.drops["control: peer not allowed"] += 1
        text = f"Client of the control socket, UID {uid}, PID {pid}: not allowed"
        log.info_ratelimited("control peer", text, now)
        return f"user {uid} may not speak here: {why}"

    # Speaking --------------------------------------------------------------------------------------------------------

    def _event(self, ref: int, events: int, now: float) -> None:
        i = ref_data(ref)
        client = self._clients[i]
        assert client is not None, "its descriptor was retired when it left the list"
        if not self._ready:
            self._ctx.reactor.between_turns(self._serve)
        self._ready[i] = client

    def _serve(self, now: float) -> None:
        """Let everybody who has something to say, or takes something, go on."""
        ready, self._ready = self._ready, {}
        each(ready.items(), self._turn, self._fault_at, now)

    def _turn(self, one: Connected, now: float) -> None:
        try:
            goes_on = self._go_on(one[1], now)
        except OSError:  # it is gone, or as good as that
            goes_on = False
        if not goes_on:
            self._drop(one)

    def _fault_at(self, one: Connected, e: Exception) -> None:
        """A fault in answering ends the client that asked."""
        client = one[1]
        record(self._ctx.drops, "a request to the control socket", e)
        _tell(client.sock, client.dialect.refusal(f"a fault of ours, which is logged: {e!r}"))
        self._drop(one)

    def _go_on(self, client: Client, now: float) -> bool:
        """Read, answer, write, as far as limits and the client allow; False when it is done. Raises OSError."""
        if not (client.waits() or client.closing or client.has_request()):
            data = client.sock.recv(READ_MAX)
            client.input += data
            client.ended = not data
        taken = self._write(client, now)
        for _ in range(REQUESTS):
            if not taken or client.closing or not client.has_request():
                break
            self._answer(client, now)
            self._make(client)
            taken = client.pieces is None and len(client.output) < OUTPUT_MAX
        self._write(client, now)
        more = not client.closing and client.has_request()
        if not client.waits() and not more:
            if client.closing or client.ended:
                return False
            client.began = (client.began or now) if client.input else 0.0
            client.deadline = client.began + REQUEST_TIME if client.input else now + IDLE_TIME
        self._ctx.reactor.change(client.fd, EPOLLOUT if client.waits() or more else EPOLLIN)
        self._arm(client.deadline)
        return True

    def _answer(self, client: Client, now: float) -> None:
        client.began = 0.0
        try:
            request = client.take()
            if request.strip():
                client.pieces = iter(client.dialect.answer(request, now))
                client.closing = client.dialect.single
        except Garbage as e:
            self._cut_off(client, str(e))

    def _cut_off(self, client: Client, why: str) -> None:
        self._ctx.drops["control: garbage"] += 1
        client.pieces = None
        client.output += client.dialect.refusal(why)
        client.closing = True

    def _write(self, client: Client, now: float) -> bool:
        """Make and send what is left of the answer; False if the client must take some of it first. Raises OSError."""
        left = OUTPUT_TURN
        while left > 0:
            self._make(client)
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

    def _make(self, client: Client) -> None:
        """The next pieces of the answer, as far as there is room for them."""
        try:
            while client.pieces is not None and len(client.output) < OUTPUT_MAX:
                client.output += next(client.pieces)
        except StopIteration:
            client.pieces = None
        except Garbage as e:
            self._cut_off(client, str(e))

    # Leaving ---------------------------------------------------------------------------------------------------------

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
        """Cut off who takes too long."""
        self._next = 0.0
        each(self._connected(), self._expire_one, self._fault_at, now)

    def _expire_one(self, one: Connected, now: float) -> None:
        client = one[1]
        if client.deadline <= now:
            self._ctx.drops["control: too slow"] += 1
            self._drop(one)
        else:
            self._arm(client.deadline)

    def _retire(self, listener: socket.socket) -> None:
        self._ctx.reactor.retire(listener.fileno(), listener)

    def _fault_at_listener(self, listener: socket.socket, e: Exception) -> None:
        record(self._ctx.drops, "the end of a control socket", e)


def _turn_away(sock: Any, dialect: Dialect, why: str) -> None:
    _tell(sock, dialect.refusal(why))
    sock.close()


def _tell(sock: Any, line: bytes) -> None:
    """The last thing that is said to somebody."""
    try:
        sock.send(line)
    except OSError:
        pass  # it does not listen
