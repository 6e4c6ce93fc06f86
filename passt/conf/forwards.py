"""All specifications of ports of a command line, and those that come later: options -> rules, with what they need.

Several options of one letter add up. A first `none` only takes away the default, as in the original; after other ports
it contradicts them. A single `all` or `auto` excludes any other. No port may be listened on twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from .. import addr
from ..log import Fatal
from ..policy.config import PASTA
from ..policy.rules import Rule, conflict
from .ports import ALL, AUTO, EPHEMERAL, INBOUND, OUTBOUND, given, parse_spec, shown
from .values import NONE

if TYPE_CHECKING:
    from .options import Options


def forwards(
    specs: Sequence[tuple[str, str]], options: Options, mode: str = PASTA, ephemeral: range = EPHEMERAL
) -> tuple[Rule, ...]:
    """The rules of a command line: `specs` are (option letter, argument) in their order, `options` all other options.

    A letter that does not occur means `auto` in pasta, and no rule in passt or without access to the namespace. Raises
    Fatal.
    """
    for letter, text in specs:
        _check_wanted(letter, text, options)
    for letter in INBOUND + OUTBOUND:
        _check_modes([given(letter, text) for at, text in specs if at == letter])
    rules = [rule for letter, text in specs for rule in parse_spec(letter, text, mode, ephemeral)]
    for rule in rules:
        _check_target(rule, options, mode)
    if mode == PASTA and not options.no_namespace:
        missing = [c for c in INBOUND + OUTBOUND if not _is_off(c, options) and c not in {at for at, _ in specs}]
        rules += [rule for letter in missing for rule in parse_spec(letter, AUTO)]
    _check_conflicts(rules)
    return tuple(rules)


def later(option: str, options: Options, ephemeral: range, v4: bool, v6: bool) -> tuple[Rule, ...]:
    """The rules of an option, "-t 8080:80", that is added at run time to a program started with `options`.

    `v4` and `v6` say which families are on. The caller checks for conflicts with other rules. Raises Fatal.
    """
    letter, text = option[1:2], option[2:].lstrip(" ")
    if not option.startswith("-") or not letter or letter not in INBOUND + OUTBOUND:
        raise Fatal(f"Invalid port forwarding option '{shown(option)}': give -t, -u, -T or -U and ports, '-t 8080:80'")
    _check_wanted(letter, text, options)
    rules = parse_spec(letter, text, options.mode, ephemeral)
    for rule in rules:
        _check_target(rule, options, options.mode)
    check_families(rules, v4, v6)
    return rules


def _is_off(letter: str, options: Options) -> bool:
    return options.no_tcp if letter in "tT" else options.no_udp


def _check_wanted(letter: str, text: str, options: Options) -> None:
    name, option = "TCP" if letter in "tT" else "UDP", shown(given(letter, text))
    if text != NONE and _is_off(letter, options):
        raise Fatal(f"{name} port forwarding requested but {name} is disabled: {option} (and --no-{name.lower()})")
    if text != NONE and options.no_namespace and (letter in OUTBOUND or AUTO in text):
        raise Fatal(f"{option} needs the namespace of the tap device: give its PID or --netns beside --fd")


def _check_modes(options: Sequence[str]) -> None:
    """`options`: all of one letter. `all` and `auto` exclude any other; `none` may come before others. Raises Fatal."""
    former: list[str] = []
    for option in options:
        word = option[3:]
        if word == NONE and not former:
            continue
        if former:
            both = f"'{shown(former[0])}' and '{shown(option)}'"
            if word in (NONE, ALL, AUTO):
                raise Fatal(f"Port forwarding mode '{word}' conflicts with previous mode: {both}: leave one out")
            if former[0][3:] in (ALL, AUTO):
                raise Fatal(f"Specific ports cannot be specified together with all/none/auto: {both}: leave one out")
        former.append(option)


def _check_target(rule: Rule, options: Options, mode: str) -> None:
    """Reject a target that no connection can reach. Raises Fatal."""
    if rule.outbound or rule.target is None:
        return
    spliced = mode == PASTA and not options.no_splice and not options.no_namespace
    local = spliced and (options.splice_only or (rule.addr is not None and addr.is_loopback(rule.addr)))
    head, target = f"Invalid port specifier {shown(rule.option)}: '{addr.text(rule.target)}'", rule.target
    if addr.is_loopback(target) and not local:
        what = "is a loopback address, which only connections from the host's loopback reach"
        how = "listen on 127.0.0.1 or ::1, or leave out the target address"
        raise Fatal(f"{head} {what}: {how}" if spliced else f"{head} is a loopback address, which cannot be reached")
    if rule.addr is not None and len(rule.addr) != len(target) and not local:
        raise Fatal(f"{head} is not of the family of '{addr.text(rule.addr)}', which is listened on")


def _check_conflicts(rules: Iterable[Rule]) -> None:
    """Reject two rules that listen on one port (`Rule.overlaps`). Raises Fatal."""
    both = conflict(rules)
    if both is not None:
        _refuse(*both)


def _refuse(a: Rule, b: Rule) -> None:
    port = max(a.first, b.first)
    if a.option == b.option:
        raise Fatal(f"Port {port} is asked for twice by '{shown(a.option)}': give it once")
    raise Fatal(
        f"Port {port} is asked for twice, by '{shown(a.option)}' and by '{shown(b.option)}': "
        f"leave it out of one of them (~{port} excludes it)"
    )


def check_families(rules: Iterable[Rule], v4: bool, v6: bool) -> None:
    """Reject a rule that needs a family that is off. Raises Fatal."""
    for rule in rules:
        for address in (rule.addr, None if rule.outbound else rule.target):
            if address is not None and not (v4 if len(address) == 4 else v6):
                name = "IPv4" if len(address) == 4 else "IPv6"
                raise Fatal(f"Invalid port specifier {shown(rule.option)}: {addr.text(address)}, but {name} is off")
