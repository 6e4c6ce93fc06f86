"""--doctor: a machine where all is well, and each thing that may be missing."""

from __future__ import annotations

import errno
import io
import os
import resource
import socket
from collections.abc import Iterable
from typing import Any

import pytest

from passt.conf.resolv_conf import ResolvConf
from passt.daemon import doctor
from passt.daemon.doctor import FAIL, NOTE, OK, Finding
from passt.linux import host_tables, tun
from passt.linux.routes import Host
from passt.linux.tun import Tap
from passt.log import Fatal
from passt.policy.config import PASST, PASTA
from passt.sandbox import isolation


def verdicts(found: Iterable[Finding]) -> list[str]:
    return [finding.verdict for finding in found]


def only(found: Iterable[Finding]) -> Finding:
    (finding,) = found
    return finding


# The report --------------------------------------------------------------------------------------------------------


def report(monkeypatch: pytest.MonkeyPatch, *findings: Finding) -> doctor.Report:
    monkeypatch.setattr(doctor, "CHECKS", (lambda mode: findings,))
    return doctor.report(PASTA)


def test_notes_are_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    found = report(monkeypatch, Finding(OK, "this"), Finding(NOTE, "that", "do something"))
    assert found.status == 0
    assert found.text.splitlines()[2:] == [
        "  ok    this",
        "  note  that",
        "        -> do something",
        "",
        "pasta can run here; 1 note.",
    ]


@pytest.mark.parametrize("cause", ["As root", "as root, for long fast paths"])
def test_a_command_to_be_copied_is_one_line(cause: str, monkeypatch: pytest.MonkeyPatch) -> None:
    command = f'sysctl -w net.ipv4.tcp_rmem="4096 131072 {doctor.BUFFER * 4}", tcp_wmem likewise'
    found = report(monkeypatch, Finding(NOTE, "that", f"{cause}: {command}"))
    assert found.text.splitlines()[3:5] == [f"        -> {cause}:", f"           {command}"]
    assert max(map(len, found.text.splitlines())) <= 80
    found = report(monkeypatch, Finding(NOTE, "that", "as root: sysctl -w a=1"))
    assert "        -> as root: sysctl -w a=1" in found.text.splitlines()


def test_a_failure_is_the_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    found = report(monkeypatch, Finding(FAIL, "this"), Finding(FAIL, "that"))
    assert found.status == 1
    assert found.text.endswith("pasta can't run here: 2 failures, 0 notes.\n")


def test_lines_of_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    found = report(monkeypatch, Finding(NOTE, "word " * 50, "cure " * 50))
    assert max(map(len, found.text.splitlines())) <= 80


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(errno.EIO, "Input/output error", "/proc/x"),
            "The check of low ports failed: /proc/x: Input/output error",
        ),
        (ImportError("none", name="pyroute2"), "Not checked without the Python module pyroute2: low ports"),
    ],
    ids=str,
)
def test_a_check_that_fails_itself(error: Exception, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def low_ports(mode: str) -> Iterable[Finding]:
        raise error
        yield

    monkeypatch.setattr(doctor, "CHECKS", (low_ports,))
    found = doctor.report(PASST)
    assert found.status == 1
    assert f"  FAIL  {said}\n" in found.text


# Checks ------------------------------------------------------------------------------------------------------------


def test_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdicts(doctor.modules(PASTA)) == [OK]
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name in ("scapy", "numpy") else name)
    numpy, scapy = doctor.modules(PASTA)
    assert (numpy.verdict, scapy.verdict) == (FAIL, NOTE)
    assert "pip install scapy" in scapy.cure


def test_the_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(doctor.system_call_filter(PASST)).verdict == OK

    def no_binding(*_: Any) -> None:
        raise Fatal("no binding")

    monkeypatch.setattr(doctor.seccomp, "build", no_binding)
    assert only(doctor.system_call_filter(PASST)) == Finding(FAIL, "no binding")


def in_new_namespaces(monkeypatch: pytest.MonkeyPatch, mode: str, tap: Tap | OSError) -> list[Finding]:
    def open_tap(name: str) -> Tap:
        if isinstance(tap, OSError):
            raise tap
        return tap

    monkeypatch.setattr(isolation, "gain_rights", lambda: None)
    monkeypatch.setattr(doctor, "unshare", lambda flags: None)
    monkeypatch.setattr(tun, "open_tap", open_tap)
    return doctor._in_namespaces(mode)


def test_a_tap_with_and_without_offloads(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdicts(in_new_namespaces(monkeypatch, PASTA, Tap(9, "x", csum=True, tso=True, uso=True))) == [OK, OK]
    found = in_new_namespaces(monkeypatch, PASTA, Tap(9, "x", csum=True, tso=True, uso=False))
    assert found[1].verdict == NOTE
    assert "USO (Linux 6.2)" in found[1].said


def test_no_tap(monkeypatch: pytest.MonkeyPatch) -> None:
    why = OSError(errno.ENOENT, "Failed to open /dev/net/tun: No such file or directory")
    assert in_new_namespaces(monkeypatch, PASTA, why)[1] == Finding(FAIL, why.strerror)
    assert verdicts(in_new_namespaces(monkeypatch, PASST, why)) == [OK], "a machine needs none"


def test_namespaces_are_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(flags: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(isolation, "gain_rights", lambda: None)
    monkeypatch.setattr(doctor, "unshare", refuse)
    found = only(doctor._in_namespaces(PASTA))
    assert found.verdict == FAIL
    assert "user.max_user_namespaces" in found.cure


def test_what_the_child_finds_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    said = [Finding(OK, "one"), Finding(NOTE, "two", "a cure, with 'signs'")]
    monkeypatch.setattr(doctor, "_as_user", lambda mode: said)
    assert list(doctor.rights(PASTA)) == said


def test_the_child_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_as_user", lambda mode: os.kill(os.getpid(), 9))
    assert only(doctor.rights(PASTA)).verdict == FAIL


def test_ping(monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[OSError | None] = [OSError(errno.EAFNOSUPPORT, "no IPv4"), PermissionError()]

    def make(*_: Any) -> Any:
        error = errors.pop(0)
        if error is not None:
            raise error
        return io.BytesIO()

    monkeypatch.setattr(doctor.socket, "socket", make)
    found = only(doctor._ping())
    assert found.verdict == NOTE
    assert found.cure.endswith('sysctl -w net.ipv4.ping_group_range="0 2147483647"')
    errors[:] = [None]
    assert only(doctor._ping()).verdict == OK


def test_a_host_that_is_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_tables, "read_host", lambda: Host(links=(), addresses=(), routes4=(), routes6=()))
    assert verdicts(doctor.host_network(PASTA)) == [NOTE, NOTE]


def test_resolvers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Known:
        current = ResolvConf((socket.inet_aton("192.0.2.53"),))

    monkeypatch.setattr(doctor, "Follower", Known)
    assert only(doctor.resolvers(PASTA)) == Finding(OK, "Resolvers in /etc/resolv.conf: 192.0.2.53")
    monkeypatch.setattr(Known, "current", ResolvConf())
    assert only(doctor.resolvers(PASTA)).verdict == NOTE


@pytest.mark.parametrize(("uid", "first", "verdict"), [(0, "1024", OK), (1000, "1024", NOTE), (1000, "0", OK)])
def test_low_ports(uid: int, first: str, verdict: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    path = tmp_path / "first"
    path.write_text(f"{first}\n")
    monkeypatch.setattr(doctor, "UNPRIVILEGED_PORT", str(path))
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    assert only(doctor.low_ports(PASTA)).verdict == verdict


@pytest.mark.parametrize(("hard", "verdict"), [(1024, NOTE), (20000, OK)])
def test_descriptors(hard: int, verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (hard, hard))
    assert only(doctor.descriptors(PASTA)).verdict == verdict


@pytest.mark.parametrize(("largest", "verdict"), [(212992, NOTE), (6 << 20, OK)])
def test_socket_buffers(largest: int, verdict: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    for name in ("tcp_rmem", "tcp_wmem"):
        (tmp_path / name).write_text(f"4096\t16384\t{largest}\n")
    monkeypatch.setattr(doctor, "BUFFERS", f"{tmp_path}/")
    assert only(doctor.socket_buffers(PASTA)).verdict == verdict


@pytest.mark.parametrize(("there", "verdict"), [(True, OK), (False, NOTE)])
def test_socket_features(there: bool, verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.tcpinfo, "probe", lambda: doctor.tcpinfo.Features(peek_off=there))
    assert only(doctor.socket_features(PASTA)).verdict == verdict
