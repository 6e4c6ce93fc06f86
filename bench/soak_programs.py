"""Programs of the soak that are none of the system: WebSocket and QUIC, both ends, and an HTTP server for the guest.

python -m bench.soak_programs websocket-serve ADDRESS PORT
python -m bench.soak_programs websocket ADDRESS PORT          # status 0: every message came back as it was sent
python -m bench.soak_programs quic-serve ADDRESS PORT
python -m bench.soak_programs quic ADDRESS PORT LOCAL_PORT    # likewise, for the streams of a connection
python -m bench.soak_programs http-serve ADDRESS PORT
"""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import http.server
import random
import socketserver
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .content import Bytes

MESSAGES = 40
MESSAGE_MAX = 1 << 18
STREAMS = 4
STREAM = 1 << 19
TIMEOUT = 110.0  # s, for all that a client does


def _same(sent: bytes, came: object) -> None:
    if not isinstance(came, bytes) or hashlib.sha256(sent).digest() != hashlib.sha256(came).digest():
        raise SystemExit(f"{len(sent)} bytes were sent, and others came back")


# WebSocket -----------------------------------------------------------------------------------------------------------


def websocket_serve(address: str, port: str) -> None:
    """Send back each message."""
    from websockets.sync.server import serve

    def echo(connection: Any) -> None:
        for message in connection:
            connection.send(message)

    with serve(echo, address, int(port), max_size=None) as server:
        server.serve_forever()


def websocket(address: str, port: str) -> None:
    """Send messages of all lengths, one after the other."""
    from websockets.sync.client import connect

    with connect(f"ws://{address}:{port}", max_size=None, open_timeout=TIMEOUT) as connection:
        for _ in range(MESSAGES):
            message = random.randbytes(int(MESSAGE_MAX ** random.random()))
            connection.send(message)
            _same(message, connection.recv(TIMEOUT))


# QUIC ----------------------------------------------------------------------------------------------------------------


def certificate(directory: Path) -> tuple[str, str]:
    """Paths of a certificate for a day, and of its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "soak.test")])
    now = datetime.datetime.now(datetime.UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + datetime.timedelta(days=1))
    files = directory / "certificate", directory / "key"
    files[0].write_bytes(made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    files[1].write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    return str(files[0]), str(files[1])


def quic_serve(address: str, port: str) -> None:
    """Send back each stream when it has ended."""
    from aioquic.asyncio import serve
    from aioquic.quic.configuration import QuicConfiguration

    tasks = set()

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.read())
        writer.write_eof()

    def begun(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(echo(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    async def main() -> None:
        configuration = QuicConfiguration(is_client=False, alpn_protocols=["soak"])
        with tempfile.TemporaryDirectory() as directory:
            configuration.load_cert_chain(*certificate(Path(directory)))
        await serve(address, int(port), configuration=configuration, stream_handler=begun)
        await asyncio.Event().wait()

    asyncio.run(main())


def quic(address: str, port: str, local_port: str) -> None:
    """Some streams at a time. The certificate is not checked: what arrives is."""
    import ssl

    from aioquic.asyncio import connect
    from aioquic.quic.configuration import QuicConfiguration

    async def exchange(client: Any) -> None:
        data = random.randbytes(STREAM)
        reader, writer = await client.create_stream()
        writer.write(data)
        writer.write_eof()
        _same(data, await reader.read())

    async def main() -> None:
        configuration = QuicConfiguration(alpn_protocols=["soak"], verify_mode=ssl.CERT_NONE)
        async with (
            asyncio.timeout(TIMEOUT),
            connect(address, int(port), configuration=configuration, local_port=int(local_port)) as client,
        ):
            await asyncio.gather(*(exchange(client) for _ in range(STREAMS)))

    asyncio.run(main())


# HTTP ----------------------------------------------------------------------------------------------------------------


class _Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True
    request_queue_size = 128


def http_serve(address: str, port: str) -> None:
    """A server of `Bytes`."""
    _Server((address, int(port)), Bytes).serve_forever()


ROLES: dict[str, Callable[..., None]] = {
    "websocket-serve": websocket_serve,
    "websocket": websocket,
    "quic-serve": quic_serve,
    "quic": quic,
    "http-serve": http_serve,
}

if __name__ == "__main__":
    ROLES[sys.argv[1]](*sys.argv[2:])
