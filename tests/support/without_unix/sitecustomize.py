"""Our own modules see the standard library as Windows has it; put this folder on PYTHONPATH, child processes too.

What CPython's documentation gives the availability "Unix" is missing from `os`, `signal`, `socket` and `time` there,
and the modules of POSIX cannot be imported. The standard library and other packages keep all of it.
"""

from __future__ import annotations

import builtins
import ctypes
import importlib
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

OURS = {"pipeline", "jobs", "serve", "app_pages"}
MISSING = "resource posix nis readline spwd pwd fcntl termios syslog crypt tty grp pty"
OS = """abc abort access add_dll_directory altsep chdir chmod close closerange cpu_count curdir defpath device_encoding
    devnull dup dup2 environ error execl execle execlp execv execve execvp execvpe extsep fdopen fsdecode fsencode
    fspath fstat fsync ftruncate get_exec_path get_inheritable get_terminal_size getcwd getcwdb getenv getlogin getpid
    getppid isatty kill linesep link listdir lseek lstat makedirs mkdir name open pardir path pathsep pipe popen putenv
    read readlink remove removedirs rename renames replace rmdir scandir sep set_inheritable spawnl spawnv spawnve st
    startfile stat stat_result strerror symlink sys system terminal_size times truncate umask unlink unsetenv urandom
    utime waitpid walk write PathLike DirEntry F_OK R_OK W_OK X_OK SEEK_SET SEEK_CUR SEEK_END P_NOWAIT P_WAIT O_RDONLY
    O_WRONLY O_RDWR O_APPEND O_CREAT O_EXCL O_TRUNC"""
SIGNAL = """signal getsignal raise_signal default_int_handler strsignal valid_signals set_wakeup_fd Signals Handlers
    NSIG
    SIG_DFL SIG_IGN SIGINT SIGTERM SIGABRT SIGFPE SIGILL SIGSEGV"""


def as_on_windows(module_name: str, there: Callable[[str], bool], **changed: Any) -> ModuleType:
    real, module = importlib.import_module(module_name), ModuleType(module_name)

    def attribute(wanted: str) -> Any:
        if wanted in changed:
            return changed[wanted]
        if not there(wanted):
            raise AttributeError(f"module {module_name!r} has no attribute {wanted!r} on Windows")
        return getattr(real, wanted)

    module.__getattr__ = attribute  # type: ignore[method-assign]
    return module


def locking(descriptor: int, mode: int, size: int) -> None:
    import fcntl

    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def c_library(name: str | None, *options: Any) -> ctypes.CDLL:
    if name is None:
        raise TypeError("LoadLibrary() argument 1 must be str, not None")
    return ctypes.CDLL(name, *options)


SEEN: dict[str, Any] = {
    "os": as_on_windows("os", set(OS.split()).__contains__, name="nt", O_BINARY=0),
    "signal": as_on_windows("signal", set(SIGNAL.split()).__contains__),
    "socket": as_on_windows("socket", lambda name: name not in ("AF_UNIX", "socketpair")),
    "time": as_on_windows("time", lambda name: not name.startswith(("clock_", "CLOCK_", "tzset", "pthread_"))),
    "sys": as_on_windows("sys", lambda name: True, platform="win32"),
    "ctypes": as_on_windows("ctypes", lambda name: True, CDLL=c_library),
    "msvcrt": SimpleNamespace(LK_NBLCK=2, locking=locking),
}
_imported = builtins.__import__


def imported(
    name: str, globals: Any = None, locals: Any = None, fromlist: tuple[str, ...] | None = (), level: int = 0
) -> Any:
    if level == 0 and str((globals or {}).get("__name__", "")).partition(".")[0] in OURS:
        if name in MISSING.split():
            raise ModuleNotFoundError(f"no module named {name!r} on Windows")
        if name in SEEN:
            return SEEN[name]
    return _imported(name, globals, locals, fromlist, level)


builtins.__import__ = imported
sys.modules["ser_without_unix"] = ModuleType("ser_without_unix")  # says that it has taken hold
