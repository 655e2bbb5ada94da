"""The ranks' meeting point: what somebody else writes there is refused."""

import datetime

import psutil
import pytest
import torch.distributed as dist

from steering.learning import MeetingPoint
from steering.learning.sealed_store import SealedStore


@pytest.fixture
def meeting():
    return MeetingPoint()


def joined(meeting):
    where = meeting.rendezvous
    return dist.TCPStore(where.address, where.port, is_master=False, timeout=datetime.timedelta(seconds=5))


def test_it_listens_where_it_is_told_to_and_nowhere_else(meeting):
    listening = [c.laddr for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN]
    assert [ip for ip, port in listening if port == meeting.rendezvous.port] == ["127.0.0.1"]


def test_what_a_rank_writes_another_one_reads(meeting):
    one, other = (SealedStore(joined(meeting), meeting.rendezvous.token) for _ in range(2))
    within = dist.PrefixStore("generation-1", one)
    within.set("address", "10.0.0.1")
    assert dist.PrefixStore("generation-1", other).get("address") == b"10.0.0.1"
    assert other.check(["generation-1/address"])
    assert not other.check(["generation-2/address"])
    assert (one.add("count", 2), other.add("count", 3)) == (2, 5)


@pytest.mark.parametrize("token", ["", "another"])
def test_what_somebody_else_writes_is_refused(meeting, token):
    rank = SealedStore(joined(meeting), meeting.rendezvous.token)
    rank.set("address", "10.0.0.1")
    stranger = joined(meeting)
    forged = SealedStore(stranger, token) if token else stranger
    forged.set("address", "10.6.6.6")
    with pytest.raises(RuntimeError, match=r"found the entry 'address' .* without the run's token"):
        rank.get("address")


def test_a_value_does_not_count_under_another_name(meeting):
    rank = SealedStore(joined(meeting), meeting.rendezvous.token)
    rank.set("a", "1")
    stranger = joined(meeting)
    stranger.set("b", stranger.get("a"))
    with pytest.raises(RuntimeError, match="found the entry 'b'"):
        rank.get("b")


def test_the_token_is_a_secret_of_each_run(meeting):
    assert meeting.rendezvous.token not in repr(meeting.rendezvous)
    assert len(meeting.rendezvous.token) == 64
    assert MeetingPoint().rendezvous.token != meeting.rendezvous.token
