"""The protocol of the control socket (-c): a request and its answer are JSON objects, each on a line.

    {"command": ...}                               answer, beside "ok": true
    ---------------------------------------------  -------------------------------------------------------------------
    "show"                                         "rules": those in force; and, if the host's network is followed,
                                                   "network": where the guest's view is from, counters
    "add", "rules": ["-t 8080:80", ...]            "added", "removed", "present": rules; adding an existing rule is
    "delete", "rules": [...], or "numbers": [...]  no error. A request is carried out as a whole, or not at all
    "replace", "rules": [...]                      the given rules replace all rules of the option letters that occur
    "clear", optional "side": "host" or "splice"   delete the rules of -t and -u (host), of -T and -U (splice), or all
    "change", "changes": [{"add": "-t 8080"},      several of these in their order; "delete" takes a number, too
      {"delete": "-u 53"}, {"clear": "host"}]
    "flows"                                        "flows": open flows
    "stats"                                        "stats": counters
    "metrics"                                      "metrics": the same in the text format of Prometheus
    "info"                                         "info": version, mode, addresses of the guest, "network"

    {"ok": false, "error": ...}                    the reason, in a line; "errors" has all lines, and "ports" the ports
                                                   that cannot be bound: "port", "rule", "errno", "reason"

A rule has the syntax of the command line. A request that is not a JSON object ends the connection; other errors do not.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from .. import __version__, addr
from ..conf import forwards as conf_forwards
from ..conf.ports import EPHEMERAL, INBOUND, OUTBOUND
from ..flow.context import Context
from ..lean.records import replace
from ..log import Fatal
from ..policy.rules import Rule, with_names
from ..ports.forwards import Add, Change, Clear, Delete, DeleteNumber, Forwards, Outcome, Refused
from ..wire.checksum import PROTO_TCP, PROTO_UDP
from . import metrics
from .server import InvalidRequest

if TYPE_CHECKING:
    from ..conf.argv import Options

REQUEST_MAX = 65536
PIECE = 64  # flows or rules in a piece of an answer
OPTION_MAX = 200  # characters of an option; a longer one does not name its rules
LISTED_MAX = 1000  # lines of an error, and ports that could not be bound
HOST, SPLICE, ALL = "host", "splice", "all"
SIDES = {HOST: False, SPLICE: True, ALL: None}  # whether rules are outbound

Json = dict[str, Any]


class RequestError(Exception):
    """A request that cannot be carried out, and the reason."""


class Specs:
    """The parser of port options at run time."""

    def __init__(self, options: Options, ctx: Context, ephemeral: range | None) -> None:
        self._options = options
        self._ctx = ctx
        self._ephemeral = EPHEMERAL if ephemeral is None else ephemeral

    def rules(self, option: str) -> tuple[Rule, ...]:
        """Raises Fatal."""
        config = self._ctx.config
        families = config.ip4 is not None, config.ip6 is not None
        rules = conf_forwards.later(option, self._options, self._ephemeral, *families)
        rules = with_names(rules, dict(config.altnames))
        return rules if len(option) <= OPTION_MAX else tuple(replace(rule, option=rule.spec) for rule in rules)


class Api:
    """A `control.server.Protocol`."""

    request_max = REQUEST_MAX
    single = False

    def __init__(self, ctx: Context, forwards: Forwards, specs: Specs, mode: str) -> None:
        self._ctx = ctx
        self._forwards = forwards
        self._specs = specs
        self._mode = mode

    def answer(self, request: bytes, now: float) -> Iterable[bytes]:
        """Raises InvalidRequest."""
        asked = decode(request)
        try:
            return self._command(asked, now)
        except (RequestError, Fatal, Refused) as e:
            return (_line(_failure(e)),)

    def refusal(self, why: str) -> bytes:
        return _line({"ok": False, "error": why})

    def _command(self, asked: Json, now: float) -> Iterable[bytes]:
        command = asked.pop("command", None)
        if not isinstance(command, str):
            raise RequestError('"command" is missing, or not a string')
        if command == "flows":
            _no_more(asked)
            return streamed("flows", metrics.flows(self._ctx, now))
        if command == "show":
            _no_more(asked)
            rules = sorted(self._forwards.rules.items(), key=_number)
            described = (self._described(number, rule) for number, rule in rules)
            network = self._network()
            return streamed("rules", described, **({} if network is None else {"network": network}))
        if command in ("add", "delete", "replace", "clear", "change"):
            outcome = self._forwards.change(self._changes(command, asked), now)
            return (_line(self._changed(outcome)),)
        answers = {"stats": self._stats, "metrics": self._metrics, "info": self._info}
        if command not in answers:
            known = ", ".join((*answers, "flows", "show", "add", "delete", "replace", "clear", "change"))
            raise RequestError(f"unknown command {command!r:.80}: give one of {known}")
        _no_more(asked)
        return (_line({"ok": True, **answers[command](now)}),)

    # Rules -----------------------------------------------------------------------------------------------------------

    def _changes(self, command: str, asked: Json) -> list[Change]:
        if command == "change":
            given = _list(asked, "changes", dict)
            steps = [item for change in given for item in change.items()]
        elif command == "clear":
            steps = [("clear", asked.pop("side", ALL))]
        else:
            steps = [(command, number) for number in _list(asked, "numbers", int)] if command == "delete" else []
            steps += [(command, text) for text in _list(asked, "rules", str)]
        _no_more(asked)
        if not steps:
            raise RequestError(f"the request names nothing to {command}")
        replaced = [value for what, value in steps if what == "replace"]
        return [change for what, value in steps for change in self._step(what, value, replaced)]

    def _step(self, what: str, value: Any, replaced: list[Any]) -> Iterator[Change]:
        """The changes of a step. The first step that replaces begins with the deletion of the replaced rules."""
        if what == "clear":
            if not isinstance(value, str) or value.lower() not in SIDES:
                raise RequestError(f"{value!r:.80} can't be cleared: give one of {', '.join(SIDES)}")
            yield Clear(SIDES[value.lower()])
            return
        if what == "delete" and isinstance(value, int) and not isinstance(value, bool):
            yield DeleteNumber(value)
            return
        if what not in ("add", "delete", "replace") or not isinstance(value, str):
            raise RequestError(f"{what!r:.80}: {value!r:.80} is not a change")
        rules = self._specs.rules(value)
        if what == "replace" and value is replaced[0]:
            for letter in dict.fromkeys(text[1:2] for text in replaced if isinstance(text, str)):
                if letter in INBOUND + OUTBOUND:
                    yield Clear(letter in OUTBOUND, PROTO_TCP if letter in "tT" else PROTO_UDP)
        if not rules and what != "replace":
            raise RequestError(f"'{value}' names no ports to {what}")
        for rule in rules:
            yield Delete(rule) if what == "delete" else Add(rule)

    def _changed(self, outcome: Outcome) -> Json:
        return {
            "ok": True,
            "added": [self._described(*item) for item in sorted(outcome.added.items(), key=_number)],
            "removed": [describe(*item) for item in sorted(outcome.removed.items(), key=_number)],
            "present": [describe(None, rule) for rule in outcome.present],
        }

    def _described(self, number: int, rule: Rule) -> Json:
        ports = self._forwards.ports(rule)
        return {**describe(number, rule), "listening": spans(ports)}

    # Queries ---------------------------------------------------------------------------------------------------------

    def _stats(self, now: float) -> Json:
        return {"stats": metrics.snapshot(self._ctx, now)}

    def _metrics(self, now: float) -> Json:
        return {"metrics": metrics.prometheus(self._ctx, now)}

    def _network(self) -> Json | None:
        """How the host's network is followed, from where the guest's view is, and how often it has changed."""
        network = self._ctx.stats.network
        return None if network is None else network()

    def _info(self, now: float) -> Json:
        config, guest = self._ctx.config, self._ctx.guest
        about: Json = {"version": __version__, "mode": self._mode}
        if not config.splice_only:  # with it there is no interface
            mac = addr.mac_text(guest.mac) if guest.mac != addr.BROADCAST_MAC else None  # no frame received yet
            seen = {"address": _text(guest.addr4), "address6": _text(guest.addr6), "mac": mac}
            families = [ip for ip in (config.ip4, config.ip6) if ip is not None]
            about |= {
                "mtu": config.mtu,
                "assigned": [addr.text(ip.addr) for ip in families if ip.addr],
                "gateways": [addr.text(ip.gateway) for ip in families if ip.gateway],
                "guest": seen,
            }
            if (network := self._network()) is not None:
                about["network"] = network
        return {"info": about}


# JSON --------------------------------------------------------------------------------------------------------------


def decode(request: bytes) -> Json:
    """Raises InvalidRequest."""
    try:
        asked = json.loads(request.decode(), parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise InvalidRequest("cannot parse JSON: not UTF-8") from None
    except ValueError as e:  # JSONDecodeError, and numbers with too many digits
        raise InvalidRequest(f"cannot parse JSON: {e}") from None
    except RecursionError:
        raise InvalidRequest("cannot parse JSON: nested too deeply") from None
    if not isinstance(asked, dict):
        raise InvalidRequest("a request is a JSON object")
    return asked


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _line(answer: Json) -> bytes:
    return json.dumps(answer, separators=(",", ":")).encode() + b"\n"


def streamed(name: str, objects: Iterable[Json], **others: Json) -> Iterator[bytes]:
    """An answer with a list, in pieces, and with other members after it."""
    yield f'{{"ok":true,"{name}":['.encode()
    left, separator = iter(objects), ""
    while some := list(islice(left, PIECE)):
        yield (separator + json.dumps(some, separators=(",", ":"))[1:-1]).encode()
        separator = ","
    yield b"]"
    for other, value in others.items():
        yield f',"{other}":{json.dumps(value, separators=(",", ":"))}'.encode()
    yield b"}\n"


def _failure(e: Exception) -> Json:
    if isinstance(e, Refused):
        ports = [
            {"port": f.port, "rule": f.rule.option, "errno": f.errno, "reason": f.reason}
            for f in e.failures[:LISTED_MAX]
        ]
        return {"ok": False, "error": e.lines[0], "errors": e.lines[:LISTED_MAX], "ports": ports}
    return {"ok": False, "error": str(e), "errors": [str(e)]}


def _list(asked: Json, name: str, kind: type) -> list[Any]:
    value = asked.pop(name, [])
    if not isinstance(value, list) or not all(isinstance(v, kind) and not isinstance(v, bool) for v in value):
        what = {str: "strings", int: "numbers", dict: "objects"}[kind]
        raise RequestError(f'"{name}" is not a list of {what}')
    return value


def _no_more(asked: Json) -> None:
    for name in asked:
        raise RequestError(f"unknown member {name!r:.80} of the request")


def _number(item: tuple[int, Rule]) -> int:
    return item[0]


def _text(address: bytes) -> str | None:
    return addr.text(address) if any(address) else None


def describe(number: int | None, rule: Rule) -> Json:
    """A rule as a JSON object; "rule" is the option that stands for it."""
    return {
        "number": number,
        "rule": rule.spec,
        "protocol": {PROTO_TCP: "tcp", PROTO_UDP: "udp"}[rule.proto],
        "side": SPLICE if rule.outbound else HOST,
        "address": None if rule.addr is None else addr.text(rule.addr),
        "interface": rule.ifname,
        "first": rule.first,
        "last": rule.last,
        "target": None if rule.target is None else addr.text(rule.target),
        "target_first": rule.to,
        "target_last": rule.target_port(rule.last),
        "auto": rule.auto,
    }


def spans(ports: Iterable[int]) -> list[list[int]]:
    """[1, 2, 3, 7] as [[1, 3], [7, 7]]"""
    found: list[list[int]] = []
    for port in sorted(ports):
        if found and found[-1][1] == port - 1:
            found[-1][1] = port
        else:
            found.append([port, port])
    return found
