"""A sample of the transfers of `make adversity`: through a link with faults, with adverse peers, checked by SHA-256.

The seed is printed, and taken from ADVERSITY_SEED. `python -m bench.adversity --seed SEED --only "NAME OF A TRANSFER"`
repeats one. Rates and times are not judged, only that all bytes arrive, and no others.
"""

from __future__ import annotations

import os
import random
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
    options = ["--seed", str(SEED), "--sample", str(AT_EACH_SEAT), "--modes", mode]
    command = [sys.executable, "-m", "bench.adversity", *options]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=LIMIT, check=False
    )
    print(f"ADVERSITY_SEED={SEED}\n{done.stdout}{done.stderr}")
    assert done.returncode == 0
    assert f"{3 * AT_EACH_SEAT} transfers" in done.stdout
