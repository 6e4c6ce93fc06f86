"""What others connect to: listening sockets, the rules in force, ports that follow those of the other side."""
