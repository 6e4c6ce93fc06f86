"""The client of the control socket. It starts quickly: it imports what it needs, and only then."""
