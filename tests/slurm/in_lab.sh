#!/usr/bin/env bash
# Run a command on the controller of a lab: tests/slurm/in_lab.sh FOLDER sbatch --nodes 2 ...
set -euo pipefail

folder=$1
shift
export SLURM_CONF=$folder/slurm.conf
# shellcheck disable=SC2016  # the inner shell expands it
exec nsenter --net="/run/netns/$(cat "$folder/name")-ctl" unshare --uts --mount sh -c '
    hostname ctl
    mount --bind "$1/hosts" /etc/hosts
    shift
    exec "$@"' sh "$folder" "$@"
