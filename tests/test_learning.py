"""Laws of the training ranks."""

import asyncio

import numpy as np
import pytest
import torch
from torch import nn

from steering.inference import HoldOut
from steering.learning import Labels, Rank, Reconstruction, TrainerSettings
from steering.learning.group import backend
from steering.learning.quality import outputs_of
from steering.learning.samples import Samples, owner_of
from steering.learning.strategies import ER, FromScratch, Incremental
from steering.models import ModelStore, Optics, ProbeFirst
from steering.ptychography import patch_weight, zone_plate
from steering.records import ModelVersion
from tests.ranks import on_ranks

PATCH = 16


def labels(scan="a", n=16, *, stratum=0, seed=0, first=0):
    """Labelled frames of 32 x 32 pixels; every fourth is held out."""
    rng = np.random.default_rng(seed)
    return Labels(
        scan=scan,
        stratum=stratum,
        frame_id=np.arange(first, first + n),
        counts=rng.poisson(5, (n, 32, 32)).astype(np.uint16),
        amplitude=rng.uniform(0.5, 1, (n, PATCH, PATCH)).astype(np.float32),
        phase=rng.uniform(-1, 1, (n, PATCH, PATCH)).astype(np.float32),
        residual=np.full(n, 0.01, np.float32),
        held_out=np.arange(n) % 4 == 3,
        probe=zone_plate(32, 10.0),
        mask=np.zeros((32, 32), bool),
    )


def rank_of(strategy, network=None, **settings):
    """A rank with a small network."""
    torch.manual_seed(0)
    network = network or ProbeFirst(window=32, patch=PATCH, width=4)
    network.optics.set(zone_plate(32, 10.0))
    objective = Reconstruction(patch_weight(zone_plate(32, 10.0), PATCH))
    return Rank(
        network, strategy(objective), TrainerSettings(**{"batch": 4, "candidates": 4, "representatives": 4} | settings)
    )


def train_once(rank, ranks, where, batch, steps):
    """Incremental training on a share of the same labels; the weights afterwards."""
    me = rank_of(Incremental, batch=batch)
    me.join(where, rank=rank, ranks=ranks)
    asyncio.run(me.receive(labels().share(rank, ranks)))  # these ids fall 6 and 6 to two ranks
    assert len(labels().share(0, 2).frame_id) - 4 == 6
    me.fit("a", steps)
    weights = torch.cat([p.detach().flatten() for p in me.network.parameters()])
    me.close()
    return weights.numpy()


@pytest.mark.slow
def test_n_ranks_equal_one_rank_on_the_same_data():
    """12 frames to train on: two ranks with 6 of them a step, or one with all 12, descend the same way."""
    one = on_ranks(1, train_once, 12, 4)[0]
    two = on_ranks(2, train_once, 6, 4)
    np.testing.assert_array_equal(two[0], two[1])
    assert np.abs(two[0] - one).mean() < 2e-5
    assert np.corrcoef(two[0], one)[0, 1] > 0.99999


def two_scans(rank, ranks, where, folder):
    """ER over two scans; what the rank reports."""
    me = rank_of(ER)
    me.join(where, rank=rank, ranks=ranks)
    reports = []
    for number, scan in enumerate(("a", "b")):
        asyncio.run(me.receive(labels(scan, 24, stratum=number, seed=number, first=100 * number).share(rank, ranks)))
        reports.append(me.fit(scan, 30))
    fills = me.buffer.fills
    if rank == 0:
        me.publish(folder, ModelVersion(number=1, network="ProbeFirst", hyperparameters=me.network.hyperparameters))
    me.close()
    return reports, fills, torch.initial_seed()


@pytest.mark.slow
def test_rehearsal_over_two_ranks(tmp_path):
    """Representatives come from all ranks equally; the past stays in the buffer; what is published loads."""
    answers = on_ranks(2, two_scans, tmp_path)
    used = sum(r.representatives for reports, *_ in answers for r in reports)
    remote = sum(r.remote for reports, *_ in answers for r in reports)
    assert used > 0.9 * 2 * 60 * 4
    assert abs(remote / used - 0.5) < 0.1
    assert answers[0][2] != answers[1][2]  # else all ranks would drop the same
    for (first, second), fills, _ in answers:
        assert np.isfinite([first.loss, second.loss]).all()
        assert set(fills) == {0, 1}
        assert set(second.seconds) == {"load", "train", "populate", "augment", "wait"}
    judged = answers[0][0][1]
    assert judged.error is not None
    assert judged.served_error is not None
    assert answers[1][0][1].error is None  # rank 0 alone judges
    assert ModelStore(tmp_path).load(1).hyperparameters["patch"] == PATCH


class Normalised(nn.Module):
    """A network with batch normalisation: what it has learnt is in its buffers too."""

    def __init__(self):
        super().__init__()
        self.hyperparameters = {"window": 32, "patch": PATCH, "modes": 1}
        self.optics = Optics(32, 1)
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3, padding=1))

    def forward(self, counts):
        found = self.body(self.optics.amplitude(counts)[:, None])[:, :, :PATCH, :PATCH]
        return torch.sigmoid(found[:, 0]), found[:, 1]


def diverges_once(rank, ranks, where):
    """A round in which the running means of rank 1 alone, or all weights, become NaN, and the round after it."""
    me = rank_of(ER, Normalised())
    me.join(where, rank=rank, ranks=ranks)
    asyncio.run(me.receive(labels(n=24).share(rank, ranks)))
    me.fit("a", 5)
    for spoilt in (
        [me.network.body[1].running_mean] if rank == 1 else [],
        [*me.network.parameters(), me.network.body[1].running_mean, me.network.body[1].running_var],
    ):
        for values in spoilt:
            values.data.fill_(float("nan"))
        loss = me.fit("a", 5).loss
        assert np.isfinite(loss)
        assert all(torch.isfinite(value).all() for value in me.network.state_dict().values())
        np.testing.assert_array_equal(me.network.optics.modes()[0], zone_plate(32, 10.0)[0])
    me.close()
    return loss


@pytest.mark.slow
def test_after_a_diverged_round_network_buffers_are_finite_on_every_rank():
    assert np.isfinite(on_ranks(2, diverges_once)).all()


def alone(strategy, **settings):
    """A single rank in this process."""
    from steering.learning import MeetingPoint

    point = MeetingPoint()
    me = rank_of(strategy, **settings)
    me.join(point.rendezvous, rank=0, ranks=1)
    return me, point


@pytest.mark.parametrize(
    ("devices", "wanted"),
    [
        (["cuda a", "cuda b"], "cpu:gloo,cuda:nccl"),
        (["cuda a", "cuda b", "cuda a"], "gloo"),
        (["cuda a", "cpu"], "gloo"),
        (["cpu", "cpu"], "gloo"),
    ],
)
def test_ranks_that_share_a_gpu_use_gloo(devices, wanted):
    assert backend(devices) == wanted


def test_learning_lowers_the_error_of_held_out_frames():
    me, _point = alone(Incremental, learning_rate=3e-3)
    truth = labels(n=32)
    constant = np.full_like(truth.phase, 0.7)
    asyncio.run(me.receive(Labels(**{**vars(truth), "phase": constant, "amplitude": np.ones_like(constant)})))
    report = me.fit("a", 80)
    me.close()
    assert report.error < 0.5 * report.served_error
    # What trust is measured against comes from the held-out frames alone.
    assert len(report.residuals) == len(report.offsets) == 8
    assert 0 <= report.noise_share <= 1
    assert np.abs(report.offsets).max() < 0.5


def test_same_seed_same_result():
    weights = []
    for _ in range(2):
        me, _point = alone(ER)
        asyncio.run(me.receive(labels()))
        me.fit("a", 10)
        weights.append(torch.cat([p.detach().flatten() for p in me.network.parameters()]))
        me.close()
    assert torch.equal(*weights)


class Noisy(torch.nn.Module):
    """Dropout and batch normalisation: what it predicts depends on whether it trains."""

    def __init__(self, *, window: int = 32, patch: int = PATCH, modes: int = 1):
        super().__init__()
        self.hyperparameters = {"window": window, "patch": patch, "modes": modes}
        self.optics = Optics(window, modes)
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(1, 4, 3, padding=1),
            torch.nn.BatchNorm2d(4),
            torch.nn.Dropout(0.5),
            torch.nn.Conv2d(4, 2, 1),
        )

    def forward(self, counts):
        """Amplitude and phase."""
        low = (counts.shape[-1] - self.hyperparameters["patch"]) // 2
        found = self.layers(self.optics.amplitude(counts)[:, None, low:-low, low:-low])
        return found[:, 0].sigmoid(), found[:, 1].tanh()


def test_a_candidate_is_judged_as_it_will_serve(tmp_path):
    """The error that is reported of it is that of the version that is loaded, and training goes on in training mode."""
    me, _point = alone(Incremental, network=Noisy())
    asyncio.run(me.receive(labels(n=40)))
    report = me.fit("a", 20)
    me.publish(tmp_path, ModelVersion(number=1, network="Noisy", hyperparameters=me.network.hyperparameters))
    held_out = me.samples.held_out("a")
    objective = Reconstruction(patch_weight(me.network.optics.modes().numpy(), PATCH))
    served = ModelStore(tmp_path).load(1, network=Noisy)
    assert report.error == float(outputs_of(served, held_out, objective)[1].mean())
    assert me.network.training
    assert me.network.layers[2].training
    again = me.fit("a", 0)
    assert (again.error, again.served_error) == (report.error, report.error)
    with torch.no_grad():
        assert float(objective.error(me.network(held_out["counts"]), held_out).mean()) != report.error
    me.close()


def test_a_network_is_given_some_held_out_frames_at_a_time_and_says_the_same(monkeypatch):
    me, _point = alone(Incremental)
    whole = labels(n=200)
    fields = {name: torch.from_numpy(getattr(whole, name)) for name in ("counts", "amplitude", "phase")}
    sizes, objective = [], Reconstruction(np.ones((PATCH, PATCH), np.float32))
    me.network.register_forward_pre_hook(lambda network, given: sizes.append(len(given[0])))
    patches, errors = outputs_of(me.network, fields, objective)
    assert sizes == [64, 64, 64, 8]
    with torch.no_grad():
        torch.testing.assert_close(errors, objective.error(me.network(fields["counts"]), fields))
    assert patches.shape == (200, PATCH, PATCH)
    me.close()


def test_of_many_held_out_frames_the_same_ones_are_kept_whatever_the_order_they_came_in():
    whole = labels(n=2600)
    parts = [Labels(**{**vars(whole), **{n: getattr(whole, n)[k::13] for n in EACH}}) for k in range(13)]
    found = []
    for order in (parts, parts[::-1]):
        samples = Samples(seed=0, keep_all=False)
        for part in order:
            samples.add(part)
        found.append(set(samples.scans["a"].held_out))
    assert found[0] == found[1]
    assert len(found[0]) == 512 < whole.held_out.sum()
    assert np.histogram(sorted(found[0]), 4, (0, 2600))[0].min() > 90  # from all of the scan


EACH = ("frame_id", "counts", "amplitude", "phase", "residual", "held_out")


@pytest.mark.parametrize(
    ("first", "then", "held"),
    [(np.uint16, np.uint32, np.uint32), (np.uint32, np.uint16, np.uint32), (np.uint16, np.float32, np.float32)],
)
def test_counts_of_another_type_before_training_are_all_held_in_the_wider_one(first, then, held):
    samples = Samples(seed=0, keep_all=False)
    for dtype, start in ((first, 0), (then, 16)):
        found = labels(first=start)
        samples.add(Labels(**{**vars(found), "counts": found.counts.astype(dtype)}))
    assert {row["counts"].numpy().dtype for row in samples.scans["a"].train.values()} == {np.dtype(held)}
    assert samples.held_out("a")["counts"].numpy().dtype == held


def test_counts_that_a_later_scan_has_wider_are_held_exactly_or_refused():
    """Once a scan is trained on, the buffers of all ranks have its dtype. What bad pixels read has no meaning."""
    samples = Samples(seed=0, keep_all=False)
    samples.add(labels("a"))
    samples.begin("a")
    wide = labels("b", first=100)
    counts, mask = wide.counts.astype(np.uint32), wide.mask.copy()
    counts[:, 3, 5], mask[3, 5] = 2**32 - 1, True
    samples.add(Labels(**{**vars(wide), "counts": counts, "mask": mask}))
    row = samples.scans["b"].train[100]["counts"].numpy()
    assert row.dtype == np.uint16
    np.testing.assert_array_equal(row[~mask], wide.counts[0][~mask])
    counts[0, 0, 0] = 70_000
    with pytest.raises(ValueError, match=r"uint32 up to 70000 in scan 'b', expected such as uint16 holds"):
        samples.add(Labels(**{**vars(wide), "counts": counts, "mask": mask}))


def test_from_scratch_restarts_at_a_new_scan_and_keeps_every_sample():
    me, _point = alone(FromScratch)
    start = {k: v.clone() for k, v in me.network.state_dict().items()}
    asyncio.run(me.receive(labels("a")))
    me.fit("a", 3)
    asyncio.run(me.receive(labels("b", stratum=1, seed=1, first=50)))
    me.fit("b", 0)
    assert len(me.samples) == 24
    assert all(torch.equal(v, start[k]) for k, v in me.network.state_dict().items() if k.startswith("enter"))
    me.close()


def test_training_before_labels_is_refused():
    me, _point = alone(Incremental)
    with pytest.raises(ValueError, match="no labelled frame of scan 'a'"):
        me.fit("a", 1)
    me.close()


def test_every_sample_once_per_epoch_and_the_last_minibatch_is_not_lost():
    samples = Samples(seed=0, keep_all=False)
    samples.add(labels(n=13))  # 10 to train on
    samples.begin("a")
    out = {k: torch.zeros((4, *v.shape), dtype=v.dtype) for k, v in samples.example().items()}
    seen = []
    for _ in range(5):  # 20 draws: two epochs
        samples.take(4, out)
        seen += [row.sum().item() for row in out["counts"].long()]
    assert sorted(seen[:10]) == sorted(seen[10:])
    assert len(set(seen[:10])) == 10


def test_shares_are_disjoint_and_complete_and_held_out_frames_go_to_all_ranks():
    whole = labels(n=21)
    shares = [whole.share(rank, 3) for rank in range(3)]
    to_train_on = np.concatenate([s.frame_id[~s.held_out] for s in shares])
    assert sorted(to_train_on) == sorted(whole.frame_id[~whole.held_out])
    for share in shares:
        assert set(share.frame_id[share.held_out]) == set(whole.frame_id[whole.held_out])


def test_no_rank_is_left_without_its_share_of_a_window_of_frames():
    """Whatever the number of ranks and the generation; every tenth frame is held out, and trains nobody."""
    ids = np.arange(700)
    held_out = HoldOut().held_out(ids)
    for ranks in range(2, 65):
        for generation in range(65):
            owner = owner_of(ids, ranks, generation)
            for first in (0, 137, 300):
                there = slice(first, first + 400)
                shares = np.bincount(owner[there], minlength=ranks)
                assert len(shares) == ranks
                assert shares.min() > 400 / ranks - 2
                assert np.bincount(owner[there][~held_out[there]], minlength=ranks).min() > 360 / ranks / 8


def test_a_frame_that_is_labelled_again_goes_to_the_same_rank():
    first, again = labels(n=40), labels(n=30, first=12)

    def to_train_on(part):
        return set(part.frame_id[~part.held_out].tolist())

    both = to_train_on(first) & to_train_on(again)
    assert len(both) > 10
    for rank in range(3):
        assert to_train_on(first.share(rank, 3)) & both == to_train_on(again.share(rank, 3)) & both


def test_a_newer_label_replaces_the_older_one():
    samples = Samples(seed=0, keep_all=False)
    samples.add(labels(seed=1))
    samples.add(labels(seed=2))
    assert len(samples) == 12
    assert samples.seen == {"a": 12}
    assert torch.equal(samples.scans["a"].train[0]["phase"], torch.from_numpy(labels(seed=2).phase[0]))


class TestReconstruction:
    """The objective."""

    def fields(self):
        """Amplitude and phase of four patches."""
        truth = labels(n=4)
        return {"amplitude": torch.from_numpy(truth.amplitude), "phase": torch.from_numpy(truth.phase)}

    def test_it_is_lowest_for_the_truth(self):
        objective, fields = Reconstruction(np.ones((PATCH, PATCH), np.float32)), self.fields()
        right = objective.error((fields["amplitude"], fields["phase"]), fields)
        wrong = objective.error((fields["amplitude"] * 0.9, fields["phase"] + 0.3 * torch.randn(PATCH, PATCH)), fields)
        assert (right < 0.01).all()
        assert (wrong > right + 0.1).all()

    def test_without_its_absolute_part_a_constant_phase_is_free(self):
        fields = self.fields()
        free = Reconstruction(np.ones((PATCH, PATCH), np.float32), absolute=0.0)
        fixed = Reconstruction(np.ones((PATCH, PATCH), np.float32), absolute=1.0)
        turned = (fields["amplitude"], fields["phase"] + 1.0)
        assert (free.error(turned, fields) < 0.01).all()
        assert (fixed.error(turned, fields) > 0.9).all()

    def test_pixels_without_light_do_not_count(self):
        weight = np.zeros((PATCH, PATCH), np.float32)
        weight[4:8, 4:8] = 1
        fields = self.fields()
        phase = fields["phase"].clone()
        phase[:, 10:] += 2
        assert (Reconstruction(weight).error((fields["amplitude"], phase), fields) < 0.01).all()
