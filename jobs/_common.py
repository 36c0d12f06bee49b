"""Code shared by all commands: option parsing, exit codes, messages, progress.

Results go to stdout, messages to stderr. Exit codes: 0 done; 2 wrong usage or unreadable input; 3 ``--enforce`` was
given and a target was missed; 4 done, but some recordings failed; 70 a bug in this program; 130 interrupted.
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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from pipeline.data.labels import chained, parse_label_map, parse_label_names
from pipeline.storage.errors import SerError, SerWarning

if TYPE_CHECKING:
    import pandas as pd
    from tqdm import tqdm

_REMEDIES = {
    errno.EACCES: "grant access to it, or choose another one",
    errno.EPERM: "grant access to it, or choose another one",
    errno.EROFS: "choose a folder that is writable",
    errno.ENOSPC: "free some space, then run the same command again",
    errno.EDQUOT: "free some space, then run the same command again",
}
EXIT_DONE, EXIT_USAGE, EXIT_TARGET_MISSED, EXIT_SOME_FAILED, EXIT_OURS, EXIT_INTERRUPTED = 0, 2, 3, 4, 70, 130
AS_SER = ContextVar("AS_SER", default=False)  # whether the user typed ``ser score``, not ``python -m jobs.score``


class Parser(argparse.ArgumentParser):
    """An argument parser that accepts ``--data_csv`` and ``--data-csv``; a usage error is one line and exit code 2."""

    _usual: frozenset[str] = frozenset()

    def put_first(self, names: Collection[str]) -> None:
        """List these options first, in their own group; the others are shown only by ``--help-all``."""
        first = self.add_argument_group("most used options")
        for group in self._action_groups:
            for action in [action for action in group._group_actions if action.dest in names and group is not first]:
                group._group_actions.remove(action)
                first._group_actions.append(action)
        self._action_groups.remove(first)
        self._action_groups.insert(0, first)
        self.add_argument("--help_all", action=_HelpAll, nargs=0, help="show every option")
        self._usual = frozenset({*names, "help", "help_all"})

    def format_help(self) -> str:
        """The help text; after ``put_first`` only with the options named there."""
        others = [action for action in self._actions if self._usual and action.dest not in self._usual]
        helps = [action.help for action in others]
        for action in others:
            action.help = argparse.SUPPRESS
        found = super().format_help()
        for action, text in zip(others, helps, strict=True):
            action.help = text
        return found

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        """As in argparse, after replacing the hyphens in option names with underscores."""
        given = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args([underscored(a) for a in given], namespace)

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with 2."""
        self.exit(EXIT_USAGE, f"error: {message}; see {self.prog} --help\n")


Job = Callable[[argparse.Namespace], int]
Parse = Callable[[Parser, Sequence[str]], argparse.Namespace]


class _HelpAll(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        """Print all options and exit."""
        assert isinstance(parser, Parser)
        parser._usual = frozenset()
        parser.print_help()
        parser.exit()


def parser_of(job: str, description: str | None, example: str) -> Parser:
    """The parser of a command; ``example``: the arguments that its help shows."""
    prog = f"ser {job}" if AS_SER.get() else f"python -m jobs.{job}"
    return Parser(prog=prog, description=description, epilog=f"example: %(prog)s {example}")


def underscored(argument: str) -> str:
    """An option with underscores instead of hyphens in its name; any other argument unchanged."""
    if not argument.startswith("--") or argument == "--":
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


class LabelMap(argparse.Action):
    """``--label_map``. If it is given twice, the second map also renames the new names of the first one."""

    def __call__(self, parser: object, namespace: argparse.Namespace, values: object, *_: object) -> None:
        """Parse a map, and chain it to the earlier one."""
        setattr(namespace, self.dest, chained(getattr(namespace, self.dest) or {}, parse_label_map(str(values))))


def _label_names(text: str) -> tuple[str, ...]:
    try:
        return parse_label_names(text)
    except SerError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


_SHARED: Mapping[str, Mapping[str, Any]] = {
    "model_weights": {"type": Path, "help": "bundle folder or the .pt in it (default: the shipped one)"},
    "features": {"type": Path, "nargs": "+", "metavar": "FOLDER", "help": "one or more folders that ser extract wrote"},
    "root": {"type": Path, "help": "folder that relative paths in the CSV start from (default: the CSV's folder)"},
    "label_map": {"action": LabelMap, "help": "rename labels of the CSV: old=new,..."},
    "label_names": {
        "type": _label_names,
        "metavar": "NAME,...",
        "help": "class names of the integer labels 0,1,... in the CSV: angry,sad,... (default: the integers "
        "themselves)",
    },
    "overwrite": {"action": "store_true", "help": "start anew even if --out has results"},
    "tolerate_failures": {"action": "store_true", "help": "exit with code 0 even if some recordings failed"},
    "crops": {
        "type": int,
        "help": "number of evenly spaced windows in each recording; their answers are averaged (default: the model's "
        "own number)",
    },
    "engine": {
        "choices": ("auto", "local", "ray"),
        "default": "auto",
        "help": "ray: run on Ray, on this machine or on the cluster at RAY_ADDRESS; local: in processes on this "
        "machine; auto (default): local if the work is too small to be worth starting Ray",
    },
    "num_cpus": {"type": int, "help": "CPUs to use (default: all)"},
}
CSV_OPTIONS = ("root", "label_map", "label_names")
ENGINE_OPTIONS = ("engine", "num_cpus")


def add_shared(parser: argparse._ActionsContainer, *names: str) -> None:
    """Add these of the options that several commands have."""
    for name in names:
        parser.add_argument(f"--{name}", **_SHARED[name])


def read_csv(arguments: argparse.Namespace, csv: Path, **how: Any) -> pd.DataFrame:
    """The manifest ``csv``, read with ``CSV_OPTIONS``; ``how``: as in ``read_manifest``."""
    from pipeline.data.manifest import read_manifest

    return read_manifest(csv, root=arguments.root, label_map=arguments.label_map, tell=say, **how)


def say(text: str = "") -> None:
    """Print one line on stderr, at once. If the terminal or pipe is closed, the line is lost and the job continues."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def true_or_false(text: str) -> bool:
    """Parse ``True`` or ``False`` of the command line (also yes/no, 1/0)."""
    value = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}.get(text.strip().lower())
    if value is None:
        raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")
    return value


# keywords of ``add_argument`` for such an option; without a value it is True
TRUE_OR_FALSE: dict[str, Any] = {"type": true_or_false, "nargs": "?", "const": True, "metavar": "True|False"}


def add_out(parser: argparse._ActionsContainer, below: str, what: str) -> None:
    """Add ``--out``, a folder for ``what``; without it, ``run`` makes a new folder in ``below``."""
    parser.add_argument(
        "--out", type=Path, help=f"folder for {what} (default: a new folder in {below}/, named by date)"
    )
    parser.set_defaults(out_below=below)


def fields_of(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The values of these options, by name."""
    return {name: getattr(arguments, name) for name in names}


def exit_code(arguments: argparse.Namespace, failed: object) -> int:
    """The exit code of a finished command; ``failed``: whether recordings failed, or how many."""
    return EXIT_SOME_FAILED if failed and not arguments.tolerate_failures else EXIT_DONE


def tell_engine(arguments: argparse.Namespace, engine: str, work: str, other: str = "Ray Data") -> None:
    """Print a message if ``auto`` chose the local engine for ``work``."""
    if engine == "local" and arguments.engine == "auto" and arguments.num_cpus != 0:
        say(f"{work}: in processes on this machine; use --engine ray for {other}")


def dated(below: str) -> str:
    """A folder in ``below`` named by the current time: ``runs/2026-11-30_094636``."""
    return f"{below}/{time.strftime('%Y-%m-%d_%H%M%S')}"


@contextmanager
def _new_out(arguments: argparse.Namespace) -> Iterator[None]:
    """If the command has ``--out`` and it was not given: make a new folder for it, and remove it if it stays empty."""
    below = getattr(arguments, "out_below", None)
    if below is None or arguments.out is not None:
        yield
        return
    if getattr(arguments, "resume", False):
        raise SerError("--resume was given without --out; give --out, the folder of the run to continue")
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
        raise SerError(f"cannot make a folder in {below}: {error.strerror}; choose another with --out") from error
    say(f"no --out given: results go into {arguments.out}")
    try:
        yield
    finally:
        left = list(arguments.out.iterdir())
        if all(path.name.startswith(".") and path.is_file() for path in left):  # locks at most
            for path in left:
                path.unlink()
            arguments.out.rmdir()
            if new_parent:
                with suppress(OSError):  # another command has written something there
                    Path(below).rmdir()


def command(job: Job, build_parser: Callable[[], Parser], parse: Parse = Parser.parse_args) -> Callable[..., int]:
    """``main(argv=None)`` of a command; ``parse`` reads the command line."""
    return lambda argv=None: run(job, build_parser(), argv, parse)


def run(job: Job, parser: Parser, argv: Sequence[str] | None, parse: Parse = Parser.parse_args) -> int:
    """Parse the command line, run the job and return the exit code; the user never sees a traceback."""
    words = list(sys.argv[1:] if argv is None else argv)
    atexit.register(gc.freeze)  # else the garbage collector runs at exit, for a second or more
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # escape characters that the console's encoding lacks
            stream.reconfigure(errors="backslashreplace")
    warnings.showwarning = _show
    try:
        try:
            arguments = parse(parser, words)
        except SystemExit as stop:
            return int(stop.code or 0)
        arguments.command = f"{parser.prog} {shlex.join(words)}"  # shown in reports
        with _new_out(arguments):
            return job(arguments)
    except SerError as error:
        say(f"error: {' '.join(str(error).split())}")
        return EXIT_USAGE
    except KeyboardInterrupt:
        say("interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        sys.stdout = None  # the reader of the pipe has closed it: print nothing more
        return EXIT_DONE
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _REMEDIES:
            what = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
            say(f"error: {' '.join(str(what).split())}; {_REMEDIES[error.errno]}")
            return EXIT_USAGE
        log = Path(tempfile.mkstemp(prefix="ser-error-", suffix=".log")[1])
        log.write_text(traceback.format_exc(), encoding="utf-8")
        say(f"error: this is a bug in the program ({type(error).__name__}); please report it with {log}")
        return EXIT_OURS


def _show(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a ``SerWarning`` as one line; any other warning as Python does."""
    if issubclass(category, SerWarning):
        say(f"warning: {message}")
    else:
        print(warnings.formatwarning(message, category, filename, lineno, line), end="", file=file or sys.stderr)


def check_free(host: str, port: int, remedy: str) -> None:
    """Raise SerError, which ends with ``remedy``, unless a server can listen on this host and port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise SerError(f"cannot listen on {host}:{port} ({reason}); {remedy}") from error


class Progress:
    """Progress on stderr, with speed, failures and time left: a bar on a terminal, else a line every few seconds."""

    def __init__(self, what: str, unit: str = "files", every_s: float = 5.0) -> None:
        self.what, self.unit, self.every_s = what, unit, every_s
        self._start: tuple[float, int] | None = None  # time and count of the first call
        self._last_line_s = 0.0
        self._bar: tqdm[NoReturn] | None = None

    def __call__(self, done: int, total: int, failed: int | None = None) -> None:
        """Show that ``done`` of ``total`` (0: unknown) are finished, and that ``failed`` failed (None: not shown)."""
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
