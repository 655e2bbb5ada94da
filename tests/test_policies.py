"""What every policy promises. A new kind of policy is one more entry in POLICIES."""

import math
import pickle
from functools import partial

import numpy as np
import pytest
import xarray as xr

from steering.inference.live import LiveImage
from steering.policies import Adaptive, DwellRule, GradientResidual, Random, Raster, SpaceFilling, StopRule
from steering.policies.interest import Cells, StructureMap
from steering.policies.ranking import Ranking
from steering.ptychography import Canvas, zone_plate
from steering.records import Decision, Geometry, Prediction, Travel

BEAM = 2.0
LOOKING = {"gradient_residual": partial(GradientResidual, beam=BEAM), "adaptive": partial(Adaptive, beam=BEAM)}
"""Kinds whose order depends on the predictions."""
POLICIES = {"raster": Raster, "random": Random, "space_filling": SpaceFilling, **LOOKING}


@pytest.fixture(params=POLICIES.values(), ids=POLICIES.keys())
def kind(request):
    return request.param


def flat(size=8):
    """A live image without any structure."""
    fields = {"amplitude": np.ones((size, size)), "phase": np.zeros((size, size)), "weight": np.ones((size, size))}
    coords = {axis: np.arange(size) - size // 2.0 for axis in "yx"}
    return xr.Dataset({name: (("y", "x"), value) for name, value in fields.items()}, coords=coords)


def grid(rows, columns, step=1.0, jitter=0.0, seed=0):
    y, x = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    places = step * np.stack([y.ravel(), x.ravel()], axis=1)
    rng = np.random.default_rng(seed)
    moved = places + rng.uniform(-jitter, jitter, places.shape) * step
    return rng.permutation(np.clip(moved, 0, places.max(0)))


def prediction(scan, n, prior_residual=0.5, residual=0.0, poisson_floor=0.0):
    return Prediction(
        frame_id=np.arange(n),
        scan=scan,
        position=np.zeros((n, 2)),
        amplitude=np.ones((n, 4, 4), np.float32),
        phase=np.zeros((n, 4, 4), np.float32),
        residual=np.full(n, residual, np.float32),
        offset=np.zeros(n, np.float32),
        model_version=np.zeros(n, np.int64),
        prior_residual=np.full(n, prior_residual, np.float32),
        poisson_floor=np.full(n, poisson_floor),
    )


def feed(policy, scan, n, **figures):
    """The predictor says that it has predicted n frames of a scan, one by one."""
    for _ in range(n):
        policy.ingest(prediction(scan, 1, **figures), flat())


def positions_of(policy, n=7):
    """What a policy suggests up to its stop."""
    found = []
    while True:
        decision = policy.suggest(n)
        found += decision.positions.tolist()
        if decision.stop:
            return np.array(found)


def sorted_rows(positions):
    return sorted(map(tuple, np.asarray(positions).tolist()))


def same_positions(kind, found, whole):
    """Fixed orders are the same; one that looks has seen something else, and still goes everywhere once."""
    if kind in LOOKING.values():
        assert sorted_rows(found) == sorted_rows(whole)
    else:
        np.testing.assert_array_equal(found, whole)


@pytest.mark.parametrize("n", [1, 7, 30, 1000])
def test_each_candidate_comes_once_with_a_reason_and_the_last_with_a_stop(kind, n):
    candidates = grid(5, 6, jitter=0.2)
    policy, found = kind(candidates), []
    while len(found) < len(candidates):
        decision = policy.suggest(n)
        assert len(decision.positions) == min(n, len(candidates) - len(found))
        assert len(decision.reasons) == len(decision.positions)
        assert all(reason.strip() for reason in decision.reasons)
        found += decision.positions.tolist()
        assert decision.stop == (len(found) == len(candidates))
    assert sorted_rows(found) == sorted_rows(candidates)


@pytest.mark.parametrize(
    "candidates",
    [
        np.zeros((1, 2)),
        np.zeros((4, 2)),  # all at one place
        np.array([[0.0, 3.0], [0.0, 1.0], [0.0, 2.0]]),  # one row
        np.array([[3.0, 0.0], [1.0, 0.0], [2.0, 0.0]]),  # one column
        np.repeat(np.random.default_rng(0).normal(size=(5, 2)), 3, axis=0),
        1e-9 * grid(4, 4),
    ],
)
def test_odd_candidates_are_visited_like_others(kind, candidates):
    assert sorted_rows(positions_of(kind(candidates))) == sorted_rows(candidates)


@pytest.mark.parametrize(
    "candidates", [np.zeros((0, 2)), np.zeros(2), np.zeros((3, 3)), np.array([[0.0, np.nan]]), np.array([])]
)
def test_candidates_that_are_none_are_refused(kind, candidates):
    with pytest.raises(ValueError, match=r"found candidates of shape .*, expected \(n, 2\) finite"):
        kind(candidates)


@pytest.mark.parametrize("n", [0, -3])
def test_a_wish_for_nothing_is_refused(kind, n):
    with pytest.raises(ValueError, match="expected 1 or more"):
        kind(grid(3, 3)).suggest(n)


def test_candidates_that_change_later_change_no_decision(kind):
    candidates = grid(3, 3)
    policy, before = kind(candidates), candidates.copy()
    candidates[:] = np.nan
    assert sorted_rows(positions_of(policy)) == sorted_rows(before)


def test_a_policy_travels_with_its_state(kind):
    policy = kind(grid(5, 5))
    policy.suggest(7)
    copy = pickle.loads(pickle.dumps(policy))
    np.testing.assert_array_equal(positions_of(copy), positions_of(policy))


def test_another_scan_begins_a_new_pass(kind):
    policy, whole = kind(grid(5, 5)), positions_of(kind(grid(5, 5)))
    feed(policy, "zinc", 0)
    policy.suggest(12)
    feed(policy, "zinc", 10)
    feed(policy, "brick", 2)  # the source went on by itself; two positions were still to be measured
    same_positions(kind, positions_of(policy), whole)


def test_the_same_scan_goes_on(kind):
    policy, whole = kind(grid(5, 5)), positions_of(kind(grid(5, 5)))
    before = policy.suggest(12).positions
    feed(policy, "zinc", 12)
    same_positions(kind, [*before, *positions_of(policy)], whole)


@pytest.mark.parametrize("late", [0, 10, 25])
def test_after_a_stop_the_next_scan_is_begun_once(kind, late):
    """The campaign asks again once all is measured; `late` frames of the scan before are predicted only then."""
    policy, whole = kind(grid(5, 5)), positions_of(kind(grid(5, 5)))
    feed(policy, "zinc", 0)
    positions_of(policy)
    feed(policy, "zinc", 25 - late)
    found = policy.suggest(5).positions.tolist()
    feed(policy, "zinc", late)
    found += policy.suggest(5).positions.tolist()
    feed(policy, "brick", 8)  # the first of the new scan: its pass goes on
    found += positions_of(policy).tolist()
    same_positions(kind, found, whole)
    same_positions(kind, positions_of(policy), whole)


def test_frames_that_nobody_suggested_do_not_begin_a_pass_twice(kind):
    """The source was left alone by its runner, and has measured five more."""
    policy, whole = kind(grid(5, 5)), positions_of(kind(grid(5, 5)))
    feed(policy, "zinc", 0)
    positions_of(policy)
    feed(policy, "zinc", 30)
    found = policy.suggest(5).positions.tolist()
    feed(policy, "brick", 5)
    found += positions_of(policy).tolist()
    same_positions(kind, found, whole)


def test_passes_may_be_ahead_by_more_than_one_scan(kind):
    """Few candidates, and a predictor that is far behind."""
    policy, whole = kind(grid(2, 3)), positions_of(kind(grid(2, 3)))
    positions_of(policy)
    positions_of(policy)
    first = policy.suggest(2).positions
    for scan in ("zinc", "brick", "coins"):
        feed(policy, scan, 6 if scan != "coins" else 1)
    same_positions(kind, [*first, *positions_of(policy)], whole)


def test_a_scan_that_stops_and_goes_on_under_its_name_does_not_shorten_the_next(kind):
    policy, whole = kind(grid(5, 5)), positions_of(kind(grid(5, 5)))
    positions_of(policy)
    feed(policy, "zinc", 25)
    policy.suggest(10)
    feed(policy, "zinc", 10)  # a drift inside the scan: measured again under the same name
    feed(policy, "brick", 1)
    same_positions(kind, positions_of(policy), whole)


def declined(policy, positions, *, stop=False):
    """A person vetoes, the limits or the source refuse."""
    where = np.reshape(positions, (-1, 2))
    reasons = ("because",) * max(len(where), int(stop))
    policy.declined(Decision(positions=where, reasons=reasons, stop=stop), "because")


def test_what_is_declined_is_neither_suggested_again_nor_waited_for(kind):
    """Of the first walk five positions bring no frame; the next scan's walk is whole and begins once."""
    policy, whole = kind(grid(5, 5)), positions_of(kind(grid(5, 5)))
    first = policy.suggest(12).positions
    declined(policy, first[:5])
    feed(policy, "zinc", 7)
    rest = positions_of(policy)
    assert sorted_rows([*first, *rest]) == sorted_rows(whole)
    feed(policy, "zinc", 13)
    found = policy.suggest(5).positions.tolist()
    feed(policy, "brick", 5)  # not more than were suggested: the walk goes on
    same_positions(kind, [*found, *positions_of(policy)], whole)


def test_a_scan_that_the_limits_have_ended_is_over_to_the_policy(kind):
    """What follows is the next scan's walk, whole, and it begins once; nothing is ended twice."""
    policy, whole = kind(grid(5, 5)), positions_of(kind(grid(5, 5)))
    policy.suggest(12)
    feed(policy, "zinc", 12)
    policy.ended("the scan has its 12 frames")
    found = policy.suggest(5).positions.tolist()
    feed(policy, "brick", 5)
    same_positions(kind, [*found, *positions_of(policy)], whole)
    policy = kind(grid(5, 5))
    policy.suggest(12)
    feed(policy, "zinc", 11)
    feed(policy, "brick", 1)  # the source went on by itself, and with it the policy
    policy.ended("the scan has its 12 frames")
    same_positions(kind, positions_of(policy), whole)


def test_a_vetoed_stop_is_not_the_end_of_a_scan(kind):
    policy, whole = kind(grid(5, 5)), positions_of(kind(grid(5, 5)))
    feed(policy, "zinc", 0)
    while not (last := policy.suggest(7)).stop:
        pass
    declined(policy, last.positions, stop=True)
    feed(policy, "zinc", 25 - len(last.positions))
    again = policy.suggest(7)  # nothing is left to measure, and no walk was begun
    assert (len(again.positions), again.stop) == (0, True)
    same_positions(kind, positions_of(policy), whole)  # that one was carried out


def test_the_stop_rule_goes_on_after_frames_whose_residuals_are_not_all_known():
    """As those from before a recovery."""
    rule = StopRule(ratio=10.0, half_life=2.0)
    rule.note(prediction("zinc", 40, prior_residual=math.nan, residual=0.25))
    rule.note(prediction("zinc", rule.least - 1, residual=0.25))
    assert rule.reason() is None
    rule.note(prediction("zinc", 1, residual=0.25))
    assert rule.reason().startswith("the live image explains new frames to 2.00")


def test_after_a_vetoed_stop_the_rule_looks_at_new_frames_only():
    policy = SpaceFilling(grid(10, 10), stop=StopRule(ratio=10.0, half_life=2.0))
    policy.suggest(20)
    feed(policy, "zinc", 20, residual=0.25)
    last = policy.suggest(7)
    assert (len(last.positions), last.stop) == (0, True)
    declined(policy, [], stop=True)
    goes_on = policy.suggest(7)
    assert (len(goes_on.positions), goes_on.stop) == (7, False)
    feed(policy, "zinc", 7, residual=0.25)
    assert policy.suggest(7).stop


@pytest.mark.parametrize("jitter", [0.0, 0.2])
@pytest.mark.parametrize("shape", [(6, 6), (36, 36), (10, 40), (40, 10), (3, 20), (20, 3), (7, 5)])
def test_a_raster_never_jumps_further_than_to_the_next_row(shape, jitter):
    found = positions_of(Raster(grid(*shape, step=3.0, jitter=jitter)), 100)
    jumps = np.hypot(*np.diff(found, axis=0).T)
    # Neighbours are one step apart, in the row and at its end; jitter moves both ends of a jump.
    assert jumps.max() <= 3.0 * math.hypot(1 + 2 * jitter, 2 * jitter) + 1e-9
    assert np.diff(np.round(found[:, 0] / 3.0)).min() >= 0


def test_a_raster_of_scattered_candidates_ends_each_row_before_the_next():
    candidates = np.random.default_rng(0).uniform(0, 10, (400, 2))
    found = positions_of(Raster(candidates, rows=5))
    rows = np.round((found[:, 0] - candidates[:, 0].min()) / np.ptp(candidates[:, 0]) * 4)
    assert (np.diff(rows) >= 0).all()
    for row in range(5):
        along = np.diff(found[rows == row, 1])
        assert (along <= 0).all() if row % 2 else (along >= 0).all()
    with pytest.raises(ValueError, match="found rows=0"):
        Raster(candidates, rows=0)


def test_a_random_walk_depends_on_its_seed_alone():
    candidates = grid(6, 6)
    np.testing.assert_array_equal(
        positions_of(Random(candidates, seed=3), 1), positions_of(Random(candidates, seed=3), 36)
    )
    assert not np.array_equal(positions_of(Random(candidates, seed=3)), positions_of(Random(candidates, seed=4)))


def covering_radius(candidates, chosen):
    """How far the farthest candidate is from what was measured."""
    return np.hypot(*(candidates[:, None] - chosen[None]).T).min(0).max()


@pytest.mark.parametrize(
    "candidates", [grid(8, 8), grid(4, 15, jitter=0.2), np.random.default_rng(0).normal(size=(60, 2))]
)
def test_space_filling_covers_at_most_twice_as_coarsely_as_the_best(candidates):
    """k + 1 points that are pairwise r apart cannot be covered by k discs of a radius below r / 2 (Gonzalez 1985)."""
    found = positions_of(SpaceFilling(candidates))
    for k in range(1, len(found)):
        apart = np.hypot(*(found[: k + 1, None] - found[None, : k + 1]).T)[np.triu_indices(k + 1, 1)].min()
        best_possible = apart / 2
        assert covering_radius(candidates, found[:k]) <= 2 * best_possible + 1e-9


def test_space_filling_covers_the_field_sooner_than_the_others():
    candidates = grid(16, 16)
    space, raster, random = (positions_of(make(candidates)) for make in (SpaceFilling, Raster, Random))
    for share in (0.1, 0.25, 0.5):
        k = int(share * len(candidates))
        mine = covering_radius(candidates, space[:k])
        assert 1.4 * mine < covering_radius(candidates, random[:k])
        assert 2.0 * mine < covering_radius(candidates, raster[:k])


def test_the_structure_of_an_image_that_changes_in_parts_is_that_of_the_whole():
    rng = np.random.default_rng(0)
    weight = np.clip(1.3 - np.hypot(*np.mgrid[-20:20, -20:20]) / 20, 0, 1).astype(np.float32)
    canvas = Canvas(shape=(260, 333), origin=(-130.0, -166.0))
    live = LiveImage("brick", canvas, weight, Geometry(shape=(64, 64)))
    candidates = rng.uniform((-100, -140), (100, 140), (500, 2))
    watched, seen = StructureMap(beam=50.0), 0
    patches = {}
    for turn in range(12):
        where = rng.uniform((-100, -140), (100, 140), (1 + turn % 3, 2))
        made = (rng.normal(size=(len(where), 40, 40)) + 1j * rng.normal(size=(len(where), 40, 40))).astype(np.complex64)
        live.stitch(made, where)
        patches[turn] = made, where
        if turn == 7:  # a patch in the middle of others goes again
            live.stitcher.remove(*patches[3])
            live.stitch(0.1 * patches[3][0], patches[3][1])
        found, whole = (
            watched.at(candidates, live.view()),
            StructureMap(beam=50.0).at(candidates, live.view().drop_attrs()),
        )
        for mine, wanted in zip(found, whole, strict=True):
            np.testing.assert_allclose(mine, wanted, rtol=1e-9, atol=1e-12)
        assert (found[1] > 0).sum() > seen
        seen = (found[1] > 0).sum() - 1
    again = pickle.loads(pickle.dumps(watched))
    np.testing.assert_allclose(again.at(candidates, live.view())[0], found[0])


@pytest.mark.parametrize("travel", [None, Travel(velocity=100.0, settling=0.01)])
def test_the_best_of_many_candidates_is_found_without_a_look_at_all(travel):
    """Whatever changes in the meantime, and for candidates in a line, at one place and far off as well."""
    rng = np.random.default_rng(0)
    places = [np.zeros((50, 2)), np.stack([np.arange(300.0), np.zeros(300)], 1), [[1e4, -1e4]]]
    where = np.concatenate([rng.uniform(-500, 500, (20_000, 2)), *places])
    cells = Cells(where, beam=10.0)
    ranking, worth = Ranking(cells), np.round(rng.random(len(where)), 2)
    assert np.array_equal(np.sort(cells.members(np.arange(len(cells.count)))), np.arange(len(where)))
    for _ in range(2):  # all are due at first, not all of them at once
        ranking.update(now := ranking.due(), due := cells.members(now), worth[due])
    for _ in range(60):
        here = where[rng.integers(len(where))]
        rows, near = cells.near(here)
        assert set(np.flatnonzero(np.abs(where - here).max(1) <= 30)) == set(rows)
        worth[rows] *= 1 - near
        changed = np.unique(cells.of[rows])
        ranking.update(changed, members := cells.members(changed), worth[members])
        gain, by = worth, ()
        if travel is not None:
            by = (lambda there, here=here: 1 + travel.seconds(here, there), here, where)
            gain = worth / by[0](where)
        best = ranking.best(*by)
        assert best == gain.argmax()
        worth[best] = -1.0
        ranking.update(cell := cells.of[[best]], members := cells.members(cell), worth[members])


def test_what_a_suggestion_looks_at_does_not_grow_with_the_candidates(monkeypatch):
    looked, update = [], Ranking.update

    def noted(self, cells, rows, worth):
        looked.append(len(rows))
        update(self, cells, rows, worth)

    monkeypatch.setattr(Ranking, "update", noted)
    policy, seen = GradientResidual(grid(300, 300), beam=BEAM), []
    for _ in range(12):
        policy.ingest(prediction("a", 5), flat())
        seen += sorted_rows(policy.suggest(5).positions)
    assert len(set(seen)) == len(seen) == 60
    assert max(looked) < 2**14 + 1000 < 300**2


def test_what_a_policy_remembers_of_frames_does_not_grow_with_the_scan():
    """It is asked in the thread that predicts."""
    dwell = DwellRule(zone_plate(16, 5.0, aperture=0.52, counts=1e4), frame_s=0.02, shortest=0.01, longest=0.1)
    policy = Adaptive(grid(8, 8), beam=BEAM, stop=StopRule(ratio=1e-3), dwell=dwell)
    for _ in range(12):
        policy.ingest(prediction("a", 512, residual=0.3, poisson_floor=0.1), flat())
        policy.suggest(1)
    state = policy.state()
    held = [
        value for part in (state, *state["rules"].values()) for value in part.values() if isinstance(value, np.ndarray)
    ]
    assert len(held) > 8
    assert max(len(value) for value in held) <= 4096 < 12 * 512
