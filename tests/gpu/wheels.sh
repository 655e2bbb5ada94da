#!/usr/bin/env bash
# Fill .gpu-wheels with what a bare machine lacks, for the Python of that machine: tests/gpu/wheels.sh [3.12]
# Left out: what such a machine has, and hdf5plugin (46 MB), which only compressed HDF5 files need.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
version=${1:-3.12}
mkdir -p "$here/.gpu-wheels"
"${PYTHON:-python3}" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$version" \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    -c "$here/constraints.txt" -d "$here/.gpu-wheels" \
    dask distributed zarr numcodecs cloudpickle toolz tblib msgpack zict sortedcontainers tornado pyyaml locket click \
    fsspec partd jinja2 markupsafe donfig google-crc32c urllib3 importlib-metadata zipp matplotlib contourpy cycler \
    fonttools kiwisolver pyparsing hypothesis pytest-timeout pytest-xdist execnet
du -sh "$here/.gpu-wheels"
