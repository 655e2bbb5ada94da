"""Laws of what stands between a policy and the source: safe limits, a person's word, going back to an older model."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from steering.campaign import (
    AskPolicy,
    Campaign,
    CampaignSettings,
    CandidateReady,
    CandidateRefused,
    ChunkArrived,
    Command,
    DecisionLimited,
    DecisionProposed,
    DecisionSettled,
    DecisionSuggested,
    FellBack,
    FrameRefused,
    Guard,
    LabelsReady,
    Limits,
    ModelPublished,
    PredictionReady,
    Publish,
    Refuse,
    Remind,
    RollBack,
    RollBackRefused,
    RolledBack,
    SourceEnded,
    Steer,
    Tick,
    Train,
    campaign_from,
    encode,
    replay,
    state_of,
)
from steering.records import Field
from tests.campaigns import addressed, handled

AREA = Field(-10.0, 10.0, -5.0, 5.0)


def suggested(positions, *, dwell=None, stop=False, time=0.0):
    where = tuple((float(y), float(x)) for y, x in positions)
    reasons = tuple(f"why {k}" for k in range(max(len(where), int(stop))))
    return DecisionSuggested(time=time, positions=where, reasons=reasons, dwell=dwell, stop=stop)


def command(name, *, time=0.0, version=None):
    return Command(time=time, name=name, version=version)


def published(number, residual=0.1):
    return ModelPublished(time=0.0, version=number, validation_error=0.5, validation_residual=residual)


def campaign_with(limits=None, *, frame_time=0.01, **settings):
    campaign = Campaign(CampaignSettings(lookahead=10, limits=limits or Limits(), **settings), frame_time=frame_time)
    assert handled(campaign, published(0, None)) == [AskPolicy(10)]
    return campaign


def steered(actions):
    return [action.decision for action in actions if isinstance(action, Steer)]


numbers = st.floats(-40, 40) | st.sampled_from([math.nan, math.inf, -math.inf, 1e300, 0.0])
nonsense = st.lists(
    st.tuples(
        st.lists(st.tuples(numbers, numbers), max_size=12),
        st.none() | st.floats(-1, 5) | st.sampled_from([math.nan, math.inf, 0.0]),
        st.booleans(),
    ),
    max_size=25,
)


@settings(max_examples=150, deadline=None)
@given(decisions=nonsense, approval=st.sampled_from([0.0, 5.0]))
def test_no_policy_gets_past_the_limits_whatever_it_suggests(decisions, approval):
    """Fuzzed: what reaches the source is inside the area, no more than allowed, nowhere too long, never too short."""
    limits = Limits(area=AREA, frames=30, shortest_dwell=0.05, exposure=1.0, reach=3.0)
    campaign = campaign_with(limits, approval_s=approval)
    scan, time = [], 0.0
    for positions, dwell, stop in decisions:
        time += 10.0
        decision = suggested(positions, dwell=None if dwell is None else (dwell,) * len(positions), stop=stop)
        if not positions and not stop:
            continue  # Decision refuses that one itself
        actions = handled(campaign, decision)
        if approval:
            actions = handled(campaign, Tick(time=time))
        for allowed in steered(actions):
            scan += zip(allowed.positions, allowed.dwell or (0.05,) * len(allowed.positions), strict=True)
            where, seconds = np.array([p for p, _ in scan]).reshape(-1, 2), np.array([d for _, d in scan])
            assert np.isfinite(where).all()
            assert AREA.contains(where, 1e-7).all()
            assert (seconds >= 0.05).all()
            assert len(scan) <= 30
            near = np.hypot(*(where[:, None] - where).T) <= 3.0
            assert (near @ seconds <= 1.0 + 1e-6).all()
            assert len(allowed.reasons) == max(1, len(allowed.positions))
            if len(scan) == 30:
                assert allowed.stop
            if allowed.stop:
                scan = []
        while campaign.outstanding:
            handled(campaign, FrameRefused(time=time, count=1, reason="measured elsewhere"))


def test_without_limits_a_decision_goes_as_it_is():
    decision = suggested([(0, 0), (1e6, -1e6)], dwell=(0.1, 2.0))
    allowed, refused = Guard(Limits(), 0.01).limited(decision)
    assert allowed == decision
    assert not refused


def test_what_is_refused_is_logged_with_its_reason_and_the_policy_is_asked_again():
    campaign = campaign_with(Limits(area=AREA))
    actions = handled(campaign, suggested([(99, 0), (0, 99), (1, 1)]))
    assert steered(actions) == [suggested([(1, 1)]).__class__(**{**vars(suggested([(1, 1)])), "reasons": ("why 2",)})]
    assert campaign.raised == [DecisionLimited(time=0.0, count=2, reason="outside the allowed area")]
    assert campaign.outstanding == 1
    assert AskPolicy(10) in actions


def test_the_last_allowed_frame_stops_the_scan_and_the_next_scan_counts_anew():
    campaign = campaign_with(Limits(frames=15))
    (first,) = steered(handled(campaign, suggested([(0, k) for k in range(10)])))
    assert not first.stop
    handled(campaign, ChunkArrived(time=0.0, scan="a", frame_ids=tuple(range(10))))
    (second,) = steered(handled(campaign, suggested([(1, k) for k in range(10)])))
    assert (len(second.positions), second.stop) == (5, True)
    asked = handled(campaign, ChunkArrived(time=0.0, scan="a", frame_ids=tuple(range(10, 15))))
    assert AskPolicy(10, ended="the scan has its 15 frames") in asked  # the policy had suggested no stop
    (third,) = steered(handled(campaign, suggested([(2, k) for k in range(10)])))
    assert (len(third.positions), third.stop) == (10, False)


def test_a_dwell_too_short_is_lengthened_also_where_none_was_named():
    guard = Guard(Limits(shortest_dwell=0.05), 0.01)
    assert guard.limited(suggested([(0, 0)]))[0].dwell == (0.05,)
    assert guard.limited(suggested([(0, 0), (0, 1)], dwell=(0.001, 0.2)))[0].dwell == (0.05, 0.2)
    assert Guard(Limits(shortest_dwell=0.05), 0.1).limited(suggested([(0, 0)]))[0].dwell is None


def test_a_place_gets_no_more_beam_than_it_stands_its_neighbours_included():
    guard = Guard(Limits(exposure=0.25, reach=1.0), 0.1)
    allowed, refused = guard.limited(suggested([(0, 0), (0, 0.9), (0, 0.5), (0, 5), (0, -0.9)]))
    # The third would bring both others to 0.3 s; the last one the first.
    assert allowed.positions == ((0, 0), (0, 0.9), (0, 5))
    assert refused == {"the place has its most exposure": ((0, 0.5), (0, -0.9))}


def test_a_policy_that_never_suggests_anything_allowed_ends_its_scan():
    campaign = campaign_with(Limits(area=AREA))
    for _ in range(999):
        assert handled(campaign, suggested([(99, 99)])) == [AskPolicy(10)]
    (stop,) = steered(handled(campaign, suggested([(99, 99)])))
    assert stop.stop
    assert "1000 decisions in a row" in stop.reasons[0]


@pytest.mark.parametrize("settings", [{"frames": 0}, {"exposure": -1.0}, {"reach": math.inf}, {"shortest_dwell": 0.0}])
def test_impossible_limits_are_refused(settings):
    with pytest.raises(ValueError, match="expected positive limits"):
        Limits(**settings)


def test_impossible_approval_is_refused():
    with pytest.raises(ValueError, match="expected 0 or more seconds"):
        CampaignSettings(approval_s=-1.0)
    with pytest.raises(ValueError, match="unanswered='perhaps'"):
        CampaignSettings(unanswered="perhaps")


# ------------------------------------------------------------------------------------------------- a person's word


def proposing(**settings):
    campaign = campaign_with(approval_s=60.0, **settings)
    assert handled(campaign, suggested([(0, 0), (0, 1)], time=100.0)) == [Remind(160.0)]
    assert campaign.raised.pop() == DecisionProposed(
        time=100.0, positions=2, reason="why 0", stop=False, until=160.0, default=settings.get("unanswered", "approve")
    )
    return campaign


def test_a_decision_waits_for_approval_and_is_carried_out_once():
    campaign = proposing()
    assert handled(campaign, Tick(time=120.0)) == []
    assert steered(handled(campaign, command("approve", time=130.0))) == [suggested([(0, 0), (0, 1)], time=100.0)]
    assert campaign.raised == [DecisionSettled(time=130.0, approved=True, by="a person")]
    assert steered(handled(campaign, Tick(time=160.0))) == []
    assert steered(handled(campaign, command("approve", time=161.0))) == []
    assert campaign.outstanding == 2


def test_a_vetoed_decision_moves_nothing_and_another_one_is_asked_for():
    campaign = proposing()
    assert handled(campaign, command("veto", time=130.0)) == [AskPolicy(10)]
    assert campaign.outstanding == 0
    assert handled(campaign, suggested([(3, 3)], time=131.0)) == [Remind(191.0)]


def asked(actions):
    [ask] = [action for action in actions if isinstance(action, AskPolicy)]
    return [(part.decision.positions, part.decision.stop, part.reason) for part in ask.declined]


def test_the_policy_is_told_once_what_was_vetoed_limited_or_refused_by_the_source():
    campaign = campaign_with(Limits(area=AREA), approval_s=60.0)
    events = [
        suggested([(0, 0), (99, 0)], stop=True, time=100.0),
        command("veto", time=130.0),
        suggested([(1, 1), (2, 2)], time=131.0),
        command("approve", time=132.0),
    ]
    told = [campaign.handle(addressed(campaign, event)) for event in events]
    assert asked(told[1]) == [
        (((99.0, 0.0),), False, "outside the allowed area"),
        (((0.0, 0.0),), True, "vetoed: a person"),
    ]
    assert asked(told[3]) == []  # once
    refused = FrameRefused(time=133.0, count=1, reason="no stage there", positions=((2.0, 2.0),))
    campaign.handle(refused)
    assert campaign.outstanding == 1
    settled = campaign.handle(addressed(campaign, suggested([(3, 3)], time=134.0)))
    assert settled  # it waits for a word
    assert asked(campaign.handle(command("veto", time=135.0))) == [
        (((2.0, 2.0),), False, "no stage there"),
        (((3.0, 3.0),), False, "vetoed: a person"),
    ]


@pytest.mark.parametrize(("unanswered", "moves"), [("approve", 1), ("veto", 0)])
def test_without_an_answer_the_stated_default_holds(unanswered, moves):
    campaign = proposing(unanswered=unanswered)
    assert len(steered(handled(campaign, Tick(time=160.0)))) == moves
    assert campaign.raised[-1] == DecisionSettled(time=160.0, approved=bool(moves), by="nobody answered")


def test_nothing_moves_by_default_while_a_person_has_paused():
    campaign = proposing()
    handled(campaign, command("pause", time=110.0))
    assert steered(handled(campaign, Tick(time=160.0))) == []
    assert len(steered(handled(campaign, command("resume", time=200.0)))) == 1


def test_the_end_of_a_run_forgets_what_was_proposed():
    campaign = proposing()
    handled(campaign, SourceEnded(time=110.0))
    assert steered(handled(campaign, command("approve", time=111.0))) == []
    assert steered(handled(campaign, Tick(time=160.0))) == []


def test_commands_that_cannot_be_obeyed_say_why():
    campaign = campaign_with()
    assert "no decision that waits" in campaign.objection(command("approve"))
    assert "no version before it" in campaign.objection(command("rollback"))
    handled(campaign, published(1))
    assert "version 7" in campaign.objection(command("rollback", version=7))
    assert campaign.objection(command("rollback")) is None
    handled(campaign, command("stop"))
    assert "has ended" in campaign.objection(command("pause"))


# --------------------------------------------------------------------------------------------- an older model again


def candidate(error=0.5, served=1.0):
    return CandidateReady(time=0.0, scan="a", steps=5, error=error, served_error=served, residual=0.1, loss=1.0)


def learning():
    """A campaign that serves version 2 and whose ranks train."""
    campaign = campaign_with(frames_to_label=10)
    handled(campaign, ChunkArrived(time=0.0, scan="a", frame_ids=tuple(range(10))))
    assert Train("a", 40) in handled(campaign, LabelsReady(time=0.0, scan="a", count=10, residual=0.1, seconds=1.0))
    for number in (1, 2):
        assert handled(campaign, candidate()) == [Publish(number)]
        assert Train("a", 40) in handled(campaign, published(number))
    return campaign


def back(version=1):
    return RolledBack(time=0.0, version=version, validation_residual=0.3, reason="asked by a person")


def test_back_to_the_version_before_and_on_from_there():
    campaign = learning()
    assert handled(campaign, command("rollback")) == [RollBack(1, "asked by a person")]
    assert "on its way back" in campaign.objection(command("rollback"))
    # The round under way began from the version that is taken back, whether it ends before or after that.
    (refusal,) = handled(campaign, candidate())
    assert isinstance(refusal, Refuse)
    assert handled(campaign, CandidateRefused(time=0.0, reason=refusal.reason)) == []  # no round meanwhile
    assert handled(campaign, back()) == [Train("a", 40)]
    assert (campaign.version, campaign.expected) == (1, 0.3)
    assert handled(campaign, candidate()) == [Publish(3)]  # numbers of versions are never used twice
    handled(campaign, published(3))
    handled(campaign, command("rollback"))
    handled(campaign, back(2))
    assert handled(campaign, command("rollback")) == [RollBack(1, "asked by a person")]  # further back each time
    handled(campaign, back(1))
    assert handled(campaign, command("rollback", version=3)) == [RollBack(3, "asked by a person")]


def test_a_round_that_ends_after_the_ranks_went_back_is_not_published():
    campaign = learning()
    handled(campaign, command("rollback"))
    handled(campaign, back())
    (refusal,) = handled(campaign, candidate())
    assert isinstance(refusal, Refuse)


def test_an_older_version_that_does_no_better_leaves_everything_as_it_was():
    campaign = learning()
    handled(campaign, predicted(1 / 40, 16))
    handled(campaign, RollBackRefused(time=0.0, version=1, reason="no better"))
    assert campaign.version == 2
    assert handled(campaign, candidate()) == [Publish(3)]


def predicted(trust, frames):
    """Frames of which so large a share of 39 validation frames looks as bad or worse."""
    return PredictionReady(
        time=0.0,
        scan="a",
        frame_ids=tuple(range(frames)),
        version=2,
        residual=0.3,
        trust_by_residual=(trust,) * frames,
        trust_by_offset=(None,) * frames,
        validation_frames=39,
        why_not=("",) * frames,
    )


@pytest.mark.parametrize(("before", "expected"), [(40, 1), (80, 0)])
def test_trust_that_falls_soon_after_a_swap_has_the_version_before_tried(before, expected):
    campaign = learning()
    handled(campaign, predicted(0.5, before))
    actions = handled(campaign, predicted(1 / 40, 16))
    assert campaign.drift
    tried = [action for action in actions if isinstance(action, RollBack)]
    assert [(action.version, action.if_better) for action in tried] == [(1, True)] * expected


def test_the_log_of_limits_answers_and_rollbacks_replays_to_the_same_actions():
    settings = CampaignSettings(lookahead=10, limits=Limits(area=AREA, frames=15), approval_s=60.0)
    events = [
        published(0, None),
        suggested([(0, k) for k in range(10)], time=1.0),
        command("approve", time=2.0),
        ChunkArrived(time=3.0, scan="a", frame_ids=tuple(range(10))),
        suggested([(0, 9), (1, 1)], time=4.0),
        Tick(time=64.0),
        published(1),
        command("rollback", time=65.0),
        RolledBack(time=66.0, version=0, validation_residual=None, reason="asked by a person"),
    ]
    live, log, actions = Campaign(settings, frame_time=0.01), [], []
    for event in events:
        event = addressed(live, event)
        log.append(encode(event))
        actions += live.handle(event)
        log += [encode(raised) for raised in live.raised]
        live.raised.clear()
    again, same = replay(log, settings, frame_time=0.01)
    assert same == actions
    assert (again.version, again.outstanding) == (live.version, live.outstanding) == (0, 1)


# A person's further limits.


def limit(area=None, dwell=None):
    return Command(time=0.0, name="limit", area=area, shortest_dwell=dwell)


def test_a_persons_limits_hold_beside_those_of_the_settings_until_they_are_lifted():
    campaign = campaign_with(Limits(area=AREA))
    campaign.handle(limit((-20.0, 0.0, -1.0, 20.0), 0.5))
    assert campaign.gate.guard.held == Limits(area=Field(-10.0, 0.0, -1.0, 5.0), shortest_dwell=0.5)
    [steer] = [a for a in handled(campaign, suggested([(-5, 0), (5, 0), (-5, -2)])) if isinstance(a, Steer)]
    assert (steer.decision.positions, steer.decision.dwell) == (((-5.0, 0.0),), (0.5,))
    campaign.handle(limit())
    assert campaign.gate.guard.held == Limits(area=AREA)
    assert "expected an area that has something" in campaign.objection(limit((11.0, 12.0, 0.0, 1.0)))
    assert "expected positive limits" in campaign.objection(limit(dwell=-1.0))
    assert "low..high" in campaign.objection(limit((1.0, 0.0, 0.0, 1.0)))


def test_an_approved_decision_keeps_to_limits_that_were_set_while_it_waited():
    campaign = campaign_with(Limits(area=AREA), approval_s=60.0)
    assert not [a for a in handled(campaign, suggested([(-5, 0), (5, 0)])) if isinstance(a, Steer)]
    campaign.handle(limit((-10.0, 0.0, -5.0, 5.0)))
    [steer] = [a for a in handled(campaign, command("approve")) if isinstance(a, Steer)]
    assert steer.decision.positions == ((-5.0, 0.0),)


def test_limits_of_a_person_outlive_a_crash():
    campaign = campaign_with(Limits(area=AREA))
    campaign.handle(limit((-1.0, 1.0, -1.0, 1.0), 0.2))
    campaign.raised.clear()
    again = campaign_from(json.loads(json.dumps(state_of(campaign))))
    assert again.gate.guard.held == campaign.gate.guard.held


def test_what_has_brought_no_frame_yet_is_known_by_its_decision():
    """By order: a frame is that of the first position left. The reasons, the dwell and the end of the scan are kept."""
    campaign = campaign_with()
    first = suggested([(0, 0), (1, 0), (2, 0)], dwell=(0.1, 0.2, 0.3))
    last = suggested([(3, 0), (4, 0), (1, 0)], stop=True)

    def left():
        return [
            (one.decision.positions, one.decision.dwell, one.decision.stop) for one in campaign.gate.unmeasured.left
        ]

    handled(campaign, first)
    handled(campaign, last)
    handled(campaign, ChunkArrived(time=0.0, scan="a", frame_ids=(0,)))
    handled(campaign, FrameRefused(time=0.0, count=2, reason="no", positions=((1.0, 0.0), (4.0, 0.0))))
    assert left() == [(((1, 0), (2, 0)), (0.2, 0.3), False), (((3, 0),), None, True)]
    handled(campaign, FrameRefused(time=0.0, count=1, reason="lost on the way"))
    assert left() == [(((2, 0),), (0.3,), False), (((3, 0),), None, True)]
    alone = FellBack(time=0.0, positions=((7.0, 0.0), (8.0, 0.0)), since=0.0)
    handled(campaign, alone)
    handled(campaign, ChunkArrived(time=0.0, scan="a", frame_ids=(1, 2, 3)))
    assert campaign.gate.unmeasured.left == (replace(alone, positions=((8.0, 0.0),)),)
    handled(campaign, ChunkArrived(time=0.0, scan="a", frame_ids=(4, 5, 6)))
    assert campaign.gate.unmeasured.left == ()
    assert campaign.outstanding == 0
