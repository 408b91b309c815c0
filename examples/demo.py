"""Tokenises real text, trains, is killed, resumes exactly, and trains through a service. Then it
fine-tunes, and compares with PyTorch.

`make demo` runs this program. `FOREBAY_DEMO_QUICK=1` takes about a minute and is meant for
continuous integration. Everything that the program makes is in `out/demo`. It ends with status 1 if
a claim does not hold.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import compare
import corpus
import fine_tune

QUICK = os.environ.get("FOREBAY_DEMO_QUICK") == "1"
OUT = Path("out/demo")
STEPS, CHECKPOINT_EVERY = (24, 8) if QUICK else (120, 20)
SERVICE_STEPS = max(24, STEPS // 2)
FINE_TUNING_STEPS, EXAMPLES_COUNT = (12, 300) if QUICK else (60, 2000)
#: Time without a step after which training counts as waiting, in seconds.
PAUSE_S = 5
COMPARISON_TOKENS = 8_000_000 if QUICK else 50_000_000
EXAMPLES = Path(__file__).resolve().parent


def heading(text: str) -> None:
    print(f"\n== {text}", flush=True)


def claim(holds: bool, text: str) -> None:
    if not holds:
        sys.exit(f"\ndemo: FAILED: {text}")
    print(f"   holds: {text}", flush=True)


def start_training(out: Path, *options: str, **environment: str) -> subprocess.Popen:
    script, data = str(EXAMPLES / "train_gpt.py"), str(OUT / "parquet")
    lengths = ("--steps", str(STEPS), "--checkpoint-every", str(CHECKPOINT_EVERY))
    command = [sys.executable, script, data, "--out", str(out), *lengths, *options]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, env={**os.environ, **environment})


def read_log(out: Path) -> list[dict]:
    """Reads the steps logged so far. Leaves out half a line, which a killed process may leave."""
    try:
        text = (out / "steps.jsonl").read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def train(out: Path, *options: str) -> dict:
    if start_training(out, *options).wait() != 0:
        sys.exit("demo: FAILED: training ended with an error")
    return json.loads((out / "summary.json").read_text())


def train_until_killed(out: Path, kill_step: int, *options: str) -> None:
    process = start_training(out, *options)
    try:
        while process.poll() is None:
            log = read_log(out)
            if log and log[-1]["step"] >= kill_step:
                process.kill()
                break
            time.sleep(0.002)
    finally:
        # No training outlives its parent, whatever happens here.
        if process.poll() is None:
            process.kill()
        process.wait()
    print()
    claim(process.returncode == -signal.SIGKILL, f"training was killed by SIGKILL at step {read_log(out)[-1]['step']}")


def show_resume() -> dict:
    """Trains once undisturbed, and once killed and resumed.

    Returns the summary of the first run, and the changes that the kill made.
    """
    whole, broken = OUT / "run-undisturbed", OUT / "run-killed"
    for folder in (whole, broken):
        shutil.rmtree(folder, ignore_errors=True)

    heading(f"Training a small GPT for {STEPS} steps, undisturbed")
    summary = train(whole)
    expected = {line["step"]: line for line in read_log(whole)}
    claim(sorted(expected) == list(range(1, STEPS + 1)), f"{STEPS} steps were logged")
    first, last = expected[1]["loss"], expected[STEPS]["loss"]
    claim(last < first - 0.5, f"the loss fell from {first:.2f} to {last:.2f}")

    middle = STEPS // CHECKPOINT_EVERY // 2 * CHECKPOINT_EVERY
    kill_step = middle + random.SystemRandom().randint(2, CHECKPOINT_EVERY // 2)
    heading(
        f"Training again with 1 loader thread, to be killed at step {kill_step} (checkpoints every {CHECKPOINT_EVERY})"
    )
    train_until_killed(broken, kill_step, "--num-workers", "1")
    before = read_log(broken)

    heading("Resuming in a new process, with 2 loader threads")
    (broken / "steps.jsonl").rename(broken / "steps-before-kill.jsonl")
    train(broken, "--num-workers", "2")
    after = read_log(broken)
    resumed_at = after[0]["step"]
    claim(
        resumed_at > 1 and resumed_at % CHECKPOINT_EVERY == 1 and resumed_at <= before[-1]["step"],
        f"it continued with step {resumed_at}, from the checkpoint before the kill at step {before[-1]['step']}",
    )
    claim([line["step"] for line in after] == list(range(resumed_at, STEPS + 1)), "it ran to the end")
    claim(
        all(line["batch"] == expected[line["step"]]["batch"] for line in before + after),
        f"all {len(after)} batches after the kill, and {len(before)} before, are byte for byte the undisturbed run's",
    )
    difference = max(abs(line["loss"] - expected[line["step"]]["loss"]) for line in before + after)
    if summary["device"] == "cpu":
        claim(difference == 0, f"so are the losses: largest difference {difference}")
    else:
        # Some GPU kernels may add in another order; the batches above are the loader's part.
        claim(difference < 1e-3, f"the losses agree: largest difference {difference:.2e}")
    repeated = before[-1]["step"] - resumed_at + 1
    return {**summary, "difference": difference, "killed_at": before[-1]["step"], "repeated": repeated}


def start_server(address: str) -> subprocess.Popen:
    """Starts a service for the corpus. Returns when it listens."""
    command = [sys.executable, "-m", "forebay", "serve", str(OUT / "parquet"), "--listen", address]
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    line = server.stdout.readline().strip()
    claim(line == f"ready at {address}", "the server listens at a Unix socket")
    return server


def show_service() -> None:
    """Trains with batches of another process, which is killed and started again meanwhile."""
    out, expected = OUT / "run-served", {line["step"]: line for line in read_log(OUT / "run-undisturbed")}
    shutil.rmtree(out, ignore_errors=True)
    kill_step = 2
    heading(f"Training for {SERVICE_STEPS} steps through a service, to be killed at step {kill_step}")
    processes = []
    with tempfile.TemporaryDirectory() as folder:
        address = f"unix:{folder}/socket"
        try:
            processes.append(start_server(address))
            # Few batches are on their way when the server dies.
            environment = {"FOREBAY_SERVICE": address, "FOREBAY_PREFETCH_BATCHES": "1"}
            processes.append(start_training(out, "--steps", str(SERVICE_STEPS), **environment))
            server, training = processes
            while training.poll() is None and not any(line["step"] >= kill_step for line in read_log(out)):
                time.sleep(0.002)
            server.kill()
            claim(server.wait() == -signal.SIGKILL, "the server was killed by SIGKILL")
            step, stands = 0, time.monotonic()
            while training.poll() is None and time.monotonic() - stands < PAUSE_S:
                time.sleep(0.1)
                if (now := len(read_log(out))) > step:
                    step, stands = now, time.monotonic()
            claim(step < SERVICE_STEPS and training.poll() is None, f"training waits for a server after step {step}")
            processes.append(start_server(address))
            claim(training.wait() == 0, "training went on in the same process, without a checkpoint")
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                process.wait()
    found = read_log(out)
    claim([line["step"] for line in found] == list(range(1, SERVICE_STEPS + 1)), "it ran to the end")
    claim(
        all(line["batch"] == expected[line["step"]]["batch"] for line in found),
        f"all {len(found)} batches are byte for byte those of a loader in the training process",
    )


def show_fine_tuning() -> None:
    heading(f"Fine-tuning the trained model for {FINE_TUNING_STEPS} steps, on {EXAMPLES_COUNT} prompts and answers")
    path = OUT / "examples.parquet"
    rows = fine_tune.write_examples(OUT / "parquet", path, EXAMPLES_COUNT)
    answers = sum(label != fine_tune.IGNORED for row in rows for label in row["labels"])
    tokens = sum(len(row["labels"]) for row in rows)
    print(f"   {path}: `input_ids`, and `labels` that are -100 on prompts")
    found = fine_tune.fine_tune(path, OUT / "run-undisturbed" / "checkpoint.pt", FINE_TUNING_STEPS)
    claim(
        found["targets"] == answers,
        f"{answers:,} of {tokens:,} tokens are targets, which are all tokens of answers and no others",
    )
    claim(
        abs(found["packed"] - found["alone"]) < 1e-4,
        f"a packed batch has the loss of its examples read one by one: {found['packed']:.5f}",
    )
    some = max(1, FINE_TUNING_STEPS // 6)
    first, last = (sum(losses) / some for losses in (found["losses"][:some], found["losses"][-some:]))
    full = f"rows that are {found['filled']:.1%} full"
    claim(last < first, f"the loss of answers fell from {first:.3f} to {last:.3f}, in {full}")


def show_comparison() -> dict:
    heading("Comparing torch.utils.data.DataLoader and forebay on the same corpus")
    report = compare.compare(OUT / "compare", QUICK, lambda text: print(f"   {text}", flush=True))
    (OUT / "comparison.json").write_text(json.dumps(report, indent=1) + "\n")
    compare.plot(report, OUT / "comparison.png")
    digests = {epoch["digest"] for epoch in report["epochs"].values()}
    rows = report["epochs"]["torch-batched"]["rows"]
    claim(len(digests) == 1, f"an epoch holds the same {rows} sequences, each once, from PyTorch, Parquet and Arrow")
    print()
    compare.print_table(report)
    return report


def main() -> None:
    started = time.monotonic()
    print(
        "Makes a corpus, trains twice, kills and resumes one training, trains through a service, fine-tunes, and"
        " compares: some 6 minutes."
    )
    heading("Making a corpus of Python's own standard library")
    made = corpus.prepare(OUT, COMPARISON_TOKENS, compare.BATCH_SIZE * compare.SEQ_LEN)
    print(
        f"   {made['documents']} files: {made['characters'] / 1e6:.1f} M characters,"
        f" {made['tokens'] / 1e6:.2f} M tokens of a byte-level BPE ({corpus.VOCAB_SIZE})\n"
        f"   in {corpus.SHARDS} shards of Parquet and of Arrow. The comparison takes the documents"
        f" {made['repetitions']} times: {made['comparison_tokens'] / 1e6:.1f} M tokens"
    )
    training = show_resume()
    show_service()
    show_fine_tuning()
    report = show_comparison()
    heading(f"Results, after {time.monotonic() - started:.0f} s")
    print(
        f"   Training on {training['device']}: {training['tokens_per_s']:,.0f} tokens/s,"
        f" {training['waited_share']:.2%} of the time waiting for data\n"
        f"   Killed at step {training['killed_at']}, {training['repeated']} steps redone from the last checkpoint:"
        f" same batches, losses differ by {training['difference']}"
    )
    for line in compare.verdicts(report):
        print(f"   {line}")
    print(f"   Picture: {OUT / 'comparison.png'}   numbers: {OUT / 'comparison.json'}")


if __name__ == "__main__":
    main()
