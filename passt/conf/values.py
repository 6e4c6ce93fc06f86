"""Values of options: text -> value, each with its range and its one-line error. No file is read, no name looked up.

A number is an integer in decimal, 0x.. or 0.. (octal), without trailing text.
"""

from __future__ import annotations

import os
import re

from .. import addr
from ..log import Fatal
from ..policy.config import ALL, MTU_MIN, OFF, ROUTES
from ..wire.domain import is_name
from ..wire.ip import MTU_MAX
from .getopt import suggestion

IFNAME_MAX = 15  # IFNAMSIZ less the final NUL
ALTNAME_MAX = 127  # ALTIFNAMSIZ less the final NUL
IFNAME_RULE = f"1 to {IFNAME_MAX} characters, no blanks, '/', ':' or '%'"
ALTNAME_RULE = f"1 to {ALTNAME_MAX} characters, no blanks, '/', ':' or '%'"
SOCKET_PATH_MAX = 107  # bytes: sizeof(sun_path) less the final NUL (unix(7))
FD_MAX = 2**31 - 1
LOG_SIZE_MIN = 40960  # bytes: enough for a start and what led to an end
LOG_SIZE_MAX = 2**31 - 1
BUSY_POLL_MAX = 1000  # us
STATS_MIN = 0.1  # s
STATS_MAX = 86400
NONE = "none"
EPHEMERAL = range(49152, 65536)  # RFC 6335, 6: assumed if the kernel's range is not known

_MAC = re.compile(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}\Z")
_HOST_LABEL = re.compile(r"[0-9A-Za-z_]([0-9A-Za-z_-]*[0-9A-Za-z_])?\Z")
_SECONDS = re.compile(r"[0-9]{1,5}(\.[0-9]{1,3})?\Z", re.ASCII)
_NUMBER = re.compile(r"(0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*)\Z", re.ASCII)


def number(text: str) -> int:
    """An integer in the format of strtoul(3) with base 0, strictly. Raises ValueError."""
    if not _NUMBER.match(text):
        raise ValueError(text)
    if text[:2] in ("0x", "0X"):
        return int(text, 16)
    return int(text, 8) if text[0] == "0" else int(text)


def mtu(text: str) -> int:
    try:
        value = number(text)
    except ValueError:
        value = -1
    if value != 0 and not MTU_MIN <= value <= MTU_MAX:
        raise Fatal(f"Invalid MTU: {text} (give {MTU_MIN} to {MTU_MAX}, or 0 to assign none)")
    return value


def log_format(text: str) -> bool:
    """Whether messages are JSON."""
    if text not in ("text", "json"):
        raise Fatal(f"Invalid --log-format: {text} (give text or json)")
    return text == "json"


def follow(text: str) -> str:
    """How far the host's network is followed."""
    modes = (OFF, ROUTES, ALL)
    if text not in modes:
        raise Fatal(f"Invalid --follow: {text} (give {', '.join(modes)}){suggestion(text, modes)}")
    return text


def log_size(text: str) -> int:
    try:
        value = number(text)
    except ValueError:
        value = -1
    if not LOG_SIZE_MIN <= value <= LOG_SIZE_MAX:
        raise Fatal(f"Invalid --log-size: {text} (give {LOG_SIZE_MIN} to {LOG_SIZE_MAX} bytes)")
    return value


def busy_poll(text: str) -> int:
    try:
        value = number(text)
    except ValueError:
        value = -1
    if not 0 <= value <= BUSY_POLL_MAX:
        raise Fatal(f"Invalid --busy-poll: {text} (give 0 to {BUSY_POLL_MAX} microseconds; 0 turns it off)")
    return value


def stats(text: str) -> tuple[float, bool]:
    """SECONDS[,json] -> (seconds, whether as JSON)."""
    seconds, comma, form = text.partition(",")
    if not _SECONDS.match(seconds) or not STATS_MIN <= float(seconds) <= STATS_MAX or form != ("json" if comma else ""):
        raise Fatal(f"Invalid --stats: {text} (give {STATS_MIN} to {STATS_MAX} seconds, and ',json' if wanted)")
    return float(seconds), bool(comma)


def runas(text: str) -> str:
    """UID[:GID] or LOGIN[:GROUP], with numbers in decimal. Names are looked up later."""
    parts = text.split(":")
    if len(parts) > 2 or not all(parts):
        raise Fatal(f"Invalid --runas option: {text} (give UID, UID:GID, LOGIN or LOGIN:GROUP)")
    return ":".join(str(number(part)) if _NUMBER.match(part) else part for part in parts)


def mac(text: str) -> bytes:
    if not _MAC.match(text):
        raise Fatal(f"Invalid MAC address: {text} (give six pairs of hexadecimal digits with colons between)")
    return bytes.fromhex(text.replace(":", ""))


def guest_mac(text: str) -> bytes:
    """A MAC address that an interface can have: not a group address, not zero."""
    value = mac(text)
    if value[0] & 1 or not any(value):
        raise Fatal(f"Invalid MAC address: {text} (an interface needs a unicast address)")
    return value


def is_interface(text: str, most: int = ALTNAME_MAX) -> bool:
    """Whether the kernel allows it as the name of an interface, or as an alternative name."""
    try:
        length = len(os.fsencode(text))
    except UnicodeEncodeError:
        return False
    return 0 < length <= most and text not in (".", "..") and not re.search(r"[/:\s%\0]", text)


def interface(text: str) -> str:
    """The name of an interface that is there, or an alternative name of it."""
    if not is_interface(text):
        raise Fatal(f"Invalid interface name: {text} ({ALTNAME_RULE})")
    return text


def new_interface(text: str) -> str:
    """A name for an interface."""
    if not is_interface(text, IFNAME_MAX):
        raise Fatal(f"Invalid interface name: {text} ({IFNAME_RULE})")
    return text


def netmask(text: str) -> int:
    """Prefix length from a number of bits or a contiguous dotted mask; 0 means the default."""
    try:
        if "." in text:
            bits = int.from_bytes(_packed4(text), "big")
            length = bits.bit_count()
            valid = addr.netmask(length) == bits.to_bytes(4, "big")
        else:
            length = number(text)
            valid = length <= 32
    except ValueError:
        valid = False
    if not valid:
        raise Fatal(f"Invalid netmask: {text} (give 1 to 32 bits or a contiguous dotted mask)")
    return length


def _packed4(text: str) -> bytes:
    value = addr.packed(text)
    if len(value) != 4:
        raise ValueError(text)
    return value


def _checked(text: str, refuse: str, message: str, *keywords: str) -> bytes:
    """An address that is none of the kinds named in `refuse`. The option also accepts `keywords` in its place."""
    try:
        value = addr.packed(text)
    except ValueError:
        near = suggestion(text, keywords) if keywords else ""
        raise Fatal(f"{message} {text} (not an IPv4 or IPv6 address){near}") from None
    kinds = {
        "unspecified": addr.is_unspecified(value),
        "loopback": addr.is_loopback(value),
        "multicast": addr.is_multicast(value),
        "broadcast": value == addr.BROADCAST4,
        "IPv4-mapped": addr.unmapped(value) != value,
        "IPv4-compatible": len(value) == 16 and not any(value[:12]) and any(value[12:14]),
    }
    for kind in refuse.split():
        if kinds[kind]:
            raise Fatal(f"{message} {text} (is {kind})")
    return value


def address(text: str) -> tuple[bytes, int]:
    """ADDR or ADDR/PREFIX; a prefix length of 0 stands for the default, as if it was not given."""
    plain, slash, prefix = text.partition("/")
    value = _checked(plain, "unspecified loopback multicast broadcast IPv4-mapped IPv4-compatible", "Invalid address:")
    if not slash:
        return value, 0
    bits = len(value) * 8
    if not (prefix.isascii() and prefix.isdecimal()) or len(prefix) > 3 or int(prefix) > bits:
        raise Fatal(f"Invalid address: {text} (the prefix length is 1 to {bits}, or 0 for the default)")
    return value, int(prefix)


def gateway(text: str) -> bytes:
    return _checked(text, "unspecified loopback multicast broadcast", "Invalid gateway address:")


def outbound(text: str) -> bytes:
    return _checked(text, "unspecified multicast broadcast", "Invalid outbound address:")


def dns(text: str) -> bytes:
    return _checked(text, "unspecified multicast broadcast", "Cannot use DNS address", NONE)


def dns_forward(text: str) -> bytes:
    return _checked(text, "unspecified loopback multicast broadcast", "Invalid DNS forwarding address:")


def dns_host(text: str) -> bytes:
    return _checked(text, "unspecified multicast broadcast", "Invalid host nameserver address:")


def mapped(text: str) -> bytes:
    return _checked(text, "unspecified loopback multicast broadcast", "Invalid address to remap to host:", NONE)


def domain(text: str) -> str:
    """A domain for the search list; a final dot is allowed."""
    if not is_name(text):
        raise Fatal(f"Cannot use DNS search domain {text} (ASCII, labels of 1 to 63 characters, 253 in all)")
    return text


def _host(text: str, message: str) -> str:
    """The name of a host (RFC 1123, 2.1; underscores occur), without a final dot."""
    if not is_name(text) or not all(_HOST_LABEL.match(label) for label in text.removesuffix(".").split(".")):
        raise Fatal(f"{message} {text} (labels of 1 to 63 letters, digits and inner hyphens, 253 characters in all)")
    return text.removesuffix(".")


def hostname(text: str) -> str:
    return _host(text, "Invalid hostname:")


def fqdn(text: str) -> str:
    return _host(text, "Invalid FQDN:")


def socket_path(text: str) -> str:
    try:
        size = len(os.fsencode(text))
    except UnicodeEncodeError:
        size = 0
    if not 0 < size <= SOCKET_PATH_MAX or "\0" in text:
        raise Fatal(f"Invalid socket path: {text} (1 to {SOCKET_PATH_MAX} bytes)")
    return text


def fd(text: str) -> int:
    """The descriptor of --fd, also 0 (inetd(8), StandardInput=socket of systemd)."""
    return descriptor(text, "--fd")


def ready_fd(text: str) -> int:
    return descriptor(text, "--ready-fd")


def descriptor(text: str, option: str) -> int:
    """The number of an open descriptor, for `option`."""
    try:
        value = number(text)
    except ValueError:
        value = -1
    if not 0 <= value <= FD_MAX:
        raise Fatal(f"Invalid {option}: {text} (give the number of an open descriptor)")
    return value


def path(text: str, option: str) -> str:
    """The name of a file, for `option`."""
    if not text or "\0" in text:
        raise Fatal(f"Invalid {option}: {'a zero byte in the' if text else 'an empty'} file name (give a path)")
    return text
