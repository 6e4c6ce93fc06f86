"""The servers of the soak, all of them on the peer: PostgreSQL, nginx (HTTP/1.1,
HTTP/2, git), ssh, DNS, WebSocket, QUIC."""

from __future__ import annotations

import glob
import hashlib
import os
import pwd
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.system.support import wait_for
from tests.system.traffic.servers import dns_server
from tests.system.traffic.support import Namespace

from .content import content, digest
from .lab import PEER, ROOT
from .soak_programs import certificate

POSTGRES, HTTP, HTTP2, SSH, WEBSOCKET, QUIC = 5432, 8080, 8081, 2222, 8082, 4433
BIG, SMALL, PARTS = 32 << 20, 1 << 16, 8  # bytes of files, and how many of SMALL there are
PROGRAMS = [sys.executable, "-m", "bench.soak_programs"]

NGINX = """
daemon off; worker_processes 1; pid {directory}/nginx.pid; error_log {directory}/nginx.log; user root;
events {{ worker_connections 2048; }}
http {{
    access_log off; client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi; uwsgi_temp_path {directory}/uwsgi; scgi_temp_path {directory}/scgi;
    ssl_certificate {directory}/certificate; ssl_certificate_key {directory}/key;
    server {{ listen {peer}:{http} backlog=1024; listen {peer}:{http2} ssl http2; root {directory}/files; }}
}}
"""
SSHD = """
Port {port}
ListenAddress {peer}
HostKey {directory}/host_key
AuthorizedKeysFile {directory}/user_key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin yes
MaxStartups 100
Subsystem sftp internal-sftp
"""


@dataclass(frozen=True)
class Servers:
    """Facts for the clients: files below `directory`, checksums, the head of the repository, the port for DNS."""

    directory: Path
    big: str
    small: str
    head: str
    dns: int


@contextmanager
def servers(peer: Namespace, directory: Path) -> Iterator[Servers]:
    """All of them, until the context ends."""
    files = directory / "files"
    files.mkdir()
    for name, size in (("big", BIG), *((f"small{i}", SMALL) for i in range(PARTS))):
        with (files / name).open("wb") as file:
            file.writelines(content(size))
    head = _repository(files)
    with ExitStack() as stack:
        stack.enter_context(_postgres(peer, directory))
        certificate(directory)
        config = directory / "nginx.conf"
        config.write_text(NGINX.format(directory=directory, peer=PEER, http=HTTP, http2=HTTP2))
        stack.enter_context(_running(peer, HTTP, "nginx", "-c", str(config), "-e", f"{directory}/nginx.log"))
        stack.enter_context(_ssh(peer, directory))
        stack.enter_context(_running(peer, WEBSOCKET, *PROGRAMS, "websocket-serve", PEER, str(WEBSOCKET)))
        stack.enter_context(_running(peer, QUIC, *PROGRAMS, "quic-serve", PEER, str(QUIC)))
        dns = stack.enter_context(dns_server(peer, PEER))
        yield Servers(directory, digest(BIG), digest(SMALL), head, dns)


@contextmanager
def _running(where: Namespace, port: int, *command: str) -> Iterator[None]:
    """`command`, as soon as it has the port, of TCP or UDP."""
    environment = {**where.user.env, "PYTHONPATH": str(ROOT)}
    with where.popen(*command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment) as process:

        def listens() -> bool:
            if process.poll() is not None:
                raise RuntimeError(f"{command[:3]} ended with status {process.returncode}")
            return f":{port} " in where.run("ss", "-Hltun").stdout

        wait_for(listens, f"{command[0]} at port {port}")
        yield


def _repository(files: Path) -> str:
    """A git repository to be cloned over HTTP, with a commit for each of some files; its head."""
    git = ["git", "-C", str(files / "work"), "-c", "user.name=soak", "-c", "user.email=soak@soak.test"]

    def run(*command: str) -> str:
        environment = {**os.environ, "HOME": str(files), "GIT_CONFIG_NOSYSTEM": "1"}
        return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.strip()

    run("git", "init", "-q", "-b", "main", str(files / "work"))
    for i in range(30):
        noise = hashlib.shake_256(bytes((i,))).digest(100_000)
        (files / "work" / f"file{i}").write_bytes(noise)
        run(*git, "add", ".")
        run(*git, "commit", "-q", "-m", f"File {i}")
    run("git", "clone", "-q", "--bare", str(files / "work"), str(files / "repository.git"))
    run("git", "-C", str(files / "repository.git"), "update-server-info")
    return run(*git, "rev-parse", "HEAD")


@contextmanager
def _postgres(peer: Namespace, directory: Path) -> Iterator[None]:
    """PostgreSQL with the tables of pgbench, as its own user: it refuses to be root."""
    programs = Path(max(glob.glob("/usr/lib/postgresql/*/bin")))
    user = pwd.getpwnam("postgres")
    data = directory / "postgres"
    data.mkdir()
    os.chown(data, user.pw_uid, user.pw_gid)
    become = ("setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups")
    peer.run(*become, str(programs / "initdb"), "-D", str(data), "-A", "trust", "--no-sync", "-E", "UTF8")
    with (data / "pg_hba.conf").open("a") as hba:
        hba.write("host all all 0.0.0.0/0 trust\n")
    options = ["-c", "max_connections=120", "-c", "fsync=off", "-c", f"unix_socket_directories={data}"]
    server = [*become, str(programs / "postgres"), "-D", str(data), "-h", PEER, "-p", str(POSTGRES), *options]
    with _running(peer, POSTGRES, *server):
        ready = ["psql", "-h", PEER, "-U", "postgres", "-qc", "CREATE TABLE lines (n int, t text)"]
        wait_for(lambda: peer.run(*ready, check=False).returncode == 0, "PostgreSQL")
        peer.run("pgbench", "-h", PEER, "-U", "postgres", "-q", "-i", "-s", "5", "postgres", timeout=120)
        yield


@contextmanager
def _ssh(peer: Namespace, directory: Path) -> Iterator[None]:
    peer.run("mkdir", "-p", "/run/sshd")
    for name in ("host_key", "user_key"):
        peer.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{directory}/{name}")
    config = directory / "sshd_config"
    config.write_text(SSHD.format(directory=directory, peer=PEER, port=SSH))
    with _running(peer, SSH, "/usr/sbin/sshd", "-D", "-f", str(config)):
        yield
