"""The law of recovery: at every event, state and later events make the campaign that was never interrupted."""

import json

import pytest
from hypothesis import given, settings, strategies as st

from steering.campaign import Campaign, Limits, SourceEnded, replay
from steering.campaign.state import campaign_from, state_of
from steering.records.plain import plain, whole
from tests.test_campaign import SETTINGS, WORLDS, World, as_logged
from tests.test_transitions import Model


def saved(campaign):
    """Through a file."""
    return json.loads(json.dumps(state_of(campaign), allow_nan=False))


def same(one, other):
    return (one, one.models, state_of(one)) == (other, other.models, state_of(other))


class Crashing:
    """Everything is lost before every event, and recovered: from the newest state, or an older one and the log."""

    def crash(self, before):
        self.states = [*getattr(self, "states", [])[-1:], (len(self.log), saved(self.campaign))]
        number, state = self.states[0]
        recovered, again = campaign_from(state), []
        for event in self.log[number:]:
            again += recovered.handle(event)
            recovered.raised.clear()
        assert again == self.actions[len(self.actions) - len(again) :]
        before.raised.clear()
        assert same(recovered, before)
        assert recovered.gate.actions is recovered.models.actions is recovered.actions
        assert recovered.gate.raised is recovered.raised
        return recovered


class CrashingWorld(Crashing, World):
    def take(self, event):
        if self.log:
            self.campaign = self.crash(self.campaign)
        return super().take(event)

    def nonsense(self):
        """Checked without crashes."""


class CrashingModel(Crashing, Model):
    def take(self, event):
        if self.log:
            self.campaign = self.crash(self.campaign)
        return super().take(event)

    def again(self):
        """Checked without crashes."""


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", WORLDS)
def test_a_campaign_that_is_lost_before_every_event_ends_as_others_do(kind, seed):
    world = CrashingWorld(seed, **WORLDS[kind]).run()
    again, actions = replay(map(as_logged, world.log), SETTINGS)
    assert actions == world.actions
    again.raised.clear()
    world.campaign.raised.clear()
    assert (again, again.models) == (world.campaign, world.campaign.models)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 10_000), min_size=60, max_size=200))
def test_versions_under_way_and_decisions_that_wait_survive_a_crash_at_every_event(choices):
    model = CrashingModel(choices).run()
    assert model.campaign.finished
    assert set(model.campaign.served) | {0} == set(model.store)


def test_a_state_of_another_format_and_a_damaged_one_are_refused():
    state = saved(Campaign(SETTINGS))
    with pytest.raises(ValueError, match="found a campaign's state of format 'steering-campaign 9', expected"):
        campaign_from({**state, "format": "steering-campaign 9"})
    del state["state"]["gate"]["paused"]
    with pytest.raises(ValueError, match="without 'paused'"):
        campaign_from(state)


def test_only_named_records_are_made_of_what_stands_in_a_file():
    assert whole(plain(Limits(frames=3)), [Limits]) == Limits(frames=3)
    for strange in (plain(SourceEnded(time=0.0)), {"~": "class", "v": "Popen"}, {"~": "array", "v": ["|O", [1], ""]}):
        with pytest.raises(ValueError, match="expected what steering writes"):
            whole(strange, [Limits])
