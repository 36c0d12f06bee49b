"""What every job shares: options in two spellings, exit codes, where talk and data go, progress.

Data goes to stdout, talk to stderr. Exit codes: 0 done; 2 usage or unreadable input; 3 ``--enforce`` was given and a
target was missed; 4 done, but some recordings failed; 70 an error of ours; 130 interrupted.
"""

from __future__ import annotations

import argparse
import atexit
import errno
import gc
import io
import itertools
import shlex
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from pipeline.data.labels import chained, parse_label_map, parse_label_names
from pipeline.storage.errors import SerError, SerWarning

if TYPE_CHECKING:
    from tqdm import tqdm

_REMEDIES = {
    errno.EACCES: "grant access to it, or name another",
    errno.EPERM: "grant access to it, or name another",
    errno.EROFS: "name a place that can be written",
    errno.ENOSPC: "free some space, then give the same command again",
    errno.EDQUOT: "free some space, then give the same command again",
}
EXIT_DONE, EXIT_USAGE, EXIT_TARGET_MISSED, EXIT_SOME_FAILED, EXIT_OURS, EXIT_INTERRUPTED = 0, 2, 3, 4, 70, 130


AS_SER = ContextVar("AS_SER", default=False)  # whether the command was given as ``ser NAME``


def called(job: str) -> str:
    """A command as it was given: ``ser score`` or ``python -m jobs.score``."""
    return f"ser {job}" if AS_SER.get() else f"python -m jobs.{job}"


class Parser(argparse.ArgumentParser):
    """Options read as ``--data_csv`` and ``--data-csv`` alike; a usage error is one line and exit code 2."""

    _usual: frozenset[str] = frozenset()

    def put_first(self, names: Collection[str]) -> None:
        """Show these options in a first group of their own, and the others with ``--help-all`` only."""
        first = self.add_argument_group("what is usually given")
        for group in self._action_groups:
            for action in [action for action in group._group_actions if action.dest in names and group is not first]:
                group._group_actions.remove(action)
                first._group_actions.append(action)
        self._action_groups.remove(first)
        self._action_groups.insert(0, first)
        self.add_argument("--help_all", action=_HelpAll, nargs=0, help="show every option")
        self._usual = frozenset({*names, "help", "help_all"})

    def format_help(self) -> str:
        """The options that are usually given; all where none is more usual than the others."""
        others = [action for action in self._actions if self._usual and action.dest not in self._usual]
        helps = [action.help for action in others]
        try:
            for action in others:
                action.help = argparse.SUPPRESS
            return self.format_all()
        finally:
            for action, text in zip(others, helps, strict=True):
                action.help = text

    def format_all(self) -> str:
        """All options."""
        return super().format_help()

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        """As argparse, after writing every option's hyphens as underscores."""
        given = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args([underscored(a) for a in given], namespace)

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with 2."""
        self.exit(EXIT_USAGE, f"error: {message}; see {self.prog} --help\n")


class _HelpAll(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        """Print all options and end."""
        assert isinstance(parser, Parser)
        print(parser.format_all(), end="")
        parser.exit()


def underscored(argument: str) -> str:
    """An option's name with underscores for hyphens; anything else as it is."""
    if not argument.startswith("--") or argument == "--":
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


class LabelMap(argparse.Action):
    """``--label_map``; given again, it is about what the one before it gives, as the report's advice is."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Read a map, and chain it to the one before."""
        setattr(namespace, self.dest, chained(getattr(namespace, self.dest) or {}, parse_label_map(str(values))))


def add_csv_options(parser: argparse.ArgumentParser | argparse._ArgumentGroup, *, integers: bool = True) -> None:
    """``--root`` and ``--label_map`` of a CSV, and ``--label_names`` where its integer labels may be anybody's."""
    parser.add_argument("--root", type=Path, help="folder that relative paths in the CSV start from (default: its own)")
    parser.add_argument("--label_map", action=LabelMap, help="other label names in the CSV: given=wanted,...")
    if integers:
        add_label_names(parser)


def add_label_names(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """``--label_names``, of a CSV."""
    parser.add_argument(
        "--label_names",
        type=_label_names,
        metavar="NAME,...",
        help="what the integer labels 0,1,... in the CSV mean: angry,sad,... (default: classes are called by them)",
    )


def _label_names(text: str) -> tuple[str, ...]:
    try:
        return parse_label_names(text)
    except SerError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def say(text: str = "") -> None:
    """Talk: one line on stderr, at once; lost where the terminal or the pipe has gone, which ends no job."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def escape_on_consoles() -> None:
    """From now on, signs that a console's encoding lacks are printed escaped, instead of ending the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def true_or_false(text: str) -> bool:
    """``True``/``False`` as the command line spells them (also yes/no, 1/0)."""
    value = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}.get(text.strip().lower())
    if value is None:
        raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")
    return value


def add_out(parser: argparse._ActionsContainer, below: str, what: str) -> None:
    """``--out``, a folder for ``what``; where it is not given, ``run`` makes a new one in ``below``."""
    parser.add_argument("--out", type=Path, help=f"folder for {what} (default: a new, dated one in {below}/)")
    parser.set_defaults(out_below=below)


def add_engine(parser: argparse._ActionsContainer) -> None:
    """``--engine`` and ``--num_cpus``: where the work is done."""
    parser.add_argument(
        "--engine",
        choices=("auto", "local", "ray"),
        default="auto",
        help="ray: Ray, here or on the cluster of RAY_ADDRESS; local: processes of this machine; auto (default): "
        "local where the work is too small to repay Ray's start",
    )
    parser.add_argument("--num_cpus", type=int, help="CPUs to use (default: all)")


def tell_engine(arguments: argparse.Namespace, engine: str, work: str, other: str = "Ray Data") -> None:
    """Say so when ``auto`` chose the local engine for ``work``."""
    if engine == "local" and arguments.engine == "auto" and arguments.num_cpus != 0:
        say(f"{work}: in processes of this machine; --engine ray for {other}")


def dated(below: str) -> str:
    """The folder of now in ``below``: ``runs/2026-11-30_094636``."""
    return f"{below}/{time.strftime('%Y-%m-%d_%H%M%S')}"


@contextmanager
def _new_out(arguments: argparse.Namespace) -> Iterator[None]:
    """A new dated folder as ``arguments.out`` where the command has one and none was given; gone again if not used.

    Raises:
        SerError: it cannot be made, or ``--resume`` does not say what to go on with.
    """
    below = getattr(arguments, "out_below", None)
    if below is None or arguments.out is not None:
        yield
        return
    if getattr(arguments, "resume", False):
        raise SerError("--resume without --out; give the folder of the run to go on with")
    new_parent = not Path(below).exists()
    try:
        Path(below).mkdir(parents=True, exist_ok=True)
        name = arguments.out = Path(dated(below))
        for number in itertools.count(2):  # other commands may start in this second
            with suppress(FileExistsError):
                arguments.out.mkdir()
                break
            arguments.out = name.with_name(f"{name.name}_{number}")
    except OSError as error:
        raise SerError(f"cannot make a folder in {below}: {error.strerror}; give another one with --out") from error
    say(f"no --out given: everything goes into {arguments.out}")
    try:
        yield
    finally:
        left = list(arguments.out.iterdir())
        if all(path.name.startswith(".") and path.is_file() for path in left):  # locks at most
            for path in left:
                path.unlink()
            arguments.out.rmdir()
            if new_parent:
                with suppress(OSError):  # another command has put something there
                    Path(below).rmdir()


def run(
    job: Callable[[argparse.Namespace], int],
    parser: Parser,
    argv: Sequence[str] | None,
    *,
    prepare: Callable[[Parser, Sequence[str]], Parser] | None = None,
    parse: Callable[[Parser, Sequence[str]], argparse.Namespace] = Parser.parse_args,
) -> int:
    """Parse, run, and turn what happened into an exit code; no traceback ever reaches the user.

    ``prepare`` may change the parser by what it finds on the command line; ``parse`` reads that line.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    atexit.register(gc.freeze)  # else Python looks through all there is for cycles, for a second or more, to end
    escape_on_consoles()
    warnings.showwarning = _show
    try:
        if prepare is not None:
            parser = prepare(parser, words)
        arguments = parse(parser, words)
        arguments.command = f"{parser.prog} {shlex.join(words)}"  # as reports tell it
    except SystemExit as stop:
        return int(stop.code or 0)
    except SerError as error:
        say(f"error: {' '.join(str(error).split())}")
        return EXIT_USAGE
    try:
        with _new_out(arguments):
            return job(arguments)
    except SerError as error:
        say(f"error: {' '.join(str(error).split())}")
        return EXIT_USAGE
    except KeyboardInterrupt:
        say("interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        sys.stdout = None  # the reader has gone: nothing more to print
        return EXIT_DONE
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _REMEDIES:
            what = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
            say(f"error: {' '.join(str(what).split())}; {_REMEDIES[error.errno]}")
            return EXIT_USAGE
        # the last line of defence: our own mistake
        log = Path(tempfile.mkstemp(prefix="ser-error-", suffix=".log")[1])
        log.write_text(traceback.format_exc(), encoding="utf-8")
        say(f"error: this is our mistake ({type(error).__name__}); please report it with {log}")
        return EXIT_OURS


def _show(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning of ours as one line of talk; anyone else's as Python shows it."""
    if issubclass(category, SerWarning):
        say(f"warning: {message}")
    else:
        print(warnings.formatwarning(message, category, filename, lineno, line), end="", file=file or sys.stderr)


def check_free(host: str, port: int, remedy: str) -> None:
    """Whether a server can listen there.

    Raises:
        SerError: it cannot; the message ends with ``remedy``.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise SerError(f"cannot listen on {host}:{port} ({reason}); {remedy}") from error


class Progress:
    """Done / total, speed, failures and time left: a bar on a terminal, else a plain line every few seconds."""

    def __init__(self, what: str, unit: str = "files", every_s: float = 5.0) -> None:
        self.what, self.unit, self.every_s = what, unit, every_s
        self._start: tuple[float, int] | None = None  # when the first work was done, and how much
        self._last_line_s = 0.0
        self._bar: tqdm[NoReturn] | None = None

    def __call__(self, done: int, total: int, failed: int | None = None) -> None:
        """Show that ``done`` of ``total`` (0: not known) are finished, ``failed`` of them badly (None: none can)."""
        if sys.stderr.isatty():
            if self._bar is None:
                from tqdm import tqdm

                self._bar = tqdm(total=total or None, desc=self.what, unit=self.unit, initial=0)
            if failed is not None:
                self._bar.set_postfix(failed=failed, refresh=False)
            self._bar.update(done - self._bar.n)
            if done >= total > 0:
                self._bar.close()
            return
        now = time.monotonic()
        self._start = self._start or (now, done)
        if (done < total or not total) and now - self._last_line_s < self.every_s:
            return
        self._last_line_s = now
        since_s, first = self._start
        rate = (done - first) / (now - since_s) if done > first else 0.0
        speed = f", {rate:.0f}/s" if rate else ""
        left = f", {(total - done) / rate:.0f} s left" if rate and done < total else ""
        bad = "" if failed is None else f", {failed} failed"
        say(f"{self.what}: {done}/{total or '?'} {self.unit}{speed}{bad}{left}")
