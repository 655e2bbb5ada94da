"""What the campaign's tests share: answers find the action they answer, and actions are compared without numbers."""

from dataclasses import replace

from steering.campaign import ANSWERS, Answer, Steer


def addressed(campaign, event):
    """An answer as the runner gives it: with the id of the newest open action that it can answer."""
    if not isinstance(event, Answer) or event.action is not None:
        return event
    found = [action.id for action in campaign.actions.open if isinstance(action, ANSWERS[type(event)])]
    return replace(event, action=found[-1], generation=campaign.generation) if found else event


def handled(campaign, event):
    """What an event calls for, its actions without their numbers."""
    return plain(campaign.handle(addressed(campaign, event)))


def plain(actions):
    """Actions without their ids, generations, candidates, and what the policy is told beside the question."""
    bare = {"generation": 0, "candidate": 0, "declined": ()}
    found = []
    for action in actions:
        changes = {name: value for name, value in bare.items() if hasattr(action, name)}
        if isinstance(action, Steer):
            changes["decision"] = replace(action.decision, action=None, generation=0)
        found.append(replace(action, id=0, **changes))
    return found
