"""The command line as a whole: its verbs, and how what goes wrong is told."""

from __future__ import annotations

import sys
import warnings

import click

from ..errors import DslibError, first_line
from .lazy import LazyGroup, commands_in

VERBS = commands_in(*(f"dslib.cli.{module}" for module in ("commands", "run", "bench")))


@click.group(
    cls=LazyGroup, lazy=VERBS, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(package_name="dslib")
def app() -> None:
    """Shrink a CNN: search which activations to keep, finetune without the rest, merge each linear block exactly."""


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr and exit status 2."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"  # without the line of code that warns
    sys.path.append("")  # so that --model mynet:build finds mynet.py in the current folder, and no library there
    try:
        app.main(standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
    except click.ClickException as error:
        _fail(f"{error.format_message()} (dslib --help lists the options)")
    except DslibError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename or 'a file'}: {error.strerror or error}: check the path, its permissions and the disk")
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted: what was finished is kept; the same command goes on from there")
    except RuntimeError as error:
        from ..training import processes

        if not processes.lost_another(error):
            raise
        _fail(
            f"another process of this job ended ({first_line(error)[:100]}): see what it said; the same command "
            "goes on from the last state"
        )


def _fail(message: str) -> None:
    click.echo(f"dslib: {' '.join(message.split())}", err=True)
    sys.exit(2)
