"""Probes of clients before a start, and the text that they look for in the answer."""

from __future__ import annotations

import re

import pytest

from .support import Client

# Options that clients look for in --help: kakoi, stado, devsandbox, libguestfs
KNOWN = (
    "--host-lo-to-ns-lo", "--map-host-loopback", "--splice-only", "--map-guest-addr", "--no-map-gw", "--foreground",
    "--config-net", "--dns-forward", "--userns", "--netns", "--quiet", "--pid", "--interface", "--ns-ifname",
)  # fmt: skip


@pytest.mark.parametrize("line", ["pasta --version", "pasta --host-lo-to-ns-lo --version", "passt --version"])
def test_version(client: Client, line: str) -> None:
    """podman info shows it whole, rootlesskit takes status 0 for `knows the option before it`."""
    done = client.run(line)
    program = line.split()[0]
    assert (done.returncode, done.stderr) == (0, "")
    assert re.match(rf"{program} \S+\n", done.stdout) and done.stdout.endswith("\n")


@pytest.mark.parametrize("option", ["--no-such-option", "--map-guest-addr-too"])
def test_option_that_is_not_known(client: Client, option: str) -> None:
    """Status 1 and getopt_long's words, by which podman sees that an older pasta lacks --map-guest-addr. Options count
    in their order: what comes after the unknown one, be it --version, is not looked at."""
    said = client.fails(f"pasta --config-net --quiet {option} 169.254.1.2 --version")
    assert said.startswith(f"pasta: unrecognized option '{option}': ")


def test_options_end_where_the_command_begins(client: Client) -> None:
    done = client.run("pasta -q --config-net sh -c 'echo $0' --version")
    assert (done.returncode, done.stdout) == (0, "--version\n")
    done = client.run("pasta -q --config-net -- sh -c 'echo $0' -f")
    assert (done.returncode, done.stdout) == (0, "-f\n")


def test_help(client: Client) -> None:
    """Each long option stands between spaces, tabs or commas."""
    done = client.run("pasta --help")
    assert (done.returncode, done.stderr) == (0, "")
    words = set(re.split(r"[ \t,\n]+", done.stdout))
    assert set(KNOWN) <= words


def test_help_of_passt(client: Client) -> None:
    """libguestfs takes status 0 or 1 for a passt that runs."""
    done = client.run("passt --help")
    assert (done.returncode, done.stderr) == (0, "") and "--one-off" in done.stdout


@pytest.mark.parametrize("line", ["pasta --mtu=1280 --mtu 1400 -m1500", "pasta --ns-if eth7 --mtu 1500"])
def test_last_occurrence_and_every_way_of_writing(client: Client, line: str) -> None:
    done = client.run(f"{line} -q --config-net --no-dhcp -- sh -c 'cat /sys/class/net/*/mtu'")
    assert "1500\n" in done.stdout


def test_executed_by_descriptor(client: Client) -> None:
    """nsjail executes what it has open (execveat(2)): the name that tells the mode is lost, and pasta is meant."""
    script = (
        f"import os; fd = os.open('{client.bin}/pasta', os.O_RDONLY); os.set_inheritable(fd, True); "
        "os.execve(fd, ['pasta', '--version'], os.environ)"
    )
    done = client.run(["/usr/bin/python3", "-c", script])
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("pasta ")
