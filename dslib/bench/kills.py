"""A run that is killed at random moments and goes on: `dslib bench kills`."""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..checkpoints import load_tensors
from ..devices import this_machine
from ..errors import DslibError, require
from ..records import Record, as_words, commit

NETWORK = ("--data", "digits", "--model", "mobilenet_v2",
           "--model-option", "width_mult=0.1", "--weights", "none", "--k", "8",
           "--pretrain-epochs", "6", "--pretrain-lr", "0.4", "--pretrain-batch-size", "64",
           "--search-epochs", "6", "--search-save-minutes", "0.005",
           "--finetune-epochs", "6", "--finetune-save-minutes", "0.005", "--pretrain-save-minutes", "0.005",
           "--rounds", "1", "--batch-size", "2", "--device", "cpu")  # fmt: skip
STATES = ("search.partial.safetensors", "finetune.partial.safetensors")
COMMAND = (sys.executable, "-c", "from dslib.cli import main; main()")


def record_kills(kills: int = 20, seed: int = 0, echo: Callable[[str], object] = print) -> Record:
    """Whether a run killed by SIGKILL at random moments of its search and finetuning ends as one that was not.

    The original and the costs are made once, before: what is killed is a short run on the embedded digits, on the
    CPU. A kill counts if it hit the search or the finetuning, and the run was then taken up again.

    Args:
        kills: that count; half of them or more in the search.
        seed: of the moments.
        echo: is told of each kill.
    Raises:
        DslibError: if the weights differ; the record is not made.
    """
    require(kills > 0, f"kills: expected 1 or more, found {kills}")
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = [*COMMAND, "run", *NETWORK]
        whole, killed = folder / "whole", folder / "killed"
        began = time.monotonic()
        _to_the_end([*words, "--out", str(whole)])
        seconds = time.monotonic() - began
        killed.mkdir()
        for made in ("config.json", "original.json", "original.safetensors", "cost.json"):
            (killed / made).write_bytes((whole / made).read_bytes())  # timings differ from run to run
        hits: list[dict[str, Any]] = []
        counts = dict.fromkeys(STATES, 0)
        limits = dict(zip(STATES, (kills - kills // 2, kills // 2), strict=True))
        while any(counts[state] < limits[state] for state in STATES):
            hit = _kill_once([*words, "--out", str(killed)], killed, rng.uniform(0, 6.0), counts, limits)
            if hit is None:
                break
            hits.append(hit)
            echo(f"kill {len(hits)}: {hit}")
        _to_the_end([*words, "--out", str(killed)])
        same = all(
            _equal(whole / f"{part}.safetensors", killed / f"{part}.safetensors") for part in ("shrunk", "merged")
        )
    counted = sum(counts.values())
    if not same:
        raise DslibError(f"after {counted} kills the weights differ from those of a run that was not killed")
    settings = {"kills": kills, "seed": seed}
    values = {"kills": counted, "in_search": counts[STATES[0]], "in_finetuning": counts[STATES[1]], "hits": hits,
              "bit_for_bit": same, "uninterrupted_s": seconds}  # fmt: skip
    command = f"dslib bench kills {as_words(settings)}"
    return Record("kills", command, settings, values, this_machine(torch.device("cpu")), commit())


def _kill_once(
    words: Sequence[str], out: Path, after: float, counts: dict[str, int], limits: dict[str, int]
) -> dict[str, Any] | None:
    """Start the run, kill it `after` seconds into a training of which kills are wanted; None if it ended before."""
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    state, began = "", 0.0
    for line in process.stdout:
        for stage, name in (("search ...", STATES[0]), ("shrunk ...", STATES[1])):
            if line.startswith(stage) and counts[name] < limits[name]:
                state, began = name, time.monotonic()
        if state:
            break
    if not state:
        process.wait()
        return None
    try:
        process.wait(timeout=after)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        counts[state] += 1
        return {"training": state.split(".")[0], "after_s": time.monotonic() - began, "state": (out / state).exists()}
    return None


def _to_the_end(words: Sequence[str]) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise DslibError(f"the run ended with status {done.returncode}: {done.stderr.splitlines()[-1:]}")


def _equal(one: Path, other: Path) -> bool:
    first, second = load_tensors(one)[0], load_tensors(other)[0]
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
