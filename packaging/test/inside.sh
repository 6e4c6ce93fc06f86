# Within a root of Debian: what the packages promise, from the installation to the purge. Any failure ends it.
set -eu

fail() {
    echo "$*" >&2
    exit 1
}
quiet() { # COMMAND...: its output only if it fails
    "$@" >/tmp/said 2>&1 || {
        cat /tmp/said >&2
        fail "failed: $*"
    }
}
# All files of the root, with contents; not the state and logs of the package tools, nor caches of others. The directory
# `disable` goes with any package that has profiles while it is empty: that is the code of dh_apparmor(1).
list() { # FILE
    find / -xdev \( -path /etc/apparmor.d/disable -o -path /proc -o -path /dev -o -path /tmp -o -path /run -o -path /media -o -path /var/lib/dpkg \
        -o -path /var/log -o -path /var/cache/man -o -path /var/lib/apt -o -name __pycache__ -path '/usr/lib/python3*/*' \
        ! -path '*/passt/*' \) -prune \
        -o \( -type f -exec sha256sum {} + \) -o -print | sort >"$1"
}
compiled=
for deb in /media/debs/python3-passt-compiled_*.deb; do
    [ ! -e "$deb" ] || compiled=python3-passt-compiled
done
packages="passt-python python3-passt $compiled"
chmod 666 /dev/net/tun
useradd --create-home tester
list /tmp/before
dpkg -L passt | grep ^/usr/bin | while read -r path; do
    if [ -f "$path" ]; then sha256sum "$path"; fi
done >/tmp/programs-in-c

echo "- a former version is installed"
quiet dpkg -i /media/former/*.deb
[ -e /usr/lib/python3/dist-packages/passt/__pycache__ ] || fail "modules were not compiled"
echo "# of the site" >>/etc/apparmor.d/passt_python
echo "# of the site" >>/etc/apparmor.d/local/passt_python

echo "- and upgraded"
quiet dpkg -i /media/debs/*.deb
find /usr -name 'gone*' | grep . && fail "a file of the former version is left"
for file in passt_python local/passt_python; do
    [ "$(tail -n 1 "/etc/apparmor.d/$file")" = "# of the site" ] || fail "$file lost an addition of the site"
done
sed -i '$d' /etc/apparmor.d/passt_python
dpkg --verify $packages | grep . && fail "files differ from those of the package"

kind() { # WORDS: which build runs
    pasta.python --version | grep -q "$1" || fail "pasta.python --version: $(pasta.python --version)"
}
if [ -n "$compiled" ]; then
    echo "- compiled modules are of the same version, or of none"
    kind "Compiled from Python"
    dpkg -i /media/former/python3-passt_*.deb >/tmp/said 2>&1 && fail "modules of two versions are mixed"
    grep -q "breaks python3-passt-compiled" /tmp/said || fail "two versions: $(cat /tmp/said)"
    quiet dpkg --remove "$compiled"
    kind "In pure Python"
    quiet dpkg -i /media/debs/"$compiled"_*.deb
    kind "Compiled from Python"
else
    kind "In pure Python"
fi

echo "- as root"
quiet timeout 120 sh /media/tests/commands
echo "- as an ordinary user"
quiet timeout 120 setpriv --reuid tester --regid tester --init-groups env HOME=/home/tester sh /media/tests/commands
echo "- --trace without scapy names the package"
timeout 20 pasta.python --config-net --trace -- true >/tmp/said 2>&1 && fail "--trace without scapy is not refused"
grep -q python3-scapy /tmp/said || fail "--trace without scapy: $(cat /tmp/said)"

echo "- beside the programs in C"
sha256sum --check --quiet /tmp/programs-in-c || fail "a program of the package passt was changed"
in_c() { # --help has status 1 on Debian 12
    pasta --help >/tmp/said 2>&1 || true
    grep -q -e --no-dhcpv6 /tmp/said && [ "$(head -c 4 "$(command -v pasta)" | tail -c 3)" = ELF ]
}
in_c || fail "pasta is not that of the package passt: $(cat /tmp/said)"

echo "- pages, completions, units and profiles"
for name in pasta passt passt4netns slirp4netns passt-repair pesto qrap; do
    quiet man --where "$name.python"
    man "$name.python" 2>/dev/null | grep -q . || fail "man $name.python shows nothing"
done
for name in pasta passt passt4netns pesto; do
    file=/usr/share/bash-completion/completions/$name.python
    bash -c ". $file && complete -p $name.python && ! complete -p $name" >/dev/null 2>&1 || fail "$file: for other names"
done
quiet systemd-analyze verify --man=no passt-python@x.service pasta-python@x.service netns-python@x.service
mkdir -p /tmp/user
quiet env XDG_RUNTIME_DIR=/tmp/user systemd-analyze --user verify --man=no /usr/lib/systemd/user/passt-python@.service
quiet apparmor_parser --skip-kernel-load --skip-cache /etc/apparmor.d/passt_python
userns=/etc/apparmor.d/abstractions/passt_python.d/userns
if [ -e /etc/apparmor.d/abi/4.0 ]; then
    [ -e "$userns" ] || fail "AppArmor 4 has no rule for user namespaces"
else
    [ ! -e "$userns" ] || fail "AppArmor 3 has a rule that it does not know"
    : >/etc/apparmor.d/abi/4.0 # as an upgrade to Debian 13 does
    quiet dpkg-trigger --by-package=apparmor /etc/apparmor.d/abi
    quiet dpkg --triggers-only --pending
    [ -e "$userns" ] || fail "the upgrade to AppArmor 4 did not add the rule for user namespaces"
    rm /etc/apparmor.d/abi/4.0
    quiet dpkg-trigger --by-package=apparmor /etc/apparmor.d/abi
    quiet dpkg --triggers-only --pending
    [ ! -e "$userns" ] || fail "the rule for user namespaces stays with AppArmor 3"
fi

echo "- removed: configuration files stay"
quiet dpkg --remove $packages
[ -e /etc/apparmor.d/passt_python ] || fail "a configuration file was removed before the purge"
find /usr -path '*passt*python*' ! -path '/usr/share/doc/*' | grep . && fail "files stay after the removal"
[ ! -e /usr/lib/python3/dist-packages/passt ] || fail "the modules stay after the removal"
find /usr/lib/python3* -name '*__mypyc.*' | grep . && fail "compiled modules stay after the removal"

echo "- purged: nothing stays"
quiet dpkg --purge $packages
list /tmp/after
diff /tmp/before /tmp/after >/tmp/said || {
    cat /tmp/said >&2
    fail "something stays after the purge"
}
in_c || fail "pasta of the package passt does not run any more: $(cat /tmp/said)"
