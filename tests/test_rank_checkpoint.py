"""Laws of the checkpoint of a group of ranks, with real processes: one step for all, and training goes on meanwhile."""

import asyncio
import json

import numpy as np
import pytest
from distributed import Client

from steering.clusters import local
from steering.clusters.roles import TRAINER, addresses, workers_now
from steering.learning import MeetingPoint, RanksPart
from steering.learning.strategies import ER
from steering.runner.actors import call, every
from steering.runner.rank_group import RankGroup
from tests.test_learning import labels, rank_of

pytestmark = pytest.mark.slow


async def formed(client, ranks, **before):
    where = addresses(await workers_now(client), TRAINER)[:ranks]
    rank = rank_of(ER, deadline=60.0)
    return await RankGroup.form(client, rank, where, meeting=MeetingPoint(), emit=lambda _: None, **before)


async def taught(group, found):
    async def send(ranks):
        await every(call(rank, "receive", found.share(k, len(ranks))) for k, rank in enumerate(ranks))

    await group.send(send, group.generation)


async def three_then_others(client, folder):
    """Checkpoints while three ranks train; then as many, fewer and more ranks go on from the last."""
    group = await formed(client, 3)
    await taught(group, labels(n=90))
    await group.fit("a", 20, 0)
    training = asyncio.ensure_future(group.fit("a", 40, 0))
    part = await group.checkpoint(folder, 0)
    rounds = await training
    digest = await group.digest()
    last = await group.checkpoint(folder, 1)
    again = await asyncio.gather(group.checkpoint(folder, 2), group.fit("a", 5, 0))
    await group.close()
    found = {"steps": (part.step, rounds[0].steps, last.step, again[0].step), "digest": digest[0], "last": last}
    last = RanksPart.from_json(json.loads(json.dumps(last.to_json())))
    for ranks in (3, 2):
        group = await formed(client, ranks, before=("restore", folder, last))
        digests = await group.digest()
        more = await group.fit("a", 10, 0)
        found[ranks] = digests, [one.seen for one in more], [one.error for one in more], [one.stored for one in more]
        later = RanksPart.from_json((await group.checkpoint(folder)).to_json())
        found["began", ranks] = later.began, later.ranks
        await group.close()
    return found


def test_ranks_go_on_from_a_checkpoint_that_was_written_while_they_trained(tmp_path):
    async def main(address):
        async with Client(address, asynchronous=True) as client:
            return await asyncio.wait_for(three_then_others(client, tmp_path), 300)

    with local(ranks=3) as client:
        found = asyncio.run(main(client.scheduler.address))
    first, second, last, again = found["steps"]
    assert (first in (20, 60), second, last, again in (60, 65)) == (True, 60, 60, True)
    assert (found["last"].ranks, found["last"].began) == (3, 3)
    assert (found["began", 3], found["began", 2]) == ((3, 3), (3, 2))  # batch and rate follow from both numbers
    for ranks in (3, 2):
        digests, seen, errors, stored = found[ranks]
        assert digests == [found["digest"]] * ranks
        assert sum(one["a"] for one in seen) == 68
        assert np.isfinite(errors[0])
        assert min(stored) > 0
