"""Sessions: who asks. The guard finds it out and writes it into each request's header; all others read it there."""

import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from imgadapt import locking
from imgadapt.atomic import atomically

OWNER = "x-imgadapt-owner"
"""Header of requests that have passed the guard; what a client sends under this name is thrown away there."""
COOKIE = "imgadapt_session"
"""Of a browser that nobody has logged in from."""


def owner_of(headers: Mapping[str, str]) -> str:
    """Who asks, of the headers of a request that has passed the guard: `user-NAME` or `guest-...`."""
    return headers.get(OWNER, "")


class Guests:
    """Cookies for those without a name: random, signed, so that only ours are taken and none is remembered.

    secret: what they are signed with; the same after a restart, and a guest still is the same one.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    @classmethod
    def kept_in(cls, file: Path) -> Self:
        """With the secret of a file, which is made where there is none."""
        with locking.alone(file.with_name(f"{file.name}.lock")):  # of another playground in this home
            return cls(cls._of(file))

    @staticmethod
    def _of(file: Path) -> bytes:
        if not file.is_file() or file.stat().st_size != 32:
            with atomically(file, mode=0o600) as out:
                out.write(secrets.token_bytes(32))
        return file.read_bytes()

    def new(self) -> str:
        """A cookie's value."""
        name = secrets.token_hex(16)
        return f"{name}.{self._signed(name)}"

    def owner(self, cookie: str | None) -> str | None:
        """Whose cookie it is, None where it is none of ours. (The owner's name is written down; the cookie must not
        be.)
        """
        found = re.fullmatch(r"([0-9a-f]{32})\.([0-9a-f]{32})", cookie or "")
        if found is None or not hmac.compare_digest(found[2], self._signed(found[1])):
            return None
        return f"guest-{hashlib.sha256(found[1].encode()).hexdigest()[:16]}"

    def _signed(self, name: str) -> str:
        return hmac.new(self._secret, name.encode(), hashlib.sha256).hexdigest()[:32]
