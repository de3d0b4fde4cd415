#!/usr/bin/env bash
# The script of a Slurm job: runs its arguments. Warned by SIGUSR1 that its time is nearly up, it lets
# the program save and stop, and puts itself back into the queue, to resume when it starts again.
unset "${!SQUEUE_@}" SLURM_TIME_FORMAT # of the user's own, which change what squeue says
task=$SLURM_JOB_ID
if [ -n "$SLURM_ARRAY_TASK_ID" ]; then # the job's number may be that of the whole array
    task=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
fi
say() {
    echo "$(date '+%Y-%m-%d %H:%M:%S') $*"
}
is_time_up() { # rather than that somebody cancelled it
    local reason
    until reason=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format="%A %r"); do
        say "squeue does not answer; trying again"
        sleep 3
    done
    grep -qx "$SLURM_JOB_ID TimeLimit" <<<"$reason"
}
requeue() { # the job ends at its limit at the latest
    local try=1
    until scontrol requeue "$task"; do
        say "job $task cannot be requeued (try $try); trying again"
        try=$((try + 1))
        sleep 3
    done
}
warned=
trap '' USR1 # the program ignores it, too, until it can save
"$@" &
child=$!
trap 'warned=1' USR1
trap 'kill -TERM "$child"' TERM
while kill -0 "$child" 2>/dev/null; do
    wait "$child" # a signal interrupts it
    while [ -n "$warned" ] && kill -USR1 "$child" 2>/dev/null; do
        sleep 1
    done
done
wait "$child"
status=$?
trap '' USR1
case $status in
138) [ -z "$warned" ] || requeue ;; # stopped by the warning
143) ! is_time_up || requeue ;;     # which came too late for a program that was still starting
esac
exit "$status"
