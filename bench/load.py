"""Load generators: servers and clients that spend as little as Python can on each operation.

    python bench/load.py SERVER ADDRESS [--port N]
    python bench/load.py CLIENT ADDRESS [--port N] [--seconds S] [--flows N]

A server prints the word `ready` once it listens and serves until it is killed. A client runs for the given time and
prints one line of JSON: `{"count": N, "seconds": S}`, where operations have an answer also `"p50"` and `"p99"`, the
seconds that half of them took at most, and 99 of 100. The file is run by its path, not as a module of the package, and
imports the standard library only: a process is there in 20 ms.

| server     | client      | one operation                                                                  |
|------------|-------------|--------------------------------------------------------------------------------|
| tcp-echo   | tcp-rr      | one byte there and back on a standing connection, on all flows at once         |
| tcp-answer | tcp-crr     | connect, one byte there and back; the server closes first, as HTTP/1.0 would   |
| tcp-echo   | tcp-pace    | the same at a rate: --flows N a second, each begins in its time                |
| udp-echo   | udp-rr      | one byte there and back                                                        |
| udp-sink   | udp-send    | a datagram of 1400 bytes that has reached the server                           |
| udp-source | udp-receive | a datagram of 1400 bytes that has reached the client                           |

Round trips of several flows run in one process on edge-triggered epoll: a process for each flow would measure the
scheduler. Connections run in one process for each flow, because there five blocking calls are cheaper than the
epoll bookkeeping of a connection.

Datagrams go and come by sendmmsg(2) and recvmmsg(2), 64 a call: the sender hands over single datagrams, as any
program would, but does not take a core for itself alone to do so. It does not wait for the receiver, which counts the
datagrams that arrive in a window that opens with the first one.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import select
import signal
import socket
import sys
import time
from array import array
from collections.abc import Callable, Sequence

PORT = 5401
DATAGRAM = 1400
VLEN = 64
LEAD = 0.3  # seconds that a datagram source runs on, so that the receiver's window is covered to its end
PATIENCE = 5.0  # seconds without any answer after which a client gives up and says so


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("len", ctypes.c_size_t))


class _Msghdr(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_void_p),
        ("namelen", ctypes.c_uint),
        ("iov", ctypes.c_void_p),
        ("iovlen", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("controllen", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class _Mmsghdr(ctypes.Structure):
    _fields_ = (("hdr", _Msghdr), ("len", ctypes.c_uint))


def _batch() -> tuple[ctypes.Array[_Mmsghdr], list[object]]:
    """VLEN message headers with one buffer of DATAGRAM bytes each, and what must stay alive with them."""
    buffers = [ctypes.create_string_buffer(DATAGRAM) for _ in range(VLEN)]
    iovecs = (_Iovec * VLEN)(*[_Iovec(ctypes.addressof(b), DATAGRAM) for b in buffers])
    messages = (_Mmsghdr * VLEN)()
    for i in range(VLEN):
        messages[i].hdr.iov = ctypes.addressof(iovecs) + i * ctypes.sizeof(_Iovec)
        messages[i].hdr.iovlen = 1
    return messages, [buffers, iovecs]


_libc = ctypes.CDLL(None, use_errno=True)


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _bound(kind: socket.SocketKind, address: str, port: int) -> socket.socket:
    sock = socket.socket(_family(address), kind)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((address, port))
    if kind == socket.SOCK_STREAM:
        sock.listen(1024)
    return sock


def _connected(kind: socket.SocketKind, address: str, port: int) -> socket.socket:
    sock = socket.socket(_family(address), kind)
    seconds = int(PATIENCE)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, seconds.to_bytes(8, sys.byteorder) + bytes(8))
    sock.connect((address, port))
    if kind == socket.SOCK_STREAM:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def _ready() -> None:
    print("ready", flush=True)


# Servers ---------------------------------------------------------------------------------------------------------


def _accept_all(listener: socket.socket, epoll: select.epoll, conns: dict[int, socket.socket]) -> None:
    while True:
        try:
            conn, _ = listener.accept()
        except BlockingIOError:
            return
        conn.setblocking(False)
        conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        conns[conn.fileno()] = conn
        epoll.register(conn.fileno(), select.EPOLLIN | select.EPOLLET)


def _serve_tcp(address: str, port: int, close: bool) -> None:
    """Send back what comes in; with `close`, end the connection after the first answer."""
    listener = _bound(socket.SOCK_STREAM, address, port)
    listener.setblocking(False)
    epoll = select.epoll()
    epoll.register(listener.fileno(), select.EPOLLIN)
    conns: dict[int, socket.socket] = {}
    read, write = os.read, os.write
    listening = listener.fileno()
    _ready()
    while True:
        for fd, _ in epoll.poll():
            if fd == listening:
                _accept_all(listener, epoll, conns)
                continue
            try:
                data = read(fd, 64)
                if data:
                    write(fd, data)
                if close or not data:
                    conns.pop(fd).close()
            except BlockingIOError:
                continue
            except OSError:  # the client was stopped: its connections end as they may
                conns.pop(fd).close()


def tcp_echo(address: str, port: int) -> None:
    """Answer each byte on a standing connection."""
    _serve_tcp(address, port, close=False)


def tcp_answer(address: str, port: int) -> None:
    """Answer once, then close."""
    _serve_tcp(address, port, close=True)


def udp_echo(address: str, port: int) -> None:
    """Send each datagram back."""
    sock = _bound(socket.SOCK_DGRAM, address, port)
    _ready()
    receive, send = sock.recvfrom, sock.sendto
    while True:
        try:
            data, peer = receive(64)
            send(data, peer)
        except ConnectionRefusedError:  # an earlier client has gone
            continue


def udp_sink(address: str, port: int) -> None:
    """Count datagrams; `udp-send` fetches the count of its window on a TCP connection to the same port."""
    sock = _bound(socket.SOCK_DGRAM, address, port)
    control = _bound(socket.SOCK_STREAM, address, port)
    _ready()
    while True:
        conn, _ = control.accept()
        seconds = float(conn.recv(64))
        conn.sendall(b"go")
        conn.sendall(json.dumps(_receive(sock, seconds)).encode())
        conn.close()


def udp_source(address: str, port: int) -> None:
    """Send to the source of a request, for the time in the request."""
    sock = _bound(socket.SOCK_DGRAM, address, port)
    _ready()
    while True:
        data, peer = sock.recvfrom(64)
        out = socket.socket(sock.family, socket.SOCK_DGRAM)  # connected: no look-up for each datagram
        out.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.close()
        out.bind((address, port))
        out.connect(peer)
        _send(out, float(data) + LEAD)
        out.close()
        sock = _bound(socket.SOCK_DGRAM, address, port)


# Clients ---------------------------------------------------------------------------------------------------------


def _receive(sock: socket.socket, seconds: float) -> dict[str, float]:
    """Datagrams that arrive in the `seconds` after the first one."""
    messages, keep = _batch()
    fd, receive, clock = sock.fileno(), _libc.recvmmsg, time.monotonic
    sock.setblocking(False)
    while select.select([sock], [], [], 0)[0]:  # what an earlier run left
        receive(fd, messages, VLEN, 0, None)
    if not select.select([sock], [], [], PATIENCE)[0]:
        return {"count": 0, "seconds": seconds}
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    count, start = 0, clock()
    end = start + seconds
    while (now := clock()) < end:
        got = receive(fd, messages, VLEN, 0, None)
        if got > 0:
            count += got
        else:
            poll.poll(50)
    del keep
    return {"count": count, "seconds": now - start}


def _send(sock: socket.socket, seconds: float) -> None:
    messages, keep = _batch()
    fd, send, clock = sock.fileno(), _libc.sendmmsg, time.monotonic
    end = clock() + seconds
    while clock() < end:
        send(fd, messages, VLEN, 0)  # a refused or full socket is the receiver's loss, and counted there
    del keep


def udp_send(address: str, port: int, seconds: float, flows: int) -> dict[str, float]:
    """Send as fast as the socket takes it; the count is the server's."""
    sock = _connected(socket.SOCK_DGRAM, address, port)
    control = _connected(socket.SOCK_STREAM, address, port)
    control.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, bytes(16))
    control.sendall(str(seconds).encode())
    control.recv(2)
    _send(sock, seconds + LEAD)
    control.settimeout(PATIENCE + seconds)
    result: dict[str, float] = json.loads(control.recv(4096))
    return result


def udp_receive(address: str, port: int, seconds: float, flows: int) -> dict[str, float]:
    """Ask for datagrams and count them."""
    sock = _connected(socket.SOCK_DGRAM, address, port)
    sock.send(str(seconds).encode())
    return _receive(sock, seconds)


def _result(took: Sequence[float], seconds: float) -> dict[str, float]:
    """The line of operations that took so long each."""
    ordered = sorted(took)
    quantiles = {f"p{n}": ordered[len(ordered) * n // 100] for n in (50, 99)} if took else {}
    return {"count": len(took), "seconds": seconds, **quantiles}


def _pingpong(sock: socket.socket, seconds: float) -> dict[str, float]:
    """Round trips of one byte, one at a time; a lost datagram costs the socket's receive timeout and is sent anew."""
    receive, send, clock = sock.recv, sock.send, time.monotonic
    took = array("d")
    note = took.append
    before = start = clock()
    end = start + seconds
    while before < end:
        send(b"x")
        receive(64)
        now = clock()
        note(now - before)
        before = now
    return _result(took, before - start)


def _pingpongs(socks: list[socket.socket], seconds: float) -> dict[str, float]:
    """The same on several sockets at once; where all have lost theirs, all begin anew."""
    epoll = select.epoll()
    for sock in socks:
        sock.setblocking(False)
        epoll.register(sock.fileno(), select.EPOLLIN | select.EPOLLET)
    read, write, clock, poll = os.read, os.write, time.monotonic, epoll.poll
    took = array("d")
    note = took.append
    now = start = clock()
    end = start + seconds
    sent = dict.fromkeys((sock.fileno() for sock in socks), start)
    for fd in sent:
        write(fd, b"x")
    while now < end:
        events = poll(PATIENCE) or [(fd, 0) for fd in sent]
        now = clock()
        for fd, ready in events:
            if ready:
                if not read(fd, 64):
                    raise ConnectionError("the server closed a connection")
                note(now - sent[fd])
            write(fd, b"x")
            sent[fd] = now
    return _result(took, now - start)


def _round_trips(kind: socket.SocketKind, address: str, port: int, seconds: float, flows: int) -> dict[str, float]:
    socks = [_connected(kind, address, port) for _ in range(flows)]
    return _pingpong(socks[0], seconds) if flows == 1 else _pingpongs(socks, seconds)


def udp_rr(address: str, port: int, seconds: float, flows: int) -> dict[str, float]:
    """Round trips of one datagram on each of `flows` sockets."""
    return _round_trips(socket.SOCK_DGRAM, address, port, seconds, flows)


def tcp_rr(address: str, port: int, seconds: float, flows: int) -> dict[str, float]:
    """Round trips of one byte on each of `flows` connections."""
    return _round_trips(socket.SOCK_STREAM, address, port, seconds, flows)


def tcp_pace(address: str, port: int, seconds: float, flows: int) -> dict[str, float]:
    """Round trips of one byte on one connection, `flows` a second; one that is late begins at once."""
    sock = _connected(socket.SOCK_STREAM, address, port)
    receive, send, clock, interval = sock.recv, sock.send, time.monotonic, 1 / flows
    count, start = 0, clock()
    while (now := clock()) < start + seconds:
        if (early := start + count * interval - now) > 0:
            time.sleep(early)
        send(b"x")
        receive(64)
        count += 1
    return {"count": count, "seconds": now - start}


def _connections(address: str, port: int, seconds: float) -> array[float]:
    """How long each of the connections took that got its answer, from connect(2) to close(2)."""
    family, make, clock = _family(address), socket.socket, time.monotonic
    target, stream = (address, port), socket.SOCK_STREAM
    took = array("d")
    note = took.append
    before = clock()
    end = before + seconds
    while before < end:
        sock = make(family, stream)
        sock.connect(target)
        sock.send(b"x")
        answer = sock.recv(64)
        sock.close()
        now = clock()
        if answer:
            note(now - before)
        before = now
    return took


def tcp_crr(address: str, port: int, seconds: float, flows: int) -> dict[str, float]:
    """Connections with one round trip each, by `flows` processes at once."""
    start = time.monotonic()
    if flows == 1:
        return _result(_connections(address, port, seconds), time.monotonic() - start)
    pipes = []
    for _ in range(flows):
        source, sink = os.pipe()
        if os.fork() == 0:
            with open(sink, "wb") as file:
                _connections(address, port, seconds).tofile(file)
            os._exit(0)
        os.close(sink)
        pipes.append(source)
    took = array("d")
    for fd in pipes:
        with open(fd, "rb") as file:
            took.frombytes(file.read())
    return _result(took, time.monotonic() - start)


Server = Callable[[str, int], None]
Client = Callable[[str, int, float, int], dict[str, float]]

SERVERS: dict[str, Server] = {
    "tcp-echo": tcp_echo,
    "tcp-answer": tcp_answer,
    "udp-echo": udp_echo,
    "udp-sink": udp_sink,
    "udp-source": udp_source,
}
CLIENTS: dict[str, Client] = {
    "tcp-rr": tcp_rr,
    "tcp-pace": tcp_pace,
    "tcp-crr": tcp_crr,
    "udp-rr": udp_rr,
    "udp-send": udp_send,
    "udp-receive": udp_receive,
}


def main() -> None:
    """Run the server or client that the first argument names."""
    parser = argparse.ArgumentParser(description="load generators of the benchmark")
    parser.add_argument("mode", choices=[*SERVERS, *CLIENTS])
    parser.add_argument("address")
    parser.add_argument("--port", type=int, default=PORT)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--flows", type=int, default=1)
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if args.mode in SERVERS:
        SERVERS[args.mode](args.address, args.port)
    else:
        print(json.dumps(CLIENTS[args.mode](args.address, args.port, args.seconds, args.flows)))


if __name__ == "__main__":
    main()
