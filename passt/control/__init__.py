"""Control sockets and what is said on them, and what is counted, as it is shown."""
