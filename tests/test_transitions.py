"""Laws of the version in service: whatever is lost, vetoed, refused or answered twice, and in whatever order.

A small model of ranks, store and predictor carries the campaign's actions out, a step at a time, in an order that
hypothesis chooses. It keeps what the real ones keep: weights and where they come from.
"""

from collections import Counter

from hypothesis import given, settings, strategies as st

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
    Finish,
    GroupChanged,
    Label,
    LabelsReady,
    ModelPublished,
    PredictionReady,
    PredictorReplaced,
    Publish,
    Refuse,
    Remind,
    RollBack,
    RollBackRefused,
    RolledBack,
    SourceEnded,
    Steer,
    TakeBack,
    Tick,
    Train,
    TrainingSkipped,
    VersionRefused,
    encode,
    fingerprint,
    replay,
)

SETTINGS = CampaignSettings(lookahead=4, frames_to_label=4, label_every=8, steps=5, approval_s=9.0)


class Model:
    """Ranks, store, predictor, policy and a person around a campaign. Weights are numbers, each made once."""

    def __init__(self, choices):
        self.choices = list(choices)
        self.campaign = Campaign(SETTINGS)
        self.parent = {0: None}
        self.error = {0: 1.0}
        self.ranks = [0, 0, 0]
        self.store = {0: (0, None)}
        self.serving = 0
        self.under_way = []  # of each action that is carried out, what is left of it to do
        self.round_of = None  # the action by which the ranks train now
        self.candidates = {}
        self.answers, self.log, self.actions = [], [], []
        self.given, self.frames = Counter(), 0
        self.ended, self.due_after_end, self.made_up_for = False, SETTINGS.rounds_after_end, 0
        self.take(ModelPublished(time=0.0, version=0, validation_error=None, validation_residual=None))

    def choose(self, options):
        return options[(self.choices.pop() if self.choices else 0) % len(options)]

    def take(self, event):
        self.log.append(event)
        actions = self.campaign.handle(event)
        self.actions += actions
        for action in actions:
            self.given[type(action)] += 1
            carried_out = {
                Train: self.train,
                Publish: self.publish,
                TakeBack: self.take_back,
                RollBack: self.roll_back,
                Refuse: self.refuse,
                Label: self.label,
                AskPolicy: self.ask,
                Remind: self.remind,
                Steer: self.measure,
            }.get(type(action))
            if carried_out is not None:
                self.under_way.append((action, carried_out(action)))
            for kinds in ((Train,), (Label,), (AskPolicy,), (Publish, TakeBack, RollBack)):
                open_now = [a for a in self.campaign.actions.open if isinstance(a, kinds)]
                assert len(open_now) <= 1, "asked for twice"
        self.check()
        return actions

    def check(self):
        for weights, figures in self.store.values():
            assert figures in (None, self.error[weights]), "figures of other weights"
        if not self.campaign.models.under_way:
            assert self.serving == self.campaign.version
            for weights in self.ranks:
                assert self.store[self.serving][0] in self.line(weights), "not trained from the version in service"

    def line(self, weights):
        found = []
        while weights is not None:
            found.append(weights)
            weights = self.parent[weights]
        return found

    def answer(self, action, kind, **fields):
        event = kind(time=0.0, action=action.id, generation=self.campaign.generation, **fields)
        self.answers.append(event)
        self.take(event)

    # What each action does, a step at a time: a loss, a person's word or a late answer may come at every `yield`.

    def train(self, action):
        while self.round_of is not None:
            yield
        if action.generation != self.campaign.generation:
            return
        self.round_of = action.id
        yield
        if self.choose([False, False, True]):  # the samples of some rank went with a lost one
            self.round_of = None
            self.due_after_end += self.ended
            self.answer(action, TrainingSkipped, scan=action.scan, reason="nothing to learn from")
            return
        new = len(self.parent)
        self.parent[new], self.error[new] = self.ranks[0], self.choose([0.3, 0.9, 0.1, 0.5]) * self.error[self.ranks[0]]
        self.ranks = [new] * len(self.ranks)
        yield
        self.round_of = None
        self.candidates[action.id] = self.error[new]
        served = self.error[self.store[self.campaign.version][0]]
        self.answer(
            action,
            CandidateReady,
            scan=action.scan,
            steps=5,
            error=self.error[new],
            served_error=served,
            residual=0.1,
            loss=1.0,
        )

    def publish(self, action):
        yield
        self.store[action.version] = (self.ranks[0], self.candidates[action.candidate])
        yield
        if self.choose([False, False, True]):
            self.answer(action, VersionRefused, version=action.version, reason="far off")
            return
        self.serving = action.version
        yield
        self.answer(action, ModelPublished, version=action.version, validation_error=0.1, validation_residual=0.1)

    def take_back(self, action):
        yield
        self.store.pop(action.version, None)
        assert action.serving == self.serving
        yield
        self.answer(action, CandidateRefused, reason=action.reason)

    def roll_back(self, action):
        yield
        if action.if_better and self.choose([False, True]):
            self.answer(action, RollBackRefused, version=action.version, reason="no better")
            return
        self.serving = action.version
        while self.round_of is not None:
            yield
        for rank in range(2 * len(self.ranks)):  # a loss in between may bring the others' weights back: once more
            self.ranks[rank % len(self.ranks)] = self.store[action.version][0]
            if rank == 1:
                yield
        self.ranks = [self.store[action.version][0]] * len(self.ranks)
        self.answer(action, RolledBack, version=action.version, validation_residual=0.1, reason="because")

    def refuse(self, action):
        yield
        self.answer(action, CandidateRefused, reason=action.reason)

    def label(self, action):
        yield
        if action.generation == self.campaign.generation:
            self.answer(action, LabelsReady, scan=action.scan, count=4, residual=0.1, seconds=1.0)

    def ask(self, action):
        yield
        stop = self.choose([False, False, True])
        where = tuple((float(k), 0.0) for k in range(self.choose([4, 2, 0 if stop else 1])))
        self.answer(action, DecisionSuggested, positions=where, reasons=("why",) * max(1, len(where)), stop=stop)

    def remind(self, action):
        yield
        self.answer(action, Tick)

    def measure(self, action):
        for _ in action.decision.positions:
            yield
            self.frames += 1
            self.take(ChunkArrived(time=0.0, scan="a", frame_ids=(self.frames,)))

    # What happens by itself.

    def lose(self):
        """A rank is gone; the others go on from what one of them holds."""
        if len(self.ranks) < 2:
            return
        del self.ranks[self.choose(range(len(self.ranks)))]
        self.ranks = [self.choose(self.ranks)] * len(self.ranks)
        self.change(lost=(1,))

    def join(self):
        """A rank more."""
        if self.round_of is None and len(self.ranks) < 5:
            self.ranks.append(self.ranks[0])
            self.change(joined=(len(self.ranks) - 1,))

    def interrupt(self):
        """A round failed though nobody is lost: the ranks form a group anew, from what one of them holds."""
        self.ranks = [self.choose(self.ranks)] * len(self.ranks)
        self.change()

    def recover(self):
        """All are gone, and others go on from what was in service; a few rounds are to be done again."""
        if self.made_up_for < 4 and not self.campaign.models.under_way:
            self.ranks = [self.store[self.serving][0]] * len(self.ranks)
            self.made_up_for += 2
            self.due_after_end += 2
            self.change(joined=tuple(range(len(self.ranks))), rounds_lost=2)

    def change(self, lost=(), joined=(), rounds_lost=0):
        void = self.campaign.actions.any(Train)
        self.due_after_end += void and self.ended
        self.round_of = None
        self.under_way = [(a, steps) for a, steps in self.under_way if not isinstance(a, Train | Label)]
        generation = self.campaign.generation + 1
        ranks = len(self.ranks)
        group = {"ranks": ranks, "generation": generation, "rounds_lost": rounds_lost}
        actions = self.take(GroupChanged(time=0.0, lost=lost, joined=joined, **group))
        given = [a.generation for a in actions if isinstance(a, Train)]
        assert len(given) <= (void or rounds_lost > 0), "a round more than were void, or lost"
        assert given == [generation] * (void and not self.campaign.models.going_back) or self.ended

    def person(self):
        name = self.choose(["rollback", "veto", "approve", "pause", "resume", "rollback"])
        version = self.choose([None, *self.campaign.served]) if name == "rollback" else None
        self.take(Command(time=0.0, name=name, version=version))

    def doubt(self):
        """Trust falls in what the version in service says."""
        self.take(
            PredictionReady(
                time=0.0,
                scan="a",
                frame_ids=tuple(range(16)),
                version=self.campaign.version,
                residual=0.3,
                trust_by_residual=(self.choose([1 / 40, 0.5]),) * 16,
                trust_by_offset=(None,) * 16,
                validation_frames=39,
                why_not=("",) * 16,
            )
        )

    def replace(self):
        """The predictor is lost, and another one has what it had in service."""
        assert not any(
            isinstance(a, Train | Label) for a in self.take(PredictorReplaced(time=0.0, frames=3, seconds=1.0))
        )

    def again(self):
        """An answer comes a second time, or belongs to nothing."""
        event = self.choose([*self.answers, LabelsReady(time=0.0, scan="a", count=1, residual=0.1, seconds=1.0)])
        open_before = self.campaign.actions.open
        assert self.take(event) == []
        assert isinstance(self.campaign.raised[-1], AnswerIgnored)
        assert self.campaign.actions.open == open_before

    def step(self):
        action, steps = self.choose(self.under_way)
        if next(steps, self) is self and (action, steps) in self.under_way:
            self.under_way.remove((action, steps))

    def run(self):
        self.live_through(len(self.choices) // 3)
        if self.campaign.gate.paused:
            self.take(Command(time=0.0, name="resume"))
        rounds, self.ended = self.given[Train], True
        self.take(SourceEnded(time=0.0))
        self.live_through(0)
        while self.under_way:
            self.step()
        assert self.given[Train] - rounds <= self.due_after_end, "surplus rounds"
        return self

    def live_through(self, left):
        """What the choices say, until so many of them are left."""
        while len(self.choices) > left and not self.campaign.finished:
            options = [self.step] * 12 if self.under_way else []
            options += [
                self.lose,
                self.join,
                self.interrupt,
                self.recover,
                self.replace,
                self.person,
                self.doubt,
                self.again,
            ]
            self.choose(options)()


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 10_000), min_size=60, max_size=250))
def test_the_version_in_service_is_the_one_that_all_agree_on(choices):
    model = Model(choices).run()
    campaign = model.campaign
    assert campaign.finished
    assert isinstance(model.actions[-1], Finish)
    assert set(campaign.served) | {0} == set(model.store)
    assert max(Counter(e.action for e in model.answers).values(), default=1) == 1
    # The log alone leads to the same actions, whoever reads it and wherever.
    again, actions = replay([encode(campaign.began), *map(encode, model.log)])
    assert fingerprint(actions) == fingerprint(model.actions)
    assert again.models == campaign.models


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 10_000), max_size=120))
def test_a_return_wished_while_another_version_is_on_its_way_comes_after_it(choices):
    """It is neither lost nor undone: the version asked for is the last to go into service."""
    model = Model(choices)
    campaign = model.campaign
    while not (campaign.actions.any(Publish) and campaign.version) and not campaign.finished:
        if not model.under_way:
            model.take(SourceEnded(time=0.0))
        elif campaign.gate.proposed is not None:
            model.take(Command(time=0.0, name="approve"))
        else:
            model.step()
    if campaign.finished:
        return  # no second version was ever published
    served = len(campaign.served)
    model.take(Command(time=0.0, name="rollback", version=0))
    while campaign.models.under_way:
        model.step()
    assert campaign.version == model.serving == 0
    assert len(campaign.served) in (served + 1, served + 2)  # the other one, unless it was refused, and this
