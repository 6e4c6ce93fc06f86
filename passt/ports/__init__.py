"""The ways in of host clients: listening sockets, the rules in force, ports that follow the other side's."""
