"""The load generator against a server on a thread that answers every request, or drops the connection."""

import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest

from benchmarks.client import Address, build_request
from benchmarks.load import Stretch, closed_loop, exchange, open_loop

GOOD = build_request("/", b"good", media_type="text/plain")
BAD = build_request("/", b"bad!", media_type="text/plain")
FATAL = build_request("/", b"die!", media_type="text/plain")


class Handler(socketserver.BaseRequestHandler):
    request: socket.socket

    def handle(self) -> None:
        with suppress(ConnectionError):  # a loop that is over leaves with requests in flight
            self.answer()

    def answer(self) -> None:
        while data := self.request.recv(len(GOOD)):
            if data.endswith(b"die!"):
                return
            status = b"400 Bad Request" if data.endswith(b"bad!") else b"200 OK"
            self.request.sendall(b"HTTP/1.1 " + status + b"\r\ncontent-length: 2\r\n\r\nok")


class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False


@pytest.fixture
def address() -> Iterator[Address]:
    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server.server_address
        server.shutdown()
        thread.join()


def make_stretch(edges: list[str]) -> Stretch:
    return Stretch(warm_seconds=0.1, seconds=0.5, at_edges=lambda: edges.append("edge"))


def test_a_closed_loop_counts_good_and_bad_answers_between_two_edges(address: Address) -> None:
    edges: list[str] = []
    outcome = closed_loop(address, [GOOD, GOOD, GOOD, BAD], num_connections=3, stretch=make_stretch(edges))
    assert edges == ["edge", "edge"]
    assert outcome.latencies
    assert outcome.num_errors
    assert outcome.seconds > 0


def test_a_closed_loop_outlives_broken_connections(address: Address) -> None:
    outcome = closed_loop(address, [GOOD, FATAL, GOOD], num_connections=2, stretch=make_stretch([]))
    assert outcome.latencies
    assert outcome.num_errors


def test_an_open_loop_sends_at_its_own_pace(address: Address) -> None:
    edges: list[str] = []
    outcome = open_loop(address, [GOOD], rate=500.0, stretch=make_stretch(edges))
    assert edges == ["edge", "edge"]
    assert 0 < len(outcome.latencies) < 500
    assert outcome.num_errors == 0


@pytest.mark.parametrize("num_connections", [1, 2, 9])
def test_an_exchange_keeps_the_order_and_tells_who_got_nothing(address: Address, num_connections: int) -> None:
    answers = exchange(address, [GOOD, BAD, GOOD, FATAL], num_connections=num_connections, timeout_seconds=10.0)
    assert [answer.status if answer else 0 for answer in answers] == [200, 400, 200, 0]
