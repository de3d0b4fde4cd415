#!/usr/bin/env bash
# A job of Slurm's: runs its arguments. Warned by SIGUSR1 that its time is nearly up, it lets the
# program save and end, and puts itself back into the queue, to resume when it starts again.
task=$SLURM_JOB_ID
if [ -n "$SLURM_ARRAY_TASK_ID" ]; then # the job's number may be the one of the whole array
    task=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
fi
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
if [ -n "$warned" ] && [ "$status" -eq $((128 + 10)) ]; then # it ended because of the warning
    scontrol requeue "$task"
fi
exit "$status"
