"""Real programs in a guest: curl, dig, iperf3, ssh, git, apt-get, and two at once in one namespace."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from bench.content import content, digest

from ..support import User, alive, wait_for
from .servers import bytes_server, dns_server, files_server, running, ssh_server
from .support import GATEWAY, GATEWAY6, PEER, PEER6, Guest, Lan, Namespace, in_thread

GIB = 1 << 30
LOCAL = [("host", "127.0.0.1", GATEWAY), ("host", "::1", GATEWAY6), ("peer", PEER, PEER), ("peer", PEER6, PEER6)]


def url(address: str, port: int) -> str:
    return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"


def of(lan: Lan, where: str) -> Namespace:
    return lan.host if where == "host" else lan.peer


@pytest.mark.parametrize(("where", "bind", "address"), LOCAL)
def test_curl_downloads(guest: Guest, lan: Lan, where: str, bind: str, address: str) -> None:
    size = GIB if bind == "127.0.0.1" else GIB // 8
    with bytes_server(of(lan, where), bind) as port:
        done = guest.run("sh", "-c", f"curl -fsSg --max-time 60 {url(address, port)}/{size} | sha256sum", timeout=90)
    assert done.stdout.split()[0] == digest(size)


@pytest.mark.parametrize(("where", "bind", "address"), LOCAL)
def test_curl_uploads(guest: Guest, lan: Lan, where: str, bind: str, address: str) -> None:
    size = GIB if bind == "127.0.0.1" else GIB // 8
    with bytes_server(of(lan, where), bind) as port:
        headers = ["-H", f"Content-Length: {size}", "-H", "Transfer-Encoding:", "-H", "Expect:"]
        curl = guest.argv(["curl", "-fsSg", "--max-time", "60", *headers, "-T", "-", f"{url(address, port)}/"])
        with subprocess.Popen(
            curl, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=guest.user.env, cwd="/"
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            for chunk in content(size):
                process.stdin.write(chunk)
            process.stdin.close()
            answer = process.stdout.read().decode()
    assert process.returncode == 0
    assert answer == digest(size)


def test_curl_says_connection_refused(guest: Guest, lan: Lan) -> None:
    with lan.host.listen("127.0.0.1") as listener:
        port = listener.getsockname()[1]
    done = guest.run("curl", "-sS", "--max-time", "20", url(GATEWAY, port), check=False)
    assert done.returncode == 7, done.stderr


@pytest.mark.parametrize(("where", "bind", "address"), LOCAL)
def test_dig(guest: Guest, lan: Lan, where: str, bind: str, address: str) -> None:
    with dns_server(of(lan, where), bind) as port:
        dig = ("dig", "+short", "+time=5", "+tries=2", "-p", str(port), f"@{address}")
        assert guest.run(*dig, "name.test").stdout == "192.0.2.77\n"
        assert guest.run(*dig, "name.test", "AAAA").stdout == "2001:db8::77\n"
        assert guest.run(*dig, "+tcp", "name.test").stdout == "192.0.2.77\n"
        long = guest.run("dig", "+time=5", "-p", str(port), f"@{address}", "+bufsize=512", "long.test", "TXT").stdout
    assert "Truncated, retrying in TCP mode" in long
    assert all(f'"{str(i) * 200}"' in long for i in range(8))


@pytest.mark.parametrize("options", [[], ["-R"], ["--bidir"], ["-P", "8"], ["-P", "8", "-R"]], ids=" ".join)
@pytest.mark.parametrize(("bind", "address"), [("127.0.0.1", GATEWAY), ("::1", GATEWAY6)])
def test_iperf3_tcp(guest: Guest, lan: Lan, bind: str, address: str, options: list[str]) -> None:
    with running(lan.host, bind, "iperf3", "-s", "-B", bind, "-p", "{port}") as port:
        done = guest.run("iperf3", "-J", "-c", address, "-p", str(port), "-n", "100M", *options)
    result = json.loads(done.stdout)
    assert "error" not in result
    assert all(stream["receiver"]["bytes"] > 0 for stream in result["end"]["streams"])


@pytest.mark.alone
@pytest.mark.parametrize("options", [[], ["-R"]], ids=["out", "in"])
def test_iperf3_udp(guest: Guest, lan: Lan, options: list[str]) -> None:
    """At a rate that any machine carries, and every datagram accounted for."""
    with running(lan.host, "127.0.0.1", "iperf3", "-s", "-p", "{port}") as port:
        rate = ["-u", "-b", "40M", "-l", "1400", "-t", "1"]
        done = guest.run("iperf3", "-J", "-c", GATEWAY, "-p", str(port), *rate, *options)
    result = json.loads(done.stdout)
    assert "sum" in result["end"], result
    total = result["end"]["sum"]
    assert total["packets"] > 1000
    assert total["lost_packets"] < 0.05 * total["packets"]


def test_ssh(guest: Guest, lan: Lan, root: User, open_dir: Path) -> None:
    with ssh_server(lan.host, open_dir) as port:
        os.chmod(open_dir / "user_key", 0o600)
        os.chown(open_dir / "user_key", os.stat(f"/proc/{guest.pid}").st_uid, -1)
        options = (
            "-F",
            "none",
            "-o",
            "StrictHostKeyChecking=no",
            "-o",
            "UserKnownHostsFile=/dev/null",
            "-o",
            "BatchMode=yes",
        )
        ssh = ("ssh", "-q", *options, "-i", f"{open_dir}/user_key", "-p", str(port), f"root@{GATEWAY}")
        assert guest.run(*ssh, "echo here; exit 3", check=False).returncode == 3
        assert (
            guest.run(*ssh, "head -c 20000000 /dev/zero | sha256sum").stdout.split()[0]
            == hashlib.sha256(bytes(20_000_000)).hexdigest()
        )
        assert guest.run(*ssh, "wc -c", input="x" * 3_000_000).stdout.strip() == "3000000"


def test_git_clone(guest: Guest, lan: Lan, open_dir: Path) -> None:
    origin, git = (
        open_dir / "origin",
        ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"],
    )
    origin.mkdir()
    (origin / "file").write_bytes(b"".join(content(8 << 20)))
    for command in (["init", "-q"], ["add", "file"], ["commit", "-qm", "x"], ["update-server-info"]):
        subprocess.run([*git, *command], cwd=origin, check=True, stdin=subprocess.DEVNULL)
    with files_server(lan.host, open_dir) as port:
        guest.run("git", "clone", "-q", f"http://{GATEWAY}:{port}/origin/.git", f"{open_dir}/clone")
    assert (open_dir / "clone" / "file").read_bytes() == (origin / "file").read_bytes()


CONTROL = """Package: hello-pasta
Version: 1.0
Architecture: all
Maintainer: nobody <nobody@example.com>
Description: a package that was made for a test
"""


def make_repository(directory: Path) -> None:
    """A repository for APT with one package."""
    tree = directory / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN" / "control").write_text(CONTROL)
    (tree / "payload").write_bytes(b"".join(content(4 << 20)))
    subprocess.run(["dpkg-deb", "--root-owner-group", "-b", tree, directory / "hello-pasta.deb"], check=True)
    shutil.rmtree(tree)
    package = (directory / "hello-pasta.deb").read_bytes()
    sums = f"Size: {len(package)}\nSHA256: {hashlib.sha256(package).hexdigest()}\n"
    index = f"{CONTROL}Filename: ./hello-pasta.deb\n{sums}"
    (directory / "Packages").write_text(index)
    entry = f"{hashlib.sha256(index.encode()).hexdigest()} {len(index)} Packages"
    (directory / "Release").write_text(f"Suite: ./\nDate: Thu, 01 Jan 2026 00:00:00 UTC\nSHA256:\n {entry}\n")


def test_apt_get(guest: Guest, lan: Lan, open_dir: Path) -> None:
    make_repository(open_dir)
    for part in (
        "state/lists/partial",
        "cache/archives/partial",
        "etc/apt.conf.d",
        "etc/preferences.d",
        "etc/sources.list.d",
    ):
        (open_dir / part).mkdir(parents=True)
    (open_dir / "state/status").touch()
    config = {
        "Dir::State": f"{open_dir}/state",
        "Dir::State::status": f"{open_dir}/state/status",
        "Dir::Cache": f"{open_dir}/cache",
        "Dir::Etc": f"{open_dir}/etc",
        "APT::Sandbox::User": "root",
        "Debug::NoLocking": "1",
    }
    options = [word for key, value in config.items() for word in ("-o", f"{key}={value}")]
    subprocess.run(["chmod", "-R", "a+rwX", open_dir], check=True)
    with files_server(lan.host, open_dir) as port:
        (open_dir / "etc/sources.list").write_text(f"deb [trusted=yes] http://{GATEWAY}:{port}/ ./\n")
        guest.run("apt-get", "-q", *options, "update")
        guest.run(
            "sh", "-c", 'mkdir "$0/got"; cd "$0/got"; apt-get -q "$@" download hello-pasta', str(open_dir), *options
        )
    (got,) = (open_dir / "got").iterdir()
    assert got.read_bytes() == (open_dir / "hello-pasta.deb").read_bytes()


def test_two_commands_share_a_namespace(lan: Lan, someone: User, open_dir: Path) -> None:
    """`pasta PID` in the background, two programs that enter by nsenter(1); pasta goes when the namespace does."""
    on_host = lan.host.argv([])
    shared = Namespace(
        [*on_host, *someone.command(["unshare", "--user", "--map-root-user", "--net", "--mount"])], someone
    )
    try:
        pid_file = open_dir / "pid"
        pasta = someone.pasta("-q", "--config-net", "-P", str(pid_file), str(shared.pid))
        subprocess.run([*on_host, *pasta], env=someone.env, cwd="/", stdin=subprocess.DEVNULL, check=True, timeout=30)
        daemon = int(pid_file.read_text())
        assert alive(daemon)
        size = 64 << 20
        with bytes_server(lan.host, "127.0.0.1") as port:
            command = f"curl -fsS --max-time 30 {url(GATEWAY, port)}/{size} | sha256sum"
            with in_thread(shared.run, "sh", "-c", command) as one, in_thread(shared.run, "sh", "-c", command) as two:
                results = [done().stdout.split()[0] for done in (one, two)]
        assert results == [digest(size)] * 2
    finally:
        shared.close()
    wait_for(lambda: not alive(daemon), "pasta ends with the namespace")
