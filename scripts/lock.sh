#!/bin/sh
# Re-makes every lock of the build machine: ./scripts/lock.sh [--upgrade]. Needs uv (pip install uv).
# Index addresses are left out on purpose: pip's own configuration decides where files come from.
set -eu
cd "$(dirname "$0")/.."
if [ -z "${UV:-}" ] && [ -x .venv/bin/uv ]; then
    export UV="$PWD/.venv/bin/uv" # set-up's
fi

compile() {
    name=$1
    shift
    "${UV:-uv}" pip compile --universal --generate-hashes --python-version 3.11 --no-emit-index-url --no-emit-find-links \
        --custom-compile-command scripts/lock.sh --quiet "$@" "locks/$name.in" --output-file "locks/$name.lock"
}

for box in locks/box-*.in; do
    name=${box#locks/box-}
    ./locks/box.sh "${name%.in}" "$@"
done
# What runs on the box is also run here (scoring, bench, serve): in the same versions, hence the constraint.
compile build -c locks/box-llamacpp.lock -c locks/box-ort.lock --override locks/without-torch.in --no-emit-package torch "$@"
compile test -c locks/build.lock --override locks/without-torch.in --no-emit-package torch "$@"
compile uv --no-deps "$@"
compile demo --no-deps "$@"
compile test-data --no-deps "$@"
compile tensorrt --no-deps "$@"
echo "torch-cpu.lock is kept by hand: its header says how." >&2
