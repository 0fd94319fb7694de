#!/usr/bin/env python3
"""Set up and run DepthShrinker, the book. The first call makes .venv from requirements.lock.

    python3 dev.py test [pytest arguments]   the tests and every cell of every chapter: pytest --nbval
    python3 dev.py test --quick [...]        in about a minute: laws, algebra, sites, plans, records, each command
                                             once; no training that takes long, no chapter
    python3 dev.py book [--execute | --full] build the pages (--execute: run the chapters afresh; --full: with
                                             the long measurements that some have, hours, on the best device)
    python3 dev.py serve [port]              build, then serve the pages on 127.0.0.1 (port 8000)
    python3 dev.py lint                      ruff check, ruff format --check, mypy
    python3 dev.py browser [pytest arguments]   open the built pages in Chromium
    python3 dev.py setup                     only make .venv

Exit status: 2 if the set-up failed, 130 if interrupted, else that of the tool. Needs only Python's
standard library; one dev.py at a time sets up, the others wait (not on Windows).
"""

import functools
import hashlib
import http.server
import os
import shutil
import subprocess
import sys
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has none: there, don't run two set-ups at once
    fcntl = None

ROOT = Path(__file__).resolve().parent
BUILD, VENV = ROOT / "_build", ROOT / ".venv"
HTML, LOG, STAMP = BUILD / "html", BUILD / "setup.log", VENV / "complete"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
OLDEST, NEWEST = (3, 10), (3, 12)
MODULES = ("package", "records", "sites", "refusals", "planning", "compressing", "setup", "dev")
# for test --quick: what takes no large network
QUICK = ["tests/algebra/test_affine.py", "tests/cli"]
QUICK += [f"tests/test_{name}.py" for name in MODULES]
SIGNS = {  # what the log of a failed set-up holds -> what it means
    "No space left": "the disk is full: free about 10 GB",
    "connection broken": "the package index cannot be reached: check the network",
}


class SetupError(Exception):
    """A problem that whoever runs this can solve; its text is the one line they see."""


def check_python(version):
    """Raise SetupError unless `version` is one that requirements.lock was made for."""
    if not OLDEST <= tuple(version[:2]) <= NEWEST:
        names = [f"python3.{minor}" for minor in range(NEWEST[1], OLDEST[1] - 1, -1)]
        found = next(filter(shutil.which, names), None)
        advice = f"run `{found} dev.py ...`" if found else "install one of these and run dev.py with it"
        raise SetupError(f"expected Python 3.10 to 3.12, found {version[0]}.{version[1]}: {advice}")


def wanted_stamp():
    """The hash of all that a set-up depends on: lock, pyproject.toml's head, Python, this folder."""
    head = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("\n[tool.")[0]
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    parts = [head, lock, str(sys.version_info[:2]), str(ROOT)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def is_current():
    """Whether .venv was completed for what is wanted now, and its Python still stands."""
    python = shutil.which("python", path=str(BIN))
    return bool(python) and STAMP.exists() and STAMP.read_text() == wanted_stamp()


def logged(*command):
    """Run a set-up command, its output going to LOG; raise SetupError with the likely reason if it fails."""
    with LOG.open("ab") as log:
        status = subprocess.call(command, cwd=str(ROOT), stdout=log, stderr=subprocess.STDOUT)
    if status:
        text = LOG.read_text(errors="replace")
        reason = next((SIGNS[sign] for sign in SIGNS if sign in text), "its output says why")
        raise SetupError(f"`{' '.join(command[2:])}` failed ({reason}), see {LOG}, then run this again")


def make_venv():
    """Make .venv from nothing; the stamp comes last, so that a half-made one is never used."""
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError as error:
        raise SetupError(f"Python lacks its module {error.name}: on Debian, apt install python3-venv") from None
    print(f"dev.py: setting up .venv, once (minutes, about 7 GB); progress in {LOG}", flush=True)
    LOG.write_text("")
    shutil.rmtree(str(VENV), ignore_errors=True)
    # Not sys.executable: that may be the .venv just removed.
    logged(getattr(sys, "_base_executable", sys.executable), "-m", "venv", str(VENV))
    pip = [str(BIN / "python"), "-m", "pip", "install"]
    logged(*pip, "-r", "requirements.lock")
    logged(*pip, "--no-deps", "--no-build-isolation", "-e", ".")
    STAMP.with_suffix(".partial").write_text(wanted_stamp())
    STAMP.with_suffix(".partial").replace(STAMP)


def setup(args=()):
    """Make .venv if it is missing, half made or stale; return 0."""
    check_python(sys.version_info)
    BUILD.mkdir(exist_ok=True)
    with (BUILD / "setup.lock").open("w") as handle:
        if fcntl:
            fcntl.flock(handle, fcntl.LOCK_EX)
        if not is_current():
            make_venv()
    return 0


def tool(name, *args, **environment):
    """Run a program of .venv at the project's root; return its exit status."""
    command = [str(BIN / name), *map(str, args)]
    return subprocess.call(command, cwd=str(ROOT), env=dict(os.environ, **environment))


def test(args):
    """Run the tests and, cell by cell, the chapters, or those of QUICK: a file or chapter a core, four at most."""
    quick = "--quick" in args
    args = [*(QUICK if quick else ["--nbval"]), *(arg for arg in args if arg != "--quick")]
    cores = os.cpu_count() or 1
    workers = min(cores, 4)
    threads = os.environ.get("OMP_NUM_THREADS", str(cores // workers))
    parallel = ["-n", str(workers), "--dist", "loadfile"]
    return setup() or tool("python", "-m", "pytest", *parallel, *args, OMP_NUM_THREADS=threads)


def lint(args):
    """Run every checker, also when an earlier one complains."""
    setup()
    return max([tool("ruff", "check"), tool("ruff", "format", "--check"), tool("mypy")])


def book(args):
    """Build the pages from the committed outputs, with --execute or --full from outputs made now.

    Nothing is cached (--all, no jupyter-cache): committed outputs are those that the tests compare with today's.
    """
    if args not in ([], ["--execute"], ["--full"]):
        raise SetupError(f"expected `book`, `book --execute` or `book --full`, found `book {' '.join(args)}`")
    setup()
    shutil.rmtree(str(HTML), ignore_errors=True)
    tool("python", "book/_ext/vendored.py")
    tool("python", "book/_ext/lab.py")
    status = tool(
        "jupyter-book",
        "build",
        ".",
        "--all",
        "-W",
        "--keep-going",
        "-n",
        DSLIB_BOOK_EXECUTE="force" if args else "off",
        **({"DSLIB_BOOK": "full"} if args == ["--full"] else {}),
    )
    print("dev.py: " + ("the book has errors, see above" if status else f"open {HTML / 'index.html'}"))
    return status


def serve(args):
    """Build the pages, then serve them to this machine only until Ctrl-C."""
    if len(args) > 1 or not all(arg.isdigit() for arg in args):
        raise SetupError(f"expected `serve` or `serve PORT`, found `serve {' '.join(args)}`")
    address = ("127.0.0.1", int(args[0]) if args else 8000)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(HTML))
    with http.server.ThreadingHTTPServer(address, handler) as server:  # first: a taken port shows at once
        status = book([])
        if not status:
            print(f"dev.py: http://{address[0]}:{address[1]}, Ctrl-C ends", flush=True)
            server.serve_forever()
    return status


def browser(args):
    """Open every built page in Chromium; builds the book if there is none."""
    setup()
    status = 0 if (HTML / "index.html").exists() else book([])
    return status or tool("python", "-m", "pytest", "tests/browser", *args)


def main(argv):
    """Run one command; return the exit status."""
    commands = {f.__name__: f for f in (test, book, serve, lint, browser, setup)}
    if not argv or argv[0] not in commands:
        print(__doc__)
        return 0 if argv in (["-h"], ["--help"]) else 2
    try:
        return commands[argv[0]](argv[1:])
    except SetupError as problem:
        print(f"dev.py: {problem}", file=sys.stderr)
    except OSError as problem:
        print(f"dev.py: {problem}: make room, or change permissions or port; run again", file=sys.stderr)
    except KeyboardInterrupt:
        print("dev.py: interrupted; the next call takes up from here", file=sys.stderr)
        return 130
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
