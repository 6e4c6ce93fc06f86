"""passt and pasta in pure Python: user-mode networking for namespaces and virtual machines.

One process, one `select.epoll` loop. It translates between the Ethernet frames of a guest and ordinary sockets of the
host, without privileges. The work per byte is left to kernels: frames of up to 64 KiB cross the tap with their
checksums unfinished and their segments uncut (vnet header, TSO, USO), payload stays in the sockets until it is
acknowledged, and runs of datagrams are one system call (UDP_SEGMENT, UDP_GRO, recvmmsg).

Where a packet goes
===================

    guest -> host   tap fd, or a machine's UNIX socket -> link.stream_input -> tap (classify, group by flow)
                        ARP -> arp    NS, RS -> ndp    UDP 67 -> dhcp    UDP 547 -> dhcpv6         answers -> link
                        echo -> icmp    UDP -> udp    TCP -> tcp         flow, or a new one: policy.forwarding
                                                                         -> host socket
                        queries for the host's resolvers -> udp_engine.dns -> the resolver that policy.resolvers picks
    host -> guest   socket -> tcp / udp / icmp -> pre-cooked header and a view of the payload -> link
                    listening socket -> ports.listen -> tcp_engine.opening / ports.udp_in, and on as above
                    link.tap_device: as it is to the tap fd; link.stream_socket: cut and summed (link.gso) to the UNIX
                    socket; link.plain_tap: likewise to a tap that was given to us without a vnet header
    loopbacks       listening socket -> ports.listen -> splice.tcp, or ports.udp_in -> splice.udp -> socket of the
                    other side
    bound ports     kernel's tables of both sides -> ports.scan -> ports.listen: `auto` opens and closes sockets
    other rules     control sockets -> control.server -> control.api, control.slirp -> ports.forwards -> ports.listen,
                    another Config
    resolv.conf     directory watches -> conf.resolv_conf -> conf.names -> another Config
    another Config  policy.settings -> all that keep a part of it, then ndp, ports.scan
    time            timerfds -> tcp / udp / icmp / ndp, each handed `now`

Where a change goes: folders and modules of this level, each above all that it imports
======================================================================================

    pesto, qrap             programs of their own: the client of the control socket; QEMU's descriptor wrapper
    cli, __main__, vm       the commands: `pasta`, `passt`; `python -m passt.vm` is passt
    daemon                  the start in its steps, the wiring of all services, the end, reports
    pasta, passt            the two faces: namespaces and the command in them; the socket of a virtual machine
    namespace               the first process of a namespace, the supervisor of a command, a shared terminal
    sandbox, seccomp        what is given up before the first byte of the guest is read
    control                 control sockets, their two dialects, what is counted as it is shown
    conf                    argv -> frozen Config; options, port specifications, --help, completions, resolv.conf
    ports                   the ways in of host clients: listening sockets, rules that change, automatic ports
    tap                     the way in of frames: classified, grouped by flow, handed on
    splice                  loopback to loopback without the tap
    udp, udp_engine         UDP through the tap, and queries to resolvers
    tcp, tcp_engine         TCP through the tap
    arp ndp dhcp dhcpv6     configuration services
    icmp                    ping
    flow                    what all flows share: the table, idle limits, errors, statistics; the Context
    link                    devices and sockets that lead to the guest, the packet pool, captures
    policy                  Config and the one in force, rules, address translation, resolvers: no sockets, no clock
    loop                    epoll, timers, directory watches; walks over many, where a fault stays with one (`each`)
    linux                   the kernel, wrapped once
    log, log_file           messages and where they go
    wire, addr, calls       formats; addresses as packed bytes; declarations of system calls

tests/test_layers.py has the order and fails on an import upward and on a circle. Each module has a test file at the
same place in tests/unit.

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
