"""Loopback to loopback, from socket to socket without the tap. Nothing here knows of frames."""
