"""Ridge least squares for the weights of a convolution, from sums over batches: memory does not grow with images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..algebra import padding_of

HELD = 2**26  # numbers held back at most
MANY = 10_000  # unknowns from which on the given ridge is taken, as each try takes time and a copy of the system
CHUNK = 1024  # rows of a system computed at once


class Sums:
    """The sums that least squares needs, for a change of a convolution's weight and bias.

    Args:
        conv: the convolution, of any kernel, stride, dilation and groups.
        positions: output positions used of each image, the same for the images of a batch.
        seed: of their choice.
        tries: how many ridges may be tried; if several, on every fourth image, which is held back while there is
            memory for it.
    """

    def __init__(self, conv: nn.Conv2d, positions: int, seed: int, tries: int = 1) -> None:
        self.conv, self.positions, self.seed = conv, positions, seed
        self.unknowns = conv.weight[0].numel() + 1
        self.tries = tries if self.unknowns < MANY else 1
        self.count = self.images = 0
        self.held: list[tuple[Tensor, Tensor]] = []
        device = conv.weight.device if conv.weight.device.type != "mps" else torch.device("cpu")  # has no float64
        per_group = conv.out_channels // conv.groups
        self.inputs = _zeros(device, conv.groups, self.unknowns, self.unknowns)
        self.both = _zeros(device, conv.groups, per_group, self.unknowns).mT  # by columns, see `_solution`
        self.square, self.total = _zeros(device), _zeros(device, conv.groups, per_group)

    def add(self, x: Tensor, found: Tensor, wanted: Tensor, batch: int) -> None:
        """A batch.

        Args:
            x: the convolution's input, (N, C_in, H, W).
            found: the output that is to be changed, (N, C_out, H', W').
            wanted: what it should be at the positions that `pick` chooses, (N * positions, C_out).
            batch: its number, which with the seed decides on the positions.
        """
        some = places(found.shape[2] * found.shape[3], self.positions, self.seed, batch).to(x.device)
        precise = torch.promote_types(x.dtype, torch.float32)
        a = self._patches(x.to(precise), some, found.shape[3])
        y = (wanted - pick(found, self.positions, self.seed, batch)).to(precise)
        y = y.reshape(len(y), self.conv.groups, -1).transpose(0, 1)
        self.count += y.shape[1]
        fourth = (torch.arange(self.images, self.images + len(x), device=x.device) % 4 == 3).repeat_interleave(
            len(some)
        )
        self.images += len(x)
        back = a[:, fourth] if self.tries > 1 else a[:, :0]
        if back.numel() and sum(held.numel() for held, _ in self.held) + back.numel() <= HELD:
            self.held.append((back, y[:, fourth]))
            a, y = a[:, ~fourth], y[:, ~fourth]
        self._sum(a, y)

    def _sum(self, a: Tensor, y: Tensor) -> None:
        """Rows (groups, rows, unknowns) and what is wanted of them (groups, rows, C_out / groups)."""
        device = self.inputs.device
        for rows in range(0, self.unknowns, CHUNK):
            self.inputs[:, rows : rows + CHUNK].add_((a[..., rows : rows + CHUNK].mT @ a).to(device))
        self.both.add_((a.mT @ y).to(device))
        self.square += y.to(device).double().square().sum()
        self.total += y.to(device).double().sum(1)

    def is_finite(self) -> bool:
        """Whether all that was added was."""
        sums = [self.both.sum(), self.inputs.sum(), *(part.sum() for parts in self.held for part in parts)]
        return all(bool(one.isfinite()) for one in sums)

    def solve(self, ridge: float) -> tuple[Tensor, Tensor, float]:
        """The change of the weight (C_out, C_in / groups, k_v, k_h), of the bias (C_out,), and the error left over.

        The sums are gone after it: memory may not hold them twice.

        Args:
            ridge: the least to be tried, as a share of the mean square of the inputs; keeps the change small, the
                bias's excepted. It is raised tenfold while that helps on the images held back, which then join.
        Returns:
            The error: the norm of what is not explained, relative to that of the wanted change less its mean.
        """
        ridge = self._best(ridge)
        while self.held:
            self._sum(*self.held.pop())
        solution, lower = self._solution(self.inputs, self.both, ridge)
        self.inputs = self.both = self.inputs.new_empty(0)
        left = self.square - lower
        spread = self.square - self.total.square().sum() / max(self.count, 1)
        error = (left.clamp_min(0) / spread.clamp_min(1e-30)).sqrt().item()
        conv, (k_v, k_h) = self.conv, self.conv.kernel_size
        weight = solution[:, :-1].reshape(conv.groups, k_v, k_h, -1, solution.shape[2]).permute(0, 4, 3, 1, 2)
        return weight.reshape(conv.weight.shape), solution[:, -1].reshape(-1), error

    def _best(self, ridge: float) -> float:
        """The ridge, raised tenfold while that lowers the error on the images held back."""
        least = float("inf")
        for i in range(self.tries if self.held else 0):
            solution, _ = self._solution(self.inputs.clone(), self.both.clone(), ridge * 10**i)
            error = sum(float((y - a @ solution.to(a)).square().sum()) for a, y in self.held)
            if error >= least:
                return ridge * 10 ** (i - 1)
            least = error
        return ridge * 10 ** (self.tries - 1) if self.held else ridge

    def _solution(self, system: Tensor, right: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
        """Unknowns, and by how much they lower the sum of squares; both sides of the system are overwritten."""
        system = system.mT  # symmetric; by columns, as LAPACK wants it to work in place
        squares = system.diagonal(dim1=1, dim2=2)[:, :-1]
        ridges = ridge * squares.mean(1).clamp_min(1e-12)
        squares += ridges[:, None]
        torch.linalg.cholesky(system, out=system)
        torch.linalg.solve_triangular(system, right, upper=False, out=right)
        lower = torch.linalg.vector_norm(right).square()
        torch.linalg.solve_triangular(system.mT, right, upper=True, out=right)
        penalty = ridges * torch.linalg.vector_norm(right[:, :-1], dim=(1, 2)).square()
        return right, lower + penalty.sum()

    def _patches(self, x: Tensor, some: Tensor, width: int) -> Tensor:
        """What the convolution reads at some output positions, and a one: (groups, N * positions, unknowns)."""
        conv = self.conv
        x = F.pad(x, padding_of(conv, (x.shape[2], x.shape[3]))).permute(0, 2, 3, 1)
        axes = zip((some // width, some % width), conv.stride, conv.dilation, conv.kernel_size, strict=True)
        rows, columns = (at[:, None] * s + d * torch.arange(k, device=x.device) for at, s, d, k in axes)
        read = x[:, rows[:, :, None], columns[:, None, :]]  # N, positions, k_v, k_h, C_in
        read = read.reshape(len(x) * len(some), -1, conv.groups, x.shape[3] // conv.groups)
        flat = read.permute(2, 0, 1, 3).reshape(conv.groups, len(read), -1)
        return F.pad(flat, (0, 1), value=1.0)


def _zeros(device: torch.device, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64, device=device)


def pick(output: Tensor, positions: int, seed: int, batch: int) -> Tensor:
    """An output (N, C, H, W) at some positions, the same for the images of a batch: (N * positions, C)."""
    n, channels, height, width = output.shape
    some = places(height * width, positions, seed, batch).to(output.device)
    return output.permute(0, 2, 3, 1).reshape(n, height * width, channels)[:, some].reshape(-1, channels)


def places(total: int, positions: int, seed: int, batch: int) -> Tensor:
    """Numbers of the positions used of `total`: all, or so many at random."""
    if positions >= total:
        return torch.arange(total)
    generator = torch.Generator().manual_seed(seed * 100_003 + batch)
    return torch.randperm(total, generator=generator)[:positions]
