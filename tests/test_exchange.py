"""Laws of global sampling: the plan, in one process; the exchange, between real gloo processes."""

import datetime
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from scipy.stats import chi2

from steering.learning.buffer import RehearsalBuffer
from steering.learning.exchange import Exchange
from steering.learning.sampling import MODES, Fills, StepRNG, draw
from tests.ranks import on_ranks

UNEVEN = np.array([[900, 60, 40], [0, 10, 0], [0, 0, 0]])  # ranks filled 1000 : 10 : 0, strata unevenly


def improbable(found, expected):
    """Probability of counts at least as far from those expected (chi-square, one constraint)."""
    found, expected = np.asarray(found, float), np.broadcast_to(np.asarray(expected, float), np.shape(found))
    return chi2.sf(((found - expected) ** 2 / expected).sum(), len(found) - 1)


def draws(counts, r, steps, mode="uniform", seen=None, seed=0):
    step_rng = StepRNG(seed)
    counts = np.asarray(counts)
    for step in range(steps):
        yield draw(counts, counts if seen is None else np.asarray(seen), r, step_rng.of_step(step), mode=mode)


def samples(plan, rank):
    return list(zip(plan.owner[rank].tolist(), plan.column[rank].tolist(), plan.ordinal[rank].tolist(), strict=True))


def test_every_stored_sample_is_drawn_equally_often_whatever_the_fills():
    hits = np.zeros((3, 1010))
    for plan in draws(UNEVEN, 24, 3000):
        place = np.where(plan.owner == 0, plan.ordinal, 1000 + plan.ordinal)
        for rank in range(3):
            hits[rank, place[rank]] += 1
    for rank in range(3):
        assert improbable(hits[rank], 3000 * 24 / 1010) > 1e-3
    sparse = hits[:, 1000:].sum()
    assert sparse == pytest.approx(3 * 3000 * 24 * 10 / 1010, rel=0.06)


@pytest.mark.parametrize("mode", MODES)
def test_all_sets_of_equal_samples_are_equally_likely(mode):
    """Also in the regime where independent draws collide, and for each rank on its own."""
    found = [Counter(), Counter()]
    for plan in draws([[6], [0]], 3, 4000, mode):
        for rank in range(2):
            found[rank][frozenset(samples(plan, rank))] += 1
    for counter in found:
        assert len(counter) == len(list(combinations(range(6), 3)))
        assert improbable(list(counter.values()), 4000 / 20) > 1e-3
    assert found[0] != found[1]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("r", [1, 7, 24, 1009])
def test_a_minibatch_is_full_has_no_duplicates_and_only_stored_samples(mode, r):
    for plan in draws(UNEVEN, r, 40, mode):
        for rank in range(3):
            drawn = samples(plan, rank)
            assert len(drawn) == len(set(drawn)) == r
            for owner, column, ordinal in drawn:
                assert 0 <= ordinal < (UNEVEN[owner].sum() if mode == "uniform" else UNEVEN[owner, column])


@pytest.mark.parametrize("mode", MODES)
def test_more_than_is_stored_delivers_all_that_is(mode):
    for r in (7, 8, 100):
        (plan,) = draws([[3, 0], [0, 4]], r, 1, mode)
        assert {len(set(samples(plan, rank))) for rank in range(2)} == {7}
    (plan,) = draws([[0, 0], [0, 0]], 5, 1, mode)
    assert plan.owner.shape == (2, 0)
    (plan,) = draws(np.zeros((2, 0), dtype=int), 5, 1, mode)
    assert plan.owner.shape == (2, 0)


def test_balanced_draws_strata_equally_and_their_samples_equally():
    strata, within = np.zeros((3, 3)), Counter()
    for plan in draws(UNEVEN, 8, 6000, "balanced"):
        for rank in range(3):
            counts = np.bincount(plan.column[rank], minlength=3)
            assert counts.max() - counts.min() <= 1
            strata[rank] += counts
        within.update(s for rank in range(3) for s in samples(plan, rank) if s[1] == 1)
    assert strata == pytest.approx(np.full((3, 3), 6000 * 8 / 3), rel=0.02)
    assert len(within) == 70
    assert improbable(list(within.values()), sum(within.values()) / 70) > 1e-3


def test_balanced_takes_a_small_stratum_whole_and_shares_the_rest():
    for plan in draws([[100, 2, 100]], 12, 50, "balanced"):
        assert np.bincount(plan.column[0]).tolist() == [5, 2, 5]


def test_weighted_by_what_was_seen_draws_uniformly_over_the_past():
    """Two ranks store 50 each, of 9000 and 1000 seen: 90 % of the draws come from the first."""
    counts, seen = [[50], [50]], [[9000], [1000]]
    hits = np.zeros(100)
    for plan in draws(counts, 5, 4000, "seen", seen):
        np.add.at(hits, plan.owner[0] * 50 + plan.ordinal[0], 1)
    assert hits[:50].sum() == pytest.approx(0.9 * hits.sum(), rel=0.01)
    assert improbable(hits[:50], hits[:50].mean()) > 1e-3
    assert improbable(hits[50:], hits[50:].mean()) > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_the_plan_follows_from_seed_and_step_alone(mode):
    plans = [samples(plan, 1) for plan in draws(UNEVEN, 7, 5, mode, seed=4)]
    step_rng = StepRNG(4)
    again = [samples(draw(UNEVEN, UNEVEN, 7, step_rng.of_step(step), mode=mode), 1) for step in (3, 1, 1)]
    assert again == [plans[3], plans[1], plans[1]]
    assert plans[0] != plans[1]
    assert plans != [samples(plan, 1) for plan in draws(UNEVEN, 7, 5, mode, seed=5)]


def test_fills_take_any_number_of_strata():
    fills = Fills(2)
    fills.update(1, np.array([[7, 3, 5]]))
    fills.update(0, np.array([[key, key % 5, key] for key in range(100)]))
    fills.update(1, np.array([[7, 4, 9], [-3, 1, 1]]))
    assert fills.counts.shape == (2, 101)
    assert fills.counts[:, fills.keys.index(7)].tolist() == [2, 4]
    assert fills.counts[:, fills.keys.index(-3)].tolist() == [0, 1]


@pytest.mark.parametrize("mode", MODES)
def test_a_single_rank_needs_no_group(mode):
    buffer = RehearsalBuffer(20 * 64)
    exchange = Exchange(buffer, None, 5, mode=mode)
    out = {"id": torch.full((9,), -1), "stratum": torch.full((9,), -1)}
    exchange.start(0)
    assert exchange.finish(out, 4).count == 0
    buffer.insert({"id": torch.arange(3)}, torch.arange(3) % 2)
    exchange.start(1)
    exchange.start(2)
    assert exchange.in_flight == 2
    assert [exchange.finish(out, 4).count for _ in range(2)] == [3, 3]
    assert sorted(out["id"].tolist()) == [-1] * 6 + [0, 1, 2]
    buffer.insert({"id": torch.arange(3, 50)}, torch.arange(47))
    exchange.start(3)
    delivered = exchange.finish(out, 4)
    assert (delivered.count, delivered.remote) == (5, 0)
    assert len(set(out["id"][4:].tolist())) == 5
    with pytest.raises(RuntimeError, match="start"):
        exchange.finish(out, 4)
    exchange.start(4)
    with pytest.raises(ValueError, match="expected 9 or more"):
        exchange.finish({"id": torch.zeros(8, dtype=torch.int64)}, 4)


def test_slots_that_were_drawn_before_a_stratum_shrank_are_replaced_by_others():
    buffer = RehearsalBuffer(10 * 64, policy="balanced")
    buffer.insert({"id": torch.arange(10)}, torch.zeros(10, dtype=torch.int64))
    buffer.insert({"id": torch.arange(4)}, torch.ones(4, dtype=torch.int64))
    assert buffer.fills == {0: 6, 1: 4}
    slots = buffer.locate([0] * 10, list(range(10)))
    assert sorted(slots) == list(range(10))
    own = buffer.strata.members(0)
    for _ in range(20):
        slots = buffer.locate([0, 0, 0], [9, 8, 2])
        assert len(set(slots)) == 3
        assert set(slots) <= set(own)
    assert buffer.locate([55], [0])[0] in range(10)


def test_wrong_arguments_are_refused():
    buffer = RehearsalBuffer(1000)
    with pytest.raises(ValueError, match="expected neither below 0"):
        Exchange(buffer, None, -1)
    with pytest.raises(ValueError, match="mode 'fair'"):
        Exchange(buffer, None, 1, mode="fair")


# ---------------------------------------------------------------------------------------------- between processes

RANKS = 3
B, R = 4, 6
FIELDS = {"counts": ((5, 3), torch.uint16), "id": ((), torch.int64), "wave": ((2,), torch.complex64)}


def content(ids):
    """The sample that belongs to an identifier, every bit of it."""
    counts = (ids[:, None] * 7919 + torch.arange(15)) % 65536
    wave = torch.complex(ids.float(), -ids.float())[:, None].expand(-1, 2)
    return {"counts": counts.to(torch.uint16).view(-1, 5, 3), "id": ids, "wave": wave.contiguous()}


def poisoned(rows=B + R, device="cpu"):
    out = {name: torch.empty((rows, *shape), dtype=dtype, device=device) for name, (shape, dtype) in FIELDS.items()}
    out["stratum"] = torch.empty(rows, dtype=torch.int64, device=device)
    for tensor in out.values():
        tensor.view(torch.uint8).fill_(0xA5)
    return out


def check(out, delivered):
    """Rows below `count` hold what was stored, bit for bit, each once; all others are untouched."""
    out = {name: tensor.cpu() for name, tensor in out.items()}
    ids = out["id"][B : B + delivered.count]
    expected = content(ids)
    whole = all(torch.equal(out[name][B : B + delivered.count], value) for name, value in expected.items())
    poison = poisoned()
    rest = [*range(B), *range(B + delivered.count, B + R)]
    untouched = all(
        torch.equal(out[name][rest].view(torch.uint8), poison[name][rest].view(torch.uint8)) for name in out
    )
    strata = torch.equal(out["stratum"][B : B + delivered.count], ids // 1000 % 10)
    return whole and untouched and strata and len(set(ids.tolist())) == delivered.count


def uneven(rank, group, *, device="cpu", storage="cpu"):
    """Ranks filled 100 : 10 : 0 before they meet; the last one never stores anything."""
    buffer = RehearsalBuffer(100_000, device=storage)
    size = (100, 10, 0)[rank]
    ids = torch.arange(size) + 100 * rank
    buffer.insert(content(ids), ids // 1000 % 10) if size else None
    exchange = Exchange(buffer, group, R, device=device)
    hits, good, remote = np.zeros(110, dtype=int), [], 0
    for step in range(500):
        exchange.start(step)
        out = poisoned(device=device)
        delivered = exchange.finish(out, B)
        good.append(check(out, delivered) and delivered.count == R)
        hits[out["id"][B:].cpu().numpy()] += 1
        remote += delivered.remote
    return {"good": all(good), "hits": hits.tolist(), "remote": remote}


def stream(rank, group, mode, ahead, policy, *, device="cpu", storage="cpu"):
    """A pipeline as a trainer runs it, with strata that appear on the way, many at once, on different ranks."""
    buffer = RehearsalBuffer(40 * (30 + 8 + 16 + 56), seed=rank, policy=policy, device=storage)
    exchange = Exchange(buffer, group, R, mode=mode, seed=1, device=device)
    good, counts = [], []
    for step in range(ahead):
        exchange.start(step)
    for step in range(80):
        out = poisoned(device=device)
        delivered = exchange.finish(out, B)
        good.append(check(out, delivered))
        counts.append(delivered.count)
        exchange.start(step + ahead)
        stratum = step // 20 if rank != 1 else 9 - step // 20
        ids = torch.arange(4) + 4 * step + 1000 * stratum + 10_000 * rank
        if step != 40 or rank == 2:
            new = {name: value.to(device) for name, value in content(ids).items()}
            buffer.insert(new, ids // 1000 % 10)
    while exchange.in_flight:
        exchange.finish(poisoned(device=device), B)
    return {"good": all(good), "counts": counts, "known": exchange.fills.counts.sum(axis=1).tolist()}


def epochs(rank, group):
    """Rank 0 has 20 frames and comes to them again every third step, the others have 400 and room for 100."""
    frames = 20 if rank == 0 else 400
    exchange = Exchange(RehearsalBuffer(100 * 64, seed=rank), group, R, mode="seen")
    own, drawn = 0, 0
    for step in range(300):
        ids = torch.arange(8 * step, 8 * step + 8) % frames + 1000 * rank
        exchange.buffer.insert({"id": ids}, torch.zeros(8).long(), ids)
        exchange.start(step)
        out = {"id": torch.full((R,), -1)}
        count = exchange.finish(out).count
        if step >= 100:
            own += int((out["id"][:count] < 1000).sum())
            drawn += count
    return {"share": own / drawn, "stored": len(exchange.buffer)}


def many_strata(rank, group, mode):
    """Hundreds of strata at once, then in every step more changes than a header has room for, in a full buffer."""
    buffer = RehearsalBuffer(300 * 64, seed=rank)
    exchange = Exchange(buffer, group, R, mode=mode)
    good, known = [], []
    for step in range(30):
        if step == 2:
            buffer.insert({"id": torch.arange(300) * 3 + rank}, torch.arange(300) * 3 + rank)
        if step > 8:
            ids = torch.arange(60 * step) * 3 + rank + 10_000 * step
            buffer.insert({"id": ids}, ids)
        exchange.start(step)
        out = {"id": torch.full((R,), -1), "stratum": torch.full((R,), -2)}
        delivered = exchange.finish(out)
        ids = out["id"][: delivered.count]
        good.append(torch.equal(ids, out["stratum"][: delivered.count]) and len(set(ids.tolist())) == delivered.count)
        known.append([len(exchange.fills.keys), int(exchange.fills.counts.sum())])
    return {"good": all(good), "known": known}


def said(action):
    try:
        action()
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def disagreements(rank, group):
    """Each is an error on every rank, and none a hang."""
    found = {}
    found["seed"] = said(lambda: Exchange(RehearsalBuffer(1000), group, R, seed=rank // 2).start(0))
    buffer = RehearsalBuffer(1000)
    buffer.insert({"x": torch.zeros(1, dtype=torch.float64 if rank == 1 else torch.float32)}, torch.zeros(1).long())
    found["fields"] = said(lambda: Exchange(buffer, group, R).start(0))
    exchange = Exchange(RehearsalBuffer(1000), group, R)
    exchange.start(5 + rank // 2)
    found["step"] = said(lambda: exchange.finish({}))
    return found


def lost(rank, group):
    """The last rank stays away: the others hear of it at the group's deadline."""
    if rank == RANKS - 1:
        return {"said": "nothing"}
    exchange = Exchange(RehearsalBuffer(1000), group, R)
    return {"said": said(lambda: exchange.start(0))}


def rank_main(rank, ranks, where):
    torch.set_num_threads(1)
    store = dist.TCPStore(where.address, where.port, is_master=False)
    wait = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=wait)
    group = dist.new_group(timeout=wait)
    results = {
        "uneven": uneven(rank, group),
        "uniform": stream(rank, group, "uniform", 1, "reservoir"),
        "balanced": stream(rank, group, "balanced", 1, "balanced"),
        "seen, three ahead": stream(rank, group, "seen", 3, "replacement"),
        "epochs": epochs(rank, group),
        "many strata, uniform": many_strata(rank, group, "uniform"),
        "many strata, balanced": many_strata(rank, group, "balanced"),
        "disagreements": disagreements(rank, group),
        "lost": lost(rank, dist.new_group(timeout=datetime.timedelta(seconds=1))),
    }
    dist.barrier()
    dist.destroy_process_group()
    return results


@pytest.fixture(scope="module")
def ranks():
    """What every rank of one run reports, by scenario: starting the processes once serves all tests."""
    reports = on_ranks(RANKS, rank_main)
    return {name: [report[name] for report in reports] for name in reports[0]}


@pytest.mark.slow
def test_by_what_was_seen_a_sample_with_an_identity_counts_once_in_however_many_epochs(ranks):
    share = np.mean([report["share"] for report in ranks["epochs"]])
    assert share == pytest.approx(20 / (20 + 400 * (RANKS - 1)), rel=0.35)  # three standard deviations of 88 draws
    assert ranks["epochs"][0]["stored"] == 20
    assert ranks["epochs"][1]["stored"] == 100


@pytest.mark.slow
def test_ranks_draw_from_all_buffers_equally_and_bit_for_bit(ranks):
    for report in ranks["uneven"]:
        assert report["good"]
        assert improbable(report["hits"], 500 * R / 110) > 1e-3
    assert ranks["uneven"][2]["remote"] == 500 * R
    assert ranks["uneven"][0]["remote"] == pytest.approx(500 * R / 11, rel=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["uniform", "balanced", "seen, three ahead"])
def test_a_stream_with_new_strata_is_rehearsed_without_gaps(ranks, name):
    for report in ranks[name]:
        assert report["good"]
        ahead = 3 if "three" in name else 1
        first = report["counts"].index(R)
        assert first <= 2 * ahead + 1
        assert set(report["counts"][first:]) == {R}
        assert report["known"] == [40] * RANKS


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["uniform", "balanced"])
def test_any_number_of_strata_may_appear_in_one_step(ranks, mode):
    for report in ranks[f"many strata, {mode}"]:
        assert report["good"]
        assert report["known"][8] == [900, 900]
        assert report["known"][-1][1] == 900
        assert report["known"] == ranks[f"many strata, {mode}"][0]["known"]


@pytest.mark.slow
def test_ranks_that_do_not_agree_say_so(ranks):
    for report in ranks["disagreements"]:
        assert "different r, seed or mode" in report["seed"]
        assert "other fields" in report["fields"]
        assert "RuntimeError: found rank" in report["step"]


@pytest.mark.slow
def test_a_rank_that_stays_away_is_an_error_at_the_deadline(ranks):
    assert all("RuntimeError" in report["said"] for report in ranks["lost"][:-1])
