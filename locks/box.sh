#!/bin/sh
# Re-makes locks/box-NAME.lock: locks/box.sh NAME [--upgrade]. One lock for every platform and Python (markers kept),
# hashes of every file. --fork-strategy fewest: one version of each package for all Pythons, so that every box runs the
# same code. Index addresses are left out on purpose: pip's own configuration decides where files come from.
set -eu
cd "$(dirname "$0")/.."
name=$1
shift
excludes=locks/box-excludes.txt
case $name in
    llamacpp | vllm | tensorrt | tensorrt_rtx | tensorrt_decoder) python=3.10 ;;
    transformers) python=3.11 excludes=/dev/null ;;  # torch has no wheel for 3.10; transformers imports the hub's library
    edgellm) python=3.12 excludes=/dev/null ;;  # JetPack 7.2; its server imports what it downloads models with
    *) python=3.11 ;;  # onnxruntime has no wheel for 3.10
esac
exec "${UV:-uv}" pip compile --universal --generate-hashes --python-version "$python" --fork-strategy fewest \
    --only-binary :all: --excludes "$excludes" --no-emit-index-url --no-emit-find-links \
    --custom-compile-command "locks/box.sh $name" --quiet "$@" \
    "locks/box-$name.in" --output-file "locks/box-$name.lock"
