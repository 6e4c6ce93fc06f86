"""Loopback to loopback, from socket to socket without the tap. It sees no frame."""
