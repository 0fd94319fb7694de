"""Do random blocks of every kind, merged, give what their layers give?"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor, fx, nn
from tqdm import tqdm

from ..algebra import Affine, bypass, interpret_run, linear_blocks, start_of, tail
from ..errors import DslibError, NotMergeable
from ..merging import CHANNELS_KEY, merge_blocks
from ..records import Record
from .benchmark import Benchmark, Context, Values
from .random_blocks import RandomBlock, random_block
from .settings import BenchSettings, setting

LIMIT64, LIMIT32 = 1e-11, 1e-4


@dataclass(frozen=True)
class Fuzz(BenchSettings):
    """Merge random blocks of every kind and compare each with its layers; fails if one differs.

    Args:
        cases: random blocks to merge.
        seed: case i is drawn with seed and i.
    """

    cases: int = setting(10_000, "1 or more")
    seed: int = 0


@dataclass
class Tally:
    """What came out so far.

    Args:
        cases: blocks (or runs of blocks) tried.
        failures: what went wrong, one line each.
        worst64, worst32: largest error relative to the largest output.
        exact: of the cases, how many also merged with their padding left where it was.
        refused: how many of those were refused, a padded convolution following a spatial one.
    """

    cases: int = 0
    failures: tuple[str, ...] = ()
    worst64: float = 0.0
    worst32: float = 0.0
    exact: int = 0
    refused: int = 0


def fuzz_merge(cases: int = 10_000, seed: int = 0, progress: bool = True) -> Tally:
    """Merge random blocks and compare: with their layers, with the block itself, with impulse responses.

    Three oracles. The merged convolution against the hoisted layers, everywhere. The hoisted layers against the
    block's own code without its activations, away from the border. With the padding left where it was, the merged
    block against the block's own code, everywhere.

    Args:
        cases: how many; a fifth of them are runs of two or three blocks.
        seed: case i is drawn with seed and i, so that a failing one can be had alone.
        progress: show a bar.
    """
    tally = Tally()
    with torch.no_grad():
        for i in tqdm(range(cases), disable=not progress, unit="block"):
            _try_case(Random(f"{seed} {i}"), tally, f"case {i}")
    return tally


def answer(config: Fuzz, _: Context[Fuzz]) -> Values:
    """What a `Tally` holds."""
    tally = fuzz_merge(config.cases, config.seed)
    return {
        "cases": tally.cases,
        "failures": len(tally.failures),
        "failed": tally.failures[:20],
        "worst_relative_error_float64": tally.worst64,
        "worst_relative_error_float32": tally.worst32,
        "exact_border_cases": tally.exact,
        "exact_border_refused": tally.refused,
    }


def _told(record: Record) -> Iterator[str]:
    values = record.values
    yield from values["failed"]
    yield (
        f"{values['cases']} cases, {values['failures']} failures; worst relative error "
        f"{values['worst_relative_error_float64']:.1e} in float64, {values['worst_relative_error_float32']:.1e} in "
        f"float32; {values['exact_border_cases']} merged with exact borders too, "
        f"{values['exact_border_refused']} cannot be without hoisting"
    )
    if values["failures"]:
        raise DslibError(f"{values['failures']} of {values['cases']} blocks were merged wrongly: please report them")


BENCHMARK = Benchmark("Is merging exact?", Fuzz, answer, _told)


def _try_case(rng: Random, tally: Tally, name: str) -> None:
    c_in = rng.choice([1, 2, 3, 4, 6])
    blocks = [random_block(rng, c_in)]
    while rng.random() < 0.2 and len(blocks) < 3:
        blocks.append(random_block(rng, blocks[-1].c_out))
    tally.cases += 1
    try:
        _compare(blocks, _maps_without_activations(blocks, c_in, rng), tally, name, rng)
    except Exception as error:  # a fault of ours of any kind is what this looks for
        tally.failures += (f"{name}: {type(error).__name__}: {error}",)


def _maps_without_activations(blocks: list[RandomBlock], c_in: int, rng: Random) -> list[Tensor]:
    """A random input, and what the blocks' own code makes of it, one after another, their activations off."""
    height, width = rng.randint(20, 40), rng.randint(20, 40)
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    maps: list[Tensor] = []
    while len(maps) <= len(blocks):  # strides and kernels may ask for a larger image
        maps = [torch.randn(2, c_in, height, width, dtype=torch.float64, generator=generator)]
        for block in blocks:
            block.off = True
            with contextlib.suppress(RuntimeError):
                maps.append(block(maps[-1]))
            block.off = False
        height, width = 2 * height, 2 * width
    return maps


def _compare(blocks: list[RandomBlock], inputs: list[Tensor], tally: Tally, name: str, rng: Random) -> None:
    x, alone = inputs[0], inputs[-1]
    linear = _linear(blocks, inputs, hoisted=True)
    layers, merged = nn.Sequential(*linear), merge_blocks(linear)
    merged.act = nn.Identity()
    without_end = _without_end(layers)
    expected = without_end(x)
    _note(tally, f"{name}: merged and layers", merged(x), expected)
    _note(tally, f"{name}: impulse", *_impulses(merged, without_end, x, rng))
    if expected.shape != alone.shape:
        tally.failures += (f"{name}: hoisting changed the shape {tuple(alone.shape)} to {tuple(expected.shape)}",)
        return
    whole = interpret_run(linear, start_of(x.shape[1], linear[0]))
    _note(tally, f"{name}: hoisted and the block itself, inside", *_inside(expected, alone, whole))
    single = copy.deepcopy(layers).float()
    in32 = merge_blocks(list(single))  # type: ignore[arg-type]
    in32.act = nn.Identity()
    _note(tally, f"{name}: float32", in32(x.float()), _without_end(single)(x.float()), single=True)
    try:
        kept = _linear(blocks, inputs, hoisted=False)
        bias = merge_blocks(kept, "block", tuple(x.shape[1:]))  # type: ignore[arg-type]
    except NotMergeable:
        tally.refused += 1
        return
    tally.exact += 1
    ways = [bias]
    with contextlib.suppress(NotMergeable):  # a map larger than its input has no channel of ones
        ways.append(merge_blocks(kept))
    for way in ways:
        way.act = nn.Identity()
        _note(tally, f"{name}: exact border", way(x), alone)


def _linear(blocks: list[RandomBlock], inputs: list[Tensor], hoisted: bool) -> list[fx.GraphModule]:
    names, shapes = [f"block{i}" for i in range(len(blocks))], [tuple(x.shape[1:]) for x in inputs[:-1]]
    linear = linear_blocks(blocks, names, shapes, hoisted=hoisted)  # type: ignore[arg-type]
    linear[0].meta[CHANNELS_KEY] = inputs[0].shape[1]
    return linear


def _without_end(layers: nn.Sequential) -> nn.Sequential:
    layers = copy.deepcopy(layers)
    last = layers[-1]
    for node in tail(last):  # type: ignore[arg-type]
        bypass(last, node)  # type: ignore[arg-type]
    last.recompile()  # type: ignore[operator]
    return layers


def _impulses(merged: nn.Module, layers: nn.Module, x: Tensor, rng: Random) -> tuple[Tensor, Tensor]:
    """The answers to single ones at random places, less those to zeros."""
    zeros = torch.zeros_like(x[:1])
    spots = torch.cat([zeros] * 4)
    for spot in spots:
        spot[rng.randrange(x.shape[1]), rng.randrange(x.shape[2]), rng.randrange(x.shape[3])] = 1
    offset = layers(zeros)  # put back at the end: errors are relative to the outputs, not to what one pixel adds
    return merged(spots) - merged(zeros) + offset, layers(spots) - offset + offset


def _inside(a: Tensor, b: Tensor, whole: Affine) -> tuple[Tensor, Tensor]:
    """The parts of two outputs that no padding can reach: less the merged kernel's width and padding on each side."""
    v, h = (
        -(-(2 * d * (k - 1) + max(sides)) // s) + 2
        for k, s, d, sides in zip(
            whole.kernel, whole.stride, whole.dilation, (whole.padding[2:], whole.padding[:2]), strict=True
        )
    )
    return a[..., v:-v, h:-h], b[..., v:-v, h:-h]


def _note(tally: Tally, name: str, found: Tensor, expected: Tensor, single: bool = False) -> None:
    if found.numel() == 0 and expected.numel() == 0:
        return
    error = ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12)).item()
    limit = LIMIT32 if single else LIMIT64
    if single:
        tally.worst32 = max(tally.worst32, error)
    else:
        tally.worst64 = max(tally.worst64, error)
    if not error < limit:
        tally.failures += (f"{name}: relative error {error:.1e}",)
