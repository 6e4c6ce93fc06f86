"""Syntax trees of sources: each is parsed once in a process, for all tests that look at it, and none changes it."""

from __future__ import annotations

import ast
from functools import cache


@cache
def parse(source: str) -> ast.Module:
    return ast.parse(source)
