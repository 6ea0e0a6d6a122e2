#!/usr/bin/env bash
# node.sh FOLDER I: switches node I of a lab on, after boot.sh or after the node died.
#
# FOLDER/nodeI/pid then has the pid of the node's first process, as the lab counts them: who kills it takes the node's
# slurmd, its steps and all processes of its jobs along, at once.
set -euo pipefail
lab=$1 name=node$2
export PATH=$PATH:/usr/sbin:/sbin SLURM_CONF=$lab/slurm.conf
unset TMPDIR
mkdir -p "$lab/$name/spool" "$lab/$name/local"
rm -f "$lab/$name/pid"

# shellcheck disable=SC2016  # expanded by the shell of the node
nsenter --net="/run/netns/$name" setsid unshare --pid --fork --kill-child --uts --ipc --mount bash -c '
    set -eu
    lab=$1 name=$2
    read -r pid _ < /proc/self/stat   # /proc is still that of the lab
    mount -t proc proc /proc
    mount -t tmpfs -o mode=1777 tmpfs /dev/shm
    mount --bind "$lab/$name/local" "$lab/local"
    hostname "$name"
    echo "$pid" > "$lab/$name/.pid"
    mv "$lab/$name/.pid" "$lab/$name/pid"
    slurmd -D -N "$name" &
    sleep infinity &
    wait
' node "$lab" "$name" < /dev/null > "$lab/log/$name.out" 2>&1 &

until [ -e "$lab/$name/pid" ]; do sleep 0.01; done
