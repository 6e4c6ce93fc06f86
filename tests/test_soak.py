"""The soak itself takes minutes (`make soak`); these are its judgements."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace
from typing import Any

import pytest

from bench.content import CHUNK, content, digest
from bench.soak import Sample, growth
from bench.soak_jobs import PAUSE, Job


def samples(resident: list[int], descriptors: list[int]) -> list[Sample]:
    return [Sample(float(i), r, d, 0.0) for i, (r, d) in enumerate(zip(resident, descriptors, strict=True))]


def test_what_stays_does_not_grow() -> None:
    assert growth(samples([20_000, 40_000, 41_000, 40_500] * 10, [30, 200, 150, 180] * 10)) == []


@pytest.mark.parametrize("what", ["resident", "descriptors"])
def test_what_grows_all_the_time_is_found(what: str) -> None:
    rising, flat = [10_000 + 500 * i for i in range(40)], [100] * 40
    found = growth(samples(rising, flat) if what == "resident" else samples(flat, rising))
    assert found == [f"{what} grew from 17250 to 27250"]


def test_what_grows_at_the_beginning_is_no_growth() -> None:
    assert growth(samples([10_000] * 10 + [40_000] * 30, [10] * 10 + [300] * 30)) == []


@pytest.mark.parametrize(("status", "bad"), [(0, 0), (1, 1)])
def test_a_job_is_bad_when_its_script_fails(monkeypatch: pytest.MonkeyPatch, status: int, bad: int) -> None:
    scripts: list[str] = []

    def run(*command: str, **how: Any) -> Any:
        scripts.append(command[-1])
        return SimpleNamespace(returncode=status, stdout="", stderr="why")

    job = Job("a job", SimpleNamespace(run=run, user=SimpleNamespace(env={})), "command {port}")  # type: ignore[arg-type]
    times = iter((0.0, 1.0, 3.0, 9.0))
    monkeypatch.setattr("bench.soak_jobs.time", SimpleNamespace(monotonic=lambda: next(times), sleep=lambda s: None))
    job.repeat(until=5.0)
    assert scripts == [scripts[0]] and scripts[0].endswith("command 7000") and PAUSE > 0
    assert (job.runs, job.bad, job.longest) == (1, bad, 2.0)
    assert job.said == ["status 1: why"] * bad


def test_content_is_of_its_size_and_never_the_same() -> None:
    size = 3 * CHUNK + 10
    chunks = list(content(size))
    assert sum(map(len, chunks)) == size and len(set(chunks)) == 4
    assert digest(size) == hashlib.sha256(b"".join(chunks)).hexdigest()
