"""Tests that no damage of a shard gives other tokens without an error, a crash or a hang.

`damage.py` damages each format at seeded places and counts the outcomes. The run ends with the
totals, which also go to `out/damage.json`. With `--stress` there are 150,000 cases.
`--damage-cases` sets the number of each family.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("pyarrow", reason="corpora are written with pyarrow")

import damage

pytestmark = [pytest.mark.hostile, pytest.mark.thread_unsafe(reason="it starts processes")]

#: Outcomes of all families of this run.
TOTAL: Counter[str] = Counter()


def check(kind: str, folder: Path, count: int, *, checksums: bool) -> Counter[str]:
    found, bad = damage.run(kind, folder, seed=1, count=count, checksums=checksums)
    TOTAL.update(found)
    name = f"{kind}, checksums" if checksums else kind
    print(f"{name}: {dict(found)}; all so far: {sum(TOTAL.values())} cases, {dict(TOTAL)}")
    assert sum(found.values()) == count
    assert not bad, "\n".join(bad)
    assert found["refused"] > count // 10, "hardly a case met what a reader needs"
    return found


@pytest.mark.parametrize("kind", damage.KINDS)
def test_damage_gives_right_tokens_or_an_error_or_what_the_file_says(
    kind: str, tmp_path: Path, stress: bool, pytestconfig: pytest.Config
) -> None:
    count = pytestconfig.getoption("--damage-cases") or (5000 if stress else 150)
    check(kind, tmp_path, count, checksums=False)


@pytest.mark.parametrize("kind", damage.KINDS)
def test_with_checksums_damage_gives_right_tokens_or_an_error(
    kind: str, tmp_path: Path, stress: bool, pytestconfig: pytest.Config
) -> None:
    count = pytestconfig.getoption("--damage-cases") or (5000 if stress else 300)
    found = check(kind, tmp_path, count, checksums=True)
    assert found["as stored"] == 0
