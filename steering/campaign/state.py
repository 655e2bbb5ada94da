"""The state of a campaign as plain JSON: with it and the events after it a campaign goes on as if never interrupted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from steering.campaign import actions
from steering.campaign.actions import Action, Declined
from steering.campaign.drift import Window
from steering.campaign.events import EVENTS
from steering.campaign.limits import Limits
from steering.campaign.machine import Campaign
from steering.campaign.settings import CampaignSettings
from steering.campaign.unlabelled import Unlabelled
from steering.campaign.unmeasured import Unmeasured
from steering.records import Field
from steering.records.plain import plain, whole

FORMAT = "steering-campaign 3"
_ACTIONS = (kind for kind in vars(actions).values() if isinstance(kind, type) and issubclass(kind, Action))
_RECORDS = (*_ACTIONS, *EVENTS, Declined, Field, Limits, Unlabelled, Unmeasured, Window)
_NOT_STATE = {
    "campaign": {"settings", "frame_time", "raised", "actions", "_trust"},
    "actions": set(),
    "gate": {"guard", "actions", "scans", "lookahead", "approval_s", "unanswered", "raised"},
    "guard": {"limits", "frame_time"},
    "models": {"actions", "gain"},
    "trust": {"frames", "false_alarm"},
}
"""Of each part, the fields that are settings or other parts: all others are its state."""


def state_of(campaign: Campaign) -> dict[str, Any]:
    """The state in JSON's own types, the settings beside it. Nothing waits in `raised`: the runner has logged it."""
    state = {
        name: {each: plain(getattr(part, each)) for each in _names(name, part)}
        for name, part in _parts(campaign).items()
    }
    return {"format": FORMAT, "began": plain(campaign.began), "state": state}


def campaign_from(data: Mapping[str, Any]) -> Campaign:
    """The campaign whose state this is. Raises ValueError for another format, and where something lacks."""
    if data.get("format") != FORMAT:
        raise ValueError(
            f"found a campaign's state of format {data.get('format')!r}, expected {FORMAT!r}: recover the run with the "
            "version of steering that wrote it"
        )
    try:
        began = whole(data["began"], _RECORDS)
        campaign = Campaign(CampaignSettings.read(began.settings), began.frame_time)
        for name, part in _parts(campaign).items():
            for each in _names(name, part):
                setattr(part, each, whole(data["state"][name][each], _RECORDS))
        campaign.gate.scans = campaign.scans  # one list
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"found a campaign's state without {error}, expected it whole") from error
    return campaign


def _parts(campaign: Campaign) -> dict[str, Any]:
    return {
        "campaign": campaign,
        "actions": campaign.actions,
        "gate": campaign.gate,
        "guard": campaign.gate.guard,
        "models": campaign.models,
        "trust": campaign._trust,
    }


def _names(name: str, part: Any) -> list[str]:
    return [each.name for each in fields(part) if each.name not in _NOT_STATE[name]]
