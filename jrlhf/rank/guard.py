"""Access to the page: only with the token in this run's address, from the page itself, and in small requests."""

import hashlib
import hmac
import socket
from ipaddress import ip_address
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 64 * 1024
OWN_NAMES = ("127.0.0.1", "localhost", "::1")
EVERYWHERE = ("0.0.0.0", "::")
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self';"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}


class Guard:
    """Refuses requests before the app sees them: another host's name (400), no token (403), a foreign page (403), a
    large body (413)."""

    def __init__(self, app: ASGIApp, *, token: str, host: str) -> None:
        self._app = app
        self._token = token
        self._everywhere = host in EVERYWHERE
        self._names = {*OWN_NAMES, shown_host(host).lower()}
        # Cookies ignore ports, so runs side by side need different names.
        self.cookie = "jrlhf_rank_" + hashlib.sha256(token.encode()).hexdigest()[:8]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        headers = Headers(scope=scope)
        in_address = self._matches(parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0])
        status, reason = self._refusal(scope, headers, in_address)
        body = b"" if status else await _body(receive)
        if body is None:
            status, reason = 413, f"more than {MAX_BODY_BYTES} bytes"
        reply = _with_headers(send, f"{self.cookie}={self._token}; HttpOnly; SameSite=Strict; Path=/" * in_address)
        if status or body is None:
            await PlainTextResponse(reason + "\n", status)(scope, receive, reply)
            return

        async def replay() -> Message:
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, reply)

    def _refusal(self, scope: Scope, headers: Headers, in_address: bool) -> tuple[int, str]:
        """Return a status and the reason, or 0 and an empty text to admit the request."""
        host = headers.get("host", "")
        if not self._is_ours(host):
            return 400, "wrong host name for this page"
        origin = headers.get("origin")
        safe = scope["method"] in ("GET", "HEAD")
        if (origin is not None or not safe) and origin not in (f"http://{host}", f"https://{host}"):
            return 403, "the request came from another page"
        cookies = cookie_parser(headers.get("cookie", ""))
        if not (in_address and safe) and not self._matches(cookies.get(self.cookie, "")):
            return 403, "open the full address that jrlhf rank printed, including its token"
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > MAX_BODY_BYTES:
            return 413, f"more than {MAX_BODY_BYTES} bytes"
        return 0, ""

    def _matches(self, token: str) -> bool:
        return hmac.compare_digest(token.encode("utf-8", "surrogateescape"), self._token.encode())

    def _is_ours(self, host: str) -> bool:
        """Whether a request names this host; a page elsewhere that uses DNS rebinding names its own host instead.

        A server for all addresses accepts its machine's name and any numeric address.
        """
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower()
        except ValueError:
            return False
        return name in self._names or (self._everywhere and _is_address(name))


def shown_host(host: str) -> str:
    """Return the host of the printed address: the machine's name if the page is served at all its addresses."""
    return socket.gethostname() if host in EVERYWHERE else host


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


async def _body(receive: Receive) -> bytes | None:
    """Read the body of a request; None if it is too large, whatever its header says."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            return None
        more = message.get("more_body", False)
    return body


def _with_headers(send: Send, cookie: str) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers.update(HEADERS)
            if cookie:
                headers.append("set-cookie", cookie)
        await send(message)

    return send_with_headers
