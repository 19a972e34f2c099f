import pytest

from models.parallel.topology import LINKS, Link, Topology, exchange_pairs, hop_pairs, parse_topology

FAST = Link(bytes_per_second=100.0, latency_seconds=1.0)
SLOW = Link(bytes_per_second=10.0, latency_seconds=2.0)
TWO_NODES = Topology((2, 4), (FAST, SLOW))


def test_a_topology_is_read_from_sizes_and_links() -> None:
    assert parse_topology("2x4:nvlink/ib") == Topology((2, 4), (LINKS["nvlink"], LINKS["ib"]))
    numbers = parse_topology("3x2:10@20^1.5/1.25").links
    assert numbers[0].bytes_per_second == pytest.approx(10e9)
    assert numbers[0].latency_seconds == pytest.approx(20e-6)
    assert numbers[0].contention == 1.5
    assert numbers[1].bytes_per_second == pytest.approx(1.25e9)
    assert numbers[1].latency_seconds == pytest.approx(5e-6)
    assert parse_topology("2x4:nvlink/ib").num_ranks == 8


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nvlink", "must start with sizes"),
        ("2x4:nvlink", "one link each; got 1"),
        ("8:warp", "link warp"),
        ("8:", r"link \(none\)"),
        ("0:nvlink", "at least 1"),
        ("8:0@3", "link 0@3"),
    ],
)
def test_what_is_no_topology_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_topology(text)


def test_messages_within_a_node_take_its_own_links() -> None:
    groups = [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert TWO_NODES.seconds(exchange_pairs(groups), 50.0) == pytest.approx(3 * 50 / 100 + 1)
    assert TWO_NODES.seconds(hop_pairs(groups), 50.0) == pytest.approx(50 / 100 + 1)


def test_one_message_between_nodes_is_as_slow_as_the_network() -> None:
    pairs = hop_pairs([list(range(8))])
    assert TWO_NODES.seconds(pairs, 50.0) == pytest.approx(50 / 10 + 2)
    assert TWO_NODES.seconds(exchange_pairs([[0, 4], [1, 5], [2, 6], [3, 7]]), 50.0) == pytest.approx(50 / 10 + 2)
    # Four of seven messages of each rank cross.
    assert TWO_NODES.seconds(exchange_pairs([range(8)]), 50.0) == pytest.approx(4 * 50 / 10 + 2)


def test_contention_slows_exchanges_and_not_hops() -> None:
    crowded = Topology((4,), (Link(bytes_per_second=100.0, latency_seconds=0.0, contention=1.0),))
    assert crowded.seconds(exchange_pairs([range(4)]), 10.0) == pytest.approx(3 * 3 * 10 / 100)
    assert crowded.seconds(hop_pairs([range(4)]), 10.0) == pytest.approx(10 / 100)


def test_nothing_to_send_takes_no_time() -> None:
    assert TWO_NODES.seconds(exchange_pairs([[0], [1]]), 50.0) == 0
    assert TWO_NODES.seconds(hop_pairs([range(8)]), 0) == 0
    assert hop_pairs([[3]]) == ()


def test_a_collective_sends_each_byte_once_between_nodes_over_all_ports() -> None:
    # Within a node every rank sends 3/4 of 80 bytes; between nodes 1/2, shared by four ports.
    expected = 80 * 3 / 4 / 100 + 3 * 1 + 80 / 2 / 4 / 10 + 2
    assert TWO_NODES.collective_seconds(range(8), 80.0) == pytest.approx(expected)
    assert TWO_NODES.collective_seconds(range(4), 80.0) == pytest.approx(80 * 3 / 4 / 100 + 3)
    assert TWO_NODES.collective_seconds([0, 4], 80.0) == pytest.approx(80 / 2 / 10 + 2)
    assert TWO_NODES.collective_seconds([5], 80.0) == 0
