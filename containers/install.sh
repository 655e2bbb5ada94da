#!/bin/sh
# Installs steering into a new environment: the one recipe of the Dockerfile, of the Apptainer definition and of try.sh.
#
#   containers/install.sh PREFIX [WHEEL]      PREFIX: of the environment; WHEEL: instead of this checkout
#
# EXTRAS (dectris,epics,jobqueue): which extras. pip's own variables say where packages come from; without a GPU
# PIP_EXTRA_INDEX_URL, set to the CPU wheels that PyTorch's install page names, saves several GB.
set -eu
prefix=$1
here=$(cd "$(dirname "$0")/.." && pwd)
what=${2:-$here}
extras=${EXTRAS-dectris,epics,jobqueue}

if ! python3 -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    command -v apt-get >/dev/null || {
        echo "install.sh: found no Python of 3.11 or newer with venv, expected one: install it first" >&2
        exit 1
    }
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends python3 python3-venv ca-certificates
fi
python3 -m venv "$prefix"
"$prefix/bin/pip" install --quiet --no-cache-dir -c "$here/constraints.txt" torch
"$prefix/bin/pip" install --quiet --no-cache-dir -c "$here/constraints.txt" "$what${extras:+[$extras]}"
"$prefix/bin/pip" check
"$prefix/bin/steering" doctor "${TMPDIR:-/tmp}"
