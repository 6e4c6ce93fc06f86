"""Command lines: words with a zero byte between them; of pasta, of passt and of slirp4netns.

Invariants: any words give options, or `Fatal` with one line, or `Done` with a text; two readings are equal; an option
that a message suggests is one of the mode; nothing on the host is touched.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from passt.conf import argv as conf_argv
from passt.conf import slirp4netns
from passt.conf.actions import Done
from passt.conf.table import TABLE, listed
from passt.log import Fatal
from passt.policy.config import PASST, PASTA

MODES = PASTA, PASST, slirp4netns.NAME
NAMES = {mode: {option.name for option in listed(mode)} for mode in (PASTA, PASST)}
NAMES[slirp4netns.NAME] = {option.name for option in slirp4netns.ROWS}
VALUES = ("1", "192.0.2.1", "fe80::1", "eth0", "1500", "/tmp/x", "52:54:00:12:34:56", "none", "all", "1048576", "a.b")


def seeds() -> Iterable[bytes]:
    for i, option in enumerate(TABLE):
        for value in (VALUES[i % len(VALUES)], VALUES[(i + 5) % len(VALUES)]) if option.arg else ("",):
            yield b"\0" + f"--{option.name}\0{value}".encode()
    yield b"\0--config-ent\0-T"
    yield b"\1-T\0005"
    yield b"\1--tcp-ns\0005\0--sokcet\0/tmp/a"
    yield b"\0-fq4\0-t80\0--\0sh\0-c\0true"
    yield b"\1-d\0-s\0/tmp/a\0-P/tmp/b\0-t\0auto"
    yield b"\2-c\0-6\0--mtu=65520\x001234\0tap0\0-e3"
    for option in slirp4netns.ROWS:
        yield b"\2" + f"--{option.name}\0{'10.0.2.0/24' if option.arg == 'CIDR' else '1'}\x001234".encode()
    yield b"\0" + b"--config-net\0--no-copy-routes\0" + b"1234"


def read(argv: list[str], mode: str) -> object:
    try:
        return conf_argv.parse(argv, mode) if mode != slirp4netns.NAME else slirp4netns.parse(argv)
    except Fatal as e:
        message = str(e)
        assert "\n" not in message, "one line"
        suggested = re.search(r": did you mean --(\S+)\? See \w+ --help\Z", message)
        assert not suggested or suggested[1] in NAMES[mode], "an option of the other mode is suggested"
        return message
    except Done as e:
        return str(e)


def one(data: bytes) -> None:
    if not data:
        return
    mode = MODES[data[0] % len(MODES)]
    argv = data[1:].decode("utf-8", "surrogateescape").split("\0")
    assert read(argv, mode) == read(argv, mode)
