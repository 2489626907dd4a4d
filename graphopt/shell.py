"""How the command behaves as a process: one-line errors, exit codes, signals, closed pipes.

Imports nothing heavy: it is loaded for `--help` too.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, ParamSpec

import typer

from graphopt.errors import GraphoptError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from graphopt.record import Record

P = ParamSpec("P")
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def prepare() -> None:
    """Make signals unwind the stack, and let no name that a file holds break the output."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        # Ignored signals stay ignored: that is how nohup and shells protect background jobs.
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _unwind)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def _unwind(number: int, frame: FrameType | None) -> None:
    """Leave through every context manager, so that what is half done is removed."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):  # a second signal must not interrupt the cleaning up
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def boundary(function: Callable[P, None]) -> Callable[P, None]:
    """Turn what a command raises into one line on stderr and an exit code.

    A keyword argument `verbose` of the command, or GRAPHOPT_DEBUG=1, adds the traceback and the
    log.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        verbose = bool(kwargs.get("verbose")) or os.environ.get("GRAPHOPT_DEBUG", "0") != "0"
        _set_up_logging(verbose)
        try:
            function(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except GraphoptError as error:
            _fail(str(error), error.exit_code, verbose)
        except KeyboardInterrupt:
            _fail("interrupted", INTERRUPTED, False)
        except OSError as error:
            where = f"{error.filename}: " if error.filename is not None else ""
            _fail(f"{where}{error.strerror or error}", 2, verbose)
        except MemoryError:
            _fail("out of memory", 1, verbose)
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            _fail(f"{what} (this is a bug in graphopt; -v shows where)", 1, verbose)

    return run


def _fail(message: str, code: int, verbose: bool) -> None:
    if verbose:
        import traceback

        typer.echo(traceback.format_exc(), err=True)
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    raise typer.Exit(code)


def _set_up_logging(verbose: bool) -> None:
    """Log to stderr where asked; else what matters is in the report, and stderr stays quiet."""
    import logging
    import warnings

    logger = logging.getLogger("graphopt")
    if verbose:
        logging.basicConfig(format="%(name)s: %(message)s", stream=sys.stderr)
        logger.setLevel(logging.DEBUG)
    else:
        logger.addHandler(logging.NullHandler())
        if not sys.warnoptions:
            warnings.simplefilter("ignore")


@contextlib.contextmanager
def printing() -> Iterator[None]:
    """For writing to stdout: a reader that has had enough (`| head`) is no error.

    What the command found out, its exit code included, does not depend on who reads it.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        mute_stdout()


def show(draw: Callable[[Console], None]) -> None:
    """Draw on a console on stdout."""
    from graphopt.render.text import stdout

    with printing():
        draw(stdout())


def print_json(record: Record) -> None:
    """Print the record as JSON, and nothing else."""
    with printing():
        typer.echo(record.model_dump_json(indent=2))


@contextlib.contextmanager
def report_writer(path: Path | None, *models: Path) -> Iterator[Callable[[Record], Any]]:
    """A function that writes a record to `path` as JSON; that it can be written is checked now.

    Raises UsageError where that is one of the `models` of the command, and OutputError.
    """
    if path is None:
        yield lambda record: None
        return
    from graphopt.output import Target, output_errors

    if any(path.resolve() == model.resolve() for model in models):
        raise UsageError(f"--report {path}: that is a model of this command")
    with Target(path) as place:

        def save(record: Record) -> None:
            with output_errors(path):
                place.staged.write_text(record.model_dump_json(indent=2) + "\n", "utf-8")
            place.commit([place.staged])

        yield save


def mute_stdout() -> None:
    """Send the rest of stdout nowhere, also what Python flushes at exit."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
