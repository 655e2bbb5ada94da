#!/usr/bin/env bash
# Everything that needs a GPU, by one command, in about 5 minutes:
#
#   tests/gpu/run.sh OUT              on a machine with an NVIDIA GPU
#   tests/gpu/run.sh OUT cpu          the same parts at tiny size on the CPU: says that the script works
#   tests/gpu/run.sh OUT cpu PART...  some of them
#   tests/gpu/run.sh OUT class        the second command: class_incremental on the GPU, a wider network, three strategies
#   tests/gpu/run.sh OUT compiled     the third: prediction with compiled backends too, which takes a C++ compiler
#
# The machine may be bare and without a network: Python with torch, numpy, xarray, h5py, scikit-image, safetensors,
# psutil, rich and pytest. What else is needed travels along as wheels in .gpu-wheels, which tests/gpu/wheels.sh fills.
# Each part is limited in time, and one that fails does not stop the others. OUT gets summary.json, summary.txt (one
# screen), a log of each part, and the folders of its runs.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
mkdir -p "${1:?expected the folder for the results, as in: tests/gpu/run.sh OUT}" || exit 1
out=$(cd "$1" && pwd)
kind=${2:-gpu}
cd "$here" || exit 1

wheels=$here/.gpu-wheels
python=${PYTHON:-python3}
if ! "$python" -c 'import dask, distributed, zarr, hypothesis, matplotlib, pytest_timeout, xdist' 2>/dev/null; then
    # A folder and no environment: the machine's own torch and numpy must be found beside it.
    target=$(mktemp -d)
    "$python" -m pip install --quiet --no-index --no-deps --target "$target" "$wheels"/*.whl >"$out/wheels.log" 2>&1 ||
        { echo "the wheels in $wheels could not be installed, see $out/wheels.log" >&2; exit 1; }
    export PYTHONPATH=$target${PYTHONPATH:+:$PYTHONPATH}
fi
for data in shared/data ../shared/data; do
    [ -n "${STEERING_DATA:-}" ] || [ ! -d "$data" ] || STEERING_DATA=$(cd "$data" && pwd)
done
[ -z "${STEERING_DATA:-}" ] || export STEERING_DATA
export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}
export OMP_NUM_THREADS=1 MPLBACKEND=Agg
exec "$python" tests/gpu/parts.py "$out" "$kind" "${@:3}"
