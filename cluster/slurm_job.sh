#!/usr/bin/env bash
# The script of a Slurm job: runs its arguments. Warned by SIGUSR1 that its time is nearly up, it lets
# the program save and stop, and puts itself back into the queue, to resume when it starts again.
task=$SLURM_JOB_ID
if [ -n "$SLURM_ARRAY_TASK_ID" ]; then # the job's number may be that of the whole array
    task=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
fi
is_time_up() { # rather than that somebody cancelled it
    squeue --noheader --jobs="$SLURM_JOB_ID" --format="%A %r" | grep -qx "$SLURM_JOB_ID TimeLimit"
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
case $status in
138) [ -z "$warned" ] || scontrol requeue "$task" ;; # stopped by the warning
143) ! is_time_up || scontrol requeue "$task" ;;     # which came too late for a program that was still starting
esac
exit "$status"
