"""Does a run that is killed at random moments and goes on end as one that was not?"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import DslibError
from ..models import load_tensors
from ..records import read_json
from .benchmark import Benchmark, Context, Values
from .settings import BenchSettings, setting

NETWORK = """
    --data digits --model mobilenet_v2 --model-option width_mult=0.1 --weights none --k 8
    --pretrain-epochs 6 --pretrain-lr 0.4 --pretrain-batch-size 64 --rounds 1 --batch-size 2 --device cpu
    --search-save-minutes 0.005 --finetune-save-minutes 0.005 --pretrain-save-minutes 0.005
"""
BEGINNING = 1.0  # seconds before a training makes its first step
COMMAND = (sys.executable, "-m", "dslib")


@dataclass(frozen=True)
class Kills(BenchSettings):
    """Kill a run by SIGKILL at random moments of its search and finetuning, and take it up again each time.

    The original and the costs are made once, before: what is killed is a short run on the embedded digits, on the CPU,
    each time at a random moment after its search or its finetuning began. Weights, importances and every row of both
    trainings must be equal, bit for bit.

    Args:
        kills: half of them in the search, unless that ends before; the others in the finetuning.
        seed: of the moments.
        epochs: of the search, and of the finetuning.
    """

    kills: int = setting(20, "1 or more")
    seed: int = 0
    epochs: int = 12


def answer(config: Kills, context: Context[Kills]) -> Values:
    """What was killed when.

    Raises:
        DslibError: if anything differs; the record is not made.
    """
    epochs = ("--search-epochs", str(config.epochs), "--finetune-epochs", str(config.epochs))
    words = (*COMMAND, "run", *NETWORK.split(), *epochs)
    with tempfile.TemporaryDirectory() as name:
        whole, killed = Path(name) / "whole", Path(name) / "killed"
        began = time.monotonic()
        _to_the_end([*words, "--out", str(whole)])
        seconds = time.monotonic() - began
        killed.mkdir()
        for made in ("config.json", "original.json", "original.safetensors", "cost.json"):
            (killed / made).write_bytes((whole / made).read_bytes())  # timings differ from run to run
        hits = _kill([*words, "--out", str(killed)], killed, config, read_json(whole / "seconds.json"), context.echo)
        _to_the_end([*words, "--out", str(killed)])
        differ = [
            f"the weights in {part}"
            for part in ("shrunk.safetensors", "merged.safetensors")
            if not _equal(whole / part, killed / part)
        ]
        differ += ["what was learnt"] if _learnt(whole) != _learnt(killed) else []
    if differ:
        raise DslibError(f"after {config.kills} kills a run differs from one that was not killed: {', '.join(differ)}")
    found = {f"in_{at}": sum(hit["training"] == at for hit in hits) for at in ("search", "finetune")}
    return {"kills": config.kills, **found, "hits": hits, "bit_for_bit": True, "uninterrupted_s": seconds}


def _kill(
    words: Sequence[str], out: Path, config: Kills, lasted: Values, echo: Callable[[str], object]
) -> list[Values]:
    """Kill the run as often as asked for; what it was at each time."""
    rng, hits, wanted = random.Random(config.seed), list[Values](), config.kills
    while len(hits) < wanted:
        early = len(hits) < wanted - wanted // 2 and not (out / "search.json").exists()
        stage, seconds = ("search", lasted["search"]) if early else ("finetune", lasted["shrunk"])
        longest = min(0.8 * seconds, BEGINNING + 2 * seconds / wanted)
        hits.append(_kill_once(words, out, stage, rng.uniform(0, longest)))
        echo(f"kill {len(hits)}: {hits[-1]}")
    return hits


def _kill_once(words: Sequence[str], out: Path, stage: str, after: float) -> Values:
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


TOLD = (
    "{kills} kills, {in_search} in the search, {in_finetune} in the finetuning: "
    "the weights are those of a run that was not killed, bit for bit"
)
BENCHMARK = Benchmark("Training", Kills, answer, TOLD)
