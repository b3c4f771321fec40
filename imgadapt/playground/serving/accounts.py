"""Accounts: names and passwords in a file, those who are logged in, and how often a wrong password may be tried."""

import hashlib
import hmac
import ipaddress
import math
import re
import secrets
import threading
import time
from base64 import b64decode, b64encode
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from imgadapt import locking
from imgadapt.atomic import atomically
from imgadapt.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,31}")
_LONGEST = 1024
"""Characters of a password."""
_N, _R, _P = 2**14, 8, 1
"""scrypt's cost: 16 MiB, some 50 ms."""


def hashed(password: str) -> str:
    """`scrypt$n$r$p$salt$hash`, as it stands in the file."""
    salt = secrets.token_bytes(16)
    made = hashlib.scrypt(password.encode(), salt=salt, n=_N, r=_R, p=_P)
    return f"scrypt${_N}${_R}${_P}${b64encode(salt).decode()}${b64encode(made).decode()}"


def _matches(password: str, stored: str) -> bool:
    _, n, r, p, salt, wanted = stored.split("$")
    made = hashlib.scrypt(password.encode(), salt=b64decode(salt), n=int(n), r=int(r), p=int(p))
    return hmac.compare_digest(made, b64decode(wanted))


def _is_hash(stored: str) -> bool:
    """Whether it is as `hashed` writes it, and of a cost that can be borne at each login."""
    found = re.fullmatch(
        r"scrypt\$(\d{1,7})\$(\d{1,2})\$(\d{1,2})\$([A-Za-z0-9+/=]+)\$([A-Za-z0-9+/=]+)", stored, re.ASCII
    )
    if found is None:
        return False
    n, r, p = (int(number) for number in found.groups()[:3])
    try:
        whole = all(b64decode(text, validate=True) for text in found.groups()[3:])
    except ValueError:
        return False
    return whole and n > 1 and n.bit_count() == 1 and min(r, p) > 0 and 128 * n * r < 2**25 and p <= 16


class Accounts:
    """Who may come in.

    A file is read again when it has changed, and whoever is no longer in it, or has another password there, is out.
    """

    def __init__(self, file: Path | None = None, fixed: dict[str, str] | None = None) -> None:
        """file: lines of `NAME:scrypt$...`; fixed: name -> such a hash, of those that stand in no file.

        Raises:
            ConfigError: the file cannot be read, or has nobody in it.
        """
        self._file, self._fixed = file, dict(fixed or {})
        self._stamp: tuple[int, int] | None = None
        self._read: dict[str, str] = {}
        self._nobody = hashed(secrets.token_hex(16))
        self._lock = threading.Lock()
        if not self.all:
            raise ConfigError(f"{file or 'the accounts'}: nobody is in it; add one with `imgadapt ui --add-user NAME`")

    @property
    def all(self) -> dict[str, str]:
        """Name -> hash. A file that has gone lets nobody in."""
        if self._file is None:
            return self._fixed
        with self._lock:
            try:
                state = self._file.stat()
                stamp = (state.st_mtime_ns, state.st_size)
                if stamp != self._stamp:
                    self._read, self._stamp = read(self._file), stamp
            except OSError:
                self._read, self._stamp = {}, None
            return {**self._fixed, **self._read}

    def check(self, name: str, password: str) -> bool:
        """Whether it is their password; takes as long for a name that nobody has."""
        stored = self.all.get(name)
        matches = _matches(password[:_LONGEST], stored or self._nobody)
        return matches and stored is not None and len(password) <= _LONGEST

    def mark(self, name: str) -> str | None:
        """What changes when their password does; None: nobody has the name."""
        stored = self.all.get(name)
        return hashlib.sha256(stored.encode()).hexdigest() if stored else None


def found(file: Path | None, pair: str) -> Accounts | None:
    """Those of a file and of `NAME:PASSWORD`; None: neither is given.

    Raises:
        ConfigError: something that is given cannot be used.
    """
    name, colon, password = pair.partition(":")
    if pair and not (_NAME.fullmatch(name) and colon and password):
        raise ConfigError("IMGADAPT_AUTH is NAME:PASSWORD, and what is set is not")
    if file is not None and not file.is_file():
        raise ConfigError(f"{file}: there is no such file; make it with `imgadapt ui --add-user NAME`")
    if file is None and not pair:
        return None
    return Accounts(file.absolute() if file else None, {name: hashed(password)} if pair else None)


def is_own(host: str) -> bool:
    """Whether only this machine reaches an address that is listened at."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read(file: Path) -> dict[str, str]:
    """Name -> hash, of a file.

    Raises:
        ConfigError: a line that is none (which), a name twice.
        OSError: it cannot be read.
    """
    found: dict[str, str] = {}
    for k, line in enumerate(file.read_bytes().decode("utf-8", "replace").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, stored = line.strip().partition(":")
        if not _NAME.fullmatch(name) or not _is_hash(stored):
            raise ConfigError(
                f"{file}, line {k}: it is not NAME:scrypt$...; write it with `imgadapt ui --add-user NAME`"
            )
        if name in found:
            raise ConfigError(f"{file}, line {k}: {name} is there twice")
        found[name] = stored
    return found


def add(file: Path, name: str, password: str) -> None:
    """Write a name with its password, in place of the one that it had; nobody else may read the file.

    Raises:
        ConfigError: a name or a password that will not do.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} is no name: letters, digits and _.@-, at most 32, a letter or digit first")
    if not 8 <= len(password) <= _LONGEST:
        raise ConfigError(f"a password has 8 to {_LONGEST} characters; this one has {len(password)}")
    stored = hashed(password)
    with locking.alone(file.with_name(f".{file.name}.lock")):
        _write(file, {**(read(file) if file.exists() else {}), name: stored})


def _write(file: Path, everyone: Mapping[str, str]) -> None:
    with atomically(file, mode=0o600) as out:
        out.write("".join(f"{one}:{stored}\n" for one, stored in everyone.items()).encode())


@dataclass
class _Tries:
    wrong: int
    until: float


class Throttle:
    """How long to wait before the next try: nothing for the first `free` wrong ones, then twice as long after each.

    longest: seconds; most: keys that are remembered, the oldest is forgotten first.
    """

    def __init__(
        self, longest: float, free: int = 5, most: int = 4096, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._longest, self._free, self._most, self._clock = longest, free, most, clock
        self._tries: OrderedDict[str, _Tries] = OrderedDict()

    def wait(self, key: str) -> int:
        """Seconds until the next try, 0: now."""
        tries = self._tries.get(key)
        return max(0, math.ceil(tries.until - self._clock())) if tries else 0

    def charge(self, key: str) -> None:
        """Count a try as wrong, before it is known: many at once are no way round it."""
        tries = self._tries.pop(key, _Tries(0, 0.0))
        now = self._clock()
        if now > tries.until + self._longest:
            tries = _Tries(0, 0.0)
        tries.wrong += 1
        if tries.wrong >= self._free:
            tries.until = now + min(self._longest, 2.0 ** min(30, tries.wrong - self._free))
        else:
            tries.until = max(tries.until, now)
        self._tries[key] = tries
        while len(self._tries) > self._most:
            self._tries.popitem(last=False)

    def clear(self, key: str) -> None:
        """It was right."""
        self._tries.pop(key, None)


class Tokens:
    """Who is logged in: random tokens, of which only a hash is kept, here and for a time."""

    def __init__(
        self,
        accounts: Accounts,
        lasts: float = 7 * 86400.0,
        most: int = 4096,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._accounts, self._lasts, self._most, self._clock = accounts, lasts, most, clock
        self._known: OrderedDict[str, tuple[str, str | None, float]] = OrderedDict()

    def new(self, name: str) -> str:
        """A token for someone whose password was right."""
        token = secrets.token_urlsafe(32)
        self._known[_key(token)] = (name, self._accounts.mark(name), self._clock() + self._lasts)
        while len(self._known) > self._most:
            self._known.popitem(last=False)
        return token

    def name(self, token: str | None) -> str | None:
        """Whose it is; None: nobody's, or no longer."""
        found = self._known.get(_key(token)) if token else None
        if found is None or token is None:
            return None
        name, mark, until = found
        if self._clock() > until or mark is None or mark != self._accounts.mark(name):
            self.end(token)
            return None
        return name

    def end(self, token: str) -> None:
        """Log out."""
        self._known.pop(_key(token), None)


def _key(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
