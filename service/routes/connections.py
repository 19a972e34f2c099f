"""What a client's connection keeps to below any request: it speaks HTTP/1.1, and its heads are small and come soon.

uvicorn's own connection reads heads of any size for any time, answers in plain text what is no HTTP, and loses the body
of a request that offers to change the protocol, as Java's client does (`Upgrade: h2c`). Here such offers are ignored,
and what is refused gets the same answer as everything else that is refused; then the connection is closed.

Differs: this builds on the inside of uvicorn's class, whose version is pinned; the tests hold all that is used of it.
"""

import asyncio
import secrets
from http import HTTPStatus

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from service.errors import HeadTooLarge, MalformedRequest, RequestTimeout, ServiceError
from service.metrics import Metrics
from service.routes.headers import SECURITY_HEADERS
from service.routes.problems import refuse

MAX_HEAD_BYTES = 65_536  # of the path, the query and the headers; and of what is no body, as it comes
HEAD_SECONDS = 30.0  # for a head to begin, to be whole, and for a body that nobody reads any longer
_FRAMING = (b"content-length", b"transfer-encoding")


class Connection(HttpToolsProtocol):
    """One client's connection; see the module."""

    metrics: Metrics  # of the service; `make_connection` gives them

    _num_loose_bytes = 0  # that came since a head, a part of a body or a request was complete
    _num_head_bytes = 0  # of the path, the query and the headers of the request that is parsed
    _is_amid_body = False
    _is_over = False  # what else comes is not looked at
    _previous: RequestResponseCycle | None = None  # the request before the last one
    _is_repeated_head = False  # what is parsed is a head of ours, before a body whose own was parsed already
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first head."""
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing any longer."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take the next bytes."""
        if self.transport.is_closing() or self._is_over:
            return
        self._unset_keepalive_if_required()
        self._num_loose_bytes += len(data)
        try:
            while data:
                data = self._feed(data)
        except httptools.HttpParserError as error:
            cause = error.__context__  # what a callback raised, where it was one that ended the parsing
            self._refuse(cause if isinstance(cause, HeadTooLarge) else _malformed())
            return
        if self._num_loose_bytes > MAX_HEAD_BYTES:
            self._refuse(_head_too_large())
        elif (last := self._last) is not None and last.response_complete and self.timeout_keep_alive_task is None:
            self._start_timer()  # something of the next request came, or of a body whose answer is out already

    def _feed(self, data: bytes) -> bytes:
        """Parse; gives what is still to be parsed."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            # The parser stops after the head. Another one, given a head that offers nothing, reads the body.
            rest = data[offer.args[0] :]
            self.parser = httptools.HttpRequestParser(self)
            framing = [name + b": " + value for name, value in self.headers if name in _FRAMING]
            if not framing:
                return rest
            self._is_repeated_head, self.cycle.more_body = True, True
            return b"\r\n".join([b"POST / HTTP/1.1", *framing, b"", rest])
        return b""

    def on_message_begin(self) -> None:
        """Begin a request."""
        if not self._is_repeated_head:
            self._num_head_bytes = 0
            super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Take a part of the path.

        Raises: HeadTooLarge, which the parser wraps.
        """
        if not self._is_repeated_head:
            self._count_head(len(url))
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header, or a trailer after a body; raises as `on_url`."""
        if not self._is_repeated_head:
            self._count_head(len(name) + len(value) + len(b": \r\n"))
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Begin to answer a request."""
        if not self._is_repeated_head:
            self._previous = self._last
            super().on_headers_complete()
        self._num_loose_bytes, self._is_amid_body, self._is_repeated_head = 0, True, False
        self._stop_timer()

    def on_body(self, body: bytes) -> None:
        """Take a part of a body."""
        self._num_loose_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Take the end of a request."""
        self._num_loose_bytes, self._is_amid_body = 0, False
        self._stop_timer()
        super().on_message_complete()

    @property
    def _last(self) -> RequestResponseCycle | None:
        """The last request and its answer; uvicorn does not say that there may be none."""
        return self.cycle

    def _count_head(self, num_bytes: int) -> None:
        # A head that comes in one piece is complete before its loose bytes are looked at.
        self._num_head_bytes += num_bytes
        if self._num_head_bytes > MAX_HEAD_BYTES:
            raise _head_too_large()

    def _start_timer(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self._timer = None
        if not self._num_loose_bytes and not self._is_amid_body:
            self.transport.close()  # nobody asks anything, and who does next would read an answer as one to that
            return
        self._refuse(
            RequestTimeout(
                f"only a part of a request's head came in {HEAD_SECONDS:g} s; all of it was expected by then; send "
                "the path and the headers at once"
            )
        )

    def _refuse(self, error: ServiceError) -> None:
        """Answer and close; where an answer to what came before is on its way, or would be taken for it, only close.

        Answers to whole requests come first, and nothing that comes later is looked at.
        """
        self._stop_timer()
        self._is_over = True
        if self.pipeline and self._is_amid_body:  # the request that is broken was not begun: the one before is the last
            self.pipeline.popleft()
            assert self._previous is not None, "what waits in line waits for another request"
            self.cycle, self._is_amid_body = self._previous, False
        last = self._last
        is_answering = last is not None and not last.response_complete
        if last is not None and is_answering and (last.response_started or not self._is_amid_body):
            last.keep_alive = False  # it ends after that answer
            return
        if not self.pipeline and (is_answering or not self._is_amid_body):
            response = refuse(error, secrets.token_hex(16), self.metrics)
            headers = dict([*response.raw_headers, *SECURITY_HEADERS]) | {b"connection": b"close"}
            lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}".encode()]
            lines += [name + b": " + value for name, value in headers.items()]
            self.transport.write(b"\r\n".join([*lines, b"", bytes(response.body)]))
        self.transport.close()


def _malformed() -> MalformedRequest:
    return MalformedRequest(
        "what came is no HTTP/1.1, or contradicts itself; a request line, headers that agree with each other and a "
        "body of the stated length were expected; look at how the client frames its requests"
    )


def _head_too_large() -> HeadTooLarge:
    return HeadTooLarge(
        f"the path, the query and the headers, or what stands between parts of the body, have more than "
        f"{MAX_HEAD_BYTES} bytes; at most as many are read; send what is long in the body"
    )


def make_connection(metrics: Metrics) -> type[Connection]:
    """Make the class of connections that count what they refuse."""

    class Counted(Connection):
        pass

    Counted.metrics = metrics
    return Counted
