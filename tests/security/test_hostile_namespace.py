"""A namespace whose root is hostile while pasta starts in it and runs: forged answers of netlink, destroyed sockets."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from ..system.support import REPOSITORY, Host, Runner, User, addresses, alive, by_name, enter, new_host, wait_for
from ..system.test_destroyed_sockets import assert_calm, exchange
from ..system.test_forward_start import Place, guest, options, talk

STARTS = 2
START_MAX = 8.0  # s; a start takes about one, and the forger keeps a processor busy
FORWARDED = 5000


@dataclass
class Scene:
    """A namespace of an ordinary user's, on a host with an address; pasta is that user's, or root's."""

    pasta: Runner
    host: Host
    owner: User
    target: int
    stack: ExitStack

    def as_its_root(self, *command: str) -> list[str]:
        enter = ["nsenter", f"--target={self.target}", "--user", "--net", "--preserve-credentials", "--"]
        return self.owner.command([*enter, *command])


@pytest.fixture
def scene(anyone: User, ordinary_user: User) -> Iterator[Scene]:
    with ExitStack() as stack:
        host = stack.enter_context(new_host("veth nic"))
        host.ip("address", "add", "192.0.2.2/24", "dev", "nic")
        host.ip("link", "set", "nic", "up")
        host.ip("route", "add", "default", "via", "192.0.2.1")
        owner, pasta = Runner(ordinary_user), Runner(anyone, host)
        stack.callback(owner.close)
        stack.callback(pasta.close)
        yield Scene(pasta, host, ordinary_user, owner.namespace(), stack)


def test_forged_answers_are_not_believed_and_hold_up_no_start(scene: Scene) -> None:
    forger = subprocess.Popen(
        scene.as_its_root(scene.owner.python, "-m", "tests.security.forger"),
        cwd=REPOSITORY, env=scene.owner.env, stdout=subprocess.PIPE,
    )  # fmt: skip
    scene.stack.callback(forger.wait)
    scene.stack.callback(forger.kill)
    assert forger.stdout is not None
    with forger.stdout:
        assert forger.stdout.readline() == b"ready\n"
        for i in range(STARTS):
            began = time.monotonic()
            daemon = scene.pasta.daemon("--config-net", "-I", f"tap{i}", *options(T="auto"), str(scene.target))
            assert time.monotonic() - began < START_MAX
            assert scene.pasta.said.count("Couldn't") == 0, scene.pasta.said
            forger.send_signal(signal.SIGSTOP)  # ip(8) believes it, and fails
            links = json.loads(enter(scene.target, "ip", "-j", "address"))
            forger.send_signal(signal.SIGCONT)
            assert addresses(by_name(links, f"tap{i}")) == ["192.0.2.2/24"]
            os.kill(daemon, 15)
            wait_for(lambda daemon=daemon: not alive(daemon), "it ends")  # type: ignore[misc]
    assert forger.poll() is None, "the forger ended before"


def test_what_its_root_destroys_is_opened_again(scene: Scene) -> None:
    """Listeners of -T and -U, and a spliced UDP flow."""
    daemon = scene.pasta.daemon("--config-net", *options(T=f"{FORWARDED}", U=f"{FORWARDED}"), str(scene.target))
    outside = scene.stack.enter_context(Place(scene.host.path))
    inside = scene.stack.enter_context(guest(scene.target))
    server = outside.server(FORWARDED, address="127.0.0.1")
    udp = outside.server(FORWARDED, socket.SOCK_DGRAM, "127.0.0.1")
    client = inside.sock(kind=socket.SOCK_DGRAM)
    client.connect(("127.0.0.1", FORWARDED))
    for _ in range(2):
        talk(server, inside.client(FORWARDED))
        exchange(udp, client)
        for which in ("-lt", "-au"):
            command = scene.as_its_root("ss", "-HK", which, "sport", "=", f":{FORWARDED}")
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            assert done.stdout, f"no socket was found: {done.stderr}"
        assert_calm(daemon)
        wait_for(lambda: inside.listening(FORWARDED), "the port is open again")
        server.accept()[0].close()
