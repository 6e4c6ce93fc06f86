"""Bytes for transfers: each place differs from the others, so that a gap, a repetition or a swap shows by a digest."""

from __future__ import annotations

import hashlib
import http.server
from collections.abc import Iterator

CHUNK = 1 << 20
_NOISE = hashlib.shake_256(b"passt").digest(CHUNK - 8)


def content(size: int) -> Iterator[bytes]:
    """`size` bytes, in chunks; made without a disk."""
    for at in range(0, size, CHUNK):
        yield ((at // CHUNK).to_bytes(8, "big") + _NOISE)[: size - at]


def digest(size: int) -> str:
    """SHA-256 of `content(size)`, in hexadecimal."""
    sha = hashlib.sha256()
    for chunk in content(size):
        sha.update(chunk)
    return sha.hexdigest()


class Bytes(http.server.BaseHTTPRequestHandler):
    """GET /SIZE gives so many bytes of `content`; PUT answers with the SHA-256 of what came."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        size = int(self.path[1:])
        self.send_response(200)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        for chunk in content(size):
            self.wfile.write(chunk)

    def do_PUT(self) -> None:
        left, sha = int(self.headers["Content-Length"]), hashlib.sha256()
        while left and (chunk := self.rfile.read(min(left, CHUNK))):
            sha.update(chunk)
            left -= len(chunk)
        answer = sha.hexdigest().encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None:
        """Requests are not worth a line."""
