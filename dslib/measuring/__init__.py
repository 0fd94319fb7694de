"""How long a network takes on this device, by which runtime, and how much of the device it uses.

counterpart  The dense counterpart of a network: one convolution a block, at the same multiply-accumulates.
devices      This machine: its devices, its allocator, its memory, and what else it is busy with.
latency      What a network costs: multiply-accumulates, parameters, memory, and latency measured in turns.
roofline     How much of a device a network uses: the device's measured peaks, and where a network stands below them.
runtimes     What runs a network: PyTorch itself, or another runtime that it is compiled for; and in which precision.
"""

from .counterpart import Dense, DenseBlock, dense
from .devices import Others, allocator_is_tuned, peak_memory_gib, pick_device, this_machine, tune_allocator, wait_for
from .latency import Timing, count_macs, count_parameters, halving, interleaved, measure, working_memory_mib
from .roofline import Peaks, find_peaks, utilisation
from .runtimes import PRECISIONS, RUNTIMES, dtype_for, runner_for, use_precision
