"""Do the tests protect the core? Sixty small bugs are put into a copy of the project, one at a time.

    python tests/mutations.py                 all of them; about half an hour on a core that is free
    python tests/mutations.py lr-scale no-clipping
    python tests/mutations.py --list          names, and where each bug would be put; runs no test
    python tests/mutations.py --clean         the tests without the bugs, which must pass: or they would catch anything

Each bug is a line of code to look for and what to write in its place. It is looked for in all of `dslib`, and must
stand there exactly once; tests are named by their files' names and by what pytest's -k takes. So modules and tests may
move. Where code is rewritten, rewrite the bug here too: it is about what the code means, not about how it is spelt.

`caught` means that a test failed, which is named (or ran for too long), `SURVIVED` that none did: then a test is
missing. The status is 1 if a bug has no place any more or no test was run for it; survivors do not change it. Data
sets are found as the tests find them, by DSLIB_DATA.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = (".*", "__pycache__", "_build", "node_modules", "runs", "*.egg-info")
LIMIT = 900  # seconds of one bug's tests

# name | test files | expression for -k, or nothing
# - what stands in the code
# + what is written in its place
TABLE = r"""
# the algebra of affine maps, and which layer is which map
taps-axis | affine |
  - h * step[1] : h * step[1] + k_h
  + h * step[0] : h * step[0] + k_h
compose-dilation | affine |
  - second.dilation[axis] * first.stride[axis]
  + second.dilation[axis]
bias-of-groups | affine |
  - per_group.repeat_interleave(second.weight.shape[0] // second.groups, dim=0)
  + per_group.repeat(second.weight.shape[0] // second.groups, 1)
zeros-after-a-bias | affine |
  - affine.pointwise and affine.bias is None and not crossed
  + affine.pointwise and not crossed
zeros-after-a-crop | affine |
  - affine.pointwise and affine.bias is None and not crossed
  + affine.pointwise and affine.bias is None
stride-of-sides | affine |
  - return (left * h, right * h, top * v, bottom * v)
  + return (left * v, right * h, top * h, bottom * v)
regroup-diagonal | affine layers |
  - torch.eye(ratio, dtype=
  + torch.ones(ratio, ratio, dtype=
branches-place | affine |
  - (left, k_h - left, top, k_v - top)
  + (left, k_h - left, left, k_v - top)
batchnorm-eps | affine |
  - (var + bn.eps).rsqrt()
  + var.rsqrt()
pool-divisor | layers | affine_layers or average
  - 1 / (pool.divisor_override or k_v * k_h)
  + 1 / (k_v * k_h)
same-padding-side | borders merging | tf_efficientnet
  - (h // 2, h - h // 2, v // 2, v - v // 2)
  + (h - h // 2, h // 2, v - v // 2, v // 2)
shuffle-order | layers | affine_layers
  - .reshape(groups, -1).T.flatten()
  + .reshape(-1, groups).T.flatten()
uneven-chunks | layers silently_wrong | not half
  - -(-len(a.weight) // chunks)
  + len(a.weight) // chunks
constant-along-the-width | layers silently_wrong |
  - ((channels, 1, 1), (1, channels, 1, 1))
  + ((channels,), (channels, 1, 1), (1, channels, 1, 1))
macs-of-strides | merging plans | some or strides
  - conv.weight.numel() * pixels / (v * h)
  + conv.weight.numel() / (v * h)

# padding, borders, merging, folding, shrinking
statistics-see-the-padding | merging | batch_statistics or padding_batchnorm
  - self._scale_shift(F.pad(x, [-side for side in self.ring]))
  + self._scale_shift(x)
running-variance-biased | merging | batch_statistics
  - var * (count / max(count - 1, 1))
  + var
padding-of-zeros | merging | padding_batchnorm
  - F.pad(x - response, self.ring) + response
  + F.pad(x, self.ring)
every-block-pads | plans | run
  - first=i == 0
  + first=True
ring-ignores-stride | plans | run
  - (left * h, right * h, top * v, bottom * v)
  + (left, right, top, bottom)
uneven-top | layers borders | not families and not resnet50
  - left == right and top == bottom and min(
  + left == right and min(
ones-come-first | borders |
  - torch.cat([a.weight, b.weight], 1)
  + torch.cat([b.weight, a.weight], 1)
fold-returned | silently_wrong folding |
  - and key not in returned
  + and key not in ()
contract-mean | expanding | back
  - .running_mean"] - bias
  + .running_mean"] + bias
boundary-fades-too | merging loop finetuning | fade or fading
  - 1 - t if name.endswith(f".{BOUNDARY}") else t
  + t

# least squares and calibration
error-without-ridge | calibrating | least_squares or left_over
  - lower + penalty.sum()
  + lower
patches-dilation | calibrating | found_exactly or sums_are
  - at[:, None] * s + d * torch.arange(k
  + at[:, None] * s + torch.arange(k
held-back-is-fitted | calibrating | held_back
  - a, y = a[:, ~fourth], y[:, ~fourth]
  + a, y = a.clone(), y.clone()
held-back-is-lost | calibrating calibrating_networks | not nearer
  - self._sum(*self.held.pop())
  + self.held.pop()
match-mean | calibrating | spread
  - wanted.mean - factor * found.mean
  + wanted.mean - found.mean
match-without-bounds | calibrating calibrating_networks | not nearer
  - .clamp(0.5, 2)
  + .clamp_min(0)
switched-off-moves | calibrating calibrating_networks | not nearer
  - weight * alive[:, None, None, None], bias * alive
  + weight, bias
replay-unchecked | calibrating | replay
  - torch.equal(self.network(first), expected)
  + self.network(first) is not expected

# the planner
exact-budget | planning | not user
  - last.saving >= cost.total - latency - 1e-9 * cost.total
  + last.saving > cost.total - latency
run-begins-at-its-end | planning | not user
  - _Choice(place[names[0]], saving, loss, True, dropped)
  + _Choice(place[names[-1]], saving, loss, True, dropped)
drop-saves-as-merged | planning | not user
  - add([name], cost.kept[name], loss, dropped=True)
  + add([name], cost.saving([name], merged), loss, dropped=True)
never-linear | planning | linear
  - add([name], cost.saving([name], merged), loss)
  + add([name], cost.saving([name], True), loss)
quickest-is-thinned | planning | thinned
  - saving[0] = np.inf
  + pass
joint-without-own-loss | planning | joint
  - found.base_loss + point.loss
  + point.loss
speedup-by-quartile | planning | measured and not user
  - reached[0] >= speedup
  + reached[2] >= speedup

# training, and its state on disk
lr-scale | searching choosing loop training_goes_on |
  - lr_at(progress, config) * group.get("lr_scale", 1.0)
  + lr_at(progress, config)
final-lr | loop | learning_rate
  - config.final_lr + (peak - config.final_lr)
  + (peak - config.final_lr)
decay-of-biases | loop | decay
  - p.ndim <= 1], "weight_decay": 0.0
  + p.ndim <= 1], "weight_decay": config.weight_decay
micro-batches-add-up | loop finetuning | micro_batches
  - self.loss(self.network, images, labels) / len(micros)
  + self.loss(self.network, images, labels)
dropout-alike-in-each-step | loop | chance
  - * 1_000_003 + place.step) * 1_009
  + * 1_000_003) * 1_009
no-clipping | loop | clip
  - max_norm=config.clip
  + max_norm=float("inf")
average-begins-anew | training_goes_on | no_trace
  - self.average.steps = meta["average_steps"]
  + self.average.steps = 0
momentum-is-lost | loop training_goes_on | resumes or no_trace or was_not
  - if momentum is not None
  + if momentum is None
state-before-is-lost | state |
  - path.replace(before_last(path))
  + path.unlink()
older-state-first | state |
  - (_new(path), path, before_last(path))
  + (path, _new(path), before_last(path))
checksum-unread | loop training_goes_on state | changed_byte or checksum or damaged
  - header.get("sha256") != digest(tensors)
  + header.get("sha256") is None
seconds-of-one-stage | running | calibrated
  - self._seconds() | {name: time.perf_counter() - started}
  + {name: time.perf_counter() - started}

# records, masks, measuring, search, data
write-without-rename | records saving state loop training_goes_on | record or write or disk or state or tensors
  - partial.replace(path)
  + path.write_bytes(partial.read_bytes())
dropped-is-merged-too | plans | dropped or plan_says
  - {*self.dropped, *(name for run
  + {*(name for run
gate-gradient-sign | searching | straight_through
  - (grad * (ctx.act(x) - x)).sum()
  + (grad * (x - ctx.act(x))).sum()
negative-savings | searching | latency
  - savings.clamp(min=0)
  + savings.clone()
mean-for-median | latency | speedup
  - float(np.median(self.ms[name]))
  + float(np.mean(self.ms[name]))
time-of-all-repeats | latency |
  - 1e3 * (time.perf_counter() - start) / repeats
  + 1e3 * (time.perf_counter() - start)
mixup-labels | feeding | mixup
  - torch.lerp(soft.flip(0), soft, share)
  + torch.lerp(soft, soft.flip(0), share)
epochs-in-one-order | loop training_goes_on feeding | order or epochs
  - self.config.seed * 100_003 + epoch
  + self.config.seed * 100_003
"""


class Mutation(NamedTuple):
    """A bug, and the tests that ought to see it."""

    name: str
    files: tuple[str, ...]
    only: str
    old: str
    new: str


def mutations() -> list[Mutation]:
    """The table's rows."""
    found, lines = [], [line.strip() for line in TABLE.splitlines() if line and not line.startswith("#")]
    for head, old, new in zip(lines[::3], lines[1::3], lines[2::3], strict=True):
        name, files, only = (part.strip() for part in head.split("|"))
        assert (old[0], new[0]) == ("-", "+"), f"{name}: expected a line with '-', then one with '+'"
        found.append(Mutation(name, tuple(files.split()), only, old[1:].strip(), new[1:].strip()))
    return found


def place_of(mutation: Mutation, folder: Path) -> Path | str:
    """The one file of the package that holds the code to be changed; else why there is none."""
    counts = {path: path.read_text(encoding="utf-8").count(mutation.old) for path in folder.rglob("*.py")}
    holding = sorted(str(path.relative_to(folder)) for path, count in counts.items() if count)
    if sum(counts.values()) != 1:
        where = f"{sum(counts.values())} times, in {', '.join(holding)}" if holding else "nowhere"
        return f"expected once, found {where}: {mutation.old}"
    return folder / holding[0]


def tests_of(mutation: Mutation, folder: Path) -> list[str]:
    """The files of tests that a mutation names, wherever they lie; none if one of them is not there."""
    found = [sorted(folder.rglob(f"test_{stem}.py")) for stem in mutation.files]
    return [str(path) for paths in found for path in paths] if all(found) else []


def copied(folder: str) -> Path:
    """A copy of the project; the command `dslib`, where a test starts it, runs the copy's code too."""
    copy = Path(shutil.copytree(ROOT, Path(folder) / "copy", ignore=shutil.ignore_patterns(*LEFT_OUT)))
    first = f"import sys\n\nsys.path.insert(0, {str(copy)!r})\n"  # Python runs it where PYTHONPATH is the tests' folder
    (copy / "tests" / "sitecustomize.py").write_text(first, encoding="utf-8")
    return copy


def outcome(mutation: Mutation, copy: Path) -> tuple[str, str]:
    """What pytest makes of the copy as it is, and the test that failed, or what is wrong."""
    files = tests_of(mutation, copy / "tests")
    if not files:
        return "NO TESTS", f"expected a file test_NAME.py for each of {', '.join(mutation.files)}"
    words = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", *files]
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            [*words, *(["-k", mutation.only] if mutation.only else [])],
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
    except subprocess.TimeoutExpired:
        return "caught", f"more than {LIMIT} s"
    if done.returncode > 2:  # 5: no test was chosen; 4 and 3: pytest itself failed
        return "NO TESTS", f"pytest ended with {done.returncode}, see -k {mutation.only!r}"
    failed = [line.split(" ")[1] for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return ("caught", failed[0].rpartition("/")[2] if failed else "?") if done.returncode else ("SURVIVED", "")


def main() -> int:
    """Run those that were asked for; the status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--clean", action="store_true")
    given, every = parser.parse_args(), mutations()
    unknown = set(given.names) - {one.name for one in every}
    if unknown:
        parser.error(f"no such mutation: {', '.join(sorted(unknown))}; --list shows all")
    chosen = [one for one in every if one.name in given.names or not given.names]
    places = {one.name: place_of(one, ROOT / "dslib") for one in chosen}
    lost = [f"{name}: {why}" for name, why in places.items() if isinstance(why, str)]
    print(*lost, sep="\n", end="\n" if lost else "")
    if given.list:
        print(*(f"{n:28} {p.relative_to(ROOT)}" for n, p in places.items() if isinstance(p, Path)), sep="\n")
        return 1 if lost else 0
    if given.clean:  # the same tests once
        chosen = list({(one.files, one.only): one for one in chosen}.values())
    outcomes, begun = [], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        copy = copied(folder)
        for one in chosen:
            place = places[one.name]
            if isinstance(place, str):
                continue
            file, started = copy / place.relative_to(ROOT), time.perf_counter()
            whole = file.read_text(encoding="utf-8")
            file.write_text(whole if given.clean else whole.replace(one.old, one.new), encoding="utf-8")
            found, why = outcome(one, copy)
            file.write_text(whole, encoding="utf-8")
            if given.clean:
                found = {"SURVIVED": "passes", "caught": "FAILS"}.get(found, found)
            outcomes.append(found)
            print(f"{one.name:28} {found:8} {time.perf_counter() - started:6.1f} s  {why}".rstrip(), flush=True)
    good = "passes" if given.clean else "caught"
    print(f"{outcomes.count(good)} of {len(chosen)} {good}, in {(time.perf_counter() - begun) / 60:.1f} minutes")
    return 1 if lost or "NO TESTS" in outcomes or "FAILS" in outcomes else 0


if __name__ == "__main__":
    sys.exit(main())
