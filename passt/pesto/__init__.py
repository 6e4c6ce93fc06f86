"""The client of the control socket. It starts quickly: each module imports only what it needs at once."""
