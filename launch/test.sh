#!/bin/sh
# Install with the test tools and run the tests.
#
#   sh launch/test.sh                      all that a change must pass
#   sh launch/test.sh --fast               before each commit: no further processes, no compilation, nothing long
#   sh launch/test.sh --slow               before a release: the slow variants too
#   sh launch/test.sh tests/model -k rope  what pytest's arguments select
#
# Several processes of pytest run side by side: two halves that compute, which take about as long, and the tests that
# mostly wait: for SLURM, cut cables, stalled and missing ranks. Their reports come one after the other. --fast spreads its
# tests over all cores.
# Options for all of them: PYTEST_ADDOPTS. What the groups are: docs/testing.md.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
venv=${VIRTUAL_ENV:-$root/.venv}
sh "$root/launch/install.sh" --venv "$venv" --extras test
cd "$root"
# What is computed in one process is small, and other processes of tests run beside it: half of the cores.
cores=$(nproc)
export OMP_NUM_THREADS=$(((cores + 1) / 2))

case ${1-} in
    --fast)
        shift
        export OMP_NUM_THREADS=1
        exec "$venv/bin/python" -m pytest -n "$cores" --dist worksteal \
            -m "not (slow or distributed or compiled or heavy)" "$@"
        ;;
    --slow) shift; group="" ;;
    *) group=" and not slow" ;;
esac
if [ $# -gt 0 ]; then
    exec "$venv/bin/python" -m pytest "$@"
fi

reports=$(mktemp -d)
# shellcheck disable=SC2317,SC2046  # called by the trap; the ids are words
end() {
    # They hear SIGTERM as an interruption (tests/conftest.py), and end what they have started. A variable that is set
    # after each start could miss the last one.
    jobs -p >"$reports/started"
    kill $(cat "$reports/started") 2>/dev/null || true
    wait
    rm -rf "$reports"
}
trap end EXIT
trap 'exit 130' INT TERM

# Usage: pytest_of EXPRESSION [ARGUMENTS], in the background: becomes pytest
pytest_of() {
    expression=$1
    shift
    exec "$venv/bin/python" -m pytest -m "($expression)$group" "$@"
}

pytest_of "distributed" tests/slurm tests/netns tests/distributed >"$reports/waiting" 2>&1 &
waiting=$!
pytest_of "distributed and not compiled" --ignore tests/engine --ignore tests/slurm --ignore tests/netns \
    --ignore tests/distributed >"$reports/processes" 2>&1 &
beside="$waiting $!"
status=0
pytest_of "(compiled or not distributed) and not (slurm or netns)" &
wait $! || status=$?
pytest_of "distributed and not compiled" tests/engine &
wait $! || status=$?
for pid in $beside; do
    wait "$pid" || status=$?
done
cat "$reports/waiting" "$reports/processes"
exit "$status"
