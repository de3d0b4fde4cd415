#!/usr/bin/env bash
# Starts a real one-node Slurm (Debian's slurm-wlm and munge) on this machine, as root: eight pretend CPUs, one pretend
# GPU. Usage: start-slurm.sh DIR, a short path; then export SLURM_CONF=DIR/slurm.conf. It ends with
# kill $(cat DIR/*.pid)
set -euo pipefail
dir=$1
host=$(hostname -s)
port=$((20000 + RANDOM % 10000)) # not those of a Slurm that runs here
mkdir -p "$dir"/state "$dir"/spool "$dir"/munge
# cred_expire is also how long a job that was requeued waits before it may start again. A job is over when its batch
# script is, and all processes of its group are killed with it, as on most clusters.
cat >"$dir/slurm.conf" <<END
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmdPort=$((port + 1))
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
MailProg=/bin/true
ReturnToService=2
KillWait=5
MessageTimeout=5
SlurmdParameters=config_overrides
JobRequeue=1
GresTypes=gpu
NodeName=$host NodeAddr=127.0.0.1 CPUs=8 RealMemory=64000 Gres=gpu:1 State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=$host MaxTime=INFINITE State=UP PriorityTier=10
END
echo "Name=gpu Count=1 File=/dev/null" >"$dir/gres.conf"
export SLURM_CONF=$dir/slurm.conf
# a munge of its own: the machine may have one, or another such test
(umask 077 && head -c 1024 /dev/urandom >"$dir/munge/key")
setsid munged --force --key-file="$dir/munge/key" --socket="$dir/munge/socket" --pid-file="$dir/munged.pid" \
    --log-file="$dir/munge/log" --seed-file="$dir/munge/seed" 2>/dev/null
setsid slurmctld -c -f "$SLURM_CONF"
setsid slurmd -c -f "$SLURM_CONF"
for _ in $(seq 100); do # until the node is ready
    sinfo --noheader --format=%T 2>/dev/null | grep -q idle && exit 0
    sleep 0.2
done
sinfo >&2
exit 1
