"""Round trips of the link to the guest, and how long to wait for an acknowledgement (RFC 6298, RFC 8985).

    rto = srtt + max(G, 4 x rttvar), between `Link.rto_min` and RTO_MAX; doubled at each expiry
    pto = 2 x the least round trip, at least PTO_MIN (RFC 8985, 7.2); or rto, up to PTO_DELAYED_ACK, if that is more

One segment of a flight is timed, until it is acknowledged or SACKed. None that was retransmitted is (Karn; RFC 6298,
3). So without SACK a doubled RTO stays until data has gone through at the first attempt, unless a partial
acknowledgement shows that there was a loss indeed. With SACK it is computed again when the guest acknowledges new data:
D-SACK tells of retransmissions that were not needed.

The handshake is an exception. The time since the last SYN is a lower bound of the round trip, and later samples correct
the estimate: a lost SYN would make every later loss cost a second otherwise. The time since the first one is an upper
bound, and the timeout of the next SYN follows from those of earlier handshakes, since all connections share the link
(RFC 9040): three times that round trip, up to RTO_INIT_MAX (`TcpTable.begin_handshake`). The very first one has
`rto_min`.

RFC 6298 has a minimum of 1 s, for paths across the Internet. This link is a queue in the same machine. A retransmission
that was not needed costs a frame there and no other flow's share of a network, and a late one stops the guest.

A guest may delay its acknowledgement of a single segment. Linux delays it by 40 ms, unless it has data to send. A probe
that comes before is answered by a D-SACK; from then on the connection waits for PTO_DELAYED_ACK.

The least round trip takes the place of SRTT in `pto`: the guest's delays are part of SRTT, and a lost last segment
would wait for twice their length. So the delays of a busy guest count up to PTO_DELAYED_ACK only. The least round trip
follows the link when that gets slower, by the round trip of a needless probe.
"""

from __future__ import annotations

from typing import Final

from .conn import RTO_MAX, TcpConn

GRANULARITY: Final = 0.001  # s, G
PTO_MIN: Final = 0.010  # s
PTO_DELAYED_ACK: Final = 0.045  # s, more than Linux delays an acknowledgement, and less than 50 ms
LOCAL: Final = 0.001  # s: estimates and samples up to this have the minimum timeouts, whatever they are
_HALF_LOCAL: Final = LOCAL / 2


def sample(conn: TcpConn, rtt: float, rto_min: float) -> None:
    """A round trip took `rtt` seconds (RFC 6298, 2.2 and 2.3)."""
    if conn.srtt:
        conn.rttvar += (abs(conn.srtt - rtt) - conn.rttvar) / 4
        conn.srtt += (rtt - conn.srtt) / 8
        conn.min_rtt = min(conn.min_rtt, rtt)
    elif 0 < rtt <= LOCAL:
        conn.srtt = conn.min_rtt = LOCAL  # the objects are those of all connections: own ones would cost each 64 bytes
        conn.rttvar = _HALF_LOCAL
    else:
        conn.srtt = conn.min_rtt = rtt
        conn.rttvar = rtt / 2
    set_rto(conn, rto_min)


def set_rto(conn: TcpConn, rto_min: float) -> None:
    """Compute the timeouts from the estimates (RFC 6298, 2.3)."""
    if conn.srtt <= LOCAL and conn.rttvar <= LOCAL / 2 and conn.sack and not conn.delays_acks:
        conn.rto, conn.pto = rto_min, PTO_MIN  # what follows has the same result
        return
    estimate = conn.srtt + max(4 * conn.rttvar, GRANULARITY)
    conn.rto = min(max(estimate, rto_min), RTO_MAX)
    if conn.sack:
        usual = PTO_DELAYED_ACK if conn.delays_acks else min(max(estimate, PTO_MIN), PTO_DELAYED_ACK)
        conn.pto = max(2 * conn.min_rtt, usual)
    else:
        conn.pto = conn.rto  # RFC 8985, 7.1: no probe without SACK


def needless_probe(conn: TcpConn, rtt: float) -> None:
    """The guest had the data of a probe already, as it says `rtt` seconds after the probe (RFC 8985, 7.4.2)."""
    conn.delays_acks = True
    conn.min_rtt = max(conn.min_rtt, rtt)
    conn.pto = max(2 * conn.min_rtt, PTO_DELAYED_ACK)
