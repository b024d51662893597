"""An optional bearer token, read from a file and compared in constant time."""

from __future__ import annotations

import hmac
from pathlib import Path

from mi2rage_engines.errors import InputError

__all__ = ["Token", "token_from_file"]

_SHORTEST = 16


class Token:
    """What a request must show."""

    def __init__(self, secret: str) -> None:
        self._secret = secret.encode("utf-8")

    def fits(self, authorization: str | bytes | None) -> bool:
        """Whether an Authorization header is `Bearer` and the token; in a time that does not tell how far it fits."""
        given = authorization.encode("utf-8", "replace") if isinstance(authorization, str) else authorization or b""
        scheme, _, secret = given.partition(b" ")
        same = hmac.compare_digest(secret.strip(), self._secret)
        return scheme.lower() == b"bearer" and same


def token_from_file(path: Path) -> Token:
    """The token that a file holds, white space around it left out.

    Raises:
        InputError: the file cannot be read, or its token is too short or no ASCII text.
    """
    try:
        secret = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); expected a text file that holds the token") from error
    if len(secret) < _SHORTEST or not secret.isascii() or not secret.isprintable() or " " in secret:
        raise InputError(
            f"{path}: its token has {len(secret)} characters; expected at least {_SHORTEST} of printable ASCII, "
            "without spaces; make one, e.g. with: openssl rand -hex 32"
        )
    return Token(secret)
