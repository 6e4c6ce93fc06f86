"""The ways to and from the guest: devices, sockets, frames, captures. No protocol above Ethernet is decided here."""
