"""An attacker in the daemon after the lock-down (`intruder.py`): no right over the host's network is left, for
any user that starts it, and for any owner of the guest's namespace.

The host is a network namespace of root's: as the machine's own, its owner is the initial user namespace.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest

from ..system.support import REPOSITORY, Host, Runner, User, new_host
from ..system.test_forward_start import Place
from .intruder import ATTACKS

ON_THE_HOST = [name for name in ATTACKS if name != "mark_by_option"]
NIC = "nic"


@dataclass
class Scene:
    """A host with what an attacker may want, and a daemon with a guest."""

    host: Host
    outside: Place
    pasta: Runner
    guest: Callable[[], list[str]]  # creates it; the program and its options
    connection: tuple[socket.socket, socket.socket]

    def attack(self, *attacks: str) -> subprocess.CompletedProcess[str]:
        told = {
            "attacks": attacks,
            "victim": "victim",
            "nic": next(link["ifindex"] for link in self.host.show("link") if link["ifname"] == NIC),
            "bait": 2,
            "connection": [sock.getsockname()[1] for sock in self.connection],
            "udp": 9,
        }
        user = self.pasta.user
        intruder = [user.python, "-m", "tests.security.intruder", json.dumps(told), *self.guest()]
        command, more = user.command(intruder, self.host), {"env": user.env, "cwd": REPOSITORY, "timeout": 60}
        return subprocess.run(command, capture_output=True, text=True, check=False, **more)  # type: ignore[call-overload,no-any-return]


PASTA = ["pasta", "-q", "--config-net", "--follow-link", "-T", "auto", "-t", "auto"]
MACHINES = "root's machine", "a user's machine"
GUESTS = "root's", "a user's", "spawned", "spawned by one who stays root", "of an ordinary user's pasta", *MACHINES


@pytest.fixture(params=GUESTS)
def scene(
    request: pytest.FixtureRequest, root_pasta: Runner, user_pasta: Runner, ordinary_user: User
) -> Iterator[Scene]:
    command = ["--", "sleep", "60"]
    with ExitStack() as stack:
        host = stack.enter_context(new_host(f"veth {NIC}", "link add victim type veth peer name victim2"))
        host.ip("address", "add", "192.0.2.2/24", "dev", NIC)
        host.ip("link", "set", NIC, "up")
        host.ip("route", "add", "default", "via", "192.0.2.1")
        outside = stack.enter_context(Place(host.path))

        def of_root() -> list[str]:
            target = stack.enter_context(new_host("link add bait type veth peer name bait2"))
            return [*PASTA, "--netns", target.path]

        path = f"/tmp/passt-security-{os.getpid()}-{time.monotonic_ns()}.socket"
        machine = ["passt", "-q", "--vhost-user", "-s", path]
        stack.callback(remove, path)
        stack.callback(remove, f"{path}.repair")
        guests: dict[str, tuple[Runner, Callable[[], list[str]]]] = {
            "root's": (root_pasta, of_root),
            "a user's": (root_pasta, lambda: [*PASTA, str(user_pasta.namespace())]),
            "spawned": (root_pasta, lambda: [*PASTA, *command]),
            "spawned by one who stays root": (root_pasta, lambda: [*PASTA, "--runas", "0", *command]),
            "of an ordinary user's pasta": (user_pasta, lambda: [*PASTA, str(user_pasta.namespace())]),
            "root's machine": (root_pasta, lambda: machine),
            "a user's machine": (user_pasta, lambda: machine),
        }
        pasta, guest = guests[request.param]
        server = outside.server(4000)
        client = outside.client(4000)
        accepted = server.accept()[0]
        yield Scene(host, outside, pasta, guest, (client, accepted))
        for sock in (accepted, client):
            sock.close()


def remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def test_no_attack_on_the_hosts_network_succeeds(scene: Scene) -> None:
    done = scene.attack(*ON_THE_HOST)
    assert done.returncode == 0, done.stderr
    outcome: dict[str, Any] = json.loads(done.stdout)
    assert set(outcome) == set(ON_THE_HOST)
    assert {name: tried for name, tried in outcome.items() if 0 in tried} == {}
    assert set(outcome["mark_in_control_message"]) == {errno.EPERM}
    assert outcome["delete_link"], "there is no socket to try, so nothing is shown"
    assert outcome["destroy_socket"] or scene.guest()[0] == "passt"
    names = {link["ifname"] for link in scene.host.show("link")}
    assert names == {"lo", NIC, f"{NIC}-far", "victim", "victim2"}
    client, accepted = scene.connection
    client.send(b"still here")
    assert accepted.recv(100) == b"still here"


def test_no_mark_by_an_option(scene: Scene) -> None:
    done = scene.attack("mark_by_option")
    assert (done.returncode, done.stdout) == (-signal.SIGSYS, "")
