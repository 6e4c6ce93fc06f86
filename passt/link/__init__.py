"""The ways to and from the guest, frame by frame: devices, sockets, captures. It imports no protocol above IP."""
