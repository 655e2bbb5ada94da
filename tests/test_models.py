"""What both networks promise, whatever their size."""

import numpy as np
import pytest
import torch

from steering.models import ProbeFirst, PtychoNN, ResNet18, ResNet50, build_network
from steering.ptychography import zone_plate

WINDOW, PATCH = 32, 20
NETWORKS = {
    "ProbeFirst": lambda **settings: ProbeFirst(**{"window": WINDOW, "patch": PATCH, "width": 8, **settings}),
    "PtychoNN": lambda **settings: PtychoNN(**{"window": WINDOW, "patch": PATCH, "width": 4, "depth": 2, **settings}),
}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(params=NETWORKS.values(), ids=NETWORKS.keys())
def make(request):
    return request.param


def lit(network, *, mask=None):
    """The network with as many probe modes as it wants, the further ones weaker and shifted."""
    window, modes = network.hyperparameters["window"], network.hyperparameters["modes"]
    main = zone_plate(window, 20.0, counts=1e4)[0]
    network.optics.set(np.stack([np.roll(main, m, axis=0) / 3**m for m in range(modes)]), mask)
    return network.eval()


def frames(n=3, window=WINDOW, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).poisson(20, (n, window, window)).astype(np.float32))


@torch.no_grad()
def out(network, counts):
    return torch.stack(network(counts))


def parameters(network):
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("modes", [1, 3])
@pytest.mark.parametrize(("window", "patch"), [(32, 20), (32, 32), (24, 12), (40, 8), (64, 40)])
def test_a_frame_becomes_a_transmission_and_a_phase(make, window, patch, modes):
    network = lit(make(window=window, patch=patch, modes=modes))
    amplitude, phase = out(network, frames(window=window))
    assert amplitude.shape == phase.shape == (3, patch, patch)
    assert amplitude.dtype == phase.dtype == torch.float32
    assert (amplitude >= 0).all()
    assert (amplitude <= 1.2).all()
    assert (phase.abs() <= torch.pi).all()


def test_another_flux_gives_the_same_object(make):
    network = lit(make())
    torch.testing.assert_close(out(network, 4 * frames()), out(network, frames()), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("value", [0.0, 65535.0, -1.0, torch.nan, torch.inf])
def test_what_masked_pixels_read_is_of_no_meaning(make, value):
    mask = np.zeros((WINDOW, WINDOW), bool)
    mask[13:16] = True
    network = lit(make(), mask=mask)
    counts = frames()
    counts[:, torch.from_numpy(mask)] = value
    assert torch.equal(out(network, counts), out(network, frames()))


def test_frames_of_a_batch_do_not_meet(make):
    network, counts = lit(make()), frames(5)
    torch.testing.assert_close(out(network, counts)[:, 2:4], out(network, counts[2:4]), atol=1e-6, rtol=1e-5)


def test_frames_and_beams_differ_in_what_is_said_of_them(make):
    network, counts = lit(make()), frames()
    said = out(network, counts)
    assert not torch.equal(said[:, 0], said[:, 1])
    network.optics.set(np.roll(network.optics.modes().numpy(), 3, axis=-1))
    if isinstance(network, ProbeFirst):
        assert not torch.allclose(out(network, counts), said, atol=1e-4)


def test_an_empty_frame_and_integer_counts_are_taken(make):
    network = lit(make())
    assert out(network, torch.zeros(2, WINDOW, WINDOW)).isfinite().all()
    counts = frames()
    assert torch.equal(out(network, counts.to(torch.uint16)), out(network, counts))


def test_every_weight_learns(make):
    network = lit(make()).train()
    amplitude, phase = network(frames())
    (amplitude.square().sum() + phase.square().sum()).backward()
    still = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not still
    assert not any(name.startswith("optics") for name, _ in network.named_parameters())


def test_the_same_seed_gives_the_same_weights(make):
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        made.append(torch.cat([p.flatten() for p in make().parameters()]))
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_hyperparameters_set_the_size(make):
    assert parameters(make(width=16)) > 1.8 * parameters(make(width=8)) > 3 * parameters(make(width=4))
    assert parameters(make(patch=12)) == parameters(make(patch=20))
    assert parameters(PtychoNN(depth=4, width=8)) > 3 * parameters(PtychoNN(depth=3, width=8))


def test_the_networks_are_as_large_as_they_should_be():
    # The encoder and two decoders of the paper's layout, layer by layer.
    conv = lambda i, o: 9 * i * o + o  # noqa: E731
    encoder = sum(conv(i, o) + conv(o, o) for i, o in ((1, 32), (32, 64), (64, 128)))
    decoder = sum(conv(i, o) + conv(o, o) for i, o in ((128, 128), (128, 64), (64, 32))) + conv(32, 1)
    assert parameters(PtychoNN(window=64)) == encoder + 2 * decoder
    assert 2e5 < parameters(ProbeFirst(window=64, width=32)) < 5e5


@pytest.mark.parametrize("gap", [False, True])
def test_an_empty_beam_has_no_contrast(gap):
    """Back-projection starts from what is known: a frame without sample tells the CNN nothing, gap or not."""
    mask = np.zeros((WINDOW, WINDOW), bool)
    mask[12:18] = gap
    network = lit(ProbeFirst(window=WINDOW, patch=PATCH, width=4), mask=mask)
    wave = torch.fft.fftshift(torch.fft.fft2(network.optics.modes(), norm="ortho"), dim=(-2, -1))
    guess, _ = network.preprocess(3 * wave.abs().square(), *network.constants())
    assert guess[:, :2].abs().max() < 1e-4


def test_back_projection_finds_a_weak_object():
    """Before any training, the guess of a weak phase object points the right way."""
    network = lit(ProbeFirst(window=WINDOW, patch=PATCH, width=4))
    y, x = np.mgrid[:WINDOW, :WINDOW] - WINDOW // 2
    bump = np.exp(-(y**2 + x**2) / 8.0)
    thing = torch.from_numpy(np.exp(-0.2 * bump).astype(np.complex64))
    wave = torch.fft.fftshift(torch.fft.fft2(network.optics.modes() * thing, norm="ortho"), dim=(-2, -1))
    guess, _ = network.preprocess(wave.abs().square(), *network.constants())
    keep = slice((WINDOW - PATCH) // 2, (WINDOW + PATCH) // 2)
    wanted = (thing.real - 1)[keep, keep]
    seen = guess[0, 0] - guess[0, 0].mean()
    assert (seen * (wanted - wanted.mean())).sum() > 0


@pytest.mark.parametrize(
    ("kind", "settings", "says"),
    [
        (ProbeFirst, {"depth": 3}, "expected some of .*'width'"),
        (ProbeFirst, {"width": "8"}, "expected numbers"),
        (ProbeFirst, {"patch": 42}, "expected a patch of 4, 8, 12"),
        (ProbeFirst, {"patch": 68}, "at most an even window"),
        (ProbeFirst, {"patch": 0}, "expected a patch of 4"),
        (ProbeFirst, {"width": 0}, "expected 1 or more"),
        (PtychoNN, {"window": 60}, "a window divisible by 8"),
        (PtychoNN, {"patch": 80}, "an even patch"),
        (PtychoNN, {"patch": 41}, "an even patch"),
        (PtychoNN, {"depth": 0}, "expected 1 or more"),
    ],
)
def test_a_network_that_cannot_be_is_refused(kind, settings, says):
    with pytest.raises(ValueError, match=says):
        build_network(kind, settings)


def test_a_network_is_built_again_from_its_hyperparameters(make):
    network = make(modes=2)
    again = build_network(type(network), {k: float(v) for k, v in network.hyperparameters.items()})
    assert again.hyperparameters == network.hyperparameters
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in network.state_dict().items()}


@pytest.mark.parametrize(
    ("probe", "mask", "says"),
    [
        (np.ones((1, 8, 8)), None, "found a probe of shape"),
        (np.ones((2, WINDOW, WINDOW)), None, "found a probe of shape"),
        (np.zeros((1, WINDOW, WINDOW)), None, "all zero or not finite"),
        (np.full((1, WINDOW, WINDOW), np.nan), None, "all zero or not finite"),
        (np.ones((1, WINDOW, WINDOW)), np.zeros((1, WINDOW), bool), "found a mask of bool"),
        (np.ones((1, WINDOW, WINDOW)), np.zeros((WINDOW, WINDOW)), "found a mask of float64"),
    ],
)
def test_optics_that_cannot_be_are_refused_and_change_nothing(make, probe, mask, says):
    network = lit(make())
    before = {k: v.clone() for k, v in network.optics.state_dict().items()}
    with pytest.raises(ValueError, match=says):
        network.optics.set(probe, mask)
    assert all(torch.equal(v, before[k]) for k, v in network.optics.state_dict().items())


def test_a_probe_without_a_mask_keeps_the_mask(make):
    mask = np.zeros((WINDOW, WINDOW), bool)
    mask[3] = True
    network = lit(make(), mask=mask)
    lit(network)
    assert network.optics.bad.numpy().sum() == WINDOW


def test_resnet_is_the_published_one_at_full_width_and_takes_other_sizes():
    """11.17 million parameters with ten classes, as usual for 32 x 32; logits of any size of image are finite."""
    assert sum(p.numel() for p in ResNet18(10).parameters()) == 11_173_962
    narrow = ResNet18(7, width=4).eval()
    for size in (32, 33, 64):
        logits = narrow(torch.randn(2, 3, size, size))
        assert logits.shape == (2, 7)
        assert torch.isfinite(logits).all()
    with pytest.raises(ValueError, match="width=0"):
        ResNet18(10, width=0)


def test_the_networks_for_imagenet_are_the_published_ones():
    """Parameters as in torchvision's; a quarter of the size after the stem, so that 224 pixels end as 7 x 7."""
    assert sum(p.numel() for p in ResNet18(1000, stem="imagenet").parameters()) == 11_689_512
    network = ResNet50(1000)
    assert sum(p.numel() for p in network.parameters()) == 25_557_032
    small = ResNet50(7, width=4).eval()
    image = torch.randn(2, 3, 224, 224)
    assert small.shrink(small.enter(image)).shape == (2, 4, 56, 56)
    assert small.stages(small.shrink(small.enter(image))).shape == (2, 128, 7, 7)
    assert torch.isfinite(small(image)).all()
    with pytest.raises(ValueError, match="stem 'none'"):
        ResNet18(10, stem="none")
