"""Formats: bytes <-> values, and nothing else. No sockets, no clock, no log.

A module per protocol holds the layout, the RFC section, `parse` and `emit` side by side.
Whatever reads bytes of a guest does so through `cursor.Cursor` and may raise only `cursor.Malformed`.
"""
