"""The dashboard of contrib/grafana: it asks for metrics that there are, by labels that they have, as what they are.

The metrics are those of a program that has seen everything, read by the parser of Prometheus' own client library.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from passt.control import metrics

from .unit.control.test_metrics import work
from .unit.support import make_context

PATH = Path(__file__).parent.parent / "contrib" / "grafana" / "passt.json"
DASHBOARD: dict[str, Any] = json.loads(PATH.read_text())
TARGET_LABELS = {"job", "instance"}  # that Prometheus adds to every sample
COLUMNS = 24  # of Grafana's grid
METRIC = re.compile(r"\b(?:passt|process)_\w+")


@cache
def families() -> dict[str, tuple[str, set[str]]]:
    """Name -> type, labels."""
    ctx = make_context()
    work(ctx)
    found = {}
    for family in text_string_to_metric_families(metrics.prometheus(ctx, ctx.stats.started + 5)):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        found[name] = (family.type, {label for sample in family.samples for label in sample.labels})
    return found


def targets() -> Iterator[tuple[str, str]]:
    """All queries, each with the text of its legend."""
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            yield target["expr"], target["legendFormat"]


QUERIES = dict(targets())


@pytest.mark.parametrize("query", QUERIES)
def test_queries(query: str) -> None:
    (name,) = METRIC.findall(query)
    kind, labels = families()[name]
    functions = re.findall(r"\b(rate|increase)\(", query)
    assert len(functions) == (kind == "counter"), f"{name} is a {kind}"
    assert ("[$__rate_interval]" in query) == (kind == "counter")
    (matched,) = re.findall(r"\{(.*?)\}", query)
    assert matched == 'job=~"$job",instance=~"$instance"', "the choice at the top of the page"
    grouped = {label for inner in re.findall(r"\bby \((.*?)\)", query) for label in inner.split(", ")}
    assert grouped <= labels | TARGET_LABELS
    shown = set(re.findall(r"\{\{(\w+)\}\}", QUERIES[query]))
    assert shown <= (grouped if "sum" in query else labels | TARGET_LABELS)
    assert query.count("(") == query.count(")")


def test_no_metric_is_left_out() -> None:
    asked = {name for query in QUERIES for name in METRIC.findall(query)}
    assert asked == families().keys()


def test_variables_are_defined_before_they_are_used() -> None:
    text, known = json.dumps(DASHBOARD), {"__rate_interval", "__all"}
    for variable in DASHBOARD["templating"]["list"]:
        asked = json.dumps(variable.get("query"))
        assert set(re.findall(r"\$\{?(\w+)", asked)) <= known
        assert set(METRIC.findall(asked)) <= families().keys()
        known.add(variable["name"])
    assert set(re.findall(r"\$\{?(\w+)", text)) <= known


def test_panels_have_a_place_each() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= COLUMNS and panel["title"] and panel["targets"]
        columns, rows = (range(place[at], place[at] + place[size]) for at, size in (("x", "w"), ("y", "h")))
        for cell in product(columns, rows):
            assert cell not in taken, f"{panel['title']} lies over {taken[cell]}"
            taken[cell] = panel["title"]
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
