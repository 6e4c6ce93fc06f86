"""Specifications of ports: -t, -u, -T, -U, on the command line and while we run.

Invariants: any text gives rules or `Fatal` with one printable line; rules have ports from 1 to 65535 with targets that
are, too, and name no port twice; what a rule is written as means that rule.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from passt.conf import forwards as conf_forwards
from passt.conf.options import Options
from passt.log import Fatal
from passt.policy.config import PASST, PASTA
from passt.policy.rules import PORT_MAX, Rule

OPTIONS = {PASTA: Options(), PASST: Options(mode=PASST)}
EPHEMERAL = range(32768, 61000)


def seeds() -> Iterable[bytes]:
    for text in (
        *("80", "192.0.2.1%eth0/22-25:2022-2025,~23", "auto,~22", "all", "all:192.0.2.2", "*%lo/1:2"),
        *("127.0.0.1/80:[2001:db8::1]/8080", "~1-1000", "%eth0/22", "none", "[::1]/5,6:7,8-9:18-19"),
    ):
        yield b"\0" + text.encode()
        yield b"\3" + text.encode()


def check(rule: Rule) -> None:
    assert 1 <= rule.first <= rule.last <= PORT_MAX
    assert rule.to >= 1 and rule.target_port(rule.last) <= PORT_MAX
    for address in (rule.addr, rule.target):
        assert address is None or len(address) in (4, 16)


def one(data: bytes) -> None:
    if not data:
        return
    letter, mode = "tuTU"[data[0] & 3], PASST if data[0] & 4 else PASTA
    text = data[1:].decode("utf-8", "surrogateescape")
    try:
        rules = conf_forwards.forwards([(letter, text)], OPTIONS[mode], mode, EPHEMERAL)
        conf_forwards.later(f"-{letter} {text}", OPTIONS[mode], EPHEMERAL, True, True)
    except Fatal as e:
        assert str(e).isprintable()
        return
    for rule in rules:
        check(rule)
    for rule in rules[:4]:
        if rule.option[1] != letter or rule.auto or rule.weak:
            continue
        (again,) = conf_forwards.later(rule.spec, OPTIONS[mode], range(0), True, True)
        assert replace(again, option=rule.option) == rule
