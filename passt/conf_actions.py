"""What options do to the dictionary of fields: functions of it and of the argument. The table names one for each.

There are few kinds, made here for a field; what only one option does stands below them. Scalars are overwritten, so
that the last of several wins; what exists once per family, once per family.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import conf_values as values
from . import log
from .conf_options import DEPRECATED, PORT_SPECS, Fields, Options, Pair
from .conf_values import NONE
from .log import Fatal

Action = Callable[[Fields, str], None]

DNS_MAX = 3  # per family, as in resolv.conf(5)
SEARCH_MAX = 6

# Kinds -------------------------------------------------------------------------------------------------------------


def debug(fields: Fields, _: str) -> None:
    """After --quiet it counts; --trace, which implies it, stays."""
    fields["level"] = max(fields.get("level", log.INFO), log.DEBUG)


def setting(field: str, value: Any) -> Action:
    """An option without argument."""

    def action(fields: Fields, _: str) -> None:
        fields[field] = value

    return action


def parsed(field: str, parse: Callable[[str], Any]) -> Action:
    """An argument, as `parse` reads it."""

    def action(fields: Fields, text: str) -> None:
        fields[field] = parse(text)

    return action


def per_family(field: str, parse: Callable[[str], bytes]) -> Action:
    """An address, once per family."""

    def action(fields: Fields, text: str) -> None:
        value = parse(text)
        _put(fields, field, value, len(value) == 16)

    return action


def mapping(field: str) -> Action:
    """Like per_family, or `none` for both."""

    def action(fields: Fields, text: str) -> None:
        if text == NONE:
            fields[field] = Pair(False, False)
        else:
            per_family(field, values.mapped)(fields, text)

    return action


def outbound_if(v6: bool) -> Action:
    """An interface for one family."""
    return lambda fields, text: _put(fields, "outbound_if", values.interface(text), v6)


def ports(letter: str) -> Action:
    """Collected: what a specification means depends on the options after it."""
    return lambda fields, text: fields.setdefault(PORT_SPECS, []).append((letter, text))


def deprecated_copy(name: str, field: str) -> Action:
    """--no-copy-routes, --no-copy-addrs."""

    def action(fields: Fields, _: str) -> None:
        fields.setdefault(DEPRECATED, []).append(name)
        fields[field] = False

    return action


def absent(name: str, why: str, none: bool = False) -> Action:
    """An option that clients may know from elsewhere; `none` says that its argument "none" asks for nothing."""

    def action(fields: Fields, text: str) -> None:
        if not (none and text == NONE):
            raise Fatal(f"{fields['mode']}: unrecognized option '--{name}': {why}")

    return action


def elsewhere(name: str, mode: str) -> Action:
    """An option of `mode` in the other one."""

    def action(_: Fields, __: str) -> None:
        raise Fatal(f"--{name} is for {mode} mode only")

    return action


def nothing(_: Fields, __: str) -> None:
    """Accepted because clients give it."""


def _put(fields: Fields, field: str, value: Any, v6: bool) -> None:
    pair = fields.get(field, Options.__dataclass_fields__[field].default)
    fields[field] = Pair(pair.v4, value) if v6 else Pair(value, pair.v6)


# Single ones -------------------------------------------------------------------------------------------------------


def address(fields: Fields, text: str) -> None:
    value, prefix_len = values.address(text)
    v6 = len(value) == 16
    _put(fields, "address", value, v6)
    _put(fields, "prefix_len", prefix_len, v6)
    if prefix_len and not v6:
        fields["netmask"] = 0


def netmask(fields: Fields, text: str) -> None:
    """Of -n and the prefix length of -a the last counts."""
    fields["netmask"] = values.netmask(text)
    _put(fields, "prefix_len", 0, v6=False)


def dns(fields: Fields, text: str) -> None:
    """Adds to the list. `none` clears it, and what was said about forwarding; a later -D starts anew."""
    if text == NONE:
        fields.update(dns=(), dns_none=True, dns_forward=(), dns_host=())
        return
    value = values.dns(text)
    servers = (*fields.get("dns", ()), value)
    if len([s for s in servers if len(s) == len(value)]) > DNS_MAX:
        raise Fatal(f"Cannot use DNS address {text} (at most {DNS_MAX} per family)")
    fields.update(dns=servers, dns_none=False)


def dns_forward(fields: Fields, text: str) -> None:
    """Adds to the list."""
    fields["dns_forward"] = (*fields.get("dns_forward", ()), values.dns_forward(text))


def dns_host(fields: Fields, text: str) -> None:
    """Adds to the list."""
    value = values.dns_host(text)
    hosts = (*fields.get("dns_host", ()), value)
    if len([a for a in hosts if len(a) == len(value)]) > DNS_MAX:
        raise Fatal(f"Cannot use host nameserver address {text} (at most {DNS_MAX} per family)")
    fields["dns_host"] = hosts


def search(fields: Fields, text: str) -> None:
    if text == NONE:
        fields.update(search=(), search_none=True)
        return
    for name in text.split(" "):  # QEMU gives all of its search domains as one argument
        domains = (*fields.get("search", ()), values.domain(name))
        if len(domains) > SEARCH_MAX:
            raise Fatal(f"Cannot use DNS search domain {name} (at most {SEARCH_MAX})")
        fields.update(search=domains, search_none=False)


def stats(fields: Fields, text: str) -> None:
    seconds, as_json = values.stats(text)
    fields.update(stats=seconds, stats_json=as_json)


def socket(fields: Fields, text: str) -> None:
    fields.update(socket_path=values.socket_path(text), fd=None)


def fd(fields: Fields, text: str) -> None:
    """One connection, or one tap device, is all there will be."""
    fields.update(fd=values.fd(text), socket_path=None, one_off=True)


def userns(fields: Fields, text: str) -> None:
    fields.update(userns=values.path(text), netns_only=False)


def netns_only(fields: Fields, _: str) -> None:
    fields.update(userns=None, netns_only=True)


def config_net(fields: Fields, _: str) -> None:
    fields.update(config_net=True, no_ra=True)
