"""The targets: what guides each, and how long its inputs are.

Only modules that are named here tell which branches were taken: the less that is, the more executions in a second.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Protocol, cast

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
REGRESSIONS = HERE / "regressions"


class Module(Protocol):
    """A module of `targets`."""

    def one(self, data: bytes) -> None:
        """One execution: raises nothing."""

    def seeds(self) -> Iterable[bytes]:
        """Inputs to begin with."""


class Target(NamedTuple):
    """`modules` are those of `passt` that guide it, `length` the most bytes of an input."""

    name: str
    length: int
    modules: tuple[str, ...]

    def load(self) -> Module:
        """Import it."""
        return cast(Module, importlib.import_module(f"fuzz.targets.{self.name}"))

    def corpus(self) -> list[bytes]:
        """Inputs of earlier runs, and the inputs that found bugs."""
        path = CORPUS / f"{self.name}.hex"
        lines = path.read_text().split("\n") if path.exists() else []
        found = [bytes.fromhex(line) for line in lines if line]
        return found + [p.read_bytes() for p in sorted((REGRESSIONS / self.name).glob("*"))]


def _target(name: str, length: int, modules: str) -> Target:
    return Target(name, length, tuple(f"passt.{module}" for module in modules.split()))


TARGETS = (
    # formats
    _target("arp", 64, "wire.arp wire.cursor"),
    _target("ip", 200, "wire.ip wire.cursor"),
    _target("fragment", 200, "wire.fragment wire.ip link.reassembly"),
    _target("tcp_options", 64, "wire.tcp"),
    _target("builders", 200, "wire.ether wire.udp wire.icmp wire.checksum"),
    _target("dhcp_format", 512, "wire.dhcp wire.cursor"),
    _target("dhcpv6_format", 300, "wire.dhcpv6 wire.cursor"),
    _target("ndp_format", 300, "wire.ndp wire.domain wire.cursor"),
    _target("igmp_format", 200, "wire.igmp wire.cursor"),
    _target("domain", 160, "wire.domain"),
    # what others write
    _target("command_line", 120, "conf.argv conf.slirp4netns conf.getopt conf.table conf.actions conf.values "
            "conf.ports conf.forwards"),
    _target("ports", 60, "conf.ports conf.forwards policy.rules"),
    _target("resolv_conf", 100, "conf.resolv_conf wire.domain addr"),
    _target("kernel_tables", 250, "linux.ports linux.inotify"),
    # machines
    _target("reassembly", 120, "link.reassembly"),
    _target("gso", 24, "link.gso"),
    _target("stream", 40, "link.stream_socket"),
    _target(
        "vhost",
        60,
        "link.vhost_user link.vhost_control link.vring link.vring_in link.vring_out wire.vhost "
        "link.dirty_log link.device_state",
    ),
    _target("migration", 600, "wire.migration"),
    _target(
        "control",
        36,
        "control.server control.json_api control.slirp ports.forwards policy.rule_table conf.ports conf.forwards",
    ),
    _target("tap", 48, "tap wire.ip link.reassembly"),
    _target("stack", 36, "tap udp icmp udp_engine.dns tcp tcp_engine.opening arp dhcp dhcpv6 ndp flow.idle"),
    _target(
        "udp", 36, "udp udp_engine.io udp_engine.gso_batch udp_engine.flow udp_engine.dns flow.idle policy.resolvers"
    ),
    _target("icmp", 36, "icmp flow.idle wire.icmp wire.fragment"),
    _target("tcp", 56, "tcp tcp_engine.opening tcp_engine.window tcp_engine.output tcp_engine.table"),
    _target("log_file", 40, "log_file"),
)

BY_NAME = {target.name: target for target in TARGETS}
