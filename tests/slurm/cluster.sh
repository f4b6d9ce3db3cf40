#!/bin/bash
# A private SLURM on this machine, for tests: a controller and three nodes, n1 to n3, with 4 processors and 2 (pretended) GPUs each.
#
#     tests/slurm/cluster.sh start FOLDER     its keys, sockets, logs and processes all belong to FOLDER
#     export SLURM_CONF=FOLDER/slurm.conf     from now on sbatch, squeue, scancel and scontrol speak to it
#     tests/slurm/cluster.sh kill FOLDER n2   as if somebody had pulled the plug of n2
#     tests/slurm/cluster.sh boot FOLDER n2   ... and put it back
#     tests/slurm/cluster.sh stop FOLDER
#
# It needs root and Debian's packages slurm-wlm and munge. It touches no service of the system and no file outside
# FOLDER. Each node has a host name of its own, and sees a list of hosts in which all nodes are this machine.
set -eu

complain() {
    echo "cluster.sh: $*" >&2
    exit 2
}

check() {
    local missing=""
    for program in munged slurmctld slurmd sbatch scontrol unshare; do
        command -v "$program" > /dev/null || missing="$missing $program"
    done
    [ -z "$missing" ] || complain "not found:$missing; apt-get install slurm-wlm munge"
    [ "$(id -u)" = 0 ] || complain "needs root, to give each node a host name"
    unshare --mount --uts true 2> /dev/null || complain "this container may not give a process its own host name"
}

free_ports() { # prints $1 ports that nobody uses, below those that the system gives to clients
    local port=$((20000 + RANDOM % 10000)) found=0
    while [ "$found" -lt "$1" ]; do
        if ! (exec 3<> "/dev/tcp/127.0.0.1/$port") 2> /dev/null; then
            echo "$port"
            found=$((found + 1))
        fi
        port=$((port + 1))
    done
}

configure() {
    local controller node1 node2 node3
    read -r controller node1 node2 node3 <<< "$(free_ports 4 | xargs)"
    dd if=/dev/urandom of="$folder/munge.key" bs=128 count=1 2> /dev/null
    chmod 400 "$folder/munge.key"
    { cat /etc/hosts; printf "127.0.1.1 n1\n127.0.1.2 n2\n127.0.1.3 n3\n"; } > "$folder/hosts"
    cat > "$folder/slurm.conf" << END
ClusterName=test
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$controller
SlurmUser=root
AuthType=auth/munge
# A job that was put back into the queue starts when the credentials of its last start have expired: 2 minutes, if not
# said otherwise.
AuthInfo=socket=$folder/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmctldPidFile=$folder/slurmctld.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdPidFile=$folder/%n.pid
SlurmdLogFile=$folder/%n.log
SlurmdSpoolDir=$folder/spool-%n
# No control groups, which a container may not have.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
# These nodes have more processors than this machine.
SlurmdParameters=config_overrides
ReturnToService=2
# What a site has at 30 to 300 seconds.
KillWait=20
SlurmdTimeout=10
SchedulerParameters=sched_interval=1,bf_interval=1
NodeName=n1 NodeHostname=n1 NodeAddr=127.0.0.1 Port=$node1 CPUs=4 Gres=gpu:2
NodeName=n2 NodeHostname=n2 NodeAddr=127.0.0.1 Port=$node2 CPUs=4 Gres=gpu:2
NodeName=n3 NodeHostname=n3 NodeAddr=127.0.0.1 Port=$node3 CPUs=4 Gres=gpu:2
PartitionName=test Nodes=n1,n2,n3 Default=YES MaxTime=INFINITE State=UP
END
    touch "$folder/gpu0" "$folder/gpu1"
    echo "Name=gpu File=$folder/gpu[0-1]" > "$folder/gres.conf"
}

wait_for_nodes() {
    export SLURM_CONF=$folder/slurm.conf
    for _ in $(seq 300); do
        [ "$(sinfo --noheader --format %t 2> /dev/null)" = idle ] && return
        sleep 0.2
    done
    complain "the nodes are not ready after 60 s: $(sinfo --noheader --Node --format '%N %t' | xargs); see $folder/*.log"
}

boot() { # the daemon of node $1, in its own namespace of mounts and of host names
    unshare --mount --uts bash -c '
        mount --bind "$1/hosts" /etc/hosts && hostname "$2" && exec slurmd -N "$2" -f "$1/slurm.conf"
    ' boot "$folder" "$1"
}

start() {
    check
    mkdir -p "$folder"/{state,spool-n1,spool-n2,spool-n3}
    chmod 755 "$folder"
    configure
    munged --force --key-file "$folder/munge.key" --socket "$folder/munge.socket" --pid-file "$folder/munged.pid" \
        --log-file "$folder/munged.log" --seed-file "$folder/munge.seed" 2> "$folder/munged.stderr" \
        || complain "munged did not start: $(tail -n 1 "$folder/munged.stderr")"
    export SLURM_CONF=$folder/slurm.conf
    slurmctld -f "$SLURM_CONF"
    boot n1
    boot n2
    boot n3
    wait_for_nodes
}

kill_node() { # node $1's daemon, and every process whose host name is the node's
    local here there
    here=$(readlink "/proc/$(cat "$folder/$1.pid")/ns/uts") || return 0
    for process in /proc/[0-9]*; do
        there=$(readlink "$process/ns/uts") || continue
        [ "$there" != "$here" ] || kill -KILL "${process#/proc/}"
    done
}

stop() { # jobs get a moment to end; then everything ends
    export SLURM_CONF=$folder/slurm.conf
    scancel --user root 2> /dev/null || true
    for _ in $(seq 100); do
        [ -n "$(squeue --noheader 2> /dev/null)" ] || break
        sleep 0.2
    done
    kill_node n1
    kill_node n2
    kill_node n3
    for daemon in slurmctld munged; do
        pid=$(cat "$folder/$daemon.pid" 2> /dev/null) || continue
        while kill "$pid" 2> /dev/null; do
            sleep 0.1
        done
    done
}

folder=$(realpath -m "${2:-}")
case $#$1 in
    2start) start ;;
    2stop) stop ;;
    3kill) kill_node "$3" ;;
    3boot) boot "$3" && wait_for_nodes ;;
    *) complain "expected: start FOLDER, stop FOLDER, kill FOLDER NODE, or boot FOLDER NODE" ;;
esac
