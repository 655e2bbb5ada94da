"""The campaign's laws: whatever happens in whatever order, it asks for the right things, once, and comes to an end."""

import copy
import json
import math
import random
from collections import Counter, deque
from dataclasses import replace

import numpy as np
import pytest

from steering.campaign import (
    AnswerIgnored,
    AskPolicy,
    Campaign,
    CampaignSettings,
    CandidateReady,
    CandidateRefused,
    ChunkArrived,
    Command,
    DecisionSuggested,
    DriftLowered,
    DriftRaised,
    Finish,
    FrameRefused,
    GroupChanged,
    Label,
    LabelsReady,
    ModelPublished,
    PredictionReady,
    PredictorReplaced,
    Publish,
    Refuse,
    RollBack,
    RollBackRefused,
    RolledBack,
    ScanNotLabelled,
    SourceEnded,
    Steer,
    TakeBack,
    Train,
    TrainingSkipped,
    VersionRefused,
    decode,
    encode,
    replay,
)
from steering.campaign.unmeasured import positions_of
from steering.policies import SpaceFilling
from steering.records import Prediction
from tests.campaigns import addressed, handled

SETTINGS = CampaignSettings(lookahead=10, frames_to_label=20, label_every=30, steps=5)


def as_logged(event):
    """The event as a line of JSON, where a number that is not finite is null, and back."""
    line = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in encode(event).items()}
    return json.loads(json.dumps(line, allow_nan=False))


def chunk(n=10, scan="a", first=0):
    return ChunkArrived(time=0.0, scan=scan, frame_ids=tuple(range(first, first + n)))


def decision(n=10, *, stop=False):
    reasons = ("because",) * max(n, int(stop))
    return DecisionSuggested(time=0.0, positions=((0.0, 1.0),) * n, reasons=reasons, stop=stop)


def labels(scan="a", count=20):
    return LabelsReady(time=0.0, scan=scan, count=count, residual=0.1, seconds=1.0)


def candidate(error=0.5, served=1.0, *, scan="a", loss=1.0):
    return CandidateReady(time=0.0, scan=scan, steps=5, error=error, served_error=served, residual=0.1, loss=loss)


def published(number, *, residual=0.1):
    return ModelPublished(time=0.0, version=number, validation_error=0.5, validation_residual=residual)


def predicted(trust, *, version=1, scan="a", frames=1, why_not=()):
    """Frames that are all trusted alike, by their residual."""
    return PredictionReady(
        time=0.0,
        scan=scan,
        frame_ids=tuple(range(frames)),
        version=version,
        residual=0.2,
        trust_by_residual=(trust,) * frames,
        trust_by_offset=(None,) * frames,
        validation_frames=40,
        why_not=why_not or ("",) * frames,
    )


def refused(reason="no better"):
    return CandidateRefused(time=0.0, reason=reason)


def changed(generation=1, rounds_lost=0):
    group = {"ranks": 1, "generation": generation, "rounds_lost": rounds_lost}
    return GroupChanged(time=0.0, lost=(1,), joined=(), **group)


def ended():
    return SourceEnded(time=0.0)


def command(name):
    return Command(time=0.0, name=name)


def feed(campaign, *events):
    """What the last of the events calls for."""
    actions = []
    for event in events:
        actions = handled(campaign, event)
    return actions


def of_kind(actions, *kinds):
    return [action for action in actions if isinstance(action, kinds)]


def started(settings=SETTINGS):
    """A campaign that has asked, been answered, and has its first version in service."""
    campaign = Campaign(settings=settings)
    assert feed(campaign, published(0, residual=None)) == [AskPolicy(settings.lookahead)]
    assert feed(campaign, decision(100)) == [Steer(decision(100), 0)]
    return campaign


def training():
    """A campaign whose first labels are with the ranks, and whose first round is under way."""
    campaign = started()
    assert feed(campaign, chunk(), chunk()) == [Label("a")]
    assert feed(campaign, labels()) == [Train("a", SETTINGS.steps)]
    return campaign


# Whole campaigns in a world that answers in any order.


class World:
    """Everything around a campaign: a paced source with parts, a predictor that lags, ranks and labels that fail.

    `step` lets one thing happen that can happen now, drawn at random, and checks the campaign's promises.
    """

    def __init__(self, seed, *, parts=(("a", 10**6),), candidates=60, trouble=0.0, commands=(), settings=SETTINGS):
        self.draws = random.Random(seed)
        self.campaign = Campaign(settings=settings)
        self.places = np.random.default_rng(seed).normal(size=(candidates, 2))
        self.policy = SpaceFilling(self.places)
        self.trouble = trouble
        self.commands = deque(commands)
        self.parts, self.part, self.left = parts, 0, parts[0][1]
        self.queue = deque()  # (position, part that ends after it)
        self.known = None  # scan of which the policy knew a frame last
        self.unpredicted = deque()
        self.measured = {name: [] for name, _ in parts}
        self.frames = 0
        self.labelled = set()
        self.source_over = self.told_over = self.paused = False
        self.waiting = {}  # what is to be answered
        self.late = []  # answers to what is no longer asked
        self.log, self.actions, self.given = [], [], Counter()
        self.take(published(0, residual=None))

    def take(self, event):
        event = addressed(self.campaign, event)
        self.log.append(event)
        allowed = not (self.paused or self.told_over)
        actions = self.campaign.handle(event)
        self.actions += actions
        for action in actions:
            name = type(action).__name__
            self.given[name] += 1
            assert self.given["Finish"] == (name == "Finish"), "something was asked for after the end"
            match action:
                case Steer(chosen, scan):
                    self.steer(chosen, scan)
                case AskPolicy():
                    assert allowed, "the policy was asked though paused or over"
                    self.wait("ask", action)
                case Label():
                    self.wait("label", action)
                case Train():
                    assert not {"weigh", "back"} & set(self.waiting)
                    self.wait("train", action)
                case Publish(number):
                    assert number == max(self.campaign.served) + 1
                    self.wait("weigh", action)
                case Refuse() | TakeBack():
                    self.wait("weigh", action)
                case RollBack():
                    self.wait("back", action)
        assert self.campaign.outstanding >= 0
        if not self.trouble and not self.campaign.finished:  # none is refused: each frame is that of the first one
            left = [where for one in self.campaign.gate.unmeasured.left for where in positions_of(one)]
            assert left == [position for position, _ in self.queue if position is not None]
        return actions

    def wait(self, what, action):
        assert what not in self.waiting, f"a second {what} before the first was answered"
        self.waiting[what] = action

    def steer(self, chosen, scan):
        part, last = self.part if scan is None else scan, len(chosen.positions) - 1
        refusals = 0
        for k, position in enumerate(chosen.positions):
            ends = part if chosen.stop and k == last else None
            if self.draws.random() < self.trouble:
                refusals += 1
                position = None
            if position is not None or ends is not None:
                self.queue.append((position, ends))
        if chosen.stop and last < 0:
            self.queue.append((None, part))
        if refusals:
            self.waiting.setdefault("refusals", []).append(refusals)

    def can_happen(self):
        found = list(self.waiting)
        if self.queue and not self.source_over:
            found += ["measure"] * 3
        if self.unpredicted:
            found += ["predict"] * 2
        if self.source_over and not self.told_over:
            found.append("over")
        if self.commands and (self.draws.random() < 0.02 or not found):
            found.append("command")
        if self.waiting and self.draws.random() < self.trouble / 2:
            found.append("lose")
        if self.late and self.draws.random() < self.trouble:
            found.append("nonsense")
        return found

    def run(self, steps=20_000):
        for _ in range(steps):
            if self.campaign.finished:
                break
            choice = self.can_happen()
            assert choice, f"stuck: {self.campaign}"
            getattr(self, self.draws.choice(choice))()
        assert self.campaign.finished, "it never ends"
        return self

    def ask(self):
        self.waiting.pop("ask")
        chosen = self.policy.suggest(SETTINGS.lookahead)
        positions = tuple(map(tuple, chosen.positions.tolist()))
        self.take(
            DecisionSuggested(time=0.0, positions=positions, reasons=chosen.reasons, stop=chosen.stop, scan=self.known)
        )

    def measure(self):
        taken, over = [], False
        while self.queue and len(taken) < min(5, self.left) and not over:
            position, ends = self.queue.popleft()
            over = ends == self.part
            if position is not None:
                taken.append(position)
        name = self.parts[self.part][0]
        self.left -= len(taken)
        if over or not self.left:
            self.part += 1
            self.source_over = self.part == len(self.parts)
            self.left = 0 if self.source_over else self.parts[self.part][1]
        if taken:
            self.measured[name] += taken
            event = chunk(len(taken), name, self.frames)
            self.frames += len(taken)
            self.unpredicted.append(event)
            self.take(event)

    def predict(self):
        event = self.unpredicted.popleft()
        n = len(event.frame_ids)
        self.known = event.scan
        self.policy.ingest(
            Prediction(
                frame_id=np.array(event.frame_ids),
                scan=event.scan,
                position=np.zeros((n, 2)),
                amplitude=np.zeros((n, 2, 2)),
                phase=np.zeros((n, 2, 2)),
                residual=np.zeros(n),
                offset=np.zeros(n),
                model_version=np.zeros(n, int),
            ),
            None,
        )
        version = max(0, self.campaign.version - self.draws.randrange(2))
        trust = self.draws.choice([0.02, 0.1, 0.5, None])
        self.take(predicted(trust, version=version, scan=event.scan, frames=n))

    def over(self):
        self.told_over = True
        self.take(ended())

    def refusals(self):
        count = self.waiting["refusals"].pop()
        if not self.waiting["refusals"]:
            del self.waiting["refusals"]
        self.take(FrameRefused(time=0.0, count=count, reason="out of reach"))

    def label(self):
        action = self.waiting.pop("label")
        failed = self.draws.random() < self.trouble
        self.labelled |= set() if failed else {action.scan}
        self.answer(replace(labels(action.scan, 0 if failed else 20), action=action.id))

    def train(self):
        action = self.waiting.pop("train")
        unjudged = self.draws.random() < self.trouble
        error, served = (math.nan, math.nan) if unjudged else (self.draws.random(), self.draws.random())
        answer = candidate(error, served, scan=action.scan, loss=self.draws.random())
        self.answer(replace(answer, action=action.id))

    def answer(self, event):
        """Give an answer, which may come again later."""
        self.take(event)
        self.late.append(event)

    def lose(self):
        """Ranks are gone: what they were doing is never answered in time, and due again."""
        void = [self.waiting.pop(what) for what in ("train", "label") if what in self.waiting]
        self.late += [replace(candidate() if isinstance(a, Train) else labels(), action=a.id) for a in void]
        again = self.take(changed(self.campaign.generation + 1))
        mine = [a for a in void if isinstance(a, Train) and a.scan == self.campaign.scan]
        if mine and not self.told_over and not self.campaign.models.going_back:
            assert len(of_kind(again, Train)) == 1, "one round for those that were void"

    def nonsense(self):
        """An answer that came before, or comes too late: it calls for nothing and changes nothing."""
        before = copy.deepcopy(self.campaign)
        event = self.draws.choice(self.late)
        assert self.take(event) == []
        before.raised.append(AnswerIgnored(time=0.0, kind=type(event).__name__, action=event.action))
        assert (self.campaign, self.campaign.models) == (before, before.models)

    def weigh(self):
        action = self.waiting.pop("weigh")
        residual = self.draws.choice([0.1, math.nan])
        if not isinstance(action, Publish):
            self.answer(replace(refused(), action=action.id))
        elif self.draws.random() < self.trouble:
            self.answer(VersionRefused(time=0.0, action=action.id, version=action.version, reason="far off"))
        else:
            self.answer(replace(published(action.version, residual=residual), action=action.id))

    def back(self):
        action = self.waiting.pop("back")
        kind, more = (RolledBack, {"validation_residual": 0.1}) if self.draws.random() < 0.5 else (RollBackRefused, {})
        self.answer(kind(time=0.0, action=action.id, version=action.version, reason="because", **more))

    def command(self):
        name = self.commands.popleft()
        self.paused = {"pause": True, "resume": False}.get(name, self.paused)
        self.told_over |= name == "stop"
        self.take(command(name))


def sorted_rows(positions):
    return sorted(tuple(map(float, p)) for p in positions)


WORLDS = {
    "quiet": {},
    "trouble": {"trouble": 0.3},
    "parts that stop": {"parts": (("a", 10**6), ("b", 10**6), ("c", 10**6)), "trouble": 0.1},
    "parts that run out": {"parts": (("a", 90), ("b", 35), ("c", 90)), "candidates": 100, "trouble": 0.1},
    "as many frames as candidates": {"parts": (("a", 60), ("b", 60), ("c", 55), ("d", 65)), "trouble": 0.05},
    "scans too short to label": {"parts": (("a", 40), ("b", 3), ("c", 12)), "trouble": 0.1},
    "few candidates": {"parts": (("a", 10**6), ("b", 10**6), ("c", 10**6)), "candidates": 3},
    "nothing works": {"parts": (("a", 10**6), ("b", 10**6)), "trouble": 0.95},
    "a person": {"parts": (("a", 10**6), ("b", 10**6)), "commands": ("pause", "pause", "resume") * 2, "trouble": 0.1},
    "a person stops it": {"parts": (("a", 90), ("b", 90)), "commands": ("pause", "resume", "stop", "stop", "pause")},
}


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", WORLDS)
def test_whatever_happens_it_ends_once_and_replays(kind, seed):
    world = World(seed, **WORLDS[kind]).run()
    assert world.given["Finish"] == 1
    assert isinstance(world.actions[-1], Finish)
    # New frames are what labels are made for, the end, and another group: none are made again for nothing.
    reasons = sum(isinstance(event, ChunkArrived | GroupChanged) for event in world.log)
    assert world.given["Label"] <= reasons + SETTINGS.labels_after_end
    assert {scan for scan, _ in never_labelled(world.campaign)} == set(world.campaign.scans) - world.labelled
    again, actions = replay([{"event": "Started"}, *map(as_logged, world.log)], SETTINGS)
    assert actions == world.actions
    assert (again, again.models) == (world.campaign, world.campaign.models)
    for event in (ended(), changed(), chunk(), command("stop"), labels(), candidate(), decision()):
        assert feed(world.campaign, event) == []


@pytest.mark.parametrize("candidates", [3, 10, 60, 65])
@pytest.mark.parametrize("seed", range(5))
def test_policy_and_campaign_agree_on_what_follows_a_stop(seed, candidates):
    """Each scan of a row is walked once, whole, however late predictions come."""
    world = World(seed, parts=tuple((name, 10**6) for name in "abcd"), candidates=candidates).run()
    everything = sorted_rows(world.places)
    assert [sorted_rows(found) for found in world.measured.values()] == [everything] * 4
    assert world.campaign.scans == list("abcd")


@pytest.mark.parametrize("candidates", [100, 104, 130])
@pytest.mark.parametrize("seed", range(5))
def test_a_stop_ends_no_other_scan_than_the_one_it_was_made_for(seed, candidates):
    """The source goes on to the next scan by itself. A policy that has not seen its first frame yet suggests the last
    candidates of the scan before, with a stop: no scan loses a frame by it."""
    world = World(seed, parts=tuple((name, 100) for name in "abc"), candidates=candidates).run()
    assert [len(found) for found in world.measured.values()] == [100] * 3


def test_decisions_name_the_scan_that_they_were_made_for():
    campaign = started(SETTINGS)
    feed(campaign, chunk(100))

    def made_for(**said):
        (steer,) = of_kind(feed(campaign, replace(decision(2), **said)), Steer)
        return steer.scan

    assert made_for() == 0  # the policy knows no frame yet
    feed(campaign, chunk(2, "b", 100))  # the source has gone on by itself
    assert made_for(scan="a", stop=True) == 0
    feed(campaign, chunk(2, "b", 102))
    assert made_for(scan="a") == 1  # what follows the policy's own stop
    feed(campaign, chunk(2, "b", 104))
    assert made_for(scan="c") == 2  # its first frame reached the policy before the campaign heard of it


# One thing at a time.


def test_it_asks_before_the_source_runs_dry_and_never_twice():
    campaign = started()
    assert of_kind(feed(campaign, chunk(90)), AskPolicy) == []  # 10 are still to come
    assert AskPolicy(10) in feed(campaign, chunk(1))
    assert of_kind(feed(campaign, chunk(9)), AskPolicy) == []  # not answered yet
    assert feed(campaign, decision(10)) == [Steer(decision(10), 0)]


def test_more_frames_than_asked_for_leave_none_outstanding():
    campaign = started()
    feed(campaign, chunk(150), FrameRefused(time=0.0, count=7, reason="out of reach"))
    assert campaign.outstanding == 0


@pytest.mark.parametrize("last", [chunk(5), FrameRefused(time=0.0, count=5, reason="out of reach")])
def test_after_a_stop_it_asks_again_only_when_nothing_is_outstanding(last):
    campaign = started()
    feed(campaign, chunk(95), decision(10, stop=True))
    assert of_kind(feed(campaign, chunk(10)), AskPolicy) == []
    assert AskPolicy(10) in feed(campaign, last)


def test_a_stop_without_positions_asks_for_the_next_scan():
    campaign = Campaign(settings=SETTINGS)
    feed(campaign, published(0))
    bare = decision(0, stop=True)
    assert feed(campaign, bare) == [Steer(bare, 0), AskPolicy(10)]


def test_pause_stops_asking_and_resume_asks_again():
    campaign = started()
    feed(campaign, command("pause"))
    assert of_kind(feed(campaign, chunk(100)), AskPolicy) == []
    assert feed(campaign, command("pause")) == []
    assert feed(campaign, command("resume")) == [AskPolicy(10)]
    assert feed(campaign, command("pause")) == []
    assert feed(campaign, decision(3)) == [Steer(decision(3), 0)]  # asked for before the pause
    assert feed(campaign, command("resume")) == [AskPolicy(10)]


def test_stop_ends_the_scan_and_waits_for_what_is_under_way_only():
    campaign = training()
    [steer] = feed(campaign, command("stop"))
    assert (steer.decision.stop, steer.decision.positions) == (True, ())
    assert feed(campaign, command("stop")) == []
    assert feed(campaign, chunk(50), ended()) == []
    assert feed(campaign, candidate()) == [Publish(1)]
    assert of_kind(feed(campaign, published(1)), Finish, Train, Label) == [Finish(campaign_end())]
    assert campaign.finished


def campaign_end():
    return "the source has ended and what it gave is learnt"


def test_a_policy_that_answers_after_the_end_steers_nothing():
    campaign = training()
    feed(campaign, chunk(80))
    assert campaign.actions.any(AskPolicy)
    feed(campaign, command("stop"))
    assert feed(campaign, decision(10)) == []
    assert campaign.outstanding == 0


def test_stop_during_the_rounds_after_the_end_ends_those_too():
    campaign = training()
    feed(campaign, ended(), labels(), candidate())
    assert feed(campaign, command("stop")) == []
    feed(campaign, labels(), published(1))
    assert campaign.finished


def test_an_unknown_command_is_refused_before_it_reaches_anything():
    with pytest.raises(ValueError, match="found command 'puase', expected one of pause, resume, stop"):
        command("puase")
    with pytest.raises(ValueError, match="expected one of"):
        decode({"event": "Command", "time": 0.0, "name": "explode", "version": None})


def test_labels_are_made_when_there_are_frames_enough_and_again_when_there_are_new_ones():
    campaign = started()
    assert feed(campaign, chunk()) == []
    assert feed(campaign, chunk()) == [Label("a")]
    assert feed(campaign, chunk()) == []  # under way
    feed(campaign, labels())
    assert of_kind(feed(campaign, chunk()), Label) == []
    assert of_kind(feed(campaign, chunk()), Label) == [Label("a")]  # 30 new ones


def test_labels_that_fail_are_made_again_with_new_frames_only():
    campaign = started()
    feed(campaign, chunk(), chunk())
    assert feed(campaign, labels(count=0)) == []
    assert feed(campaign, chunk()) == [Label("a")]


def test_labels_of_an_earlier_scan_start_no_training_on_it():
    campaign = started()
    feed(campaign, chunk(20), chunk(20, "b"))
    assert feed(campaign, labels("a")) == [Label("b")]
    assert feed(campaign, labels("b")) == [Train("b", 5)]
    assert of_kind(feed(campaign, labels("a")), Train, Label) == []
    assert feed(campaign, candidate(scan="b")) == [Publish(1)]
    assert feed(campaign, published(1)) == [Train("b", 5)]


def test_training_goes_on_while_labels_are_fresh_enough_to_learn_from():
    campaign = training()
    assert feed(campaign, candidate(0.5, 1.0)) == [Publish(1)]
    assert feed(campaign, published(1)) == [Train("a", 5)]
    assert feed(campaign, candidate(0.495, 0.5)) == [Refuse("error 0.495, the model in service has 0.5")]
    assert feed(campaign, refused()) == [Train("a", 5)]
    assert (campaign.version, campaign.expected) == (1, 0.1)


@pytest.mark.parametrize("unknown", [math.nan, None])
def test_without_held_out_frames_the_training_loss_decides(unknown):
    """Nothing to judge by is no reason to publish, and none to refuse for ever."""
    campaign = training()
    verdicts = []
    for loss in (1.0, 0.995, 0.8, 0.85, 0.79, unknown):
        [action] = feed(campaign, candidate(unknown, unknown, loss=loss))
        verdicts.append(type(action))
        feed(campaign, published(action.version, residual=unknown) if isinstance(action, Publish) else refused())
    assert verdicts == [Refuse, Refuse, Publish, Refuse, Publish, Refuse]
    assert campaign.expected is None


@pytest.mark.parametrize("loss", [math.inf, math.nan])
def test_a_candidate_that_diverged_is_refused(loss):
    campaign = training()
    assert isinstance(feed(campaign, candidate(math.nan, 0.5))[0], Refuse)
    feed(campaign, refused())
    for _ in range(3):
        assert isinstance(feed(campaign, candidate(math.nan, math.nan, loss=loss))[0], Refuse)
        feed(campaign, refused())
    assert isinstance(feed(campaign, candidate(0.3, 0.5))[0], Publish)


def test_another_group_voids_the_round_and_labels_are_due_at_once():
    campaign = training()
    assert feed(campaign, changed()) == [Label("a"), Train("a", 5)]
    assert feed(campaign, candidate()) == [Publish(1)]
    assert feed(campaign, changed(2)) == [Label("a")]  # the publication is under way and will be answered
    assert feed(campaign, published(1)) == [Train("a", 5)]
    assert campaign.handle(replace(candidate(), action=2)) == []
    assert campaign.raised == [AnswerIgnored(time=0.0, kind="CandidateReady", action=2)]


def test_what_fails_again_and_again_at_the_same_place_ends_the_run():
    lost = PredictorReplaced(time=0.0, frames=0, seconds=1.0)
    campaign = training()
    feed(campaign, lost, lost, lost, predicted(0.5), lost, lost, lost)
    assert campaign.hopeless is None
    feed(campaign, lost)
    assert "lost 4 times in a row at the same place" in campaign.hopeless
    campaign = training()
    for generation in range(1, 9):
        feed(campaign, changed(generation))  # ranks are lost: there is an end to that
    for generation in range(9, 13):
        assert campaign.hopeless is None
        feed(campaign, replace(changed(generation), lost=()))
    assert "raise TrainerSettings.deadline" in campaign.hopeless


@pytest.mark.parametrize("over", [False, True])
def test_ranks_without_samples_get_labels_before_the_next_round(over):
    campaign = training()
    if over:
        assert feed(campaign, ended(), labels(), candidate(), published(1)) == [Train("a", 5)]
    skipped = TrainingSkipped(time=0.0, scan="a", reason="rank 1 has none")
    assert feed(campaign, skipped) == [Label("a")]
    assert feed(campaign, labels()) == [Train("a", 5)]
    assert feed(campaign, skipped) == [Label("a")]
    last = feed(campaign, labels(count=0))
    assert of_kind(last, Train) == []
    assert campaign.finished == over


def test_another_group_where_nothing_is_learnt_changes_nothing():
    campaign = started()
    assert feed(campaign, changed()) == []
    assert feed(campaign, candidate()) == []  # of a round that was never asked for
    assert feed(campaign, chunk(), chunk()) == [Label("a")]


def test_a_version_installed_from_elsewhere_does_not_end_the_round():
    campaign = training()
    assert feed(campaign, published(1)) == []
    assert feed(campaign, candidate()) == [Publish(2)]


@pytest.mark.parametrize("again", [0, 1, 2])
@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_after_the_end_it_labels_and_learns_so_often(rounds, again):
    after = {"rounds_after_end": rounds, "labels_after_end": again}
    campaign = started(CampaignSettings(lookahead=10, frames_to_label=20, label_every=30, **after))
    feed(campaign, chunk(20), labels(), candidate(1.0, 1.0))
    given = [*feed(campaign, ended()), *feed(campaign, refused())]
    answers = {Label: labels(), Train: candidate(1.0, 1.0), Refuse: refused()}
    for action in given:  # grows as it goes
        if not isinstance(action, Finish):
            given += feed(campaign, answers[type(action)])
    kinds = Counter(map(type, given))
    assert (kinds[Train], kinds[Label], kinds[Finish]) == (rounds, again, 1)


@pytest.mark.parametrize("over", [False, True])
@pytest.mark.parametrize(("rounds", "stopped", "again"), [(0, False, 0), (2, False, 3), (2, True, 0)])
def test_rounds_that_were_lost_with_all_processes_follow_the_last_frame(rounds, stopped, again, over):
    """Lost twice, three and one: of before the end the most that were lost at once, of after it all; none where none
    was to follow, or a person has stopped the run."""
    campaign = started(CampaignSettings(lookahead=10, frames_to_label=20, rounds_after_end=rounds, labels_after_end=0))
    assert of_kind(feed(campaign, chunk(20), labels(), candidate(1.0, 1.0), refused()), Train)
    feed(campaign, *[ended()] * over, *[command("stop")] * stopped)
    feed(campaign, changed(1, rounds_lost=3), changed(2, rounds_lost=1), ended())
    answers, learnt = {Label: labels(), Train: candidate(1.0, 1.0), Refuse: refused()}, 0
    while not campaign.finished:
        action = next(action for action in campaign.actions.open if type(action) in answers)
        learnt += isinstance(action, Train)
        feed(campaign, answers[type(action)])
    of_before = not (over or stopped)  # the round that was under way at the end
    assert learnt == (0 if stopped or not rounds else rounds + again + over) + of_before


@pytest.mark.parametrize("frames", [0, 5])
def test_a_scan_too_short_to_label_ends_at_once(frames):
    campaign = started()
    feed(campaign, *([chunk(frames)] if frames else []))
    assert feed(campaign, ended()) == [Finish(campaign_end())]


def never_labelled(campaign):
    return [(each.scan, each.frames) for each in campaign.raised if isinstance(each, ScanNotLabelled)]


def test_scans_too_short_to_label_are_named_as_each_is_over():
    campaign = started()
    feed(campaign, chunk(10, "a"), chunk(9, "a"))
    assert never_labelled(campaign) == []
    feed(campaign, chunk(5, "b"))
    assert never_labelled(campaign) == [("a", 19)]
    assert campaign.raised[-1].reason.startswith("found 19 frames when it was over, expected 20 before labels are made")
    assert "CampaignSettings.frames_to_label" in campaign.raised[-1].reason
    feed(campaign, chunk(20, "c"), labels("c"), ended())
    assert never_labelled(campaign) == [("a", 19), ("b", 5)]
    assert set(campaign.unlabelled.figures) == {"a", "b"}


def test_the_last_scan_is_named_at_the_end_of_the_run():
    campaign = started()
    feed(campaign, chunk(5), ended())
    assert campaign.finished
    assert never_labelled(campaign) == [("a", 5)]


@pytest.mark.parametrize("count", [0, 20])
def test_of_a_scan_that_is_over_while_it_is_labelled_that_is_waited_for(count):
    campaign = started()
    feed(campaign, chunk(20, "a"), chunk(5, "b"))
    assert never_labelled(campaign) == []
    feed(campaign, labels("a", count), chunk(20, "c"))
    assert never_labelled(campaign) == [("a", 20)] * (not count) + [("b", 5)]


def test_a_scan_whose_labels_all_fail_ends_too():
    campaign = started()
    feed(campaign, chunk(20), labels(count=0))
    assert feed(campaign, ended()) == [Label("a")]
    assert feed(campaign, labels(count=0)) == [Finish(campaign_end())]
    assert never_labelled(campaign) == [("a", 20)]


def test_a_short_last_scan_does_not_hide_the_round_of_the_one_before():
    campaign = training()
    assert feed(campaign, chunk(5, "b"), ended()) == []
    assert feed(campaign, candidate()) == [Publish(1)]
    assert feed(campaign, published(1)) == [Finish(campaign_end())]


# Trust.


@pytest.mark.parametrize("version", [1, 2])
def test_before_a_young_version_the_older_one_is_tried_whichever_frames_have_raised_drift(version):
    campaign = training()
    feed(campaign, candidate(), published(1), candidate(), published(2))
    actions = feed(campaign, predicted(0.0, version=version, frames=12))
    assert campaign.drift
    assert [(action.version, action.if_better) for action in of_kind(actions, RollBack)] == [(1, True)]


def test_drift_is_raised_and_lowered_and_both_are_events_with_their_versions():
    campaign = training()
    feed(campaign, candidate(), published(1, residual=0.1))
    assert feed(campaign, predicted(0.5, frames=30)) == []
    feed(campaign, predicted(0.0, frames=12))
    [raised] = campaign.raised
    assert campaign.drift
    assert isinstance(raised, DriftRaised)
    assert (raised.version, raised.expected, raised.residual) == (1, 0.1, 0.2)
    campaign.raised.clear()
    feed(campaign, predicted(0.5, version=2, frames=20))
    [lowered] = campaign.raised
    assert not campaign.drift
    assert isinstance(lowered, DriftLowered)
    assert (lowered.version, lowered.since) == (2, 1)


def test_drift_starts_label_making_at_once_and_once():
    campaign = training()
    assert of_kind(feed(campaign, chunk(15)), Label) == []  # 30 are due by themselves
    assert feed(campaign, predicted(0.0, frames=16)) == [Label("a")]
    assert feed(campaign, predicted(0.0, frames=16)) == []
    feed(campaign, labels())
    assert of_kind(feed(campaign, chunk(5), predicted(0.0, frames=16)), Label) == []


def test_drift_that_comes_while_labels_are_made_has_new_ones_made_after_them():
    campaign = started()
    assert feed(campaign, chunk(20)) == [Label("a")]
    assert feed(campaign, predicted(0.0, frames=16)) == []
    assert of_kind(feed(campaign, chunk(5)), Label) == []
    assert Label("a") in feed(campaign, labels())


def test_drift_in_too_few_frames_waits_for_frames_to_label():
    campaign = started()
    assert feed(campaign, chunk(10), predicted(0.0, frames=16)) == []
    assert feed(campaign, chunk(10)) == [Label("a")]


def test_frames_that_are_no_evidence_raise_nothing_and_are_counted():
    campaign = training()
    assert feed(campaign, predicted(None, frames=50, why_not=("saturated",) * 50)) == []
    assert not campaign.raised
    assert campaign.unjudged == {"saturated": 50}


# The log.


EVENTS = [
    chunk(3),
    predicted(0.25, frames=2, why_not=("", "saturated")),
    decision(2),
    DecisionSuggested(time=1.5, positions=((0.1, 1e-9),), reasons=("a",), dwell=(0.25,), stop=True),
    labels(),
    candidate(None, None),
    published(3, residual=None),
    refused(),
    FrameRefused(time=0.0, count=2, reason="out of reach"),
    DriftRaised(
        time=0.0, scan="a", version=1, by="offset", trust=0.1, lowest=0.2, worse=3, most=8, residual=0.3, expected=None
    ),
    DriftLowered(time=0.0, scan="a", version=2, since=1, trust=0.5, residual=0.1, expected=0.1),
    ScanNotLabelled(time=0.0, scan="a", frames=5, reason="too few"),
    changed(),
    PredictorReplaced(time=0.0, frames=40, seconds=6.5),
    ended(),
    command("pause"),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_an_event_comes_back_from_its_line(event):
    back = decode(as_logged(event))
    assert back == event
    assert type(back) is type(event)
    hash(back)  # tuples all the way, as in the event that was written


def test_a_line_that_is_not_the_campaigns_is_passed_over_and_a_cut_one_named():
    assert decode({"event": "Started", "time": 0.0}) is None
    assert decode({}) is None
    with pytest.raises(ValueError, match=r"ChunkArrived without \['frame_ids'\]"):
        decode({"event": "ChunkArrived", "time": 0.0, "scan": "a"})


def test_drift_in_a_log_is_judged_again_not_fed_again():
    events = [published(0), decision(100), chunk(20), labels(), candidate(), published(1), predicted(0.0, frames=9)]
    live = Campaign(settings=SETTINGS)
    for number, event in enumerate(events):
        events[number] = addressed(live, event)
        live.handle(events[number])
    campaign, actions = replay(map(as_logged, [live.began, *events]))
    assert campaign.settings == SETTINGS
    [raised] = campaign.raised
    again, the_same = replay(map(as_logged, [*events, raised]), SETTINGS)
    assert again.raised == [raised]
    assert actions == the_same


@pytest.mark.parametrize(
    "wrong",
    [
        {"lookahead": 0},
        {"frames_to_label": 0},
        {"label_every": 0},
        {"steps": 0},
        {"drift_window": 0},
        {"rounds_after_end": -1},
        {"labels_after_end": -1},
        {"gain": 1.0},
        {"gain": -0.1},
        {"drift_false_alarm": 0.0},
        {"drift_false_alarm": 0.5},
    ],
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match="found CampaignSettings"):
        CampaignSettings(**wrong)
