#!/bin/sh
# Prove on a machine with one CUDA GPU what a CPU cannot show, within the minutes that are given, and leave one report.
#
#   sh launch/prove_gpu.sh [--minutes 9] [--output DIR]    what is proven, and how: docs/prove_gpu.md
#   sh launch/prove_gpu.sh --only attention resume         some items; --no-install uses only what is there
#   sh launch/prove_gpu.sh --rehearse                      the same items on the CPU, tiny: no figure means anything
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
for python in python3 python3.14 python3.13 python3.12 python3.11 "${VIRTUAL_ENV:-$root/.venv}/bin/python"; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "$python" -m launch.benchmarks.prove_gpu.driver "$@"
    fi
done
echo "prove_gpu: error: Python 3.11 or newer is needed; found $(python3 --version 2>&1 || echo none)" >&2
exit 2
