"""Policy: which of the server's routes are open, which pages may use them, and what browsers are told."""

import hashlib
import ipaddress
import re
from base64 import b64encode

from starlette.datastructures import Headers, MutableHeaders

_READ, _WRITE = ("GET", "HEAD"), ("POST",)
_ID = r"[0-9a-z]{8,40}"
_NAME = r"[A-Za-z0-9_-]{1,64}"
_OPEN: tuple[tuple[tuple[str, ...], str], ...] = (
    (_READ, r"/|/health|/login|/theme\.css|/favicon\.ico|/robots\.txt|/manifest\.json|/config/?"),
    (_READ, r"/(assets|static)/[A-Za-z0-9_./-]+"),
    (_READ, rf"/pictures/{_ID}|/cards/{_ID}/(preview|file)|/converted/{_ID}|/grids/{_ID}/export"),
    (_WRITE, r"/login|/logout|/pictures|/restore"),
    (_READ, r"/gradio_api/(info/?|theme\.css|startup-events|queue/data|upload_progress|app_id/?)"),
    (_READ, rf"/gradio_api/heartbeat/{_NAME}|/gradio_api/call/{_NAME}/{_NAME}"),
    (_READ, r"/gradio_api/file=(?![A-Za-z][A-Za-z0-9+.-]+:).+"),
    (_WRITE, rf"/gradio_api/(queue/join|cancel/?|reset/?|upload|(call|run)/{_NAME}/?)"),
)
"""Methods and whole paths. What else Gradio has is shut: its proxies, links, monitoring, editors, history, MCP, calls
that pass by the queue; a program of one's own needs none of it.
"""
_CLOSED_NAMES = re.compile(r"[\x00-\x1f\x7f]")

_EVERYWHERE = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "permissions-policy": "camera=(), microphone=(), geolocation=(), payment=(), usb=(), serial=()",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
_SOURCES = (
    "default-src 'none'; script-src 'self' 'unsafe-eval'{scripts}; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; media-src 'self' data: blob:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; manifest-src 'self'; form-action 'self'; base-uri 'self'; frame-ancestors 'none'"
)
"""For Gradio's page: it makes functions of text (`js=` of events), and styles in elements; its own scripts in the page
are named by their hashes, so that script which got into HTML some other way does not run.
"""
_NOTHING = "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
_SANDBOX = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; sandbox"
_FILES = re.compile(r"/(pictures|cards|converted|grids)/|/gradio_api/file=")
_SCRIPT = re.compile(rb"<script(?![^>]*\ssrc=)[^>]*>(.*?)</script>", re.DOTALL | re.IGNORECASE)


def is_open(method: str, path: str) -> bool:
    """Whether there is a route that may be used. path: decoded."""
    if _CLOSED_NAMES.search(path) or ".." in re.split(r"[/\\]", path.partition("=")[2] or path):
        return False
    return any(method in methods and re.fullmatch(pattern, path) for methods, pattern in _OPEN)


def brings_files(path: str) -> bool:
    """Whether requests to it may be large."""
    return path in ("/pictures", "/restore") or path.startswith("/gradio_api/upload")


def is_foreign(headers: Headers, method: str) -> bool:
    """Whether another site's page asks: by its Origin, or by what browsers say besides. Following a link to the page
    is all that it may do.
    """
    origins = headers.getlist("origin")
    if origins and (len(origins) > 1 or not _same(origins[0], headers.get("host", ""))):
        return True
    site = headers.get("sec-fetch-site", "none")
    if site in ("none", "same-origin"):
        return False
    follows = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
    return not (follows and method in _READ)


def _same(origin: str, host: str) -> bool:
    """Whether an origin is ours. (Either scheme: whoever serves https here serves http too, or nobody does.)"""
    found = re.fullmatch(r"(https?)://([^/@?#]+)", origin.lower())
    if found is None:
        return False
    usual = ":80" if found[1] == "http" else ":443"
    return found[2].removesuffix(usual) == host.lower().removesuffix(usual)


def is_address(name: str) -> bool:
    """Whether a host is an IP address, not a name, which anyone could point here."""
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def seal(headers: MutableHeaders, path: str) -> None:
    """What every response says to browsers; nothing lets another site read it, whatever the application said."""
    for key in [key for key in headers if key.lower().startswith("access-control-")]:
        del headers[key]
    headers.update(_EVERYWHERE)
    headers["content-security-policy"] = _SANDBOX if _FILES.match(path) else _NOTHING
    if "cache-control" not in headers and not path.startswith(("/assets/", "/static/")):
        headers["cache-control"] = "no-store"


def for_scripts(page: bytes) -> dict[str, str]:
    """The content security policy of Gradio's page, with the hashes of the scripts that are in it."""
    hashes = [b64encode(hashlib.sha256(text).digest()).decode() for text in _SCRIPT.findall(page)]
    return {"content-security-policy": _SOURCES.format(scripts="".join(f" 'sha256-{one}'" for one in hashes))}
