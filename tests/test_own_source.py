"""A source of one's own in a real campaign: that of the documentation's page comes to its end, and one that fails in
what its contract leaves optional ends the run with its words."""

import sys

import numpy as np
import pytest
from distributed import Client

from steering import (
    ER,
    CampaignSettings,
    Decision,
    Experiment,
    Geometry,
    ProbeFirst,
    Raster,
    RunFolder,
    Source,
    local,
    make_chunk,
    run,
    start,
    zone_plate,
)
from steering.policies import Policy
from steering.records.optional_parts import offers
from tests.test_docs import blocks

FRAMES, WINDOW = 40, 32
GRID = 3.0 * np.stack(np.mgrid[:8, :8], axis=-1).reshape(-1, 2)


def measure(y, x):
    """A frame of an even object."""
    return np.random.default_rng(int(100 * y + x)).poisson(9, (WINDOW, WINDOW))


def of_the_page():
    """The class that docs/how-to/source.md shows."""
    [text] = [block.text for block in blocks("how-to/source") if block.title == "my_source.py"]
    names = {"__name__": "__main__"}  # pickled by value, as a workflow's own
    exec(text, names)
    return names["Measuring"]


def measuring(kind):
    return kind(measure, Geometry(shape=(WINDOW, WINDOW)), zone_plate(WINDOW, 20.0), GRID, FRAMES)


def carried_out(source, folder, client):
    experiment = Experiment(
        source=source,
        policy=Raster(source.candidates),
        network=ProbeFirst(window=WINDOW, patch=16, width=4),
        strategy=ER(),
        campaign=CampaignSettings(steps=2, label_every=20, rounds_after_end=0),
        device="cpu",
    )
    return run(experiment, client, folder)


def test_the_source_of_the_page_reaches_the_end_of_its_campaign_and_a_fault_in_it_ends_the_run(tmp_path):
    page = of_the_page()

    class Miscounts(page):
        @property
        def frames_dropped(self):
            raise ValueError("found no counter, expected one")

    class Leaves(page):
        def chunks(self):
            yield next(super().chunks())
            sys.exit("the detector is off")

    class LooksAway(page):
        @property
        def streams(self):
            raise ValueError("found no stream, expected one")

    with local(ranks=1) as client:
        figures = carried_out(measuring(page), str(tmp_path / "run"), client)
        assert RunFolder(tmp_path / "run").summary()["status"] == "finished"
        assert figures["frames_predicted"] == figures["frames_acquired"] == FRAMES
        assert figures["frames_dropped"] == 0
        for kind, words in ((Miscounts, "no counter"), (Leaves, "the detector is off"), (LooksAway, "no stream")):
            with pytest.raises((ValueError, RuntimeError), match=words):
                carried_out(measuring(kind), tmp_path / kind.__name__, client)


def test_a_run_makes_its_folder_at_a_path_and_none_where_the_cluster_cannot_take_it(tmp_path):
    """The runs of this module's first test are given paths too."""
    given = RunFolder.create(tmp_path / "given")
    assert RunFolder.of(given) is given
    assert RunFolder.of(str(tmp_path / "new")).summary()["status"] == "running"
    with pytest.raises(FileExistsError, match="found a folder with files in it, expected a new or empty one"):
        RunFolder.of(tmp_path / "new")
    with Client(n_workers=0, dashboard_address=None, processes=False) as client:
        for begin in (run, start):
            with pytest.raises(RuntimeError, match="found no worker with the resource"):
                begin(None, client, str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


class Bare(Source):
    """Has what must be there, and inherits the rest."""

    def chunks(self):
        yield make_chunk(np.ones((1, 8, 8), np.uint16), [0], np.zeros((1, 2)), Geometry(shape=(8, 8)), scan="scan")

    def apply(self, decision):
        return None

    def close(self):
        pass


class Choosing(Policy):
    def ingest(self, prediction, live):
        pass

    def suggest(self, n):
        return Decision(positions=np.zeros((n, 2)), reasons=("why",) * n)


def test_a_class_that_inherits_a_contract_does_not_offer_what_that_leaves_optional():
    """Else a run would open a source again that begins from the start, and save a policy's state that is none."""
    bare, choosing = Bare(), Choosing()
    assert (bare.frames_dropped, bare.scans, bare.frames, bare.truth("scan"), bare.streams) == (0, (), None, None, {})
    assert not any(offers(bare, name) for name in ("position", "resume", "again", "after"))
    assert not any(offers(choosing, name) for name in ("declined", "state", "restore", "ended"))
    Bare.position = lambda self: {"frame": 3}
    try:
        assert offers(bare, "position")
    finally:
        del Bare.position
    assert not offers(object(), "position")


@pytest.mark.parametrize(("contract", "lacks"), [(Source, "apply"), (Policy, "suggest")])
def test_a_class_that_lacks_what_must_be_there_is_refused_when_it_is_made(contract, lacks):
    whole = {Source: Bare, Policy: Choosing}[contract]
    names = {name: thing for name, thing in vars(whole).items() if callable(thing) and name != lacks}
    with pytest.raises(TypeError, match=lacks):
        type("Lacking", (contract,), names)()
