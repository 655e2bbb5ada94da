#!/usr/bin/env bash
# Tries what a user does who has no checkout: a wheel built from the sdist, installed into a bare environment, runs the
# demo. With `image` the same through the Dockerfile, by buildah in a Debian that mmdebstrap makes. Minutes and 2 GB, so
# no test of the suite calls it.
#
#   containers/try.sh [image] [DEMO_ARGUMENTS ...]       needs: pip install build; for an image root, buildah, mmdebstrap
#
# MIRROR: of Debian, for mmdebstrap. OPTIONS: of buildah bud, as -v HERE:THERE:ro with a pip.conf of this site.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3} OPTIONS=${OPTIONS:-}

if [ "${1-}" = image ]; then
    shift
    mmdebstrap --variant=minbase --include=python3-venv,ca-certificates bookworm "$work/base.tar" ${MIRROR:-}
    base=$(buildah from scratch)
    buildah add --quiet "$base" "$work/base.tar" /
    buildah commit --quiet "$base" steering-base
    buildah rm "$base"
    # shellcheck disable=SC2086 # several options in one variable
    buildah bud --isolation chroot $OPTIONS --build-arg BASE=localhost/steering-base -f containers/Dockerfile -t steering-try .
    made=$(buildah from steering-try)
    buildah run --isolation chroot "$made" -- steering demo --out /data/run "$@"
    buildah run --isolation chroot "$made" -- steering status /data/run
    buildah rm "$made"
    buildah rmi steering-try steering-base
    exit
fi

git archive --format=tar HEAD | tar -x -C "$work" # what is committed, and no leftovers
"$python" -m build --outdir "$work/dist" "$work" >"$work/build.log" || { tail -20 "$work/build.log"; exit 1; }
ls -l "$work/dist"
EXTRAS="" sh containers/install.sh "$work/environment" "$work"/dist/*.whl
cd "$work"
environment/bin/steering demo --out run "$@"
environment/bin/steering status run
test -s run/report.html
