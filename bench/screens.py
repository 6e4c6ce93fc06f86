"""`make screens`: real screens of pasta and pesto, written into docs/observability.md.

In the laboratory of the benchmark, pasta serves a namespace with downloads, a lookup and a client of a forwarded port;
pesto runs on terminals of 80 columns. A block of the document begins with a comment that names it.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from . import lab as laboratory
from .lab import PEER, Lab, LabError, Namespace, wait_for

DOCUMENT = Path(__file__).parent.parent / "docs" / "observability.md"
COLUMNS, ROWS = 80, 24
RATES = "2M", "500k", "100k"  # of downloads
PORT, FORWARDED = 80, 8080
SETTLE = 2.5  # s until rates are those of a whole second
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def terminal(argv: Sequence[str], seconds: float) -> list[str]:
    """The screen of `argv` on a terminal after so many seconds, or its output, if it ends before."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    process = subprocess.Popen(argv, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    said, end = b"", time.monotonic() + seconds
    try:
        while (left := end - time.monotonic()) > 0:
            if select.select([master], [], [], left)[0]:
                said += os.read(master, 1 << 16)
    except OSError:
        pass  # it has ended
    finally:
        process.terminate()
        process.wait()
        os.close(master)
    _, _, screen = said.decode().rpartition("\x1b[H")  # each picture begins at the top
    return [line.rstrip() for line in ESCAPE.sub("", screen).replace("\r", "").rstrip("\n").split("\n")]


@contextmanager
def traffic(lab: Lab, guest: Namespace, directory: str) -> Iterator[None]:
    """Downloads from the peer, and one through a forwarded port."""
    with open(f"{directory}/file", "wb") as f:
        f.truncate(1 << 28)
    serve = [sys.executable, "-u", "-m", "http.server", "--directory", directory]
    for namespace in (lab.peer, guest):
        wait_for(lab.spawn([*serve, str(PORT)], namespace), "Serving")
    curl = ["curl", "-sS", "-o", "/dev/null", "--limit-rate"]
    for rate in RATES:
        lab.spawn([*curl, rate, f"http://{PEER}:{PORT}/file"], guest)
    lab.spawn([*curl, "5M", f"http://127.0.0.1:{FORWARDED}/file"])
    time.sleep(SETTLE)
    yield


def blocks(lab: Lab) -> dict[str, list[str]]:
    """The screens, by name."""
    pasta = [sys.executable, "-m", "passt"]
    pesto = [sys.executable, "-m", "passt.pesto"]
    with lab.guest() as guest, tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/p.sock"
        options = [
            "--foreground",
            "--config-net",
            "-t",
            f"{FORWARDED}:{PORT}",
            "-u",
            "none",
            "-c",
            path,
            str(guest.pid),
        ]
        with open(f"{directory}/log", "w+") as log:
            daemon = subprocess.Popen([*pasta, *options], stderr=log)
            try:
                while not os.path.exists(path) or not guest.run(["ip", "route"]).startswith("default"):
                    if daemon.poll() is not None:
                        raise LabError(f"pasta has ended: {Path(log.name).read_text()}")
                    time.sleep(0.05)
                with traffic(lab, guest, directory):
                    screens = {
                        "top": terminal([*pesto, "--top", path], SETTLE),
                        "flows": terminal([*pesto, "--flows", path], SETTLE),
                        "rules": terminal([*pesto, path], SETTLE),
                    }
            finally:
                daemon.terminate()
                daemon.wait()
            said = Path(log.name).read_text().splitlines()
    wanted = [line for line in said if "Started as root" not in line and "Multicast" not in line]
    return {"start": wanted, **screens}


def written(text: str, screens: dict[str, list[str]]) -> str:
    """The document with new blocks. Raises LookupError if one has no place."""
    for name, lines in screens.items():
        block = "".join(f"    {line}".rstrip() + "\n" for line in lines)
        place = rf"(<!-- screen {name}[^>]*-->\n\n)(?:    .*\n|\n(?=    ))*"
        text, count = re.subn(place, lambda found, block=block: found[1] + block, text)  # type: ignore[misc]
        if count != 1:
            raise LookupError(f"{DOCUMENT} has {count} places for the screen {name}")
    return text


def main(argv: list[str]) -> int:
    """Exit status: 0, or 1 with what did not work."""
    try:
        laboratory.enter("bench.screens", argv)
        with Lab() as lab:
            DOCUMENT.write_text(written(DOCUMENT.read_text(), blocks(lab)))
    except (LabError, LookupError) as e:
        print(f"screens: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
