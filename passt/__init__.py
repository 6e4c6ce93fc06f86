"""passt and pasta in pure Python: user-mode networking for namespaces and virtual machines.

One process, one `select.epoll` loop. It translates between the Ethernet frames of a guest and ordinary sockets of the
host, without privileges. The work per byte is left to kernels: frames of up to 64 KiB cross the tap with their
checksums unfinished and their segments uncut (vnet header, TSO, USO), payload stays in the sockets until it is
acknowledged, and runs of datagrams are one system call (UDP_SEGMENT, UDP_GRO, recvmmsg).

Where a packet goes
===================

    guest -> host   tap fd, or a machine's UNIX socket -> stream -> tap (packet pool, classify, group by flow)
                        ARP -> arp    NS, RS -> ndp    UDP 67 -> dhcp    UDP 547 -> dhcpv6         answers -> link
                        echo -> icmp    UDP -> udp    TCP -> tcp      flow, or a new one: fwd -> host socket
                        queries for the host's resolvers -> dns -> one of them, or the next (policy.resolvers)
    host -> guest   socket -> tcp / udp / icmp -> pre-cooked header and a view of the payload -> link
                    listening socket -> listen -> tcp / udp_in, and on as above
                    link: as it is to the tap fd; cut and summed (link.gso) to the UNIX socket (link.stream_socket),
                    or to a tap that was given to us without a vnet header (link.plain_tap)
    loopbacks       listening socket -> listen -> tcp_splice / udp_in, udp_splice -> socket of the other side
    bound ports     kernel's tables of both sides -> scan -> listen: `auto` opens and closes listening sockets
    other rules     control sockets -> control -> control_api, slirp_api -> forwards -> listen, another Config
    resolv.conf     directory watches -> resolv_conf -> conf_dns -> another Config
    another Config  policy.settings -> all that keep a part of it, then ndp, scan
    time            timerfds -> tcp / udp / icmp / ndp, each handed `now`

Layers: a module imports from lower ones only (tests/test_layers.py holds that)
================================================================================

    8  vm                                 `python -m passt.vm`
    7  cli, pesto*                        the commands
    6  conf*, daemon*, wiring             argv -> frozen Config; the composition root
       control_api, slirp_api             what is said on control sockets
    5  pasta*, passt, qrap                namespaces and the command in them; the socket of a virtual machine
       isolation, seccomp                 what we give up before the first byte of the guest is read
       terminal, trace                    a terminal that is shared; --trace
       resolv_conf, control               the host's resolvers; control sockets
    4  tap, stream, listen*, scan         the ways in: frames; connections and datagrams of others
       forwards, metrics                  rules that change; what is counted, as it is shown
    3  arp ndp dhcp dhcpv6                configuration services
       icmp udp* tcp* dns                 the data plane
    2  core                               loop, timers, packet pool, the way out, flows, rules, resolvers
    1  linux, log                         the kernel, wrapped once
    0  wire, addr                         formats; addresses as packed bytes

One writer per thing: `tap` writes what was observed of the guest, `policy.settings` the configuration in force,
`flow.table` the state of a flow, `tcp_engine.conn` the events of a connection, `link.tap_device` or `link.plain_tap`
the tap device, `link.stream_socket` the UNIX socket.

Vocabulary
==========

    guest           the namespace or virtual machine that we serve
    tap             the link to it
    host            the machine we run on, and what its sockets reach
    peer            whom a flow of the guest talks to, as the guest knows it
    flow            one conversation: a TCP connection, UDP datagrams between two endpoints, pings with one identifier
    super-frame     a frame whose payload is longer than a segment: a kernel cuts it, or never has to
    pre-cooked      a header written once per flow, of which only lengths, numbers and sums change
"""

__version__ = "0.1.0"

PASTA, PASST = "pasta", "passt"  # the two modes: a namespace, a virtual machine
