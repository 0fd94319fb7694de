"""The command line: options, a call of the package, and what it gave, printed. Listing the commands needs no torch.

bench          The benchmarks.
commands       The verbs, but for `dslib run`.
lazy           Groups of commands that are imported only when one is run.
options        Options, derived from what they are given to.
run            `dslib run`, all stages in one.
verbs          The command line as a whole: the list of its verbs, and how what goes wrong is told.
"""

from .verbs import app, main
