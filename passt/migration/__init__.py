"""Migration of a machine with its TCP connections: the helper that may use TCP_REPAIR, and the steps of a migration."""
