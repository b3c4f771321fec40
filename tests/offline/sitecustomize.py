"""No network: what Python asks of sockets beyond this machine is refused as where there is none, and written down.

conftest.py imports it for the tests, and puts this folder on PYTHONPATH for the programs that they start. It is written
down, in the file that IMGADAPT_NETWORK names, because libraries catch the refusal and go on. What does not go through
Python's socket module, native.c sees.
"""

import errno
import ipaddress
import os
import sys
import traceback
from typing import Any

RECORD = "IMGADAPT_NETWORK"
_INTERNET = (2, 10)
"""AF_INET, AF_INET6."""
_ADDRESS = {
    "socket.connect": 1, "socket.bind": 1, "socket.sendto": 1, "socket.sendmsg": 1, "socket.getaddrinfo": 0,
    "socket.gethostbyname": 0, "socket.gethostbyaddr": 0, "socket.getnameinfo": 0,
}  # fmt: skip
"""By audit event, which of its arguments says where to."""


def here(address: Any) -> bool:
    """Whether a host, or an address that begins with one, is this machine's own and no other can reach it."""
    host = address[0] if isinstance(address, tuple) else address
    if isinstance(host, bytes):
        host = host.decode("latin-1")
    if host is None or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    place = _ADDRESS.get(event)
    if place is None or (place == 1 and arguments[0].family not in _INTERNET) or here(arguments[place]):
        return
    asked = f"{event} {arguments[place]!r}"
    _note(f"{asked} by {' '.join(sys.argv[:2])}\n" + "".join(traceback.format_stack(limit=12)[:-1]))
    raise OSError(errno.ENETUNREACH, f"there is no network in tests: {asked}")


def _note(text: str) -> None:
    if path := os.environ.get(RECORD):
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(file, text.encode())
        finally:
            os.close(file)


sys.addaudithook(_audit)
