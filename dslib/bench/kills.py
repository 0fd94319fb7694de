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

from ..errors import BadConfig, DslibError
from ..measuring import this_machine
from ..models import load_tensors
from ..records import Record, as_words, commit, read_json

NETWORK = (
    "--data",
    "digits",
    "--model",
    "mobilenet_v2",
    "--model-option",
    "width_mult=0.1",
    "--weights",
    "none",
    "--k",
    "8",
    "--pretrain-epochs",
    "6",
    "--pretrain-lr",
    "0.4",
    "--pretrain-batch-size",
    "64",
    "--search-save-minutes",
    "0.005",
    "--finetune-save-minutes",
    "0.005",
    "--pretrain-save-minutes",
    "0.005",
    "--rounds",
    "1",
    "--batch-size",
    "2",
    "--device",
    "cpu",
)
BEGINNING = 1.0  # seconds before a training makes its first step
COMMAND = (sys.executable, "-c", "from dslib.cli.verbs import main; main()")


def record_kills(kills: int = 20, seed: int = 0, epochs: int = 12, echo: Callable[[str], object] = print) -> Record:
    """Whether a run killed by SIGKILL at random moments of its search and finetuning ends as one that was not.

    The original and the costs are made once, before: what is killed is a short run on the embedded digits, on the
    CPU, each time at a random moment after its search or its finetuning began, and it is taken up again each time.
    Weights, importances and every row of both trainings must be equal.

    Args:
        kills: half of them in the search, unless that ends before; the others in the finetuning.
        seed: of the moments.
        epochs: of the search, and of the finetuning.
        echo: is told of each kill.
    Raises:
        DslibError: if anything differs; the record is not made.
    """
    if not kills > 0:
        raise BadConfig(f"kills: expected 1 or more, found {kills}")
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = [*COMMAND, "run", *NETWORK, "--search-epochs", str(epochs), "--finetune-epochs", str(epochs)]
        whole, killed = folder / "whole", folder / "killed"
        began = time.monotonic()
        _to_the_end([*words, "--out", str(whole)])
        seconds = time.monotonic() - began
        killed.mkdir()
        for made in ("config.json", "original.json", "original.safetensors", "cost.json"):
            (killed / made).write_bytes((whole / made).read_bytes())  # timings differ from run to run
        lasted = read_json(whole / "seconds.json")
        hits: list[dict[str, Any]] = []
        while len(hits) < kills:
            early = len(hits) < kills - kills // 2 and not (killed / "search.json").exists()
            stage, seconds_ = ("search", lasted["search"]) if early else ("finetune", lasted["shrunk"])
            longest = min(0.8 * seconds_, BEGINNING + 2 * seconds_ / kills)
            hits.append(_kill_once([*words, "--out", str(killed)], killed, stage, rng.uniform(0, longest)))
            echo(f"kill {len(hits)}: {hits[-1]}")
        _to_the_end([*words, "--out", str(killed)])
        differ = [
            f"the weights in {part}"
            for part in ("shrunk.safetensors", "merged.safetensors")
            if not _equal(whole / part, killed / part)
        ]
        differ += ["what was learnt"] if _learnt(whole) != _learnt(killed) else []
    if differ:
        raise DslibError(f"after {kills} kills a run differs from one that was not killed: {', '.join(differ)}")
    settings = {"kills": kills, "seed": seed, "epochs": epochs}
    found = {f"in_{at}": sum(hit["training"] == at for hit in hits) for at in ("search", "finetune")}
    values = {"kills": kills, **found, "hits": hits, "bit_for_bit": not differ, "uninterrupted_s": seconds}
    command = f"dslib bench kills {as_words(settings)}"
    return Record("kills", command, settings, values, this_machine(torch.device("cpu")), commit())


def _kill_once(words: Sequence[str], out: Path, stage: str, after: float) -> dict[str, Any]:
    """Start the run, kill it `after` seconds into a stage; what it was at then.

    Raises:
        DslibError: if the run ended before.
    """
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    line = {"search": "search ...", "finetune": "shrunk ..."}[stage]
    for told in process.stdout:
        if told.startswith(line):
            break
    began = time.monotonic()
    try:
        process.wait(timeout=after)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
    ends = {"search": "search.json", "finetune": "shrunk.json"}
    at = next((name for name, made in ends.items() if not (out / made).exists()), "")
    if process.returncode >= 0 or not at:
        raise DslibError("the run ended before it was killed as often as asked for: give fewer --kills")
    return {"training": at, "after_s": time.monotonic() - began, "state": (out / f"{at}.partial.safetensors").exists()}


def _to_the_end(words: Sequence[str]) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise DslibError(f"the run ended with status {done.returncode}: {done.stderr.splitlines()[-1:]}")


def _learnt(out: Path) -> list[Any]:
    """What the search and each epoch came to, without their times."""
    search, tuned = (read_json(out / name) for name in ("search.json", "finetune.json"))
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in (*search["history"], *tuned["history"])]
    return [search["m"], *rows]


def _equal(one: Path, other: Path) -> bool:
    first, second = load_tensors(one)[0], load_tensors(other)[0]
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
