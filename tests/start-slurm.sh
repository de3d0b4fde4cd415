#!/usr/bin/env bash
# Starts a real one-node Slurm (Debian's slurm-wlm and munge) on this machine, as root, with one pretend GPU.
# Usage: start-slurm.sh DIR; then export SLURM_CONF=DIR/slurm.conf. It ends with
# kill $(cat DIR/slurmd.pid) $(cat DIR/slurmctld.pid)
set -euo pipefail
dir=$1
host=$(hostname -s)
port=$((20000 + RANDOM % 10000)) # not those of a Slurm that runs here
mkdir -p "$dir"/state "$dir"/spool
# cred_expire is also how long a job that was requeued waits before it may start again.
cat >"$dir/slurm.conf" <<END
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmdPort=$((port + 1))
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
CryptoType=crypto/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MailProg=/bin/true
ReturnToService=2
JobRequeue=1
GresTypes=gpu
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc --all) RealMemory=20000 Gres=gpu:1 State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP
END
echo "Name=gpu Count=1 File=/dev/null" >"$dir/gres.conf"
export SLURM_CONF=$dir/slurm.conf
mkdir -p /run/munge && chown munge:munge /run/munge
pgrep -x munged >/dev/null || setsid runuser -u munge -- munged --force
setsid slurmctld -c -f "$SLURM_CONF"
setsid slurmd -c -f "$SLURM_CONF"
for _ in $(seq 100); do # until the node is ready
    sinfo --noheader --format=%T 2>/dev/null | grep -q idle && exit 0
    sleep 0.2
done
sinfo >&2
exit 1
