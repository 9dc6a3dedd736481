#!/bin/sh
# Install with the test tools and run the tests: all of them, or what the arguments (pytest's) select.
#
#   sh launch/test.sh [tests/model -k rope ...]
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
venv=${VIRTUAL_ENV:-$root/.venv}
sh "$root/launch/install.sh" --venv "$venv" --extras test
cd "$root"
# A thread count exported for a launcher's many processes would slow down the one process here.
unset OMP_NUM_THREADS
exec "$venv/bin/python" -m pytest "$@"
