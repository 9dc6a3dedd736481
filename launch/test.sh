#!/bin/sh
# Install with the test tools and run the tests. Further arguments are pytest's.
#
#   sh launch/test.sh                      all that a change must pass
#   sh launch/test.sh --fast               before each commit: no further processes, no compilation
#   sh launch/test.sh --slow               before a release: the slow variants too
#   sh launch/test.sh tests/model -k rope  some of them
set -eu
selection="not slow"
case ${1-} in
    --fast) selection="not slow and not distributed and not compiled"; shift ;;
    --slow) selection=""; shift ;;
esac
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
venv=${VIRTUAL_ENV:-$root/.venv}
sh "$root/launch/install.sh" --venv "$venv" --extras test
cd "$root"
# A thread count exported for a launcher's many processes would slow down the one process here.
unset OMP_NUM_THREADS
exec "$venv/bin/python" -m pytest -m "$selection" "$@"
