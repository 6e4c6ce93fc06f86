"""The parts of UDP through the tap; `udp.py` is its face."""
