"""The laws of prediction on a GPU: it says what the CPU says, and captured graphs see the weights that come later."""

import numpy as np
import pytest
import torch

from steering.inference import Engine
from steering.inference.backends import possible
from steering.models import ProbeFirst
from steering.ptychography import far_field_residual
from tests.test_engine import frames, plain
from tests.test_models import lit

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and torch sees none here"),
]
BACKENDS = possible(torch.device("cuda", 0))


def network(seed):
    torch.manual_seed(seed)
    return lit(ProbeFirst(window=32, patch=16, width=8))


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_every_backend_says_what_the_cpu_says_before_and_after_a_swap(backend):
    engine = Engine(network(0), device="cuda", backends=[backend], measure_s=0)
    assert engine.backend == backend, engine.trials
    atol = 1e-3 if backend.dtype == torch.float32 else 4e-2  # convolutions use TF32 where the GPU has it
    for number in range(3):
        engine.spare.load(network(number).state_dict(), number=number)
        engine.swap()
        for n in (1, 3, 64):
            np.testing.assert_allclose(engine.predict(frames(n)), plain(network(number), frames(n)), atol=atol)


def test_a_mask_reaches_captured_graphs():
    engine, mask = Engine(network(0), device="cuda", measure_s=0), np.zeros((32, 32), bool)
    mask[3:6] = True
    engine.serving.mask(mask)
    hot = np.where(mask, 65535, frames()).astype(np.uint16)
    np.testing.assert_array_equal(engine.predict(hot).copy(), engine.predict(frames()))


@pytest.mark.parametrize("kind", [np.uint16, np.float32])
def test_batches_that_are_sent_in_pieces_say_what_the_cpu_says(kind):
    """Many times in a row: memory that was given back too early would be overwritten by what follows."""
    engine = Engine(network(0), frames=512, device="cuda", measure_s=0)
    expected = {n: plain(network(0), frames(n)) for n in (100, 300, 512, 700)}
    for _ in range(20):
        for n, said in expected.items():
            np.testing.assert_allclose(engine.predict(frames(n).astype(kind)), said, atol=4e-2)


def test_the_residual_that_trust_rests_on_is_the_cpus():
    rng = np.random.default_rng(0)
    patches = np.exp(1j * rng.random((5, 16, 16))).astype(np.complex64)
    probe = (rng.standard_normal((2, 32, 32)) + 1j * rng.standard_normal((2, 32, 32))).astype(np.complex64)
    mask = np.zeros((32, 32), bool)
    mask[3:6] = True
    counts = np.where(mask, 65535, rng.poisson(9.0, (5, 32, 32))).astype(np.uint16)
    there = far_field_residual(patches, counts, probe, mask, device=torch.device("cuda", 0))
    np.testing.assert_allclose(there, far_field_residual(patches, counts, probe, mask), atol=1e-4)
