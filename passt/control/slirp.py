"""The protocol of --api-socket: the JSON API of slirp4netns(1), for port drivers that were written for it.

    {"execute": ..., "arguments": {...}}                                       {"return": ...}
    -------------------------------------------------------------------------  --------------------------------------
    add_hostfwd     proto: tcp, udp, with 4 or 6 for one family alone;         {"id": 42}
                    host_addr, host_port, guest_addr, guest_port
    list_hostfwd                                                               {"entries": [{"id": 42, ...}]}, which
                                                                               slirp4netns 1.2 has instead of "return",
                                                                               and its manual in it: here it is in both
    remove_hostfwd  id                                                         {}
    list_info                                                                  {"info": {...}}, program and version

Errors are {"error": {"desc": ...}}, with the beginnings of slirp4netns. A request ends with shutdown(2) or a newline;
its answer ends the connection.

The guest of slirp4netns is 10.0.2.100 by default. Here it may have any address: a `guest_addr` that is empty, that of
slirp4netns, or one of the guest's, means the guest; any other is an address beyond it. A `host_addr` that is empty or
unspecified (0.0.0.0, ::) is unspecified in both families, if `proto` does not name one.

The rules are those of the other control socket, with the same numbers. An entry is a single port, so a range has
several entries with one number, and is removed as a whole. This API does not show automatic rules and those of -T, -U.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from .. import __version__, addr
from ..flow.context import Context
from ..log import Fatal
from ..policy.rules import PORT_MAX, Rule
from ..ports.forwards import Add, DeleteNumber, Forwards, Refused
from ..wire.checksum import PROTO_TCP
from .json_api import PIECE, Json, Specs, decode
from .server import InvalidRequest

REQUEST_MAX = 4095
DEFAULTS = (addr.packed("10.0.2.100"), addr.packed("fd00::100"))  # the guest of slirp4netns
_FAMILIES = {"": None, "4": addr.ANY4, "6": addr.ANY6}


class ArgumentError(Exception):
    """The error of a request, in the format of that API."""


class SlirpApi:
    """A `control.server.Protocol`."""

    request_max = REQUEST_MAX
    single = True

    def __init__(self, ctx: Context, forwards: Forwards, specs: Specs) -> None:
        self._ctx = ctx
        self._forwards = forwards
        self._specs = specs

    def answer(self, request: bytes, now: float) -> Iterable[bytes]:
        """Raises InvalidRequest."""
        asked = decode(request)
        execute, arguments = asked.get("execute"), asked.get("arguments") or {}
        if not isinstance(execute, str):
            raise InvalidRequest("no execute found")
        if not isinstance(arguments, dict):
            raise InvalidRequest("arguments is no object")
        if execute == "list_hostfwd":
            return self._list()
        commands = {"add_hostfwd": self._add, "remove_hostfwd": self._remove, "list_info": self._info}
        if execute not in commands:
            raise InvalidRequest("unknown execute")
        try:
            return (_encoded({"return": commands[execute](arguments, now)}),)
        except ArgumentError as e:
            return (_error(f"bad request: {execute}: {e}"),)
        except (Fatal, Refused) as e:
            return (_error(f"bad request: {execute}: slirp_{execute} failed: {e}"),)

    def refusal(self, why: str) -> bytes:
        return _error(f"bad request: {why}")

    # Commands --------------------------------------------------------------------------------------------------------

    def _add(self, arguments: Json, now: float) -> Json:
        proto = str(arguments.get("proto"))
        if proto[:3] not in ("tcp", "udp") or proto[3:] not in _FAMILIES:
            raise ArgumentError("bad arguments.proto")
        host, guest = (_port(arguments, f"{end}_port") for end in ("host", "guest"))
        bind = _bind(_address(arguments, "host_addr"), proto[3:])
        target = _address(arguments, "guest_addr")
        if target is not None and self._is_guest(target):
            target = None
        ports = Rule("", PROTO_TCP, False, host, host, guest, bind, None, target).spec[3:]
        (rule,) = self._specs.rules(f"-{proto[0]} {ports}")
        outcome = self._forwards.change([Add(rule)], now)
        if outcome.present:  # else one of two clients that add it would remove it for both
            raise ArgumentError(f"port {host} is forwarded already, by '{rule.spec}'")
        (number,) = outcome.added
        return {"id": number}

    def _is_guest(self, target: bytes) -> bool:
        config, guest = self._ctx.config, self._ctx.guest
        assigned = [ip.addr for ip in (config.ip4, config.ip6) if ip is not None]
        own = (*DEFAULTS, *assigned, guest.addr4, guest.addr6, guest.addr6_ll)
        return addr.is_unspecified(target) or target in own

    def _remove(self, arguments: Json, now: float) -> Json:
        number = arguments.get("id")
        if isinstance(number, float) and number.is_integer():
            number = int(number)
        if not isinstance(number, int) or isinstance(number, bool) or number not in self._forwards.rules:
            raise ArgumentError("bad arguments.id")
        self._forwards.change([DeleteNumber(number)], now)
        return {}

    def _info(self, arguments: Json, now: float) -> Json:
        guest = self._guest()
        return {"info": {"program": "pasta", "version": __version__, **guest}}

    def _guest(self) -> Json:
        """The guest's addresses, by their names in entries."""
        config, guest = self._ctx.config, self._ctx.guest
        found = {}
        if config.ip4 is not None:
            found["guest_addr"] = addr.text(guest.addr4)
        if config.ip6 is not None:
            found["guest_addr6"] = addr.text(guest.addr6)
        return found

    def _list(self) -> Iterator[bytes]:
        items = sorted(self._forwards.rules.items(), key=lambda item: item[0])
        rules = [(n, rule) for n, rule in items if not rule.auto and not rule.outbound]
        for head in (b'{"return": {"entries": [', b']}, "entries": ['):
            entries = (entry for number, rule in rules for entry in self._entries(number, rule))
            yield head
            separator = ""
            while some := list(islice(entries, PIECE)):
                yield (separator + json.dumps(some)[1:-1]).encode()
                separator = ", "
        yield b"]}"

    def _entries(self, number: int, rule: Rule) -> Iterator[Json]:
        """An entry for each port that is listened on."""
        v4, v6 = (rule.addr is None or len(rule.addr) == length for length in (4, 16))
        config = self._ctx.config
        here: Json = {}
        if v4 and config.ip4 is not None:
            here["host_addr"] = addr.text(rule.addr or addr.ANY4)
        if v6 and config.ip6 is not None:
            here["host_addr6" if v4 else "host_addr"] = addr.text(rule.addr or addr.ANY6)
        if rule.target is not None:
            there: Json = {"guest_addr": addr.text(rule.target)}
        else:
            own = self._guest()
            there = {name: own[name] for name, on in (("guest_addr", v4), ("guest_addr6", v6)) if on and name in own}
        name = "tcp" if rule.proto == PROTO_TCP else "udp"
        for port in sorted(self._forwards.ports(rule)):
            ports = {"host_port": port, "guest_port": rule.target_port(port)}
            yield {"id": number, "proto": name, **here, **there, **ports}


# Arguments ---------------------------------------------------------------------------------------------------------


def _port(arguments: Json, name: str) -> int:
    value = arguments.get(name)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= PORT_MAX:
        raise ArgumentError(f"bad arguments.{name}")
    return value


def _address(arguments: Json, name: str) -> bytes | None:
    value = arguments.get(name)
    if value is None or value == "":
        return None
    try:
        return addr.unmapped(addr.packed(value))
    except (TypeError, ValueError, AttributeError):
        raise ArgumentError(f"bad arguments.{name}") from None


def _bind(address: bytes | None, family: str) -> bytes | None:
    """The address to listen on; `family` is the end of `proto`."""
    any_address = _FAMILIES[family]
    if address is None or not any(address):
        return any_address
    if any_address is not None and len(any_address) != len(address):
        raise ArgumentError("bad arguments.host_addr")
    return address


def _encoded(answer: Any) -> bytes:
    return json.dumps(answer).encode()


def _error(desc: str) -> bytes:
    return _encoded({"error": {"desc": desc}})
