"""The steps from options to a configuration: their order, and which of them a failure names."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import pytest

from passt import NEVER, PASST, log
from passt.conf.argv import Options
from passt.conf.resolv_conf import Follower
from passt.daemon import configure
from passt.log import Fatal

STEPS = [
    "read the host's network configuration",
    "try the outbound addresses and interfaces",
    "raise the limit of descriptors",
    "open sockets on the host",
]


@dataclass
class Decided:
    config: str


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The steps that were begun."""
    begun: list[str] = []
    monkeypatch.setattr(log, "step", begun.append)
    decision = Decided("the configuration")
    monkeypatch.setattr(configure.host_tables, "read_host", lambda: "the host")
    tables = SimpleNamespace(read=lambda seconds: "the host" if seconds == NEVER else "cut short")
    monkeypatch.setattr(configure.host_tables, "HostTables", lambda: tables)
    monkeypatch.setattr(configure.conf_decide, "decide", lambda options, host, names, have_v6: decision)
    for module, name in (
        (configure.outbound, "check"),
        (configure.common, "raise_descriptor_limit"),
    ):
        monkeypatch.setattr(module, name, lambda *config: None)
    monkeypatch.setattr(configure.fit, "fit", lambda config, follows: f"{config}, with ports followed: {follows}")
    return begun


def decide(**options: Any) -> Any:
    return configure.decide(Options(**options), cast(Follower, SimpleNamespace(current="names")))


@pytest.mark.parametrize(
    ("options", "follows"), [({}, True), ({"mode": PASST}, False), ({"fd": 5}, False), ({"fd": 5, "pid": 7}, True)]
)
def test_the_decision_is_returned_when_all_was_tried(steps: list[str], options: dict[str, Any], follows: bool) -> None:
    decision, tables = decide(**options)
    assert decision.config == f"the configuration, with ports followed: {follows}" and tables is not None
    assert steps == STEPS


@pytest.mark.parametrize("options", [{"follow": "off"}, {"splice_only": True}])
def test_tables_that_are_not_followed_are_not_watched(steps: list[str], options: dict[str, Any]) -> None:
    decision, tables = decide(**options)
    assert decision.config.startswith("the configuration") and tables is None


@pytest.mark.parametrize("at", range(1, 4))
def test_a_failure_ends_it_in_its_step(steps: list[str], monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    def fail(*config: object, **follows: bool) -> None:
        raise Fatal("no")

    module, name = [
        (configure.outbound, "check"),
        (configure.common, "raise_descriptor_limit"),
        (configure.fit, "fit"),
    ][at - 1]
    monkeypatch.setattr(module, name, fail)
    with pytest.raises(Fatal, match="no"):
        decide()
    assert steps == STEPS[: at + 1]
