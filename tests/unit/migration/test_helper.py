"""The helper's protocol, from the side of passt: commands, answers, failures, and a helper that comes late or never."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator

import pytest

from passt.linux import unix
from passt.linux.tcp_repair import OFF, ON, SOCKETS_MAX
from passt.loop.reactor import EPOLLIN
from passt.migration.helper import ANSWER, WAIT, Helper

from ..support import T0, make_context, no_descriptors, reactor


class Office:
    """A helper's socket, and those who connect."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.ctx = make_context()
        self.listener = unix.listen_at(path)
        self.helper = Helper(self.ctx, self.listener)
        self.done: list[int] = []
        self.clients: list[socket.socket] = []

    def ask(self, command: int, *sockets: socket.socket) -> None:
        self.helper.ask(command, sockets, lambda count, now: self.done.append(count), T0)

    def connect(self) -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        client.connect(self.path)
        client.settimeout(5)
        self.clients.append(client)
        reactor(self.ctx).fire(self.listener.fileno(), EPOLLIN, T0)
        return client

    def say(self, client: socket.socket, data: bytes) -> None:
        """The helper's answer."""
        client.send(data)
        self.hear()

    def hear(self) -> None:
        reactor(self.ctx).fire(self.helper._sock.fileno(), EPOLLIN, T0)
        reactor(self.ctx).close_retired()

    def expire(self) -> None:
        services = self.ctx.timers.services
        services.fire(self.helper._timer, T0)  # type: ignore[attr-defined]

    def close(self) -> None:
        self.helper._disconnect()
        reactor(self.ctx).close_retired()
        for client in self.clients:
            client.close()
        self.listener.close()


@pytest.fixture
def office() -> Iterator[Office]:
    with tempfile.TemporaryDirectory() as directory:
        made = Office(f"{directory}/repair")
        yield made
        made.close()


@pytest.fixture
def some() -> Iterator[list[socket.socket]]:
    made = [socket.socket() for _ in range(SOCKETS_MAX + 2)]
    yield made
    for sock in made:
        sock.close()


def taken(client: socket.socket) -> tuple[bytes, int]:
    """A command, and how many sockets came with it."""
    data, fds, _, _ = socket.recv_fds(client, 2, SOCKETS_MAX + 1)
    for fd in fds:
        os.close(fd)
    return data, len(fds)


def test_sockets_go_in_messages_of_253(office: Office, some: list[socket.socket]) -> None:
    client = office.connect()
    office.ask(ON, *some)
    assert taken(client) == (b"\1", 253)
    office.say(client, b"\1")
    assert taken(client) == (b"\1", 2)
    assert office.done == []
    office.say(client, b"\1")
    assert office.done == [255]
    office.ask(OFF, some[0])
    assert taken(client) == (b"\0", 1)
    office.say(client, b"\0")
    assert office.done == [255, 1]
    office.helper.release()
    reactor(office.ctx).close_retired()
    assert client.recv(1) == b""


def test_one_thing_after_the_other(office: Office, some: list[socket.socket]) -> None:
    client = office.connect()
    office.ask(ON, some[0])
    office.ask(OFF, some[0], some[1])
    office.helper.release()  # not before all is done
    assert taken(client) == (b"\1", 1)
    office.say(client, b"\1")
    assert taken(client) == (b"\0", 2)
    office.say(client, b"\0")
    assert office.done == [1, 2]


def test_nothing_to_do_needs_no_helper(office: Office) -> None:
    office.ask(ON)
    assert office.done == [0]


def test_a_helper_that_comes_in_time(office: Office, some: list[socket.socket]) -> None:
    office.ask(ON, some[0])
    assert office.done == []
    client = office.connect()
    assert taken(client) == (b"\1", 1)
    office.say(client, b"\1")
    assert office.done == [1]


def test_no_helper(office: Office, some: list[socket.socket]) -> None:
    office.ask(ON, some[0])
    office.expire()
    assert office.done == [0]
    unasked: list[int] = []
    Helper(office.ctx, None).ask(ON, some, lambda count, now: unasked.append(count), T0)
    assert unasked == [0]
    assert WAIT < ANSWER


@pytest.mark.parametrize("answer", [b"\0", b"\1\1", b""])
def test_a_helper_that_fails(office: Office, some: list[socket.socket], answer: bytes) -> None:
    """The first message counts."""
    client = office.connect()
    office.ask(ON, *some)
    taken(client)
    office.say(client, b"\1")
    taken(client)
    if answer:
        office.say(client, answer)
    else:
        client.close()
        office.hear()
    assert office.done == [253]
    if answer:
        assert client.recv(1) == b""


def test_a_helper_that_does_not_answer(office: Office, some: list[socket.socket]) -> None:
    client = office.connect()
    office.ask(ON, some[0])
    office.expire()
    assert office.done == [0]
    reactor(office.ctx).close_retired()
    taken(client)
    assert client.recv(1) == b""
    office.ask(ON, some[0])
    assert taken(office.connect()) == (b"\1", 1)


def test_a_helper_that_is_gone_before_it_is_asked(office: Office, some: list[socket.socket]) -> None:
    office.connect().close()
    office.ask(ON, some[0])
    assert office.done == [0]
    reactor(office.ctx).close_retired()
    office.ask(OFF, some[0])
    assert taken(office.connect()) == (b"\0", 1)


def test_a_helper_that_talks_unasked_is_disconnected(office: Office) -> None:
    client = office.connect()
    office.say(client, b"\1")
    assert client.recv(1) == b""


def test_a_second_helper_is_turned_away(office: Office) -> None:
    first = office.connect()
    assert office.connect().recv(1) == b""
    first.settimeout(0)
    with pytest.raises(BlockingIOError):
        first.recv(1)


def test_a_connection_that_is_gone_again(office: Office) -> None:
    reactor(office.ctx).fire(office.listener.fileno(), EPOLLIN, T0)
    assert office.helper._sock is None


def test_no_descriptor_for_the_helper(office: Office) -> None:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(5)
    client.connect(office.path)
    with no_descriptors():
        reactor(office.ctx).fire(office.listener.fileno(), EPOLLIN, T0)
    assert client.recv(1) == b""
    client.close()
