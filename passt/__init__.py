"""passt and pasta in pure Python: user-mode networking for namespaces and virtual machines.

One process, one `select.epoll` loop. It translates between the Ethernet frames of a guest and ordinary sockets of the
host, without privileges. The work per byte is left to kernels: frames of up to 64 KiB cross the tap with their
checksums partial and their payload unsegmented (vnet header, TSO, USO), payload stays in the sockets until it is
acknowledged, and a batch of datagrams is one system call (UDP_SEGMENT, UDP_GRO, recvmmsg).

Where a packet goes
===================

    guest -> host   tap fd, a machine's UNIX socket, or its rings -> back end of link -> tap (classify, group by flow,
                                                                                          verify: link.verify)
                        ARP -> arp    NS, RS -> ndp    UDP 67 -> dhcp    UDP 547 -> dhcpv6         answers -> link
                        echo -> icmp    UDP -> udp    TCP -> tcp         flow, or a new one: policy.forwarding
                                                                         -> host socket
                        ICMP errors -> flow.guest_errors -> tcp, ports.udp_refused
                        IGMP, MLD -> igmp -> udp_engine.groups
                        queries for the host's resolvers -> udp_engine.dns -> the resolver that policy.resolvers picks
                        datagrams to groups -> udp_engine.group_sender
    host -> guest   socket -> tcp / udp / icmp -> pre-cooked header and a view of the payload -> link
                    listening socket -> ports.listen -> tcp_engine.opening / ports.udp_in, then as above; until the
                    guest has spoken, in flow.neighbours
                    link.tap_device: unchanged to the tap fd; link.stream_socket: segmented, with checksums (link.gso),
                    to the UNIX socket, and link.packet_socket as packets; link.plain_tap: likewise to an inherited tap
                    without a vnet header;
                    link.vhost_user: into the rings of a machine that shares its memory
    loopbacks       listening socket -> ports.listen -> splice.tcp, or ports.udp_in -> splice.udp -> socket in the
                    other namespace
    bound ports     kernel's tables of both namespaces -> ports.scan -> ports.listen: `auto` opens and closes sockets
    migration       the machine's state and its sockets, by link.device_state and passt-repair -> migration.steps
                    -> tcp_engine.moving, on both hosts
    other rules     control sockets -> control.server -> control.json_api, control.slirp -> ports.forwards
                    -> ports.listen, another Config
    resolv.conf     directory watches -> conf.resolv_conf -> conf.names -> another Config
    host's network  netlink -> daemon.following -> linux.host_tables -> conf.follow -> linux.tap_change, another Config,
                    flow.source, ports.forwards
    its neighbours  netlink -> linux.host_tables -> daemon.lan -> policy.lan, which has the MAC address for each
                    frame's source -> flow.headers, arp, ndp
    another Config  policy.settings -> subscribers, then ndp, ports.scan
    time            timerfds -> tcp / udp / icmp / ndp / flow.neighbours, each with `now`

Where a change goes: folders and modules of this level, each above its imports
==============================================================================

    launch                  the start of the installed commands: `commands/pasta` is their file
    pesto, qrap, repair     programs of their own: the client of the control socket; QEMU's descriptor wrapper; the
                            helper for migration
    cli, __main__, vm       the commands: `pasta`, `passt`; `python -m passt.vm` is passt
    daemon                  the start in its steps, the wiring of all services, the end, reports, --doctor
    pasta, passt            the two faces: namespaces and the command in them; the socket of a virtual machine
    namespace               a namespace's first process, its pinning and its end; the command's supervisor and terminal
    sandbox, seccomp        rights that are given up before the first byte of the guest is read
    migration               the way of a machine to another host: its steps, and the helper that they need
    control                 control sockets, their two protocols, output of statistics
    conf                    argv -> frozen Config; options, port specifications, --help, completions, resolv.conf; the
                            command line of slirp4netns
    ports                   clients of the host: listening sockets, changes of rules, automatic ports
    tap                     input of frames: classified, grouped by flow, passed to their protocol
    splice                  loopback to loopback without the tap
    igmp                    what the guest joins, followed on the host's interface
    udp, udp_engine         UDP through the tap, queries to resolvers, multicast groups
    tcp, tcp_engine         TCP through the tap
    arp ndp dhcp dhcpv6     configuration services
    icmp                    ping; like the services above, it registers with flow.services
    flow                    common to all flows: groups of a batch, the table, limits, room for new ones, errors; where
                            the guest is; the Context
    link                    back ends: devices and sockets that lead to the guest; the packet pool, captures
    policy                  Config and the one in force, rules, address translation, resolvers: no sockets, no clock
    loop                    epoll, timers, directory watches; walks over many, where a fault stays with one (`each`)
    log_file                a file of limited size for messages
    linux                   the kernel, wrapped once
    log                     messages and their targets
    wire, addr, calls       formats; addresses as packed bytes; declarations of system calls
    drops                   why something is dropped: the names of all counters
    lean                    parts of the standard library that would cost a start too much

    to add               touch
    -------------------  --------------------------------------------------------------------------------------------
    an option            a row in conf.options, its argument in conf.values, its use (of the data plane: a field of
                         policy.config, taken by settings.subscribe), a paragraph in passt.1, `make completions`
    a DHCP option        wire.dhcp (code), dhcp.configuration (value); dhcp.DISPENSABLE, if it may be left out of a
                         packet that is full
    a service            a module beside arp that registers with flow.services, a line in daemon.wiring
    a back end           a module in link with the methods of link.backend.Link, a line in link.choose, the option that
                         selects it (daemon.passt, daemon.pasta); HOT in setup.py, as all back ends
    a counter            its owner or flow.stats, control.metrics, the dashboard; a reason of a drop: drops
    a control command    control.json_api, pesto.command (TABLE, and `_print` for a query), pesto.1, `make completions`,
                         fuzz.targets.control
    a system call        CALLS of the module that makes it, then `make docs-seccomp`; the filter is built from the
                         modules that are loaded (daemon.seccomp_table has those that are loaded late). Their number is
                         in docs/security.md, and in test_seccomp and test_filter_in_force of tests/security
    an end of TCP        tcp_engine.table, then `make docs-ends`
    a timeout of TCP     tcp_engine.rtt, constants in tcp_engine.conn, `timeout` there, the table in tcp; the first one,
                         of SYN: tcp_engine.table.begin_handshake, and before any round trip link.backend's rto_min
    a setting that may   a writer that calls policy.settings.Settings.replace. The host's addresses and routes are
    change at run time   followed by daemon.following: its policy is conf.follow

tests/test_layers.py has the order and fails on an import upward and on a circle. Each module has a test file at the
same place in tests/unit.

Each state has one writer: `flow.neighbours` writes the guest's addresses, `daemon.lan` the MAC addresses of the host's
neighbours, `policy.settings` the configuration in force, `flow.table` the state of a flow, `tcp_engine.conn` the events
of a connection, the back end in `link` the device or the socket that leads to the guest.

Vocabulary
==========

    guest           the namespace or virtual machine that the process serves
    tap             the link to it
    host            the machine that the process runs on, and the network that its sockets reach
    peer            the remote endpoint of a guest's flow, with the address that the guest uses
    flow            a TCP connection, the UDP datagrams between two endpoints, or the pings with one identifier
    super-frame     a frame with more payload than a segment: a kernel segments it, or it is never segmented
    half-open       asked for by one side, and not answered by the other one
    hole            bytes that are missing in front of others that came
    scoreboard      what is known of data in flight to the guest: SACKed, lost, sent again
    pre-cooked      a header written once per flow, of which only lengths, numbers and checksums change
"""

__version__ = "0.1.0"

NEVER = float("inf")  # a time that does not come
PASTA, PASST = "pasta", "passt"  # the two modes: a namespace, a virtual machine
