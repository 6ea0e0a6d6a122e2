#!/usr/bin/env bash
# A Slurm of several nodes on this machine, for tests: no systemd, no cgroups, up in about a second.
#
#   unshare --pid --fork --kill-child --net --mount --ipc --uts lab/boot.sh FOLDER NODES CPUS GPUS
#
# It is the first process of namespaces of its own and stands for the login node and the controller. When it is killed,
# the kernel ends every process of the lab, and the network goes with them: all that is left is FOLDER. Two labs share
# nothing. Each node is a further set of namespaces (node.sh), with an address, a hostname and a /dev/shm of its own.
#
# Says "ready" when all nodes are. FOLDER/extra.conf, if it is there, goes into slurm.conf.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
lab=$1 nodes=$2 cpus=$3 gpus=$4
export PATH=$PATH:/usr/sbin:/sbin SLURM_CONF=$lab/slurm.conf
cd "$lab"
mkdir state log local
read -r pid _ < /proc/self/stat # still as the machine counts
echo "$pid" > pid

mount -t proc proc /proc
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/netns
hostname login
{
    printf '127.0.0.1 localhost\n10.0.0.1 login\n'
    # Sockets of both families show an IPv4 peer in the second form.
    for i in $(seq "$nodes"); do printf '10.0.0.%d node%d\n::ffff:10.0.0.%d node%d\n' $((10 + i)) "$i" $((10 + i)) "$i"; done
} > hosts
mount --bind hosts /etc/hosts

# One switch, and a cable to each node.
ip link set lo up
ip link add name lab0 type bridge
ip addr add 10.0.0.1/24 dev lab0
ip link set lab0 up
for i in $(seq "$nodes"); do
    ip netns add "node$i"
    ip link add name "cable$i" type veth peer name eth0 netns "node$i"
    ip link set "cable$i" master lab0 up
    ip -n "node$i" link set lo up
    ip -n "node$i" addr add "10.0.0.$((10 + i))/24" dev eth0
    ip -n "node$i" link set eth0 up
done

# Pretended GPUs: Slurm wants a device file for each, and hands out CUDA_VISIBLE_DEVICES.
node_gpus='' gpu_types=''
if [ "$gpus" -gt 0 ]; then
    for i in $(seq 0 $((gpus - 1))); do mknod -m 666 "gpu$i" c 1 3; done
    echo "Name=gpu File=$lab/gpu[0-$((gpus - 1))]" > gres.conf
    node_gpus="Gres=gpu:$gpus" gpu_types='GresTypes=gpu'
fi

# Without a named plugin slurmd looks for a mounted cgroup file system, which a container may not have.
cgroups=cgroup/v1
case $(slurmctld -V) in *' 2'[0-2].* | *' 23.02'*) ;; *) cgroups=disabled ;; esac
echo "CgroupPlugin=$cgroups" > cgroup.conf

cat > slurm.conf <<CONF
ClusterName=lab
SlurmctldHost=login(10.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job is held for as long as credentials last, and a second; 5 is the least.
AuthInfo=socket=/run/munge.socket,cred_expire=5
StateSaveLocation=$lab/state
SlurmctldPidFile=/run/slurmctld.pid
SlurmctldLogFile=$lab/log/slurmctld.log
SlurmdSpoolDir=$lab/%n/spool
SlurmdPidFile=/run/slurmd-%n.pid
SlurmdLogFile=$lab/log/slurmd-%n.log
TmpFS=$lab/local
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
# More processors than the machine has.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
$gpu_types
# A lost node is noticed, and its job requeued, in seconds.
SlurmdTimeout=5
MessageTimeout=3
ReturnToService=2
KillWait=3
UnkillableStepTimeout=20
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=0,sched_interval=1,batch_sched_delay=0,bf_interval=1
JobRequeue=1
MinJobAge=3600
# What can never run is refused at once.
EnforcePartLimits=ALL
NodeName=node[1-$nodes] Sockets=1 CoresPerSocket=$cpus ThreadsPerCore=1 RealMemory=4000 $node_gpus State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES DefaultTime=10 MaxTime=INFINITE State=UP
CONF
if [ -f extra.conf ]; then cat extra.conf >> slurm.conf; fi

# Its own key and socket: what the machine has in /etc/munge and /run/munge is not touched.
(umask 077 && head -c 128 /dev/urandom > /run/munge.key)
munged --socket=/run/munge.socket --key-file=/run/munge.key --pid-file=/run/munged.pid --seed-file=/run/munge.seed \
    --log-file="$lab/log/munged.log" --num-threads=2
slurmctld -c
for i in $(seq "$nodes"); do "$here/node.sh" "$lab" "$i"; done

until [ "$(timeout 5 sinfo --noheader --responding --states=idle --format=%D 2> /dev/null)" = "$nodes" ]; do sleep 0.05; done
echo ready
# As the first process it also reaps whatever lost its parent.
sleep infinity &
wait
