"""Ray's authentication token: whoever holds it can run code on the cluster, so only its owner may read it.

Ray takes the token from ``RAY_AUTH_TOKEN``, else from the file ``RAY_AUTH_TOKEN_PATH``, else from
``~/.ray/auth_token``, and writes that file readable by everybody. Here it is made before Ray would, with mode 0600. The
token authenticates; it encrypts nothing. Ray itself is not imported: this must be in the environment before it is.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

_MODE, _TOKEN, _PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"


def token_file() -> Path:
    """Where the token is, when it is not in the environment itself."""
    return Path(os.environ.get(_PATH) or Path.home() / ".ray" / "auth_token")


def make_token() -> None:
    """Make a token of 256 bits unless there is one; take an existing file from all but its owner.

    Does nothing where authentication was switched off on purpose (``RAY_AUTH_MODE=disabled``), or the home folder
    cannot be written: Ray then says so itself.
    """
    if os.environ.get(_TOKEN) or os.environ.get(_MODE, "token").lower() != "token":
        return
    path = token_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32))
    except FileExistsError:
        keep_private(path)
    except OSError:
        return


def keep_private(path: Path) -> None:
    """Take a file's permissions from all but its owner, where that is allowed."""
    try:
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)
    except OSError:
        return


def use_token() -> bool:
    """Have a Ray that is imported later send the token to the cluster it joins; whether there is one.

    A mode that was set in the environment stays. A cluster without authentication takes no notice of a token.
    """
    found = bool(os.environ.get(_TOKEN)) or token_file().is_file()
    if found:
        os.environ.setdefault(_MODE, "token")
    return found
