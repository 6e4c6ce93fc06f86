# Within a root of Debian, as root: the packages, an ordinary user, an image of Debian's own programs; then the list of
# user.sh, or podman's own. Any failure ends it.
set -euo pipefail

dpkg -i /media/debs/*.deb >/tmp/said 2>&1 || {
    cat /tmp/said >&2
    exit 1
}
useradd --create-home tester
mount -t tmpfs -o size=3G none /home/tester # containers' file systems are not on an overlay
runtime=/run/user/$(id -u tester)
mkdir -p "$runtime" /sys/fs/cgroup/tester
chown -R tester: /home/tester "$runtime" /sys/fs/cgroup/tester
chmod 700 "$runtime"
echo $$ >/sys/fs/cgroup/tester/cgroup.procs # delegated, as a login does
cat >/etc/containers/containers.conf <<'EOF'
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
helper_binaries_dir = ["/usr/lib/passt-python/bin", "/usr/libexec/podman", "/usr/lib/podman"]
EOF
mount --make-rshared /

# The image: busybox, and those whose output tests read
tree=/tmp/image
mkdir -p $tree/{bin,etc,tmp,root,proc,sys,dev,run,usr,home/podman,var/tmp}
ln -s bin $tree/sbin
ln -s ../bin $tree/usr/bin
chmod 1777 $tree/tmp
cp /bin/busybox $tree/bin
for applet in $(busybox --list); do
    [ -e "$tree/bin/$applet" ] || ln -s busybox "$tree/bin/$applet"
done
for name in getent ip socat ss; do
    path=$(readlink -f "$(command -v $name)")
    rm -f $tree/bin/$name
    cp "$path" $tree/bin/$name
    for library in $(ldd "$path" | grep -o '/[^ ]*'); do
        mkdir -p "$tree$(dirname "$library")"
        cp -L "$library" "$tree$library"
    done
done
echo root:x:0:0:root:/root:/bin/sh >$tree/etc/passwd
echo root:x:0: >$tree/etc/group
cat >$tree/home/podman/bytecheck <<'EOF'
#!/bin/sh
exec md5sum
EOF
chmod 755 $tree/home/podman/bytecheck
tar -C $tree -cf /tmp/image.tar .

as_tester() {
    setpriv --reuid tester --regid tester --init-groups env HOME=/home/tester XDG_RUNTIME_DIR="$runtime" \
        PATH=/usr/lib/passt-python/bin:/usr/sbin:/usr/bin:/sbin:/bin "$@"
}
sysctl -qw net.ipv4.ip_unprivileged_port_start=0
cd /tmp
image=quay.io/libpod/testimage:20241011 # the name that podman's tests look for
as_tester podman import --quiet --change WORKDIR=/home/podman --change 'CMD ["/bin/true"]' image.tar $image >/dev/null
if [ -e /media/bats/505-networking-pasta.bats ]; then
    cp -r /media/bats /tmp/bats
    cd /tmp/bats
    as_tester bats --timing 505-networking-pasta.bats
else
    tar -C /media/base -cf /tmp/base.tar . # the base of the image of packaging/Containerfile
    as_tester bash /media/test/user.sh $image
fi
