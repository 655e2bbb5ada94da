"""What became of every frame, decision, label and version of a run, each by its identity: ok, lost or unknown."""

from collections import Counter
from typing import Any

import numpy as np

from steering.campaign import replay
from steering.campaign.actions import AskPolicy, Label
from steering.models import ModelStore
from steering.runner import RunFolder


def account(folder: RunFolder) -> dict[str, Any]:
    """Counts of a run that has ended."""
    events = folder.events()
    return {
        **_frames(folder, events),
        **_decisions(folder, events),
        **_labels(events),
        **_versions(folder, events),
    }


def _frames(folder: RunFolder, events: list[dict[str, Any]]) -> dict[str, Any]:
    """A frame is ok where it was predicted, or set aside for a stated reason, and stands in its image once."""
    arrived = [i for e in events if e["event"] == "ChunkArrived" for i in e["frame_ids"]]
    aside = {i for e in events if e["event"] == "FrameSetAside" for i in e["frame_ids"]}
    predicted = {i for e in events if e["event"] == "PredictionReady" for i in e["frame_ids"]}
    lost = {i for e in events if e["event"] == "FramesLost" for i in e["frame_ids"]}
    pictured = Counter(int(i) for image in folder.objects().values() for i in image["frame"].values)
    every = set(arrived)
    ok = {i for i in every if (i in predicted and i in pictured) or i in aside}
    unknown = sorted(every - ok - lost)
    return {
        "frames": len(every),
        "frames_ok": len(ok),
        "frames_lost": len(lost) + len(unknown),
        "frames_unknown": len(unknown),
        "frames_unknown_ids": unknown[:50],
        "frames_twice": len(arrived) - len(every) + sum(count > 1 for count in pictured.values()),
    }


def _decisions(folder: RunFolder, events: list[dict[str, Any]]) -> dict[str, Any]:
    """A decided position is ok where a frame of its scan was measured there or it was refused; those of the last scan
    may still have been in hand when the run was stopped."""
    scans, by_scan = list(dict.fromkeys(e["scan"] for e in events if e["event"] == "ChunkArrived")), _by_scan(events)
    measured = {}
    for scan, image in folder.objects().items():
        pairs = np.stack([image["position_y"], image["position_x"]], 1)
        measured[scan] = Counter(map(tuple, np.round(pairs, 12).tolist()))
    refused = {tuple(p) for e in events if e["event"] == "FrameRefused" for p in np.round(e["positions"], 12).tolist()}
    decided = {
        n: [tuple(p) for p in np.round(np.reshape(positions, (-1, 2)), 12).tolist()] for n, positions in by_scan.items()
    }
    repeated = sum(len(one) - len(set(one)) for one in decided.values())
    twice = sum(count > 1 for one in measured.values() for count in one.values())
    ok = open_ = lost = 0
    for number, positions in decided.items():
        there = measured.get(scans[number], Counter()) if number < len(scans) else Counter()
        left = [p for p in positions if p not in there and p not in refused]
        ok += len(positions) - len(left)
        if number >= len(scans) - 1:
            open_ += len(left)
        else:
            lost += len(left)
    return {
        "decisions": ok + open_ + lost,
        "decisions_ok": ok,
        "decisions_open_at_end": open_,
        "decisions_unknown": lost,
        "decisions_repeated": repeated + twice,
    }


def _by_scan(events: list[dict[str, Any]]) -> dict[int, list[Any]]:
    """Positions decided on, by the number of the scan they were for: a decision that ends a scan is its last."""
    found: dict[int, list[Any]] = {0: []}
    for event in events:
        if event["event"] == "DecisionSuggested":
            found[max(found)] += event["positions"]
            if event["stop"]:
                found[max(found) + 1] = []
    return found


def _labels(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Every order to label is answered once, or void because the group of ranks has changed; frames of the answers."""
    campaign, actions = replay(events)
    ordered = {a.id for a in actions if isinstance(a, Label)}
    asked = {a.id for a in actions if isinstance(a, AskPolicy)}
    answers = Counter(
        e["action"] for e in events if e["event"] in ("LabelsReady", "DecisionSuggested") and e.get("action")
    )
    ignored = Counter(e["action"] for e in events if e["event"] == "AnswerIgnored" and e.get("action"))
    answered = {a for a in ordered if answers[a] > ignored[a]}
    open_ = {a.id for a in campaign.actions.open if isinstance(a, Label)}
    again = sum(max(0, answers[a] - ignored[a] - 1) for a in ordered | asked)
    changes = sum(e["event"] == "GroupChanged" for e in events)
    void = ordered - answered - open_
    return {
        "labels": len(ordered),
        "labels_ok": len(answered),
        "labels_void": len(void),
        "labels_unknown": max(0, len(void) - changes),
        "labels_open_at_end": len(open_),
        "answers_repeated": again,
        "labelled_frames": sum(e["count"] for e in events if e["event"] == "LabelsReady"),
    }


def _versions(folder: RunFolder, events: list[dict[str, Any]]) -> dict[str, Any]:
    """A published version is ok where the store has it and it can be read."""
    published = {e["version"] for e in events if e["event"] == "ModelPublished"}
    store = ModelStore(folder.models)
    stored = {version.number for version in store.versions()}
    for number in sorted(published & stored)[-5:]:
        store.weights(number)
    return {
        "versions": len(published),
        "versions_lost": len(published - stored),
        "versions_unknown": len(stored - published),
    }
