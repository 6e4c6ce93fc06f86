"""Fixtures of the security tests: those of the system tests."""

from ..system.conftest import anyone, ordinary_user, pasta, root, root_pasta, tun_device, user_pasta

__all__ = ["anyone", "ordinary_user", "pasta", "root", "root_pasta", "tun_device", "user_pasta"]
