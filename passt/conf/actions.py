"""Actions: the effect of an option on the dictionary of fields, given its argument and its row in the table.

Generic actions set the field of the row. Actions that serve one option follow them. A scalar is overwritten, so the
last of several options wins. A setting that exists once per address family is overwritten per family.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from .. import addr, log
from ..lean.tuples import NamedTuple
from ..log import Fatal
from . import values
from .values import NONE

DNS_MAX = 3  # per family, as in resolv.conf(5)
SEARCH_MAX = 6
PORT_SPECS = "port_specs"  # key of the port specifications, (option letter, argument); not a field of Options

Fields = dict[str, Any]  # fields of Options that the command line has set


class Done(Exception):
    """--help, --version, --doctor: print the text on standard output, and exit with the status."""

    def __init__(self, text: str, status: int = 0) -> None:
        super().__init__(text)
        self.status = status


class Pair(NamedTuple):
    """A setting that exists once per family."""

    v4: Any = None
    v6: Any = None

    def get(self, v6: bool) -> Any:
        return self.v6 if v6 else self.v4


class Row(Protocol):
    """The part of a table row that an action uses."""

    @property
    def name(self) -> str: ...

    @property
    def field(self) -> str: ...


Action = Callable[[Fields, str, Row], None]

# Generic actions -----------------------------------------------------------------------------------------------------


def setting(value: Any) -> Action:
    """An option without argument."""

    def action(fields: Fields, _: str, row: Row) -> None:
        fields[row.field] = value

    return action


def parsed(parse: Callable[[str], Any]) -> Action:
    """An argument, converted by `parse`."""

    def action(fields: Fields, text: str, row: Row) -> None:
        fields[row.field] = parse(text)

    return action


def file(fields: Fields, text: str, row: Row) -> None:
    """The name of a file."""
    fields[row.field] = values.path(text, f"--{row.name}")


def per_family(parse: Callable[[str], bytes]) -> Action:
    """An address, once per family."""

    def action(fields: Fields, text: str, row: Row) -> None:
        value = parse(text)
        _put(fields, row.field, value, len(value) == 16)

    return action


def mapping(fields: Fields, text: str, row: Row) -> None:
    """An address, once per family, or `none` for both."""
    if text == NONE:
        fields[row.field] = Pair(False, False)
    else:
        value = values.mapped(text)
        _put(fields, row.field, value, len(value) == 16)


def adding(parse: Callable[[str], Any]) -> Action:
    """An argument that is appended to a list."""

    def action(fields: Fields, text: str, row: Row) -> None:
        fields[row.field] = (*fields.get(row.field, ()), parse(text))

    return action


def outbound_if(*, v6: bool) -> Action:
    """An interface for one family."""
    return lambda fields, text, row: _put(fields, row.field, values.interface(text), v6)


def ports(letter: str) -> Action:
    """Collect the specification: its meaning depends on the options after it."""
    return lambda fields, text, _: fields.setdefault(PORT_SPECS, []).append((letter, text))


def nothing(_: Fields, __: str, ___: Row) -> None:
    """No effect: the option is accepted because clients pass it."""


def _put(fields: Fields, field: str, value: Any, v6: bool, unset: Any = None) -> None:
    pair = fields.get(field) or Pair(unset, unset)
    fields[field] = Pair(pair.v4, value) if v6 else Pair(value, pair.v6)


# Actions of one option -----------------------------------------------------------------------------------------------


def debug(fields: Fields, _: str, __: Row) -> None:
    """Raise the level to DEBUG, also after --quiet. The level of --trace stays."""
    fields["level"] = max(fields.get("level", log.INFO), log.DEBUG)


def address(fields: Fields, text: str, _: Row) -> None:
    value, prefix_len = values.address(text)
    v6 = len(value) == 16
    _put(fields, "address", value, v6)
    _put(fields, "prefix_len", prefix_len, v6, unset=0)


def dns(fields: Fields, text: str, _: Row) -> None:
    """Add to the list. `none` clears it and the options about forwarding; a later -D starts a new list.

    The list has any length (`names.py` takes the first ones): callers pass all that a configuration has.
    """
    if text == NONE:
        fields.update(dns=(), dns_none=True, dns_forward=(), dns_host=())
        return
    fields.update(dns=(*fields.get("dns", ()), values.dns(text)), dns_none=False)


def dns_host(fields: Fields, text: str, _: Row) -> None:
    """Add to the list."""
    plain, percent, zone = text.partition("%")
    value = values.dns_host(plain)
    if percent:
        if len(value) == 4 or not addr.is_link_local(value):
            raise Fatal(f"Invalid host nameserver address: {text} (only a link-local address has an interface)")
        fields["dns_zones"] = (*fields.get("dns_zones", ()), (value, values.interface(zone)))
    hosts = (*fields.get("dns_host", ()), value)
    if len([a for a in hosts if len(a) == len(value)]) > DNS_MAX:
        raise Fatal(f"Cannot use host nameserver address {text} (at most {DNS_MAX} per family)")
    fields["dns_host"] = hosts


def search(fields: Fields, text: str, _: Row) -> None:
    if text == NONE:
        fields.update(search=(), search_none=True)
        return
    for name in text.split(" "):  # QEMU gives all of its search domains as one argument
        domains = (*fields.get("search", ()), values.domain(name))
        if len(domains) > SEARCH_MAX:
            raise Fatal(f"Cannot use DNS search domain {name} (at most {SEARCH_MAX})")
        fields.update(search=domains, search_none=False)


def stats(fields: Fields, text: str, _: Row) -> None:
    seconds, as_json = values.stats(text)
    fields.update(stats=seconds, stats_json=as_json)


def socket(fields: Fields, text: str, _: Row) -> None:
    fields.update(socket_path=values.socket_path(text), fd=None)


def fd(fields: Fields, text: str, _: Row) -> None:
    """Serve one connection, or one tap device, and end with it."""
    fields.update(fd=values.fd(text), socket_path=None, one_off=True)


def userns(fields: Fields, text: str, _: Row) -> None:
    fields.update(userns=values.path(text, "--userns"), netns_only=False)


def netns_only(fields: Fields, _: str, __: Row) -> None:
    fields.update(userns=None, netns_only=True)


def config_net(fields: Fields, _: str, __: Row) -> None:
    fields.update(config_net=True, no_ra=True)
