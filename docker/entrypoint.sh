#!/bin/sh
# The entry point of the images. Options alone are those of launch/train.py; anything else is a command.
#
#   docker run IMAGE --config configs/quickstart.yaml
#   docker run IMAGE python -m data_pipeline.prepare pystdlib --output data/pystdlib
set -eu

# `docker run --user 12345` gives an id without a name, and a home that does not exist or belongs to root. Libraries keep
# their caches in it, and torch asks for the name.
if [ ! -w "${HOME:-}" ]; then export HOME=/tmp; fi
if [ -z "${USER:-}" ]; then USER=$(id -un 2>/dev/null) || USER=uid-$(id -u); fi
export USER

case ${1:---help} in
    -*) exec python /opt/gptoss_dist/launch/train.py "${@:---help}" ;;
    *) exec "$@" ;;
esac
