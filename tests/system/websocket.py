"""A WebSocket (RFC 6455), as small as it can be: text of less than 126 bytes, which is sent back."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import socket
import threading

GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # 1.3
FIN_TEXT, MASKED = 0x81, 0x80  # 5.2


def accept_key(key: bytes) -> bytes:
    """The server's proof that it has understood the handshake (4.2.2)."""
    return base64.b64encode(hashlib.sha1(key + GUID).digest())


def masked(data: bytes, mask: bytes) -> bytes:
    """5.3"""
    return bytes(byte ^ mask[i % 4] for i, byte in enumerate(data))


def read_exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = sock.recv(size - len(data))
        if not part:
            raise EOFError("the WebSocket has ended")
        data += part
    return data


def read_head(sock: socket.socket) -> bytes:
    """An HTTP message without a body."""
    data = b""
    while not data.endswith(b"\r\n\r\n"):
        data += read_exactly(sock, 1)
    return data


def serve(listener: socket.socket) -> None:
    """Echo for all clients, until the listener is closed. Begin it in a thread."""
    listener.settimeout(None)
    with contextlib.suppress(OSError):
        while True:
            client, _ = listener.accept()
            threading.Thread(target=_talk, args=(client,), daemon=True).start()


def _talk(sock: socket.socket) -> None:
    with sock, contextlib.suppress(OSError, EOFError):
        head = read_head(sock)
        (key,) = (line.split(b": ")[1] for line in head.split(b"\r\n") if line.startswith(b"Sec-WebSocket-Key: "))
        upgrade = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        sock.sendall(upgrade + b"Sec-WebSocket-Accept: " + accept_key(key) + b"\r\n\r\n")
        while True:
            kind, size = read_exactly(sock, 2)
            mask = read_exactly(sock, 4)
            text = masked(read_exactly(sock, size & ~MASKED), mask)
            sock.sendall(bytes((kind, len(text))) + text)


class WebSocket:
    """A client on a connected socket, whose messages are numbered."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._number = 0
        key = base64.b64encode(os.urandom(16))
        head = b"GET /echo HTTP/1.1\r\nHost: server\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        sock.sendall(head + b"Sec-WebSocket-Key: " + key + b"\r\nSec-WebSocket-Version: 13\r\n\r\n")
        answer = read_head(sock)
        assert answer.startswith(b"HTTP/1.1 101 ") and accept_key(key) in answer, answer

    def echo(self) -> bool:
        """Whether the next message has its answer."""
        self._number += 1
        text, mask = f"message {self._number}".encode(), os.urandom(4)
        self.sock.sendall(bytes((FIN_TEXT, MASKED | len(text))) + mask + masked(text, mask))
        return read_exactly(self.sock, 2 + len(text)) == bytes((FIN_TEXT, len(text))) + text
