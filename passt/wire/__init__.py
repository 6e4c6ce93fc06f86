"""Formats: bytes <-> values. No sockets, no clock, no log.

A module per protocol holds the layout, the RFC section, `parse` and `emit` side by side.
Code that reads bytes of a guest uses `cursor.Cursor` and may raise only `cursor.Malformed`.
"""
