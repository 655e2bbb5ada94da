"""Pty-Chi's LSQML behind `refine`, where Pty-Chi is installed; imported by `refine` only when it is asked for."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from steering.ptychography.settings import RefineSettings
from steering.records import Canvas


def reconstruct(
    counts: NDArray,
    positions_px: ArrayLike,
    probe: NDArray[np.complex64],
    canvas: Canvas,
    start: NDArray[np.complex64],
    mask: NDArray[np.bool_] | None,
    settings: RefineSettings,
) -> tuple[NDArray[np.complex64], NDArray[np.complex64]]:
    """Object (Y, X) and probe (mode, N, N) after `settings.passes` epochs of Pty-Chi's LSQML; arguments as `refine`.

    Raises ImportError where Pty-Chi cannot be imported.
    """
    try:
        from ptychi import api  # noqa: PLC0415 - optional, and slow to import
        from ptychi.api.task import PtychographyTask  # noqa: PLC0415
    except ImportError as error:
        raise ImportError(
            f"found no working Pty-Chi ({error}), expected it for engine='ptychi': install ptychi with the torchvision "
            "that matches your torch, or use engine='rpie'"
        ) from error
    window = probe.shape[-1]
    options = api.LSQMLOptions()
    options.reconstructor_options.default_device = api.Devices.CPU
    options.reconstructor_options.num_epochs = settings.passes
    options.reconstructor_options.batch_size = min(settings.batch, len(counts))
    options.reconstructor_options.random_seed = settings.seed
    options.probe_position_options.optimizable = False
    options.object_options.optimizable = True
    options.object_options.determine_position_origin_coords_by = api.ObjectPosOriginCoordsMethods.SPECIFIED
    # Pty-Chi counts from the middle between the two central pixels of a window, the canvas from pixel N // 2.
    options.object_options.position_origin_coords = -np.array(canvas.origin) - 0.5
    options.probe_options.optimizable = settings.probe_from_pass is not None
    options.probe_options.optimization_plan.start = settings.probe_from_pass or 0
    where = np.asarray(positions_px, np.float32)
    task = PtychographyTask(
        options,
        diffraction_data=np.where(False if mask is None else mask, 0, counts).astype(np.float32),
        object_data=start[None],
        # Its Fourier transforms are not normalised: an amplitude is N times smaller in real space than in ours.
        probe_data=probe.astype(np.complex64)[None] / np.float32(window),
        probe_position_y_px=where[:, 0],
        probe_position_x_px=where[:, 1],
        valid_pixel_mask=None if mask is None else ~mask,
    )
    task.run()
    found = task.get_data_to_cpu("object", as_numpy=True)[0]
    improved = task.get_data_to_cpu("probe", as_numpy=True)[0] * np.float32(window)
    if settings.probe_from_pass is None:
        # LSQML scales even a fixed probe to the mean frame; the given power stays, and the object takes the factor.
        found = found * (np.linalg.norm(improved) / np.linalg.norm(probe))
        improved = probe
    return found.astype(np.complex64), improved.astype(np.complex64)
