"""The client of the control socket. It starts quickly: each module imports only modules that it needs at once."""
