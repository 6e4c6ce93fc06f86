"""`python -m fuzz.plain SECONDS TARGET...`: seeds, changed at random, for so long each, without coverage to guide them.

For modules that atheris cannot instrument: those of the compiled build (scripts/test-compiled). The seed of the changes
is printed, and taken from PLAIN_SEED.
"""

from __future__ import annotations

import os
import random
import sys
import time
from importlib import import_module


def changed(rng: random.Random, data: bytes) -> bytes:
    """`data` with up to eight bytes changed, cut or extended."""
    made = bytearray(data)
    for _ in range(rng.randint(0, 8)):
        at = rng.randrange(len(made) + 1)
        kind = rng.randrange(4)
        if kind == 0:
            made[at:at] = rng.randbytes(rng.randint(1, 4))
        elif kind == 1:
            del made[at : at + rng.randint(1, 8)]
        elif at < len(made):
            made[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    return bytes(made)


def main(seconds: float, targets: list[str]) -> None:
    """An exception of a target ends the program, with the input that led to it."""
    seed = int(os.environ.get("PLAIN_SEED") or random.randrange(1 << 32))
    print(f"PLAIN_SEED={seed}")
    for name in targets:
        target = import_module(f"fuzz.targets.{name}")
        rng, seeds, count = random.Random(seed), list(target.seeds()), 0
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            data = changed(rng, rng.choice(seeds))
            try:
                target.one(data)
            except BaseException:
                print(f"{name}: {data.hex()}", file=sys.stderr)
                raise
            count += 1
        print(f"{name}: {count} inputs")


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2:])
