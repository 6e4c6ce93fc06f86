"""Control sockets, their two dialects, statistics as they are shown. Changes of ports go to `ports/forwards.py`."""
