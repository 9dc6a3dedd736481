#!/usr/bin/env bash
# Start the daemon of one node of a lab, unless it runs: tests/slurm/start_node.sh FOLDER node1
set -euo pipefail

folder=$1 node=$2
name=$(cat "$folder/name")
pid=$(cat "$folder/run/slurmd-$node.pid" 2>/dev/null || true)
if [[ -n $pid ]] && tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | grep -qF "slurmd -N $node -f $folder/"; then exit 0; fi
# The first processes of a mount namespace decide what its processes see: their own hosts file.
# shellcheck disable=SC2016  # the inner shell expands it
exec nsenter --net="/run/netns/$name-$node" unshare --uts --mount sh -c '
    hostname "$1"
    mount --bind "$2/hosts" /etc/hosts
    exec slurmd -N "$1" -f "$2/slurm.conf"' sh "$node" "$folder"
