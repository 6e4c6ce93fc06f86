"""The dialect of slirp4netns: what its manual shows, and what it means here."""

from __future__ import annotations

import json
from typing import Any

import pytest

from passt import addr
from passt.control.server import InvalidRequest
from passt.control.slirp import REQUEST_MAX

from ..ports.test_forwards import port as port
from ..ports.test_forwards import rig as rig
from ..ports.test_forwards import taken
from ..support import GUEST4, GUEST6, T0
from .test_json_api import Api2, Json, Make, specs_of
from .test_json_api import api as api


def test_hostfwd(api: Api2, port: int) -> None:
    """As its manual shows it."""
    added = api.call(
        "add_hostfwd", proto="tcp", host_addr="0.0.0.0", host_port=port, guest_addr="10.0.2.100", guest_port=80
    )
    assert added == {"return": {"id": 1}}
    entry = {
        "id": 1,
        "proto": "tcp",
        "host_addr": "0.0.0.0",
        "host_addr6": "::",
        "host_port": port,
        "guest_addr": addr.text(GUEST4),
        "guest_addr6": addr.text(GUEST6),
        "guest_port": 80,
    }
    listed = {"return": {"entries": [entry]}, "entries": [entry]}  # as its manual has it, and as 1.2.0 does
    assert api.call("list_hostfwd") == listed
    assert specs_of(api.ask("show")) == [f"-t {port}:80"]
    assert api.call("remove_hostfwd", id=1) == {"return": {}}
    assert api.call("list_hostfwd") == {"return": {"entries": []}, "entries": []}


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"proto": "udp"}, "-u {port}:80"),
        ({"proto": "tcp", "host_addr": ""}, "-t {port}:80"),
        ({"proto": "tcp4"}, "-t 0.0.0.0/{port}:80"),
        ({"proto": "udp6", "host_addr": "::"}, "-u [::]/{port}:80"),
        ({"proto": "tcp", "host_addr": "127.0.0.1"}, "-t 127.0.0.1/{port}:80"),
        ({"proto": "tcp6", "host_addr": "::1"}, "-t [::1]/{port}:80"),
        ({"proto": "tcp", "guest_addr": addr.text(GUEST4)}, "-t {port}:80"),
        ({"proto": "tcp", "guest_addr": "0.0.0.0"}, "-t {port}:80"),
        ({"proto": "tcp", "guest_addr": ""}, "-t {port}:80"),
        ({"proto": "tcp", "guest_addr": "192.0.2.99"}, "-t {port}:192.0.2.99/80"),
        ({"proto": "tcp", "host_port": 1.0}, None),
    ],
)
def test_what_it_means_here(api: Api2, port: int, arguments: Json, rule: str | None) -> None:
    ports = {"host_port": port, "guest_port": 80.0}
    if rule is None:
        arguments["host_port"] = float(port)
        rule = "-t {port}:80"
    assert api.call("add_hostfwd", **{**ports, **arguments}) == {"return": {"id": 1}}
    assert specs_of(api.ask("show")) == [rule.format(port=port)]


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        ({"proto": "sctp"}, "proto"),
        ({"proto": "tcp5"}, "proto"),
        ({"proto": None}, "proto"),
        ({"host_port": 0}, "host_port"),
        ({"host_port": 65536}, "host_port"),
        ({"host_port": True}, "host_port"),
        ({"host_port": "80"}, "host_port"),
        ({"guest_port": 1.5}, "guest_port"),
        ({"guest_port": None}, "guest_port"),
        ({"host_addr": "here"}, "host_addr"),
        ({"host_addr": 7}, "host_addr"),
        ({"proto": "tcp4", "host_addr": "::1"}, "host_addr"),
        ({"guest_addr": "10.0.2"}, "guest_addr"),
    ],
)
def test_bad_arguments(api: Api2, arguments: Json, wrong: str) -> None:
    good = {"proto": "tcp", "host_port": 8080, "guest_port": 80}
    answer = api.call("add_hostfwd", **{**good, **arguments})
    assert answer == {"error": {"desc": f"bad request: add_hostfwd: bad arguments.{wrong}"}}


def test_a_port_that_is_taken(api: Api2, port: int) -> None:
    arguments = {"proto": "tcp", "host_port": port, "guest_port": 80}
    with taken(port):
        (desc,) = api.call("add_hostfwd", **arguments)["error"].values()
    why = f"Failed to bind port {port} (Address already in use) for option '-t {port}:80'"
    assert desc == f"bad request: add_hostfwd: slirp_add_hostfwd failed: {why}"
    assert "return" in api.call("add_hostfwd", **arguments)
    assert "is forwarded already" in api.call("add_hostfwd", **arguments)["error"]["desc"]


@pytest.mark.parametrize("number", [0, 2, "1", True, None, 1.5])
def test_no_such_id(api: Api2, port: int, number: Any) -> None:
    api.call("add_hostfwd", proto="tcp", host_port=port, guest_port=80)
    answer = api.call("remove_hostfwd", id=number)
    assert answer == {"error": {"desc": "bad request: remove_hostfwd: bad arguments.id"}}


def test_ranges_have_an_entry_for_each_port(rig: Make, port: int) -> None:
    api = Api2(rig(f"-t 127.0.0.1/{port}-{port + 99}:1000-1099 -T {port + 5} -u auto"))
    entries = api.call("list_hostfwd")["return"]["entries"]
    assert [(e["id"], e["host_port"], e["guest_port"]) for e in entries] == [
        (1, port + i, 1000 + i) for i in range(100)
    ]


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        (b"badjson", "cannot parse JSON"),
        (b'{"unexpectedjson": 42}', "no execute found"),
        (b'{"execute": "bad"}', "unknown execute"),
        (b'{"execute": "list_hostfwd", "arguments": 3}', "arguments is no object"),
    ],
)
def test_the_words_of_its_errors(api: Api2, request_: bytes, why: str) -> None:
    with pytest.raises(InvalidRequest) as e:
        api.slirp.answer(request_, T0)
    desc = json.loads(api.slirp.refusal(str(e.value)))["error"]["desc"]
    assert desc.startswith(f"bad request: {why}")


def test_go_programs_say_null(api: Api2) -> None:
    answer = b"".join(api.slirp.answer(b'{"execute":"list_hostfwd","arguments":null}', T0))
    assert answer == b'{"return": {"entries": []}, "entries": []}'
    assert api.call("list_info")["return"]["info"]["guest_addr"] == addr.text(GUEST4)
    assert REQUEST_MAX < 4096
