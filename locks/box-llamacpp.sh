#!/bin/sh
# Re-makes locks/box-llamacpp.lock: one lock for every platform and Python (markers kept), hashes of every file.
# --fork-strategy fewest: one version of each package for all Pythons, so that every box runs the same code.
# Index addresses are left out on purpose: pip's own configuration decides where files come from.
set -eu
cd "$(dirname "$0")/.."
exec "${UV:-uv}" pip compile --universal --generate-hashes --python-version 3.10 --fork-strategy fewest \
    --only-binary :all: --excludes locks/box-excludes.txt --no-emit-index-url --no-emit-find-links \
    --custom-compile-command locks/box-llamacpp.sh --quiet "$@" \
    locks/box-llamacpp.in --output-file locks/box-llamacpp.lock
