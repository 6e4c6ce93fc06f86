"""The two dialects of the control sockets: requests as they come, answers as they are documented."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from passt import __version__, addr
from passt.conf.actions import Pair
from passt.conf.options import Options
from passt.control.json_api import OPTION_MAX, Api, Specs, decode, spans
from passt.control.server import InvalidRequest
from passt.control.slirp import SlirpApi

from ..ports.test_forwards import Rig, taken
from ..ports.test_forwards import port as port
from ..ports.test_forwards import rig as rig
from ..support import GUEST4, GUEST6, GUEST_MAC, T0, reconfigure

Json = dict[str, Any]
Make = Callable[..., Rig]


class Api2:
    """Both dialects around rules with real sockets."""

    def __init__(self, r: Rig, **options: Any) -> None:
        self.rig = r
        specs = Specs(Options(**options), r.ctx, range(49152, 65536))
        self.control = Api(r.ctx, r.forwards, specs, "pasta")
        self.slirp = SlirpApi(r.ctx, r.forwards, specs)

    def ask(self, command: str, **more: Any) -> Json:
        request = json.dumps({"command": command, **more}).encode()
        answer = b"".join(self.control.answer(request, T0))
        assert answer.endswith(b"\n") and answer.count(b"\n") == 1
        decoded: Json = json.loads(answer)
        return decoded

    def refused(self, command: str, **more: Any) -> str:
        answer = self.ask(command, **more)
        assert answer["ok"] is False
        assert answer["errors"][0] == answer["error"]
        return str(answer["error"])

    def call(self, execute: str, **arguments: Any) -> Any:
        request = {"execute": execute, **({"arguments": arguments} if arguments else {})}
        return json.loads(b"".join(self.slirp.answer(json.dumps(request).encode(), T0)))


@pytest.fixture
def api(rig: Make) -> Api2:
    return Api2(rig())


def specs_of(answer: Json, what: str = "rules") -> list[str]:
    return [rule["rule"] for rule in answer[what]]


# Rules ---------------------------------------------------------------------------------------------------------------


def test_show(rig: Make, port: int) -> None:
    api = Api2(rig(f"-t 127.0.0.1/{port}-{port + 1}:80-81 -U auto"))
    first, second = api.ask("show")["rules"]
    assert first == {
        "number": 1,
        "rule": f"-t 127.0.0.1/{port}-{port + 1}:80-81",
        "protocol": "tcp",
        "side": "host",
        "address": "127.0.0.1",
        "interface": None,
        "first": port,
        "last": port + 1,
        "target": None,
        "target_first": 80,
        "target_last": 81,
        "auto": False,
        "listening": [[port, port + 1]],
    }
    assert (second["side"], second["protocol"], second["auto"], second["listening"]) == ("splice", "udp", True, [])


def test_adding_and_deleting(api: Api2, port: int) -> None:
    answer = api.ask("add", rules=[f"-t {port}:80", f"-u{port}"])
    assert specs_of(answer, "added") == [f"-t {port}:80", f"-u {port}"] and not answer["removed"]
    answer = api.ask("add", rules=[f"-t {port}:80"])
    assert specs_of(answer, "present") == [f"-t {port}:80"] and not answer["added"]
    answer = api.ask("delete", rules=[f"-u {port}"], numbers=[1])
    assert specs_of(answer, "removed") == [f"-t {port}:80", f"-u {port}"]
    assert api.ask("show")["rules"] == []


def test_replacing(rig: Make, port: int) -> None:
    """All of the letters that occur, however often, and no others."""
    api = Api2(rig(f"-t {port},{port + 1} -u {port} -T {port + 2}"))
    api.ask("replace", rules=[f"-t {port}", f"-t {port + 3}", "-u none"])
    assert specs_of(api.ask("show")) == [f"-T {port + 2}", f"-t {port}", f"-t {port + 3}"]


def test_changes_in_their_order(rig: Make, port: int) -> None:
    api = Api2(rig(f"-t {port} -T {port + 1}"))
    steps = [
        {"clear": "SPLICE"},
        {"add": f"-t {port + 2}"},
        {"delete": f"-t {port}"},
        {"delete": 3},
        {"add": f"-u {port}"},
    ]
    answer = api.ask("change", changes=steps)
    assert answer["ok"] and specs_of(api.ask("show")) == [f"-u {port}"]


@pytest.mark.parametrize(("side", "left"), [("host", ["-T"]), ("splice", ["-t", "-u"]), ("all", []), (None, [])])
def test_clear(rig: Make, port: int, side: str | None, left: list[str]) -> None:
    api = Api2(rig(f"-t {port} -u {port} -T {port + 1}"))
    api.ask("clear", **({} if side is None else {"side": side}))
    assert [spec[:2] for spec in specs_of(api.ask("show"))] == left


def test_every_port_that_fails_is_named(api: Api2, port: int) -> None:
    with taken(port + 1), taken(port + 3):
        answer = api.ask("add", rules=[f"-t {port}-{port + 3}"])
    assert answer == {
        "ok": False,
        "error": f"Failed to bind port {port + 1} (Address already in use) for option '-t {port}-{port + 3}'",
        "errors": [
            f"Failed to bind port {p} (Address already in use) for option '-t {port}-{port + 3}'"
            for p in (port + 1, port + 3)
        ],
        "ports": [
            {"port": p, "rule": f"-t {port}-{port + 3}", "errno": errno.EADDRINUSE, "reason": "Address already in use"}
            for p in (port + 1, port + 3)
        ],
    }
    assert api.ask("show")["rules"] == []


@pytest.mark.parametrize(
    ("command", "more", "error"),
    [
        ("nonsense", {}, "unknown command 'nonsense'"),
        ("show", {"rules": []}, "unknown member 'rules'"),
        ("add", {}, "the request names nothing to add"),
        ("add", {"rules": "-t 80"}, '"rules" is not a list of strings'),
        ("add", {"rules": [80]}, '"rules" is not a list of strings'),
        ("add", {"rules": ["-t 0"]}, "Invalid port specifier -t 0: '0' at character 1: port 0 can't be forwarded"),
        ("add", {"rules": ["80"]}, "Invalid port forwarding option '80'"),
        ("add", {"rules": ["-x 80"]}, "Invalid port forwarding option '-x 80'"),
        ("add", {"rules": [""]}, "Invalid port forwarding option ''"),
        ("add", {"rules": ["-t none"]}, "'-t none' names no ports to add"),
        ("add", {"rules": ["-t 80"], "numbers": [1]}, "unknown member 'numbers'"),
        ("add", {"rules": ["-T 127.0.0.1/80"]}, "Invalid port specifier -T 127.0.0.1/80"),
        ("add", {"rules": ["-t 80:127.0.0.1/80"]}, "Invalid port specifier -t 80:127.0.0.1/80"),
        ("delete", {"numbers": [True]}, '"numbers" is not a list of numbers'),
        ("delete", {"numbers": [7]}, "There is no rule with the number 7"),
        ("clear", {"side": "guest"}, "'guest' can't be cleared"),
        ("clear", {"side": 1}, "1 can't be cleared"),
        ("change", {"changes": [{"add": 1}]}, "'add': 1 is not a change"),
        ("change", {"changes": [{"frob": "-t 80"}]}, "'frob': '-t 80' is not a change"),
        ("change", {"changes": [[]]}, '"changes" is not a list of objects'),
    ],
)
def test_mistakes(api: Api2, command: str, more: Json, error: str) -> None:
    assert api.refused(command, **more).startswith(error)


def test_what_was_started_with_counts(rig: Make) -> None:
    api = Api2(rig(), no_udp=True)
    assert api.refused("add", rules=["-u 53"]).startswith("UDP port forwarding requested but UDP is disabled")
    r = rig()
    api = Api2(r, use=Pair(True, False))
    reconfigure(r.ctx, ip6=None)
    assert api.refused("add", rules=["-t ::1/80"]).endswith("::1, but IPv6 is off")
    assert Api2(rig(), mode="passt").refused("add", rules=["-t auto"]).startswith("'auto' port forwarding is only")


def test_long_options_are_not_repeated(api: Api2, port: int) -> None:
    """Each rule of an option is called by it: that of a long one would be long for each of many."""
    text = f"-t {port}," + ",".join(f"~{p}" for p in range(40000, 40100))
    assert len(text) > OPTION_MAX
    with taken(port):
        assert api.refused("add", rules=[text]).endswith(f"for option '-t {port}'")


# Queries -------------------------------------------------------------------------------------------------------------


def test_counters(api: Api2) -> None:
    vars(api.rig.ctx.reactor).update(wakeups=1, events=2)  # which the loop has
    api.rig.ctx.drops["tcp: for a test"] = 3
    assert api.ask("stats")["stats"]["drops"] == {"tcp: for a test": 3}
    assert 'passt_drops_total{reason="tcp: for a test"} 3\n' in api.ask("metrics")["metrics"]


def test_info(api: Api2) -> None:
    info = api.ask("info")["info"]
    assert (info["mode"], info["mtu"]) == ("pasta", api.rig.ctx.config.mtu)
    assert info["assigned"] == [addr.text(GUEST4), addr.text(GUEST6)]
    guest = api.rig.ctx.guest
    guest.mac = GUEST_MAC
    assert api.ask("info")["info"]["guest"]["mac"] == "52:54:00:12:34:56"
    guest.mac = addr.BROADCAST_MAC
    assert api.ask("info")["info"]["guest"]["mac"] is None, "it has sent nothing yet"


def test_info_without_an_interface(api: Api2) -> None:
    ctx = api.rig.ctx
    reconfigure(ctx, splice_only=True)
    assert api.ask("info")["info"] == {"version": __version__, "mode": "pasta"}


def test_flows_come_in_pieces(api: Api2, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def flows(ctx: Any, now: float) -> Iterator[Json]:
        for index in range(200):
            made.append(index)
            yield {"index": index}

    monkeypatch.setattr("passt.control.metrics.flows", flows)
    pieces = iter(api.control.answer(b'{"command": "flows"}', T0))
    some = next(pieces) + next(pieces)
    assert len(made) == 64, "no more than was asked for"
    assert json.loads(some + b"".join(pieces)) == {"ok": True, "flows": [{"index": i} for i in range(200)]}


def test_no_flows(api: Api2) -> None:
    assert api.ask("flows") == {"ok": True, "flows": []}


def test_spans() -> None:
    assert spans({3, 1, 2, 7}) == [[1, 3], [7, 7]] and spans(()) == []


# JSON ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        (b"garbage", "cannot parse JSON"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"[1]", "a request is a JSON object"),
        (b"null", "a request is a JSON object"),
        (b'{"command": NaN}', "NaN is not a JSON number"),
        (b"[" * 65000, "nested too deeply"),
        (b'{"a":' * 10000 + b"1" + b"}" * 10000, "nested too deeply"),
        (b'{"command": ' + b"9" * 60000 + b"}", "cannot parse JSON"),
    ],
)
def test_garbage(request_: bytes, why: str) -> None:
    with pytest.raises(InvalidRequest, match=why):
        decode(request_)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
COMMANDS = st.sampled_from(["show", "add", "delete", "replace", "clear", "change", "flows", "info", "x"])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(st.binary(max_size=40) | st.text(max_size=40).map(str.encode), COMMANDS, JSON, JSON)
def test_anything_is_answered(api: Api2, raw: bytes, command: str, rules: Any, changes: Any) -> None:
    """An answer or InvalidRequest, nothing else, and no socket is opened."""
    requests = [raw]
    for members in ({"rules": rules}, {"changes": changes}, {"numbers": rules}, {"side": rules}, {"command": rules}):
        requests.append(json.dumps({"command": command, **members}).encode())
    requests += [json.dumps({"execute": e, "arguments": rules}).encode() for e in ("add_hostfwd", "remove_hostfwd")]
    for request in requests:
        for dialect in (api.control, api.slirp):
            try:
                answer = b"".join(dialect.answer(request, T0))
            except InvalidRequest:
                continue
            assert isinstance(json.loads(answer), dict)
    assert api.rig.open() == []


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(st.text(alphabet="-tuTU 0,~:/[].%a*l9auto\0\ud800", max_size=20))
def test_any_rule_is_answered(api: Api2, text: str) -> None:
    answer = api.ask("change", changes=[{"delete": text}])
    assert answer["ok"] is False and answer["error"].isprintable()
