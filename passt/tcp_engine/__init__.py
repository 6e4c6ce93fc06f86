"""The parts of TCP through the tap; `tcp.py` is its face. They meet in the connection (`conn.py`)."""
