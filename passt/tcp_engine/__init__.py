"""The parts of TCP through the tap. `tcp.py` is the face; the connection (`conn.py`) is what they share."""
