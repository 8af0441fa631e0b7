#!/usr/bin/env bash
# Plain ssh: the same command on every host, until all have ended. Ctrl-C or SIGTERM lets them save first.
#   HOSTS="node1 node2" docs/launch/ssh.sh --config ee_tuning --workdir /shared/runs/exits
set -uo pipefail

: "${HOSTS:?name the hosts; all must reach the first one}"
read -ra hosts <<< "$HOSTS"
folder=$(printf %q "${FOLDER:-$PWD}") # the same on every host
coordinator=${COORDINATOR:-${hosts[0]}:${PORT:-8476}}
printf -v arguments ' %q' "$@"

start() {
  local place="--coordinator $coordinator --processes ${#hosts[@]} --process $1"
  local run="cd $folder && echo \$\$ > .launch.$1 && exec ${RUN:-elastic-lm} train$arguments $place"
  ssh -n -o BatchMode=yes "${hosts[$1]}" "$run" 2>&1 | sed -u "s/^/$1: /"
}

stop() {
  for i in "${!hosts[@]}"; do
    ssh -n -o BatchMode=yes "${hosts[$i]}" "kill -TERM \$(cat $folder/.launch.$i)" 2> /dev/null
  done
}

trap stop INT TERM
for i in "${!hosts[@]}"; do start "$i" & done

status=0
for job in $(jobs -p); do
  wait "$job"
  code=$?
  while kill -0 "$job" 2> /dev/null; do # a trap has ended the wait early, with a status of its own
    wait "$job"
    code=$?
  done
  [ "$code" -eq 0 ] || status=$code
done
exit "$status"
