"""Tests the order in which settings are looked up.

An argument wins over the environment, which wins over the file, which wins over the default. Ranks
come from the launcher. Each case runs in an interpreter of its own, with exactly the environment
that it states.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support import clean_environment, json_from, run_python

pytest.importorskip("pyarrow", reason="corpora are written with pyarrow")

import corpora


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpora.unique_corpus(tmp_path_factory.mktemp("config") / "corpus", "parquet", 4000, shards=2)


LOADER = """
import json, sys
import forebay
given = json.loads(sys.argv[2])
with forebay.Loader(sys.argv[1], **given) as loader:
    print(json.dumps(loader.config, default=str))
"""

FROM_ENV = """
import json, sys
import forebay
with forebay.Loader.from_env(**json.loads(sys.argv[1])) as loader:
    first = next(iter(loader))
    name = "x" if "x" in first else "input_ids"
    print(json.dumps([loader.config, len(loader), list(first), list(first[name].shape)], default=str))
"""

FAILING = """
import json, sys
import forebay
try:
    if sys.argv[1] == "from_env":
        forebay.Loader.from_env()
    else:
        forebay.Loader(sys.argv[1])
except forebay.ConfigError as error:
    print(json.dumps(str(error)))
else:
    print(json.dumps(None))
"""


def config(corpus: Path, given: dict[str, Any] | None = None, **names: str) -> dict[str, Any]:
    found: dict[str, Any] = json_from(LOADER, corpus, json.dumps(given or {}), env=clean_environment(**names))
    return found


def refusal(data: Any, **names: str) -> str:
    message = json_from(FAILING, data, env=clean_environment(**names))
    assert isinstance(message, str), "expected a ConfigError"
    return message


def test_operational_settings_come_from_the_environment_below_arguments(corpus: Path) -> None:
    assert config(corpus, FOREBAY_NUM_THREADS="3")["num_threads"] == 3
    assert config(corpus, {"num_threads": 2}, FOREBAY_NUM_THREADS="3")["num_threads"] == 2
    assert config(corpus, FOREBAY_PREFETCH_BATCHES="9")["prefetch_batches"] == 9
    assert config(corpus, FOREBAY_MEMORY_BUDGET="256MiB")["memory_budget"] == 256 << 20


def test_an_explicit_call_takes_no_content_from_the_environment(corpus: Path) -> None:
    names = {"FOREBAY_SEQ_LEN": "7", "FOREBAY_SEED": "9", "FOREBAY_SHUFFLE": "global", "FOREBAY_BATCH_SIZE": "5"}
    found = config(corpus, {"seq_len": 32}, **names)
    assert (found["seq_len"], found["seed"], found["batch_size"]) == (32, 0, 1)


def test_from_env_takes_all_settings(corpus: Path) -> None:
    names = {
        "FOREBAY_DATA": str(corpus), "FOREBAY_SEQ_LEN": "10", "FOREBAY_BATCH_SIZE": "3", "FOREBAY_SEED": "5",
        "FOREBAY_SHUFFLE": "true", "FOREBAY_TARGETS": "shifted", "FOREBAY_NUM_THREADS": "2", "FOREBAY_EOS_ID": "0",
    }  # fmt: skip
    found, _, keys, shape = json_from(FROM_ENV, "{}", env=clean_environment(**names))
    assert (found["seq_len"], found["batch_size"], found["seed"], found["eos_id"]) == (10, 3, 5, 0)
    assert keys == ["x", "y"]
    assert shape == [3, 10]
    found, *_ = json_from(FROM_ENV, json.dumps({"seq_len": 20}), env=clean_environment(**names))
    assert found["seq_len"] == 20


def test_the_file_stands_below_the_environment_and_above_the_defaults(corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "forebay.toml"
    path.write_text(f'data = ["{corpus}"]\nseq_len = 11\nbatch_size = 2\nnum_threads = 4\n')
    names = {"FOREBAY_CONFIG": str(path), "FOREBAY_BATCH_SIZE": "6"}
    found, *_ = json_from(FROM_ENV, "{}", env=clean_environment(**names))
    assert (found["seq_len"], found["batch_size"], found["num_threads"], found["seed"]) == (11, 6, 4, 0)


def test_a_file_with_an_unknown_name_or_damage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "forebay.toml"
    path.write_text("seq_length = 11\n")
    message = refusal("from_env", FOREBAY_CONFIG=str(path))
    assert "seq_length" in message and "seq_len" in message and str(path) in message
    path.write_text("seq_len = \n")
    assert str(path) in refusal("from_env", FOREBAY_CONFIG=str(path))


@pytest.mark.parametrize(
    ("name", "value"),
    [("FOREBAY_SEQ_LEN", "many"), ("FOREBAY_SEQ_LEN", "-3"), ("FOREBAY_SHUFFLE", "sideways"),
     ("FOREBAY_NUM_THREADS", "1025"), ("FOREBAY_REMAINDER", "keep"), ("FOREBAY_PIN_MEMORY", "perhaps"),
     ("FOREBAY_MEMORY_BUDGET", "12 lightyears"), ("FOREBAY_IO", "tape")],
)  # fmt: skip
def test_a_bad_value_names_the_variable_and_the_value(corpus: Path, name: str, value: str) -> None:
    message = refusal("from_env", FOREBAY_DATA=str(corpus), **{name: value})
    assert value in message
    assert name in message or name.removeprefix("FOREBAY_").lower() in message


@pytest.mark.parametrize("value", ["1", "true", "on", "True", "0", "false", "off"])
def test_booleans_have_several_spellings(corpus: Path, value: str) -> None:
    names = {"FOREBAY_DATA": str(corpus), "FOREBAY_SEQ_LEN": "8", "FOREBAY_SHUFFLE": value}
    found, *_ = json_from(FROM_ENV, "{}", env=clean_environment(**names))
    off = value in ("0", "false", "off")
    assert (found["shuffle"] in (False, "off", "false")) == off


def test_an_unknown_name_warns_with_the_nearest_and_is_an_error_when_strict(corpus: Path) -> None:
    names = {"FOREBAY_NUM_TREADS": "3"}
    done = run_python(LOADER, corpus, "{}", env=clean_environment(**names))
    assert "FOREBAY_NUM_TREADS" in done.stderr and "FOREBAY_NUM_THREADS" in done.stderr
    message = refusal(corpus, FOREBAY_STRICT_ENV="1", **names)
    assert "FOREBAY_NUM_TREADS" in message and "FOREBAY_NUM_THREADS" in message


def test_names_that_kubernetes_injects_are_not_ours(corpus: Path) -> None:
    names = {
        "FOREBAY_SERVICE_HOST": "10.0.0.1", "FOREBAY_SERVICE_PORT": "80", "FOREBAY_PORT": "tcp://10.0.0.1:80",
        "FOREBAY_PORT_80_TCP": "tcp://10.0.0.1:80", "FOREBAY_PORT_80_TCP_ADDR": "10.0.0.1",
    }  # fmt: skip
    done = run_python(LOADER, corpus, "{}", env=clean_environment(FOREBAY_STRICT_ENV="1", **names))
    assert "FOREBAY_PORT" not in done.stderr


LAUNCHERS = {
    "none": ({}, (0, 1)),
    "torchrun": ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, (3, 4)),
    "open mpi": ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "5"}, (2, 5)),
    "pmi": ({"PMI_RANK": "1", "PMI_SIZE": "3"}, (1, 3)),
    "slurm": ({"SLURM_PROCID": "6", "SLURM_NTASKS": "8", "SLURM_STEP_ID": "0"}, (6, 8)),
    "slurm allocation without tasks": ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, (0, 1)),
    "torchrun under slurm": (
        {"RANK": "5", "WORLD_SIZE": "16", "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}, (5, 16),
    ),
    "own names first": (
        {"FOREBAY_DP_RANK": "1", "FOREBAY_DP_WORLD_SIZE": "2", "RANK": "6", "WORLD_SIZE": "8"}, (1, 2),
    ),
    "torchrun before open mpi": (
        {"RANK": "1", "WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "9"}, (1, 2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ranks_are_found_from_the_launcher(corpus: Path, launcher: str) -> None:
    names, wanted = LAUNCHERS[launcher]
    found = config(corpus, {"seq_len": 16}, **names)
    assert (found["dp_rank"], found["dp_world_size"]) == wanted


def test_an_argument_is_above_the_launcher(corpus: Path) -> None:
    names = {"RANK": "3", "WORLD_SIZE": "4"}
    found = config(corpus, {"dp_rank": 0, "dp_world_size": 2}, **names)
    assert (found["dp_rank"], found["dp_world_size"]) == (0, 2)


def test_half_a_pair_of_ranks_is_refused(corpus: Path) -> None:
    message = refusal("from_env", FOREBAY_DATA=str(corpus), FOREBAY_DP_RANK="1")
    assert "dp_world_size" in message.lower()
    message = refusal("from_env", FOREBAY_DATA=str(corpus), FOREBAY_DP_RANK="4", FOREBAY_DP_WORLD_SIZE="4")
    assert "4" in message


def test_ranks_of_a_launcher_read_what_the_reference_says(corpus: Path) -> None:
    from reference import Reference, Settings, token_stream

    program = """
    import json, sys
    import forebay
    with forebay.Loader(sys.argv[1], seq_len=16, batch_size=2, shuffle="global") as loader:
        print(json.dumps([[int(row[0]) for row in batch["input_ids"]] for batch in loader]))
    """
    reference = Reference(token_stream(corpus), Settings(seq_len=16, batch_size=2, shuffle="global"))
    for rank in range(2):
        found = json_from(program, corpus, env=clean_environment(RANK=str(rank), WORLD_SIZE="2"))
        wanted = [[ids[0] for ids, _ in rows] for rows in reference.batches(rank=rank, world_size=2)]
        assert found == wanted


def test_config_names_every_argument_of_the_constructor(corpus: Path) -> None:
    import inspect

    import forebay

    with forebay.Loader(corpus, seq_len=8) as loader:
        found = set(loader.config)
    assert found >= {"seq_len", "batch_size", "shuffle", "seed", "targets", "remainder", "num_threads", "memory_budget"}
    # A function is no setting.
    signature = set(inspect.signature(forebay.Loader).parameters) - {"self", "transform"}
    assert signature == found, f"only in one of them: {sorted(signature ^ found)}"


LOGGED = """
import logging, sys
import forebay
for _ in range(2):
    forebay.Loader(sys.argv[1])
print(logging.getLogger("forebay").level)
logging.getLogger("forebay").info("an info")
logging.getLogger("forebay").warning("a warning")
logging.basicConfig(format="root: %(message)s")
logging.getLogger("forebay").warning("another")
"""


def test_the_log_level_is_that_of_the_variable(corpus: Path) -> None:
    for level, number, lines in (
        ("", 0, ["a warning", "root: another"]),
        ("error", 40, []),
        ("Info", 20, ["an info", "a warning", "root: another"]),
    ):
        done = run_python(LOGGED, corpus, env=clean_environment(FOREBAY_LOG=level))
        assert done.stdout.split() == [str(number)]
        opened = [line for line in done.stderr.splitlines() if line.startswith("rank 0 of 1 opens ")]
        assert len(opened) == (2 if level == "Info" else 0), done.stderr
        assert [line for line in done.stderr.splitlines() if line not in opened] == lines
    assert "`FOREBAY_LOG` must be error, warn, info or debug, found `loud`" in refusal(corpus, FOREBAY_LOG="loud")


RESUMED = """
import sys
{imports}
loader = {loader}
it = iter(loader)
next(it), next(it)
state = loader.state_dict()
loader.load_state_dict(state)
next(iter(loader))
"""
LOADERS = {
    "NumPy": ("from forebay import Loader", "Loader(sys.argv[1], seq_len=8, batch_size=2)"),
    "torch": (
        "from forebay.torch import DataLoader, TokenDataset",
        "DataLoader(TokenDataset(sys.argv[1], seq_len=8), batch_size=2)",
    ),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_each_rank_logs_a_line_where_it_opens_and_where_it_resumes(corpus: Path, kind: str) -> None:
    if kind == "torch":
        pytest.importorskip("torch")
    imports, loader = LOADERS[kind]
    program = RESUMED.format(imports=imports, loader=loader)
    for level, count in (("", 0), ("info", 2), ("debug", 4)):
        environment = clean_environment(FOREBAY_LOG=level, RANK="1", WORLD_SIZE="2")
        said = run_python(program, corpus, env=environment).stderr
        lines = [line for line in said.splitlines() if line.startswith("rank 1 ")]
        assert len(lines) == count, said
        if not count:
            continue
        opens, resumes = (line for line in lines if line.startswith("rank 1 of 2"))
        for line, verb, position in ((opens, "opens", 0), (resumes, "resumes", 8)):
            assert line.startswith(f"rank 1 of 2 {verb} `{corpus}` (2 shards, "), line
            assert f"at epoch 0, position {position}, with " in line, line
            assert "thread" in line and "memory budget of 512 MiB" in line, line
        if level == "debug":
            assert sum("begins a pass at epoch 0, position" in line for line in lines) == 2, said


def test_a_warning_is_logged_once_per_process(corpus: Path) -> None:
    lines = run_python(LOGGED, corpus, env=clean_environment(FOREBAY_SEQ_LEM="16")).stderr.splitlines()
    assert sum("FOREBAY_SEQ_LEM" in line for line in lines) == 1, lines


def test_a_saved_index_is_kept_where_the_setting_or_the_variable_says(corpus: Path, tmp_path: Path) -> None:
    import forebay

    with forebay.Loader(corpus, seq_len=16, batch_size=4) as loader:
        expected = [batch["input_ids"].tolist() for batch in loader]
    for cache in (tmp_path / "argument", tmp_path / "argument"):
        with forebay.Loader(corpus, seq_len=16, batch_size=4, cache_dir=cache) as loader:
            assert loader.config["cache_dir"] == str(cache)
            assert [batch["input_ids"].tolist() for batch in loader] == expected
        assert len(list(cache.iterdir())) == 1
    assert config(corpus, FOREBAY_CACHE_DIR=str(tmp_path / "variable"))["cache_dir"] == str(tmp_path / "variable")
    assert len(list((tmp_path / "variable").iterdir())) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="single threads are placed on Linux alone")
def test_workers_run_where_they_are_sent_and_give_way(corpus: Path) -> None:
    """Looks for the placed workers in /proc.

    CPUs that do not exist are refused, and the error lists the CPUs that do.
    """
    import forebay

    def workers() -> dict[str, tuple[str, int]]:
        found = {}
        for task in Path("/proc/self/task").iterdir():
            # Other threads may end meanwhile.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                name = (task / "comm").read_text().strip()
                if re.fullmatch(r"forebay-\d+", name):
                    allowed = re.search(r"^Cpus_allowed_list:\s*(\S+)", (task / "status").read_text(), re.MULTILINE)
                    nice = int((task / "stat").read_text().rsplit(")", 1)[1].split()[16])
                    found[name] = (allowed.group(1) if allowed else "", nice)
        return found

    cpu = max(os.sched_getaffinity(0))
    placed = {"cpu_affinity": [cpu], "thread_priority": 5, "num_threads": 2}
    with forebay.Loader(corpus, seq_len=4, epochs="endless", **placed) as loader:
        assert (loader.config["cpu_affinity"], loader.config["thread_priority"]) == ([cpu], 5)
        batches = iter(loader)
        next(batches)
        expected = (str(cpu), min(19, os.getpriority(os.PRIO_PROCESS, 0) + 5))
        # The first batch may arrive before a worker has begun.
        deadline = time.monotonic() + 30
        while workers() != {"forebay-0": expected, "forebay-1": expected}:
            assert time.monotonic() < deadline, workers()
            time.sleep(0.01)
    allowed = ",".join(str(cpu) for cpu in sorted(os.sched_getaffinity(0)))
    for asked in ("0,4000", [4000]):
        with pytest.raises(forebay.ConfigError, match=r"cpu_affinity.*may not run on: 4000; it may run on"):
            forebay.Loader(corpus, seq_len=4, cpu_affinity=asked)
    assert config(corpus, FOREBAY_CPU_AFFINITY=allowed)["cpu_affinity"] == sorted(os.sched_getaffinity(0))
    assert config(corpus, FOREBAY_THREAD_PRIORITY="3")["thread_priority"] == 3


def test_page_locked_memory_is_refused_where_it_cannot_be_had(corpus: Path) -> None:
    for asked in ("from_env", str(corpus)):
        message = refusal(asked, FOREBAY_DATA=str(corpus), FOREBAY_PIN_MEMORY="1")
        assert "`pin_memory` needs forebay.torch.DataLoader" in message and "FOREBAY_PIN_MEMORY" in message


def test_peers_come_from_the_environment_of_every_loader(corpus: Path) -> None:
    names = {"RANK": "5", "WORLD_SIZE": "8", "FOREBAY_MODEL_PARALLEL_SIZE": "2"}
    found = config(corpus, {"seq_len": 16}, **names)
    assert (found["dp_rank"], found["dp_world_size"]) == (2, 4)
    found = config(corpus, {"seq_len": 16, "model_parallel_size": 4}, **names)
    assert (found["dp_rank"], found["dp_world_size"]) == (1, 2)


def test_objects_of_many_types_are_values(tmp_path: Path) -> None:
    import numpy as np

    import forebay

    folder = corpora.unique_corpus(tmp_path / "a,b\\c", "arrow", 400, shards=1)
    for given, expected in (
        ({"seq_len": np.int64(8)}, {"seq_len": 8}),
        ({"seq_len": "1Ki", "batch_size": "1"}, {"seq_len": 1024, "batch_size": 1}),
        ({"shuffle": np.False_}, {"shuffle": False}),
        ({"sample_ids": 1, "shuffle": "block"}, {"sample_ids": True, "shuffle": "block"}),
        ({"skip": np.array([[3, 5]])}, {"skip": [(0, 3, 5)]}),
        ({"skip": ((1, 3, 5), [2, 3])}, {"skip": [(1, 3, 5), (0, 2, 3)]}),
        ({"skip": []}, {"skip": []}),
        ({"input_dtype": np.int32}, {"input_dtype": "int32"}),
        ({"input_dtype": np.dtype("int32")}, {"input_dtype": "int32"}),
        ({"epochs": "endless"}, {"epochs": "endless"}),
        ({"cache_dir": tmp_path / "index"}, {"cache_dir": str(tmp_path / "index")}),
        ({"holdout": None}, {"holdout": None}),
    ):
        for data in (folder, str(folder), [folder], (str(folder),)):
            with forebay.Loader(data, **given) as loader:
                found = loader.config
                assert {name: found[name] for name in expected} == expected
                assert found["data"] == [str(folder)]


@pytest.mark.parametrize(
    ("name", "value"),
    [("seq_len", 3.0), ("seq_len", True), ("shuffle", 0.5), ("skip", 3), ("skip", [(1, 2, 3, 4)]), ("skip", [5]),
     ("cache_dir", 3), ("input_dtype", 3), ("bos_id", b"3"), ("data", 3), ("data", [3]),
     ("mixture", [1]), ("format", 1), ("cpu_affinity", 1), ("cpu_affinity", [0.5])],
)  # fmt: skip
def test_an_object_of_a_wrong_type_is_a_type_error(corpus: Path, name: str, value: Any) -> None:
    import forebay

    with pytest.raises(TypeError, match=f"`{name}` must be .*, found "):
        forebay.Loader(**{"data": corpus, name: value})


def test_a_number_out_of_range_is_shown(corpus: Path) -> None:
    import forebay

    for value in (-1, 0, 1 << 40, 1 << 200):
        with pytest.raises(forebay.ConfigError, match=f"`seq_len` must be .*, found `{value}`"):
            forebay.Loader(corpus, seq_len=value)


def test_a_mistyped_name_is_a_type_error_with_the_name_that_is_meant(corpus: Path) -> None:
    import forebay

    with pytest.raises(TypeError, match="unknown setting `seqlen`: did you mean `seq_len`"):
        forebay.Loader.from_env(corpus, seqlen=3)
