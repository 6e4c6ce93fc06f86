"""The interpreter's habits, in a process of its own: names of sockets, warnings and exceptions without system calls."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import socket, sys, threading, warnings
from passt.sandbox import interpreter
interpreter.prepare()
sock = socket.socket()
print(repr(sock) == f"<socket {sock.fileno()}>")
warnings.warn("never seen")
class Careless:
    def __del__(self):
        raise ValueError("finalizer")
Careless()
thread = threading.Thread(target=lambda: 1 / 0)
thread.start()
thread.join()
"""


def test_habits() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "True\n")
    assert done.stderr.splitlines() == [
        "An exception that could not be handled: ValueError('finalizer')",
        "An exception that could not be handled: ZeroDivisionError('division by zero')",
    ]
