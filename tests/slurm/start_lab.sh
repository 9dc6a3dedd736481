#!/usr/bin/env bash
# Start a real SLURM of one controller and several nodes on this machine, as root and without systemd.
#
#   tests/slurm/start_lab.sh FOLDER [NODES]     # then: tests/slurm/in_lab.sh FOLDER sbatch ...
#   tests/slurm/stop_lab.sh FOLDER
#
# Needed, on Debian: apt-get install -y --no-install-recommends slurm-wlm slurm-client munge iproute2
#
# The controller and each node have network, hostname and /etc/hosts of their own: namespaces NAME-ctl, NAME-node1, ...,
# where NAME is made of FOLDER. The switch between them lies in the controller's, so the machine's own network is not
# touched and two labs cannot meet. A node claims 8 processors and 2 GPUs, whatever the machine has.
# Jobs of the partition `high` push out those of `main`, after a grace time and with SIGTERM, as SLURM does by default.
set -euo pipefail

folder=$1 nodes=${2:-2}
[[ $(id -u) = 0 ]] || { echo "start_lab.sh: only root can make network namespaces" >&2; exit 1; }
for tool in munged slurmctld slurmd sbatch ip nsenter unshare; do
    command -v "$tool" >/dev/null || { echo "start_lab.sh: $tool is not installed" >&2; exit 1; }
done

umask 022
mkdir -p "$folder"/{munge,state,log,run,spool,dev}
folder=$(cd "$folder" && pwd)
chmod 711 "$folder" "$folder/munge" # munged asks for it
name=slurm$(printf '%s' "$folder" | cksum | cut -d ' ' -f 1)
echo "$name" >"$folder/name"

write_settings() {
    dd if=/dev/urandom of="$folder/munge/key" bs=1024 count=1 status=none
    chmod 400 "$folder/munge/key"
    for gpu in 0 1; do mknod "$folder/dev/gpu$gpu" c 1 3; done # like /dev/null: SLURM wants character devices
    echo "CgroupAutomount=no" >"$folder/cgroup.conf"
    cat >"$folder/gres.conf" <<END
AutoDetect=off
NodeName=node[1-$nodes] Name=gpu File=$folder/dev/gpu[0-1]
END
    {
        echo 127.0.0.1 localhost
        echo 10.77.0.1 ctl
        for i in $(seq "$nodes"); do echo "10.77.0.$((10 + i)) node$i"; done
    } >"$folder/hosts"
    cat >"$folder/slurm.conf" <<END
ClusterName=lab
SlurmctldHost=ctl(10.77.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$folder/munge/socket
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/slurmd-%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=5,batch_sched_delay=1
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=20
InactiveLimit=0
KillWait=20
MinJobAge=600
PropagateResourceLimits=NONE
$(for i in $(seq "$nodes"); do echo "NodeName=node$i NodeAddr=10.77.0.$((10 + i)) CPUs=8 RealMemory=16000 Gres=gpu:2"; done)
PartitionName=main Nodes=node[1-$nodes] Default=YES DefaultTime=10 PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=node[1-$nodes] DefaultTime=10 PriorityTier=10 PreemptMode=OFF
END
}

connect() {
    ip netns add "$name-ctl"
    ip -n "$name-ctl" link set lo up
    ip -n "$name-ctl" link add switch type bridge
    ip -n "$name-ctl" addr add 10.77.0.1/24 dev switch
    ip -n "$name-ctl" link set switch up
    for i in $(seq "$nodes"); do
        ip netns add "$name-node$i"
        ip -n "$name-ctl" link add "port$i" type veth peer name eth0 netns "$name-node$i"
        ip -n "$name-ctl" link set "port$i" master switch up
        ip -n "$name-node$i" addr add "10.77.0.$((10 + i))/24" dev eth0
        ip -n "$name-node$i" link set lo up
        ip -n "$name-node$i" link set eth0 up
    done
}

here=$(cd "$(dirname "$0")" && pwd)
if [[ ! -e $folder/slurm.conf ]]; then
    write_settings
    connect
    nsenter --net="/run/netns/$name-ctl" munged --key-file="$folder/munge/key" --socket="$folder/munge/socket" \
        --pid-file="$folder/run/munged.pid" --log-file="$folder/log/munged.log" --seed-file="$folder/munge/seed" \
        --num-threads=2
    bash "$here/in_lab.sh" "$folder" slurmctld -i
fi
for i in $(seq "$nodes"); do bash "$here/start_node.sh" "$folder" "node$i"; done

for _ in $(seq 100); do
    ready=$(bash "$here/in_lab.sh" "$folder" sinfo -h -N -p main -o '%T' 2>/dev/null | grep -c '^idle$') || true
    [[ $ready = "$nodes" ]] && exit 0
    sleep 0.3
done
echo "start_lab.sh: the nodes did not come up; the end of their logs:" >&2
tail -n 5 "$folder"/log/*.log >&2
exit 1
