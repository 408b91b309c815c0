"""Tests that files which claim absurd sizes are refused within the budget, and soon.

`bombs.py` makes the files. A process with little memory reads them (`bombs_worker.py`).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pyarrow", reason="corpora are written with pyarrow")

import bombs
import numpy as np
import pyarrow as pa
from support import HERE, clean_environment, run_python

import forebay

pytestmark = [pytest.mark.hostile, pytest.mark.thread_unsafe(reason="it starts processes")]

LIMIT_S = 240
#: Seconds for one file, also on a machine that does other work.
SOON_S = 20
#: Files that say something unusual, but nothing absurd.
SENSIBLE = {"row groups": "1024 tokens", "npy: columns without values": "0 tokens"}


def outcomes(paths: dict[str, Path]) -> dict[str, str]:
    """The outcome of each file. Fails at a file that is slow, or at which the process died."""
    command = [sys.executable, str(HERE / "bombs_worker.py")]
    names = "\n".join(str(path) for path in paths.values())
    done = subprocess.run(
        command, input=names, capture_output=True, text=True, env=clean_environment(), timeout=LIMIT_S, check=False
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    ends = [line for line in lines if "outcome" in line]
    assert done.returncode == 0, f"{list(paths)[len(ends)]}: status {done.returncode}: {done.stderr[-1000:]}"
    for name, end in zip(paths, ends, strict=True):
        assert end["seconds"] < SOON_S, f"{name}: {end}"
    return {name: end["outcome"] for name, end in zip(paths, ends, strict=True)}


def check(found: dict[str, str]) -> None:
    for name, text in found.items():
        if name in SENSIBLE:
            assert text == SENSIBLE[name], f"{name}: {text}"
        else:
            assert text.startswith("refused: "), f"{name}: {text}"


def test_parquet_files_that_claim_too_much_are_refused(tmp_path: Path) -> None:
    paths = {}
    for number, (name, content) in enumerate(bombs.PARQUET.items()):
        paths[name] = bombs.write(tmp_path, {f"{number}.parquet": content()})
    found = outcomes(paths)
    check(found)
    assert "128 levels deep" in found["schema nested 10^4 deep"]


def test_the_parquet_files_are_read_if_they_claim_nothing_absurd(tmp_path: Path) -> None:
    """The writer of the bombs writes sound files too, so that each bomb fails by its claim."""
    dictionary = bombs.dictionary_page(bombs.FOUR[:4], 1)
    deep = bombs.nested_schema(3)
    sound = {
        "plain": bombs.parquet(bombs.data_page(bombs.FOUR, 4)),
        "run": bombs.parquet(
            dictionary + bombs.data_page(b"\0" + bombs.run_of(4, 0), 4, encoding=bombs.DICTIONARY),
            data_at=len(dictionary),
        ),
        "zstd": bombs.parquet(
            bombs.data_page(pa.compress(bombs.FOUR, codec="zstd", asbytes=True), 4, inflated=16), codec=bombs.ZSTD
        ),
        "nested": bombs.parquet(bombs.data_page(bombs.FOUR, 4), schema=[*bombs.column_schema()[:1], *deep[-1:]]),
    }
    paths = {name: bombs.write(tmp_path, {f"{name}.parquet": content}) for name, content in sound.items()}
    found = outcomes(paths)
    assert {name: found[name] for name in ("plain", "run", "zstd")} == dict.fromkeys(
        ("plain", "run", "zstd"), "4 tokens"
    )


def test_flat_files_that_claim_too_much_are_refused(tmp_path: Path) -> None:
    files = bombs.flat_files()
    check(outcomes({name: bombs.write(tmp_path / str(at), files[name]) for at, name in enumerate(files)}))


@pytest.mark.parametrize("depth", [64, 1000, 10_000])
def test_a_deep_arrow_schema_is_refused(tmp_path: Path, depth: int) -> None:
    content = bombs.nested_arrow(min(depth, 1000))
    if depth > 1000:
        # No writer goes so deep. The metadata of the file is cut instead, which leaves tables open.
        content = content.replace(b"item", b"\0\0\0\0", 500)
    found = outcomes({"deep": bombs.write(tmp_path, {"a.arrow": content})})
    check(found)


@pytest.mark.parametrize(("stream", "compression"), [(False, None), (True, None), (False, "zstd"), (True, "lz4")])
def test_an_absurd_length_at_any_place_of_an_arrow_file_takes_no_memory(
    tmp_path: Path, stream: bool, compression: str | None
) -> None:
    rows = pa.array([[1, 2, 3], [4], [], [5, 6]], pa.list_(pa.int32()))
    files = bombs.wrong_lengths(bombs.arrow(rows, stream=stream, compression=compression))
    found = outcomes({name: bombs.write(tmp_path / str(at), {"a.arrow": files[name]}) for at, name in enumerate(files)})
    refused = [text for text in found.values() if text.startswith("refused: ")]
    assert len(refused) > len(found) // 5, "the numbers met no length"
    # A number among the ids gives another id, and one in a name nothing at all.
    others = {text for text in found.values() if not text.startswith("refused: ")}
    assert others <= {f"{tokens} tokens" for tokens in range(7)}, others


def test_a_state_with_absurd_values_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(100, dtype="<u2"))
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    absurd = [deep, 1 << 70, -(1 << 63), -1, "x" * 10_000_000, [0] * 1_000_000, float("nan"), {"a": 1}, None, b"abc"]
    with forebay.Loader(tmp_path / "a.npy", seq_len=4, batch_size=2) as loader:
        next(iter(loader))
        state = loader.state_dict()
        for key in state:
            for value in absurd:
                with pytest.raises((forebay.StateMismatchError, OverflowError)) as caught:
                    loader.load_state_dict({**state, key: value})
                assert key in str(caught.value) and len(str(caught.value)) < 1000, str(caught.value)[:1000]
        loader.load_state_dict(state)


def test_a_mixture_nested_deeply_is_refused() -> None:
    for text in ("[" * 1_000_000, '{"sources": ' * 100_000, '{"sources": [' * 100_000):
        with pytest.raises(forebay.ConfigError, match="recursion limit"):
            forebay.Loader(mixture=text, seq_len=4)


def test_commands_refuse_a_deep_schema_too(tmp_path: Path) -> None:
    path = bombs.write(tmp_path, {"a.parquet": bombs.PARQUET["schema nested 10^4 deep"]()})
    program = """
        import sys
        from forebay import _core
        for command in ("check", "rewrite", "verify", "plan"):
            more = [sys.argv[1] + "-out"] if command == "rewrite" else []
            assert _core.run_command(["forebay", command, sys.argv[1], *more]) in (1, 2), command
    """
    assert "128 levels deep" in run_python(program, path).stderr
