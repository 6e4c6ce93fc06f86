"""Machinery without protocol knowledge: the loop, timers, the packet pool, the way out, flows, forwarding rules."""
