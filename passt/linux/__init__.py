"""The kernel, wrapped once: system calls that the standard library lacks, netlink, namespaces, the tap device."""
