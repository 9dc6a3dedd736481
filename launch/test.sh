#!/bin/sh
# Install with the test tools and run the tests.
#
#   sh launch/test.sh                      all that a change must pass
#   sh launch/test.sh --fast               before each commit: no further processes, no compilation
#   sh launch/test.sh --slow               before a release: the slow variants too
#   sh launch/test.sh tests/model -k rope  what pytest's arguments select
#
# Two processes of pytest run side by side: tests that start processes, and all others, among them those that compile
# and those that mostly wait (for SLURM, for cut cables). The report of the former comes last. --fast spreads its tests over all cores.
# Options for both halves: PYTEST_ADDOPTS. What the groups are: docs/testing.md.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
venv=${VIRTUAL_ENV:-$root/.venv}
sh "$root/launch/install.sh" --venv "$venv" --extras test
cd "$root"
# What is computed in one process is small, and another process of tests runs beside it: half of the cores.
cores=$(nproc)
export OMP_NUM_THREADS=$(((cores + 1) / 2))

case ${1-} in
    --fast)
        shift
        export OMP_NUM_THREADS=1
        exec "$venv/bin/python" -m pytest -n "$cores" --dist worksteal \
            -m "not slow and not distributed and not compiled" "$@"
        ;;
    --slow) shift; group="" ;;
    *) group=" and not slow" ;;
esac
if [ $# -gt 0 ]; then
    exec "$venv/bin/python" -m pytest "$@"
fi

report=$(mktemp)
apart="compiled or slurm or netns"
"$venv/bin/python" -m pytest -m "distributed and not ($apart)$group" >"$report" 2>&1 &
beside=$!
trap 'kill "$beside" 2>/dev/null || true; rm -f "$report"' EXIT
trap 'exit 130' INT TERM
status=0
"$venv/bin/python" -m pytest -m "($apart or not distributed)$group" || status=$?
wait "$beside" || status=$?
cat "$report"
exit "$status"
