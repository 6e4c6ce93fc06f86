"""Both ends of the conversations of `bench.adversity`: a server, and clients that print what they saw as JSON.

    python -m bench.adverse_load serve                        for clients of both families, on PORT
    python -m bench.adverse_load transfer ADDRESS REQUEST     one conversation, checked by SHA-256
    python -m bench.adverse_load latency ADDRESS KIND COUNT   seconds of each exchange
    python -m bench.adverse_load bulk ADDRESS up|down         as fast as it goes, until it is ended

A client begins with a JSON object of HEADER bytes: what it wants. In a transfer both ends send what a seed makes up. If
both have something to send, the client shuts its side down behind it. The server tells the digest of what it got,
behind its own data. It is the adverse peer where one is asked for:

    delayed    it waits before it sends, and before it answers
    bursty     it sends and reads 64 KiB at a time, with pauses between
    pausing    it stops reading and sending for half a second, after each MiB
"""

from __future__ import annotations

import hashlib
import json
import random
import signal
import socket
import sys
import threading
import time
from typing import Any

PORT = 5500
HEADER = 256
CHUNK = 1 << 16
TIMEOUT = 30.0  # s without a byte
READY = 5.0  # s until a daemon that was just started forwards its ports
PAUSE_EVERY = 16  # chunks

TWO_PARTS, PING, GET, KEY = "two-part answer", "1 byte", "keep-alive GET", "key press"
KEY_PAUSE = 0.05  # s between two, of a user who types fast
KEY_SIZE = 36  # bytes of a packet of ssh
ANSWER = b"x" * 100
BODY = b"x" * 1000
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n" % len(BODY)


def data_of(seed: int, side: str, size: int) -> bytes:
    """The data that `side` sends."""
    return random.Random(f"{seed} {side}").randbytes(size)


def pause(peer: str, chunks: int) -> None:
    """Wait as `peer` does after that many chunks; none is the beginning."""
    if peer == "delayed" and not chunks:
        time.sleep(0.3)
    elif peer == "bursty" and chunks:
        time.sleep(0.01)
    elif peer == "pausing" and chunks and not chunks % PAUSE_EVERY:
        time.sleep(0.5)


def send(sock: socket.socket, data: bytes, peer: str = "") -> None:
    """Send all, in the way of `peer`."""
    pause(peer, 0)
    for n, at in enumerate(range(0, len(data), CHUNK), 1):
        sock.sendall(data[at : at + CHUNK])
        pause(peer, n)


def receive(sock: socket.socket, size: int | None = None, peer: str = "") -> tuple[str, float]:
    """The digest of `size` bytes, or of everything up to the end, and the longest wait for one."""
    digest, gap, got, chunks = hashlib.sha256(), 0.0, 0, 0
    while size is None or got < size:
        begin = time.monotonic()
        data = sock.recv(CHUNK if size is None else min(CHUNK, size - got))
        gap = max(gap, time.monotonic() - begin)
        if not data:
            break
        digest.update(data)
        got += len(data)
        if got // CHUNK > chunks:
            chunks = got // CHUNK
            pause(peer, chunks)
    return digest.hexdigest(), gap


def read_exactly(sock: socket.socket, size: int) -> bytes:
    """`size` bytes, or fewer at the end of the stream."""
    data = b""
    while len(data) < size and (more := sock.recv(size - len(data))):
        data += more
    return data


def half_closed(request: dict[str, Any]) -> bool:
    """Whether the client ends its side first, and the server takes that for the end. Some releases of C stall then."""
    return bool(request["up"] and request["down"])


# The server ----------------------------------------------------------------------------------------------------------


def serve() -> None:
    """A thread for each client."""
    listener = socket.create_server(("::", PORT), family=socket.AF_INET6, backlog=64, dualstack_ipv6=True)
    print("ready", flush=True)
    while True:
        sock, _ = listener.accept()
        threading.Thread(target=_serve_one, args=(sock,), daemon=True).start()


def _serve_one(sock: socket.socket) -> None:
    """A client that goes away ends its own conversation; it reports what it saw."""
    sock.settimeout(TIMEOUT)
    try:
        with sock:
            request = json.loads(read_exactly(sock, HEADER))
            SERVICES[request["do"]](sock, request)
    except (OSError, ValueError) as e:
        print(f"server: {e}", file=sys.stderr, flush=True)


def _transfer_served(sock: socket.socket, request: dict[str, Any]) -> None:
    peer, data = request["peer"], data_of(request["seed"], "server", request["down"])
    sender = threading.Thread(target=send, args=(sock, data, peer))
    sender.start()
    digest, gap = receive(sock, None if half_closed(request) else request["up"], peer)
    sender.join()
    sock.sendall(json.dumps({"digest": digest, "gap": gap}).encode())


def _sink(sock: socket.socket, request: dict[str, Any]) -> None:
    buffer = bytearray(1 << 20)
    while sock.recv_into(buffer):
        pass


def _source(sock: socket.socket, request: dict[str, Any]) -> None:
    data = bytes(1 << 20)
    while True:
        sock.sendall(data)


def _answer(sock: socket.socket, request: dict[str, Any]) -> None:
    kind = request["kind"]
    sock.setsockopt(
        socket.IPPROTO_TCP, socket.TCP_NODELAY, 1
    )  # or Nagle's algorithm waits for delayed acknowledgements
    while True:
        if kind == PING:
            if not (data := sock.recv(1)):
                return
            sock.sendall(data)
        elif kind == KEY:
            if not (data := sock.recv(KEY_SIZE)):
                return
            sock.sendall(data)
        elif kind == TWO_PARTS:
            if not sock.recv(64):
                return
            sock.sendall(ANSWER)
            time.sleep(0.001)
            sock.sendall(ANSWER)
        else:
            if not sock.recv(4096):
                return
            sock.sendall(HEAD)
            sock.sendall(BODY)


SERVICES = {"transfer": _transfer_served, "sink": _sink, "source": _source, "answer": _answer}


# Clients -------------------------------------------------------------------------------------------------------------


def connected(address: str, request: dict[str, Any]) -> socket.socket:
    """A connection that has asked for something. A port that is not forwarded yet refuses: it is tried again."""
    end = time.monotonic() + READY
    while True:
        try:
            sock = socket.create_connection((address, PORT), timeout=TIMEOUT)
            break
        except ConnectionRefusedError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
    sock.sendall(json.dumps(request).encode().ljust(HEADER))
    return sock


def transfer(address: str, request: dict[str, Any]) -> dict[str, Any]:
    """One conversation: its time, the longest wait for a byte at either end, and whether all arrived."""
    own = data_of(request["seed"], "client", request["up"])
    begin = time.monotonic()
    with connected(address, {**request, "do": "transfer"}) as sock:

        def upload() -> None:
            send(sock, own)
            if half_closed(request):
                sock.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=upload, daemon=True)
        sender.start()
        digest, gap = receive(sock, request["down"])
        answer = b"".join(iter(lambda: sock.recv(4096), b""))
        sender.join()
    taken = time.monotonic() - begin
    if not answer:
        return {"outcome": "cut", "time": taken}
    theirs = json.loads(answer)
    expected = hashlib.sha256(data_of(request["seed"], "server", request["down"])).hexdigest()
    right = digest == expected and theirs["digest"] == hashlib.sha256(own).hexdigest()
    # The end that sends most waits for the other's last word only: that is no gap of a stream
    gap = max(gap if request["down"] else 0.0, theirs["gap"] if request["up"] else 0.0)
    return {"outcome": "whole" if right else "damaged", "time": taken, "gap": gap}


def transferred(address: str, request: dict[str, Any]) -> dict[str, Any]:
    """The same; a conversation that fails is a result."""
    begin = time.monotonic()
    try:
        return transfer(address, request)
    except TimeoutError:
        return {"outcome": "stalled", "time": time.monotonic() - begin}
    except (OSError, ValueError) as e:
        return {"outcome": f"failed: {e}", "time": time.monotonic() - begin}


def latency(address: str, kind: str, count: int) -> list[float]:
    """Seconds of each of `count` exchanges on one connection."""
    samples = []
    with connected(address, {"do": "answer", "kind": kind}) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        question, size = {
            PING: (b"x", 1),
            KEY: (bytes(KEY_SIZE), KEY_SIZE),
            TWO_PARTS: (b"q" * 64, 2 * len(ANSWER)),
            GET: (b"GET / HTTP/1.1\r\nHost: peer\r\n\r\n", len(HEAD) + len(BODY)),
        }[kind]
        for _ in range(count):
            if kind == KEY:
                time.sleep(KEY_PAUSE)
            begin = time.monotonic()
            sock.sendall(question)
            if len(read_exactly(sock, size)) < size:
                raise ConnectionError("the server closed the connection")
            samples.append(time.monotonic() - begin)
    return samples


def bulk(address: str, way: str) -> None:
    """A stream that keeps the link busy until SIGTERM; what it moved is printed then."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    moved, begin, data = 0, time.monotonic(), bytearray(1 << 20)
    with connected(address, {"do": "sink" if way == "up" else "source"}) as sock:
        print("ready", flush=True)
        try:
            while size := sock.send(data) if way == "up" else sock.recv_into(data):
                moved += size
        finally:
            print(json.dumps({"rate": moved / (time.monotonic() - begin)}), flush=True)


def main(argv: list[str]) -> None:
    """Be the one that is asked for."""
    if argv[0] == "serve":
        serve()
    elif argv[0] == "transfer":
        print(json.dumps(transferred(argv[1], json.loads(argv[2]))))
    elif argv[0] == "latency":
        print(json.dumps(latency(argv[1], argv[2], int(argv[3]))))
    else:
        bulk(argv[1], argv[2])


if __name__ == "__main__":
    main(sys.argv[1:])
