"""Control sockets, their two protocols, output of statistics. `ports/forwards.py` carries out changes of ports."""
