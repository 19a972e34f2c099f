"""Headers: reading one of a request, and those of every answer that keep browsers from doing what nobody asked for.

Source: OWASP Secure Headers Project. Differs: no HSTS, which is for whoever ends TLS.
"""

import base64
import hashlib
import re

from fastapi.openapi.docs import get_swagger_ui_html
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

DOCS = "/docs"  # with its assets

Headers = tuple[tuple[bytes, bytes], ...]

_ALWAYS: Headers = ((b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"))

# Of answers to programs: nothing of them is a page, and nobody keeps a copy.
SECURITY_HEADERS: Headers = (
    *_ALWAYS,
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"cache-control", b"no-store"),
)


def find_header(request: Request, name: bytes) -> str:
    """Read a header that most requests do not have; "" where there is none.

    Args:
        request: that came.
        name: in lower case.

    Differs: from `request.headers` in time alone, at every request: nothing is decoded in vain.
    """
    return next((value.decode("latin-1") for given, value in request.scope["headers"] if given == name), "")


def render_docs(title: str) -> str:
    """Render the page of the interface, with assets of an installed package: it works without the internet."""
    page = get_swagger_ui_html(
        openapi_url="/openapi.json",
        title=title,
        swagger_js_url=f"{DOCS}/assets/swagger-ui-bundle.js",
        swagger_css_url=f"{DOCS}/assets/swagger-ui.css",
        swagger_favicon_url=f"{DOCS}/assets/favicon.png",
    )
    return bytes(page.body).decode()


def make_docs_headers(page: str) -> Headers:
    """Make the headers of that page and its assets: its own script may run, and no other.

    Args:
        page: whose scripts between tags are let through by their hashes.
    """
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{one}'" for one in hashes)
    policy = (
        "default-src 'none'; connect-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; "
        f"script-src 'self' {allowed}; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return *_ALWAYS, (b"content-security-policy", policy.encode()), (b"cache-control", b"no-cache")


class SecurityHeaders:
    """ASGI middleware: adds the headers to what the application answers.

    Args:
        app: the application.
        docs_headers: of the page and its assets.
    """

    def __init__(self, app: ASGIApp, *, docs_headers: Headers = SECURITY_HEADERS) -> None:
        self._app, self._docs_headers = app, docs_headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one connection's request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_docs = scope["path"] == DOCS or scope["path"].startswith(f"{DOCS}/")
        added = self._docs_headers if is_docs else SECURITY_HEADERS

        async def send_more(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *added]
            await send(message)

        await self._app(scope, receive, send_more)
