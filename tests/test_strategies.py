"""Laws of the strategies, for classification and for reconstruction, and of the loop that they share."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from steering.learning import Classification, Loop, Reconstruction, TrainerSettings
from steering.learning.epochs import Epochs
from steering.learning.group import Place, leave
from steering.learning.strategies import AGEM, DER, ER, ERACE, STRATEGIES, DERpp, Incremental, Minibatch
from steering.models import ProbeFirst, ResNet18
from steering.ptychography import patch_weight, zone_plate
from tests.ranks import on_ranks

PATCH, WINDOW, CLASSES = 16, 32, 5
REHEARSING = {name: kind for name, kind in STRATEGIES.items() if kind.rehearses}


def images(n=5, seed=0):
    """Images of five classes, and their labels, which are their strata too."""
    rng = np.random.default_rng(seed)
    label = torch.from_numpy(rng.integers(0, CLASSES, n))
    image = torch.from_numpy(rng.integers(0, 256, (n, 3, 8, 8), dtype=np.uint8))
    return {"image": image, "label": label, "stratum": label.clone()}


def frames(n=5, seed=0):
    """Frames as detectors give them, with labels."""
    rng = np.random.default_rng(seed)
    return {
        "counts": torch.from_numpy(rng.poisson(5, (n, WINDOW, WINDOW)).astype(np.uint16)),
        "amplitude": torch.from_numpy(rng.uniform(0.5, 1, (n, PATCH, PATCH)).astype(np.float32)),
        "phase": torch.from_numpy(rng.uniform(-1, 1, (n, PATCH, PATCH)).astype(np.float32)),
        "stratum": torch.zeros(n, dtype=torch.int64),
    }


def classification():
    """(objective, network, samples)"""
    torch.manual_seed(0)
    return Classification(mean=[0.5] * 3, std=[0.25] * 3), ResNet18(CLASSES, width=2), images


def reconstruction():
    """(objective, network, samples)"""
    torch.manual_seed(0)
    network = ProbeFirst(window=WINDOW, patch=PATCH, width=4)
    network.optics.set(zone_plate(WINDOW, 10.0))
    return Reconstruction(patch_weight(zone_plate(WINDOW, 10.0), PATCH)), network, frames


def augmented(strategy, network, samples, new=3):
    """Three new samples and two representatives, remembered earlier as the strategy wants them."""
    fields = samples()
    with torch.no_grad():
        outputs = strategy.objective.outputs(network, fields)
    return Minibatch(dict(strategy.remember(fields, outputs) or fields), new=new)


PROBLEMS = [
    pytest.param(kind, problem, id=f"{name}-{problem.__name__}")
    for name, kind in STRATEGIES.items()
    for problem in (classification, reconstruction)
    if problem is classification or not kind.needs_classes
]


@pytest.mark.parametrize(("kind", "problem"), PROBLEMS)
class TestStrategyContract:
    """What every strategy must do; a new one joins STRATEGIES."""

    def test_gradient_is_finite_and_none_is_zero(self, kind, problem):
        objective, network, samples = problem()
        strategy = kind(objective)
        loss = strategy.gradient(network, augmented(strategy, network, samples))
        assert torch.isfinite(loss.value)
        gradients = [p.grad for p in network.parameters()]
        assert all(torch.isfinite(g).all() for g in gradients)
        assert sum(float(g.abs().sum()) for g in gradients) > 0

    def test_it_remembers_samples_bit_for_bit_or_nothing(self, kind, problem):
        objective, network, samples = problem()
        strategy, fields = kind(objective), samples(3)
        kept = strategy.remember(fields, objective.outputs(network, fields))
        assert (kept is not None) == strategy.rehearses
        for name in fields if kept is not None else ():
            assert kept[name].dtype == fields[name].dtype
            assert torch.equal(kept[name], fields[name])

    def test_it_starts_with_empty_buffers_and_never_reads_what_was_not_written(self, kind, problem):
        objective, network, samples = problem()
        loop = Loop(network, kind(objective), SMALL)
        loop.connect(None)
        loop.prepare({name: value[0] for name, value in samples(1).items()})

        def load(n, out):
            for value in out.values():
                value.fill_(float("nan") if value.is_floating_point() else 250 if value.dtype == torch.uint8 else 60000)
            give(samples(n, seed=loop.steps), out)

        tally = loop.run(8, load)
        assert np.isfinite(tally.losses).all()
        # The first exchange knew of nothing; then every minibatch gets what there is, up to r.
        stored = [0, 2, 4, 6, 8][: SMALL.representatives]
        assert (tally.representatives >= sum(stored)) == loop.strategy.rehearses
        for name, value in loop.buffer.state().packed().tensors.items():
            if name.startswith("field."):
                assert torch.isfinite(value.float()).all(), name


SMALL = TrainerSettings(batch=3, candidates=2, representatives=4, buffer_bytes=2**20)


def give(samples, out):
    """Write samples into the first rows."""
    for name, value in samples.items():
        out[name][: len(value)] = value


@pytest.mark.parametrize("problem", [classification, reconstruction], ids=lambda p: p.__name__)
def test_der_adds_nothing_while_the_network_says_what_it_said(problem):
    objective, network, samples = problem()
    network.eval()
    der, fields = DER(objective), augmented(DER(objective), network, samples)
    plain = Incremental(objective).loss(network, Minibatch(dict(fields.batch), new=3))
    torch.testing.assert_close(der.loss(network, fields).value, plain.value)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn_like(p))
    plain = Incremental(objective).loss(network, Minibatch(dict(fields.batch), new=3))
    more = der.loss(network, fields).value - plain.value
    assert more > 1e-4
    torch.testing.assert_close(
        DER(objective, alpha=3.0).loss(network, fields).value - plain.value, more * 3 / 0.8, rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("problem", [classification, reconstruction], ids=lambda p: p.__name__)
def test_derpp_is_der_with_the_labels_of_the_representatives(problem):
    objective, network, samples = problem()
    network.eval()
    fields = augmented(DER(objective), network, samples)
    old = fields.representatives
    labels = objective.error(objective.outputs(network, old), old).mean()
    der = DER(objective, alpha=0.3).loss(network, fields).value
    both = DERpp(objective, alpha=0.3, beta=0.7).loss(network, fields).value
    torch.testing.assert_close(both, der + 0.7 * labels)


def asymmetric_cross_entropy(logits, label, new):
    """ER-ACE written out for single samples, as in Caccia et al.: a term of the new samples, in whose denominators are
    the classes of the new samples alone, and one of the stored samples, with every class in the denominators."""

    def term(rows, classes):
        return sum(-logits[i, label[i]] + logits[i, classes].exp().sum().log() for i in rows) / len(rows)

    among = sorted(set(label[:new].tolist()))
    loss = term(range(new), among)
    return loss + term(range(new, len(label)), list(range(logits.shape[1]))) if new < len(label) else loss


@pytest.mark.parametrize("label", [[0, 1, 1, 2, 3], [4, 4, 4, 4, 0], [0, 1, 2], [2, 2, 2]])
def test_er_ace_is_the_published_loss_and_leaves_the_outputs_of_absent_classes_alone(label):
    """Three new samples; their classes return among the representatives, or do not, or there are none of these."""
    objective, network, samples = classification()
    network.eval()
    fields = samples(len(label)) | {"label": torch.tensor(label)}
    strategy, new = ERACE(objective), 3
    loss = strategy.loss(network, Minibatch(fields, new=new))
    (logits,) = loss.outputs
    torch.testing.assert_close(loss.value, asymmetric_cross_entropy(logits, fields["label"], new))
    (gradient,) = torch.autograd.grad(loss.value, logits)
    absent = [kind for kind in range(CLASSES) if kind not in label[:new]]
    assert (gradient[:new, absent] == 0).all()
    assert (gradient[new:] != 0).all()


def test_er_ace_is_refused_for_a_reconstruction_before_anything_is_trained():
    objective = reconstruction()[0]
    with pytest.raises(ValueError, match=r"ERACE with Reconstruction.*such as Classification"):
        ERACE(objective)
    with pytest.raises(ValueError, match=r"ERACE with Reconstruction"):
        ERACE().bound(objective)
    assert ERACE().bound(classification()[0]).objective is not None


@pytest.mark.parametrize("kind", [DER, DERpp])
@pytest.mark.parametrize("problem", [classification, reconstruction], ids=lambda p: p.__name__)
def test_stored_outputs_that_are_not_finite_count_as_none(kind, problem):
    """The loss, and its gradient, are those of the other representatives' outputs; labels count as before."""
    objective, network, samples = problem()
    network.eval()
    strategy = kind(objective, alpha=1.0)
    fields = augmented(strategy, network, samples, new=1)
    name = f"stored_{objective.names[0]}"
    stored = fields.fields[name] + 0.1 * torch.randn_like(fields.fields[name])
    losses = []
    for broken in ((), (2, 4)):
        fields.fields[name] = stored.clone()
        for row, value in zip(broken, (float("nan"), float("inf")), strict=False):
            fields.fields[name][row] = value
        loss = strategy.gradient(network, fields)
        assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)
        losses.append(loss.value.detach())
        network.zero_grad()
    (outputs,) = (tuple(value[[2, 4]].detach() for value in loss.outputs),)
    rest = tuple(fields.fields[f"stored_{other}"][[2, 4]] for other in objective.names[1:])
    lost = objective.distance(outputs, (stored[[2, 4]], *rest)).sum() / 4
    torch.testing.assert_close(losses[1], losses[0] - lost)


@pytest.mark.parametrize("kind", [DER, DERpp])
def test_after_a_diverged_round_training_goes_on_as_before_it(kind):
    """Weights are broken for some steps and put back: nothing of that stays in the buffer, and losses are finite."""
    objective, network, samples = reconstruction()
    loop = Loop(network, kind(objective), SMALL)
    loop.connect(None)
    loop.prepare({name: value[0] for name, value in samples(1).items()})

    def load(n, out):
        give(samples(n, seed=loop.steps), out)

    loop.run(4, load)
    good, seen = copy.deepcopy(network.state_dict()), loop.buffer.seen
    with torch.no_grad():
        network.leave.weight.fill_(float("nan"))
    loop.run(3, load)
    assert loop.buffer.seen == seen
    network.load_state_dict(good)
    loop.optimiser.state.clear()
    assert np.isfinite(loop.run(6, load).losses).all()
    assert loop.buffer.seen == seen + 12


class Line(nn.Module):
    """Two logits, linear in the pixel means: gradients of opposite labels oppose each other."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, image):
        return self.linear(image.mean((2, 3)))


def gradient_of(strategy, fields, new):
    """What the strategy leaves in .grad, as one vector."""
    torch.manual_seed(1)
    network = Line()
    strategy.gradient(network, Minibatch(fields, new=new))
    return torch.cat([p.grad.flatten() for p in network.parameters()])


@pytest.mark.parametrize("old", [0, 1], ids=["against", "along"])
def test_agem_takes_away_what_is_against_the_representatives_and_no_more(old):
    """One image, labelled 1 as a new sample; its representative carries the other label, or the same."""
    objective = Classification(mean=[0.5] * 3, std=[0.25] * 3)
    one = images(1)["image"].expand(2, -1, -1, -1).contiguous()
    fields = {"image": one, "label": torch.tensor([1, old])}
    new = gradient_of(Incremental(objective), {k: v[:1] for k, v in fields.items()}, 1)
    reference = gradient_of(Incremental(objective), {k: v[1:] for k, v in fields.items()}, 1)
    found = gradient_of(AGEM(objective), fields, 1)
    if old == 1:
        torch.testing.assert_close(found, new)
    else:
        assert new @ reference < -1e-3
        torch.testing.assert_close(found @ reference, torch.tensor(0.0), atol=1e-6, rtol=0)
        torch.testing.assert_close(found, new - reference * (new @ reference) / (reference @ reference))


@pytest.mark.parametrize("kind", [DER, DERpp])
def test_impossible_weights_are_refused(kind):
    with pytest.raises(ValueError, match="alpha=-1"):
        kind(classification()[0], alpha=-1)


@pytest.mark.parametrize(
    "setting",
    [
        {"batch": 0},
        {"candidates": 20},
        {"representatives": -1},
        {"look_ahead": 0},
        {"clip_norm": 0},
        {"precision": "float16"},
        {"optimiser": "adam"},
    ],
)
def test_impossible_settings_are_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        TrainerSettings(**setting)


def test_the_loop_does_what_its_settings_say_and_nothing_else():
    """Each step of plain SGD is the learning rate times the gradient: clipped, scheduled, decayed only where asked."""

    def after(steps=1, **settings):
        objective, network, samples = classification()
        start = torch.cat([p.detach().flatten() for p in network.parameters()])
        wanted = {"optimiser": "sgd", "learning_rate": 0.01, "clip_norm": None, "weight_decay": 0.0} | settings
        loop = Loop(network, Incremental(objective), TrainerSettings(batch=3, candidates=2, **wanted))
        loop.connect(None)
        loop.prepare({name: value[0] for name, value in samples(1).items()})
        losses = loop.run(steps, lambda n, out: give(samples(n), out)).losses
        return torch.cat([p.detach().flatten() for p in network.parameters()]) - start, start, losses

    step, start, losses = after()
    gradient = -step / 0.01
    assert gradient.norm() > 0.5
    torch.testing.assert_close(after(clip_norm=0.1)[0], step * 0.1 / gradient.norm(), rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(after(schedule=lambda step: 0.5)[0], step * 0.5, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(after(weight_decay=0.1)[0], step - 0.01 * 0.1 * start, rtol=1e-3, atol=1e-6)
    half = after(2, schedule=lambda step: float(step == 0))[0]
    torch.testing.assert_close(half, step)  # the second step has a learning rate of 0
    coarse, _, rough = after(precision="bfloat16")
    assert coarse.dtype == torch.float32
    assert not torch.equal(coarse, step)
    assert torch.nn.functional.cosine_similarity(coarse, step, dim=0) > 0.8
    assert rough == pytest.approx(losses, rel=0.05)


def test_a_step_before_connect_is_refused():
    objective, network, samples = classification()
    loop = Loop(network, ER(objective), SMALL)
    loop.prepare({name: value[0] for name, value in samples(1).items()})
    with pytest.raises(RuntimeError, match="connect"):
        loop.run(1, lambda n, out: give(samples(n), out))


def together(rank, ranks, where, look_ahead):
    """Every strategy in turn on its own share of a stream; weights, deliveries, what is stored."""
    found = {}
    for generation, (name, kind) in enumerate(STRATEGIES.items()):
        objective, network, samples = classification()
        settings = TrainerSettings(
            batch=3, candidates=2, representatives=4, buffer_bytes=2**14, look_ahead=look_ahead, sampling="balanced"
        )
        loop = Loop(network, kind(objective), settings, rank=rank)
        loop.connect(Place(rank=rank, ranks=ranks, where=where, deadline=30.0).join(generation, device="cpu"))
        loop.prepare({name: value[0] for name, value in samples(1).items()})
        tally = loop.run(
            20, lambda n, out, loop=loop, samples=samples: give(samples(n, ranks * loop.steps + rank), out)
        )
        weights = torch.cat([p.detach().flatten() for p in network.parameters()])
        found[name] = weights.numpy(), tally.losses, tally.representatives, tally.remote
        loop.disconnect()
        leave()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("look_ahead", [3])
def test_ranks_stay_alike_whatever_the_strategy_and_the_look_ahead(look_ahead):
    """Each rank sees other samples, in a buffer that overflows; all take the same steps."""
    one, two = on_ranks(2, together, look_ahead)
    for name in STRATEGIES:
        np.testing.assert_array_equal(one[name][0], two[name][0])
        assert np.isfinite(one[name][1] + two[name][1]).all()
        if name in REHEARSING:
            # What is announced with an exchange is known when it ends and drawn by those that start after that.
            assert 4 * (20 - 2 * look_ahead - 1) <= one[name][2] <= 4 * 20
            assert 0 < one[name][3] < one[name][2]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_every_sample_is_seen_once_in_a_pass_over_all_ranks_and_no_minibatch_is_short(ranks):
    """37 samples in minibatches of 4, which divide neither by the ranks nor among them: three passes, all whole."""
    order = [Epochs(37, seed=3, rank=rank, ranks=ranks) for rank in range(ranks)]
    taken = []
    while len(taken) < 3 * 37:
        parts = [epochs.take(4) for epochs in order]
        assert all(len(part) == 4 for part in parts)
        taken += np.concatenate(parts).tolist()
    passes = [taken[k * 37 : (k + 1) * 37] for k in range(3)]
    assert all(sorted(one) == list(range(37)) for one in passes)
    assert passes[0] != passes[1]


def test_epochs_without_samples_are_refused():
    with pytest.raises(ValueError, match="count=0"):
        Epochs(0, seed=0)


class TestClassification:
    """The objective."""

    def test_it_normalises_and_does_not_move_images_when_judging(self):
        objective = Classification(mean=[0.0] * 3, std=[1.0] * 3, shift=4)
        network = nn.Flatten()
        fields = images()
        network.eval()
        (outputs,) = objective.outputs(network, fields)
        torch.testing.assert_close(outputs, fields["image"].flatten(1) / 255)
        network.train()
        assert not torch.equal(objective.outputs(network, fields)[0], outputs)

    def test_moved_images_are_their_own_pixels_shifted_or_mirrored(self):
        """Each is found among the 81 shifts of the padded image and of its mirror image."""
        objective = Classification(mean=[0.0] * 3, std=[1.0] * 3, shift=4)
        image = images(6)["image"]
        network = nn.Identity().train()
        (moved,) = objective.outputs(network, {"image": image})
        padded = nn.functional.pad(image.float() / 255, (4, 4, 4, 4))
        for found, one in zip(moved, padded, strict=True):
            mirrored = nn.functional.pad(one[:, 4:12, 4:12].flip(-1), (4, 4, 4, 4))
            assert any(
                torch.allclose(found, source[:, y : y + 8, x : x + 8])
                for source in (one, mirrored)
                for y in range(9)
                for x in range(9)
            )
