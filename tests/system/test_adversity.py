"""A sample of `make adversity`: transfers through a link with faults, with adverse peers, checked by SHA-256; and ends,
answers and datagrams while the daemon is stopped, beside the bare kernel.

The seed is printed, and taken from ADVERSITY_SEED. `python -m bench.adversity --seed SEED --only "NAME OF A TRANSFER"`
repeats one. Rates and times are not judged, only that all bytes arrive, and no others, and how connections end.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys

import pytest

from .support import REPOSITORY, environment

SEED = int(os.environ.get("ADVERSITY_SEED") or random.randrange(1 << 32))
AT_EACH_SEAT = 8  # transfers: with three MTU, each of the faults is there in each mode at least once
LIMIT = 240.0  # s; it takes about 30


def namespaces_can(*command: str) -> bool:
    """Whether `command` succeeds in new user and network namespaces."""
    inside = ["unshare", "--user", "--map-root-user", "--net", *command]
    return subprocess.run(inside, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("mode", ["passt", "pasta"])
def test_a_sample_arrives_whole(mode: str) -> None:
    if not namespaces_can("true"):
        pytest.skip("this kernel gives no user namespaces to this user")
    if mode == "pasta" and not namespaces_can("ip", "link", "add", "bridge0", "type", "bridge"):
        pytest.skip("this kernel has no bridges")
    said = adversity("--sample", str(AT_EACH_SEAT), "--modes", mode)
    assert f"{3 * AT_EACH_SEAT} transfers" in said


def test_ends_are_those_of_the_bare_kernel_while_the_daemon_is_stopped() -> None:
    """A third of the observations in a cell of each kind of guest, and in the same cells without a guest."""
    if not namespaces_can("true"):
        pytest.skip("this kernel gives no user namespaces to this user")
    if not shutil.which("cc"):
        pytest.skip("no compiler for the relays that stand for machines")
    said = adversity("--parts", "stopped", "--contenders", "loopback", "ours", "--sample", "1")
    assert said.count("ours") >= 3 * 6
    assert " 0 not as on the bare kernel" in said


def test_streams_and_exchanges_pass_a_long_path() -> None:
    if not namespaces_can("true"):
        pytest.skip("this kernel gives no user namespaces to this user")
    said = run("bench.long_path", "--round-trips", "4", "--families", "IPv6", "--mtus", "1500", "--contenders", "ours")
    cells = [line.split(" | ")[4:] for line in said.splitlines() if line.startswith("| 4 |")]
    assert len(cells) == 2, "up and down"
    figures = [[float(x) for x in re.findall(r"[\d.]+", cell)] for line in cells for cell in line]
    assert len(figures) == 4
    assert all(rate > 0 and 4 <= p50 <= p90 for rate, p50, p90 in figures)


def adversity(*options: str) -> str:
    """The output of a run with that seed."""
    return run("bench.adversity", "--seed", str(SEED), *options)


def run(module: str, *options: str) -> str:
    """The output of a run, which must succeed."""
    command = [sys.executable, "-m", module, *options]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=LIMIT, check=False
    )
    print(f"ADVERSITY_SEED={SEED}\n{done.stdout}{done.stderr}")
    assert done.returncode == 0
    return done.stdout
