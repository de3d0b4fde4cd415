#!/usr/bin/env bash
# A job of Slurm's: runs its arguments. Warned by SIGUSR1 that its time is nearly up, it lets the
# program save and end, and puts itself back into the queue, from where it goes on.
warned=
trap 'warned=1; kill -USR1 "$child"' USR1
trap 'kill -TERM "$child"' TERM
"$@" &
child=$!
while true; do
    wait "$child" # a signal interrupts it
    status=$?
    kill -0 "$child" 2>/dev/null || break
done
if [ -n "$warned" ] && [ "$status" -eq $((128 + 10)) ]; then # it ended because of the warning
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
