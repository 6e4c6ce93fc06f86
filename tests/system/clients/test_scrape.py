"""Prometheus over HTTP: the units of docs/observability.md, for which pasta and passt need no HTTP server."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ..support import DEADLINE, REPOSITORY
from ..traffic.support import Lan
from .support import Client, Site, sandbox

NAMES = "passt-http-vm1.socket", "passt-http-vm1@.service"
REQUEST = b"GET /metrics HTTP/1.1\r\nHost: localhost:9101\r\nAccept: application/openmetrics-text\r\n\r\n"


def unit(name: str) -> str:
    """The text of a unit in the document."""
    text = (REPOSITORY / "docs" / "observability.md").read_text()
    found = re.search(rf"^    # /etc/systemd/system/{re.escape(name)}\b.*\n((?:    .*\n)+)", text, re.M)
    assert found is not None
    return textwrap.dedent(found[1])


def script(socket_path: Path) -> str:
    """The command of the service, as systemd.service(5) reads it: for a program with this control socket."""
    line = re.search(r"^ExecStart=(.*?[^\\])$", unit(NAMES[1]), re.M | re.S)
    assert line is not None
    text = re.sub(r"\\\n\s*", " ", line[1]).replace("\\r", "\r").replace("\\n", "\n").replace("$$", "$")
    assert text.count("%j") == 1
    shell, option, command = shlex.split(text.replace("/run/passt/%j.ctl", str(socket_path)).replace("%%", "%"))
    assert (shell, option) == ("/bin/sh", "-c")
    return command


@pytest.fixture
def site(client: Client) -> Iterator[Site]:
    made = sandbox(client)
    yield made
    made.close()


def scrape(client: Client, lan: Lan, path: Path) -> tuple[str, str, str]:
    """Status line, headers and body that a client of the socket unit gets."""
    with lan.host.listen("127.0.0.1") as listener, lan.host.make_socket() as scraper:
        scraper.connect(listener.getsockname())
        served, _ = listener.accept()
        env = {**client.environment(), "PATH": f"{client.bin}:{os.environ['PATH']}"}
        with served:
            process = subprocess.Popen(
                client.argv(["sh", "-c", script(path)]), env=env, stdin=served.fileno(), stdout=served.fileno()
            )
        for piece in (REQUEST[:30], REQUEST[30:]):
            scraper.sendall(piece)
        with scraper.makefile("rb") as file:
            answer = file.read().decode()  # to its end: no reset
        assert process.wait(DEADLINE) == 0
    head, _, body = answer.partition("\r\n\r\n")
    status, _, headers = head.partition("\r\n")
    return status, headers, body


def test_systemd_understands_the_units(tmp_path: Path) -> None:
    for name in NAMES:
        (tmp_path / name).write_text(unit(name))
    env = {**os.environ, "SYSTEMD_UNIT_PATH": f"{tmp_path}:"}
    command = ["systemd-analyze", "--man=no", "verify", str(tmp_path / NAMES[0])]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    said = [line for line in (done.stdout + done.stderr).splitlines() if "passt-http" in line]
    assert (done.returncode, said) == (0, [])


def test_a_scrape(site: Site, lan: Lan) -> None:
    """The whole answer arrives, and the parser of Prometheus reads it; without the program it is an error."""
    path = site.client.dir / "vm1.ctl"
    daemon = site.start(f"pasta --config-net -q -t none -u none -T none -U none -c {path} {{pid}}")
    status, headers, body = scrape(site.client, lan, path)
    assert (status, headers) == ("HTTP/1.0 200 OK", "Content-Type: text/plain; version=0.0.4")
    families = {family.name: family for family in text_string_to_metric_families(body)}
    assert families["passt_info"].samples[0].labels["mode"] == "pasta" and len(families) > 15
    daemon.end()
    assert scrape(site.client, lan, path) == ("HTTP/1.0 503 Service Unavailable", "", "")
