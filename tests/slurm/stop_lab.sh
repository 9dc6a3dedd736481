#!/usr/bin/env bash
# Stop a lab and remove its folder: tests/slurm/stop_lab.sh FOLDER
#
# Whatever lives in the lab's network namespaces belongs to the lab: daemons, job steps, and what these left behind.
set -uo pipefail

folder=$1
name=$(cat "$folder/name" 2>/dev/null) || exit 0
mapfile -t spaces < <(ip netns list | cut -d ' ' -f 1 | grep -E "^$name-(ctl|node[0-9]+)\$")
for signal in TERM KILL; do
    for space in "${spaces[@]}"; do
        for pid in $(ip netns pids "$space" 2>/dev/null); do kill -s "$signal" "$pid" 2>/dev/null; done
    done
    sleep 0.5
done
for space in "${spaces[@]}"; do ip netns del "$space"; done
rm -rf "$folder"
