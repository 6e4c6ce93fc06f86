"""The benchmark: this project side by side with the C original, slirp4netns and bare loopback, in one run.

    lab         namespaces: a host, a peer behind a veth, guests; nothing of the machine's own is touched
    contenders  who is measured, and how each is started for a guest
    load        generators of round trips, connections and datagrams, run by path in a namespace
    rows        what is measured, and how a sample comes about
    report      medians, ratios, tables, JSON
    plot        the pictures of README.md and docs/performance.md, and the table of the latter, from the JSON
    demo        the whole thing on one screen

Links with faults have programs of their own, for docs/reliability.md:

    adversity    transfers through a link with faults and with adverse peers, checked by SHA-256 (`make adversity`)
    faulty_link  the link; adverse_seats puts guests behind it, adverse_load has both ends of the conversations
    adverse_latency  exchanges of a few bytes beside a bulk flow
    long_path    streams and exchanges over a path with a delay
    reliability  the tables and the picture
    lossy        a few rows in detail: single losses, times from connect(2) to the end

Samples are short, and contenders take turns within each round, so that a machine that is slow for a while is slow for
all of them. The table shows medians; the JSON keeps every sample.
"""
