"""The parts of UDP through the tap, and DNS. `udp.py` is the face; `flow.py` is what they share."""
