"""The command line: options, a call of the package, and what it gave, printed. Listing the commands needs no torch.

bench          The benchmarks.
calibrate      `dslib calibrate`, for people without labels.
lazy           Groups of commands that are imported only when one is run.
options        Options, derived from what they are given to.
plan           `dslib importance` and `dslib plan`.
run            `dslib run`, all stages in one, and `dslib eval`.
stages         The stages one by one.
verbs          The command line as a whole: its verbs, and how what goes wrong is told.
"""

from .verbs import app, main
