#!/bin/sh
# One part of `make gpu`: a command with a share of the time, its output in a log, and one line on how it went.
#
#     GPU_OUT=DIR GPU_SECONDS=1500 sh benchmarks/stage.sh NAME PERCENT COMMAND...
#
# What takes longer is interrupted, as Ctrl-C does, and killed with its children ten seconds later.
name=$1 limit=$((GPU_SECONDS * $2 / 100))
shift 2
mkdir -p "$GPU_OUT"
log=$GPU_OUT/$name.log
started=$(date +%s)
timeout --kill-after=10 --signal=INT "$limit" "$@" > "$log" 2>&1
status=$?
case $status in
0) outcome=ok ;;
124 | 137) outcome="timed out" ;;
*) outcome=failed ;;
esac
last=$(grep -v '^ *$' "$log" | tail -n 1 | cut -c 1-160)
printf '%-10s %-9s %5d s  %s\n' "$name" "$outcome" $(($(date +%s) - started)) "$last" | tee -a "$GPU_OUT/summary.txt"
exit $status
