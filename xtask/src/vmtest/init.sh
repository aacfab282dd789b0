#!/bin/sh
# The first process of a guest. It mounts file systems, loads modules, runs /command and prints its exit status.
export PATH=/usr/sbin:/usr/bin:/bin

fail() {
	echo "ebb-guest: cannot $1"
	reboot -f
}

mount -t proc proc /proc || fail "mount proc"
mount -t sysfs sysfs /sys || fail "mount sysfs"
mount -t devtmpfs devtmpfs /dev || fail "mount devtmpfs"
mkdir /dev/pts /dev/shm
mount -t devpts devpts /dev/pts || fail "mount devpts"
mount -t cgroup2 cgroup2 /sys/fs/cgroup || fail "mount cgroup2"
mount -t bpf bpf /sys/fs/bpf || fail "mount bpf"
for directory in /run /tmp /var/lib; do
	mount -t tmpfs tmpfs $directory || fail "mount a tmpfs on $directory"
done
for module in $(cat /modules/order); do
	insmod "/modules/$module.ko" || fail "load the module $module"
done
# systemd sets the limit to fs.nr_open, which is the maximum.
ulimit -n 1048576 || fail "raise the limit of open files"
ip link set lo up || fail "set lo up"

echo "ebb-guest: Linux $(uname -r)"
/command
echo "ebb-guest: exit status $?"
reboot -f
