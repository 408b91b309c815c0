"""Layouts that keep documents whole: `pack`, `pad` and `rows`."""

from __future__ import annotations

import golden_layouts


def test_the_golden_rows_are_those_of_the_specification() -> None:
    assert golden_layouts.GOLDEN.read_text() == golden_layouts.text(), "run tests/python/golden_layouts.py"
