"""Laws of running a network: every backend says the same, another version takes its place without anything made
anew."""

import numpy as np
import psutil
import pytest
import torch

import steering.inference.engine as engines
from steering.inference import Engine
from steering.inference.backends import REFERENCE, Backend, Slot, onnx, possible
from steering.inference.engine import MOST_WORSE
from steering.inference.transfer import Transfer
from steering.models import ProbeFirst, PtychoNN
from steering.ptychography import zone_plate

WINDOW, PATCH = 32, 16
CPU = torch.device("cpu")
BACKENDS = possible(CPU)
ONNX = Backend("onnx", torch.float32)
NETWORKS = {
    "ProbeFirst": lambda: ProbeFirst(window=WINDOW, patch=PATCH, width=8),
    "PtychoNN": lambda: PtychoNN(window=WINDOW, patch=PATCH, width=4, depth=2),
}


@pytest.fixture(params=NETWORKS.values(), ids=NETWORKS.keys())
def make(request):
    """Networks of one architecture, another one for each seed."""

    def network(seed=0):
        torch.manual_seed(seed)
        made = request.param().eval()
        made.optics.set(zone_plate(WINDOW, 12.0, aperture=0.6, counts=1e4))
        return made

    return network


def frames(n=5, seed=0):
    return np.random.default_rng(seed).poisson(20, (n, WINDOW, WINDOW)).astype(np.uint16)


def plain(network, counts):
    """What the network itself says."""
    with torch.inference_mode():
        return torch.polar(*network(torch.from_numpy(counts.astype(np.float32)))).numpy()


def tolerance(backend):
    """Of a complex number of size 1: bfloat16 has 8 bits, and errors of 20 layers add up."""
    return 1e-4 if backend.dtype == torch.float32 else 4e-2


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_every_backend_says_what_the_network_says(make, backend):
    network, counts = make(), frames()
    said = Engine(network, backends=[backend], measure_s=0).predict(counts)
    assert said.dtype == np.complex64
    np.testing.assert_allclose(said, plain(network, counts), atol=tolerance(backend))


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_another_flux_changes_nothing(make, backend):
    engine = Engine(make(), backends=[backend], measure_s=0)
    weak = engine.predict(frames()).copy()
    np.testing.assert_allclose(engine.predict(7 * frames()), weak, atol=tolerance(backend))
    np.testing.assert_array_equal(engine.predict(4 * frames()), weak)  # a power of two is exact in every precision


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_a_version_takes_the_place_of_another_in_the_same_memory(make, backend):
    """In place: what is compiled or captured around this memory stays valid, and is never made again."""
    engine = Engine(make(0), backends=[backend], measure_s=0)
    old, new, counts = make(0), make(1), frames()
    places = {slot: places_of(slot) for slot in (engine.serving, engine.spare)}
    before = engine.predict(counts).copy()
    engine.spare.load(new.state_dict(), number=1)
    np.testing.assert_array_equal(engine.predict(counts), before)  # the serving slot does not notice
    engine.swap()
    assert engine.serving.number == 1
    np.testing.assert_allclose(engine.predict(counts), plain(new, counts), atol=tolerance(backend))
    engine.spare.load(old.state_dict(), number=2)
    engine.swap()
    np.testing.assert_array_equal(engine.predict(counts), before)
    assert {slot: places_of(slot) for slot in places} == places


def places_of(slot):
    """Addresses of all that a version consists of."""
    return [tensor.data_ptr() for tensor in [*slot.network.state_dict().values(), *slot.constants]]


def test_masked_pixels_are_of_no_meaning_after_a_new_mask(make):
    engine, mask = Engine(make(), measure_s=0), np.zeros((WINDOW, WINDOW), bool)
    mask[3:6] = True
    engine.serving.mask(mask)
    network, counts = make(), frames()
    network.optics.set(network.optics.modes().numpy(), mask)
    hot = np.where(mask, 65535, counts).astype(np.uint16)
    np.testing.assert_array_equal(engine.predict(hot).copy(), engine.predict(counts))
    np.testing.assert_allclose(engine.predict(hot), plain(network, counts), atol=4e-2)


def test_more_frames_than_fit_are_predicted_in_parts(make):
    engine = Engine(make(), frames=4, backends=[REFERENCE], measure_s=0)
    counts = frames(11)
    np.testing.assert_allclose(engine.predict(counts), plain(make(), counts), atol=1e-4)


def test_the_backend_is_measured_and_reported(make, monkeypatch):
    """The fastest of those that are as good as float32 is used; a backend that fails is reported, and is not used."""

    def fail(*_):
        raise RuntimeError("found no C++ compiler")

    monkeypatch.setattr(engines, "make_package", fail)
    packaged = [Backend("compiled", torch.float32), ONNX]
    engine = Engine(make(), backends=[*BACKENDS, *packaged], measure_s=0.05)
    assert set(engine.trials) == {backend.name for backend in [*BACKENDS, *packaged]}
    for backend in packaged:
        assert "RuntimeError: found no C++ compiler" in engine.trials[backend.name].refused
    usable = {name: trial for name, trial in engine.trials.items() if not trial.refused}
    assert engine.backend.name == max(usable, key=lambda name: usable[name].rate(16))
    assert all(trial.frames_per_s > 0 and trial.error_over_float32 <= MOST_WORSE for trial in usable.values())
    assert engine.trials[REFERENCE.name].error_over_float32 == 1


def test_a_backend_that_errs_is_not_used(make, monkeypatch):
    true = Slot.__call__

    def false(slot, counts):
        amplitude, phase = true(slot, counts)
        return amplitude, phase + (0 if slot.backend == REFERENCE else torch.linspace(0, 2, PATCH))

    monkeypatch.setattr(Slot, "__call__", false)
    engine = Engine(make(), measure_s=0)
    assert engine.backend == REFERENCE
    assert all("phase error" in trial.refused for name, trial in engine.trials.items() if name != REFERENCE.name)


def test_weights_of_another_network_are_refused(make):
    slot = Slot(make(), REFERENCE, CPU)
    with pytest.raises(ValueError, match="expected another version of the same network"):
        slot.load(ProbeFirst(window=WINDOW, patch=PATCH, width=12).state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("make", [NETWORKS["ProbeFirst"]], indirect=True)  # a compilation takes ten seconds
def test_compiled_once_for_all_versions_and_batch_sizes(make, monkeypatch):
    """Ahead-of-time compiled code takes new weights and any batch: it is compiled once and never again."""
    compiled = []
    true = engines.make_package
    monkeypatch.setattr(engines, "make_package", lambda *a: (compiled.append(a), true(*a)))
    backend = Backend("compiled", torch.float32)
    engine = Engine(make(0), backends=[backend], compiled=True, measure_s=0)
    assert engine.backend == backend, engine.trials
    for number in range(3):
        engine.spare.load(make(number).state_dict(), number=number)
        engine.swap()
        for n in (1, 2, 7, 64):
            np.testing.assert_allclose(engine.predict(frames(n)), plain(make(number), frames(n)), atol=1e-4)
    assert len(compiled) == 1


needs_onnx = pytest.mark.skipif(not onnx.installed(), reason="needs the extra `onnx`")


@needs_onnx
@pytest.mark.slow
def test_exported_once_for_all_versions_batch_sizes_and_masks(make, monkeypatch):
    """ONNX Runtime takes new weights, any batch and another mask, and nothing is exported again."""
    exported = []
    true = engines.make_package
    monkeypatch.setattr(engines, "make_package", lambda *a: (exported.append(a), true(*a)))
    engine = Engine(make(0), backends=[ONNX], measure_s=0)
    assert engine.backend == ONNX, engine.trials
    threads = psutil.Process().num_threads()
    for number in range(3):
        before = engine.predict(frames()).copy()
        engine.spare.load(make(number).state_dict(), number=number)
        np.testing.assert_array_equal(engine.predict(frames()), before)  # the serving slot does not notice
        engine.swap()
        for n in (1, 2, 7, 64):
            np.testing.assert_allclose(engine.predict(frames(n)), plain(make(number), frames(n)), atol=1e-5)
    mask = np.zeros((WINDOW, WINDOW), bool)
    mask[3:6] = True
    engine.serving.mask(mask)
    network = make(2)
    network.optics.set(network.optics.modes().numpy(), mask)
    hot = np.where(mask, 65535, frames()).astype(np.uint16)
    np.testing.assert_allclose(engine.predict(hot), plain(network, frames()), atol=1e-5)
    assert len(exported) == 1
    assert psutil.Process().num_threads() == threads  # none that could spin while no frame comes


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize("make", [NETWORKS["ProbeFirst"]], indirect=True)
def test_an_export_that_keeps_weights_is_refused(make, monkeypatch):
    """It would answer with the weights of the version that was exported, for ever."""
    true = onnx.export_graph
    monkeypatch.setattr(onnx, "export_graph", lambda e, names, file: true(e, names | {"network.folded"}, file))
    engine = Engine(make(), backends=[ONNX], measure_s=0)
    assert engine.backend == REFERENCE
    assert "part of the exported graph: ['network.folded']" in engine.trials[ONNX.name].refused


def test_onnx_is_left_out_where_it_is_not_installed_or_not_wanted(monkeypatch):
    assert ONNX not in BACKENDS
    monkeypatch.setattr(onnx, "installed", lambda: True)
    assert ONNX in possible(CPU, compiled=True)
    monkeypatch.undo()
    monkeypatch.setattr(onnx, "NEEDED", ("torch", "no_such_package"))
    assert ONNX not in possible(CPU, compiled=True)


class LateStreams:
    """Streams of a GPU that are as late as they may be: copies happen only when they are waited for."""

    def __init__(self):
        self.back, self.pieces = [], []

    def send(self, frames):
        self.pieces.append(len(frames))
        return frames.clone()

    def bring(self, found, out):
        self.back.append((found, out))

    def finish(self):
        for found, out in self.back:
            out.copy_(found)
        self.back.clear()


@pytest.mark.parametrize("kind", [np.uint16, np.float32])
@pytest.mark.parametrize(("n", "size", "pieces"), [(5, 6, [6]), (100, 128, [64, 64]), (300, 300, [75, 75, 75, 75])])
def test_frames_go_to_a_gpu_in_pieces_and_come_back_as_if_they_had_gone_together(make, kind, n, size, pieces):
    slot, streams = Slot(make(), REFERENCE, CPU), LateStreams()
    counts = frames(n).astype(kind)
    counts[0, :3] = 65535  # above what int16 holds
    transfer = Transfer(CPU, frames=300, window=WINDOW, patch=PATCH, streams=streams)
    np.testing.assert_allclose(transfer(slot, counts, size), plain(make(), counts), atol=1e-4)
    assert streams.pieces == pieces
    assert not streams.back
