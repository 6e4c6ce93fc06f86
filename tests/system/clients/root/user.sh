# As an ordinary user: what podman, buildah and rootlesskit do with pasta, each as its users call it. user.sh IMAGE
set -euo pipefail
image=$1
host=192.0.2.1 host6=2001:db8:1::1 beyond=192.0.2.2 beyond6=2001:db8:1::2
server="socat TCP6-LISTEN:80,ipv6only=0,fork,reuseaddr SYSTEM:'echo hello'"
datagrams="socat UDP6-RECVFROM:53,ipv6only=0,fork SYSTEM:'echo datagram'"

fail() {
    echo "FAILED: $*" >&2
    exit 1
}
equal() { # WANTED GOT WHAT
    [ "$1" = "$2" ] || fail "$3: '$2' instead of '$1'"
}
holds() { # WHAT COMMAND...: within 20 seconds
    local what=$1 i
    shift
    for ((i = 0; i < 200; i++)); do
        "$@" >/dev/null 2>&1 && return
        sleep 0.1
    done
    fail "$what"
}
endpoint() { # PROTOCOL ADDRESS PORT, in the words of socat
    case $2 in
    *:*) echo "${1}6:[$2]:$3" ;;
    *) echo "${1}4:$2:$3" ;;
    esac
}
tcp() { # ADDRESS PORT: what a server there says
    socat -T 5 -u "$(endpoint TCP "$1" "$2"),connect-timeout=5" STDOUT
}
udp() {
    echo ask | socat -T 1 -t 1 - "$(endpoint UDP "$1" "$2")"
}
answers() { # PROTOCOL ADDRESS PORT TEXT
    [ "$("$1" "$2" "$3" 2>/dev/null)" = "$4" ]
}
closed() { # PORT
    ! ss -Hltun "sport = $1" | grep -q .
}
none() { # PATTERN: no process of it
    ! pgrep -u tester -f "$1" >/dev/null
}
all_gone() {
    holds "a pasta is left: $(pgrep -u tester -af '/pasta ' || true)" none '/pasta '
    for port in "$@"; do
        holds "port $port is still open" closed "$port"
    done
}
in_container() {
    podman run --rm "$@"
}

echo "- podman info"
equal /usr/lib/passt-python/bin/pasta "$(podman info --format '{{.Host.Pasta.Executable}}')" "the pasta of podman"

echo "- podman run: addresses, names, other hosts, host.containers.internal"
in_container $image sh -c "
    ip address show | grep -q $host && ip address show | grep -q $host6 &&
    [ \"\$(socat -u TCP:$beyond:7777 STDOUT)\" = beyond ] &&
    [ \"\$(socat -u 'TCP6:[$beyond6]:7777' STDOUT)\" = beyond ] &&
    nslookup beyond.test | grep -q $beyond && grep -q '^169.254.1.2.*host.containers.internal' /etc/hosts"
in_container --net=pasta:--mtu,1400,-I,own0 $image ip link show own0 | grep -q "mtu 1400" || fail "--net=pasta:--mtu"
all_gone

echo "- -p: TCP and UDP, IPv4 and IPv6, by the address of the host and its localhost; closed with the container"
podman run -d --name one -p 8080:80 -p 127.0.0.1:8081:80 -p "[::1]:8082:80" -p 8053:53/udp $image \
    sh -c "$server & $datagrams" >/dev/null
for address in $host $host6 127.0.0.1 ::1; do
    holds "TCP at $address" answers tcp $address 8080 hello
    holds "UDP at $address" answers udp $address 8053 datagram
done
holds "-p 127.0.0.1:8081" answers tcp 127.0.0.1 8081 hello
holds "-p [::1]:8082" answers tcp ::1 8082 hello
! tcp $host 8081 2>/dev/null || fail "-p 127.0.0.1:8081 is open at $host"
! none '/usr/lib/passt-python/bin/pasta ' || fail "the network is not that of our pasta"
podman rm -f -t 0 one >/dev/null
all_gone 8080 8081 8082 8053

echo "- a port that is taken: the line of pasta"
podman run -d --name one -p 8080:80 $image sleep 1000 >/dev/null
! podman run --rm -p 8080:80 $image true 2>/tmp/user-said || fail "a port was given twice"
grep -q "Failed to bind port 8080 (Address already in use)" /tmp/user-said || fail "$(cat /tmp/user-said)"
podman rm -f -t 0 one >/dev/null

echo "- five restarts with the same port"
podman run -d --name one -p 8080:80 $image sh -c "$server" >/dev/null
for _ in 1 2 3 4 5; do
    podman restart -t 0 one >/dev/null
    holds "after a restart" answers tcp 127.0.0.1 8080 hello
done
podman rm -f -t 0 one >/dev/null
all_gone 8080

echo "- a bridge: names of containers, a published port, the way out; its pasta ends with it"
podman network create bridge0 >/dev/null
podman run -d --name one --network bridge0 -p 8080:80 $image sh -c "$server" >/dev/null
holds "by the name of a container" \
    in_container --network bridge0 $image sh -c '[ "$(socat -u TCP:one:80 STDOUT)" = hello ]'
in_container --network bridge0 $image sh -c "[ \"\$(socat -u TCP:$beyond:7777 STDOUT)\" = beyond ]"
holds "the published port" answers tcp $host 8080 hello
podman rm -f -t 0 one >/dev/null
podman network rm bridge0 >/dev/null
all_gone 8080

echo "- a pod, and podman kube play"
podman pod create --name pod0 -p 8080:80 >/dev/null
podman run -d --pod pod0 $image sh -c "$server" >/dev/null
in_container --pod pod0 $image sh -c '[ "$(socat -u TCP:127.0.0.1:80 STDOUT)" = hello ]'
holds "the port of a pod" answers tcp 127.0.0.1 8080 hello
podman pod rm -f -t 0 pod0 >/dev/null
cat >/tmp/kube.yaml <<EOF
apiVersion: v1
kind: Pod
metadata: {name: pod1}
spec:
  containers:
  - name: web
    image: $image
    command: [sh, -c, "$server"]
    ports: [{containerPort: 80, hostPort: 8080}]
EOF
podman kube play --network pasta /tmp/kube.yaml >/dev/null
holds "the port of podman kube play" answers tcp 127.0.0.1 8080 hello
podman kube down --force /tmp/kube.yaml >/dev/null
all_gone 8080

echo "- podman build and buildah"
mkdir -p /tmp/context
printf 'FROM %s\nRUN [ "$(socat -u TCP:%s:7777 STDOUT)" = beyond ]\n' $image $beyond >/tmp/context/Containerfile
podman build --quiet --no-cache --network pasta /tmp/context >/dev/null
buildah build --quiet --isolation chroot --network host /tmp/context >/dev/null
made=$(buildah from $image)
buildah run --network pasta:--mtu,1400,--ns-mac-addr,9a:dd:31:ea:92:98 "$made" ip link | grep -A1 "mtu 1400" |
    grep -q 9a:dd:31:ea:92:98 || fail "buildah run --network pasta"
buildah rm "$made" >/dev/null
all_gone

echo "- thirty containers at once"
for i in $(seq 30); do
    podman run -d --name "many$i" -p $((9000 + i)):80 $image sh -c "$server" >/dev/null &
done
wait
for i in $(seq 30); do
    holds "container $i" answers tcp 127.0.0.1 $((9000 + i)) hello
done
podman rm -f -t 0 --all >/dev/null
all_gone $(seq 9001 9030)

echo "- the image of packaging/Containerfile, built by buildah"
podman import --quiet /tmp/base.tar localhost/base >/dev/null
buildah build --quiet --file /media/packaging/Containerfile --build-arg BASE=localhost/base --tag passt-python \
    /media/debs >/dev/null 2>/tmp/user-said || fail "buildah build: $(cat /tmp/user-said)"
for flags in --privileged \
    "--device /dev/net/tun --cap-add SYS_ADMIN,NET_ADMIN --security-opt seccomp=unconfined --security-opt unmask=ALL"; do
    in_container $flags passt-python --config-net -- ip -br address >/tmp/user-said 2>&1 || fail "$(cat /tmp/user-said)"
    grep -q "$host/24" /tmp/user-said || fail "podman run $flags passt-python: $(cat /tmp/user-said)"
done
in_container --entrypoint passt passt-python --version >/dev/null
all_gone

lines=( # as their users call it; then Docker's script, and that of containerd and nerdctl
    "--net=pasta --copy-up=/etc"
    "--net=pasta --detach-netns --copy-up=/etc"
    "--net=pasta --mtu=65520 --disable-host-loopback --port-driver=implicit --copy-up=/etc --copy-up=/run
     --propagation=rslave"
    "--state-dir=/tmp/containerd-rootless --net=pasta --mtu=1500 --slirp4netns-sandbox=auto
     --slirp4netns-seccomp=auto --disable-host-loopback --port-driver=implicit --copy-up=/etc --copy-up=/run
     --copy-up=/var/lib --propagation=rslave"
)
for line in "${lines[@]}"; do
    echo "- rootlesskit" $line
    enter=
    [[ $line != *--detach-netns* ]] || enter='nsenter --net=$ROOTLESSKIT_STATE_DIR/netns'
    rootlesskit $line sh -c "
        $enter ip -j address | grep -q 10.0.2.100 && [ \"\$($enter socat -u TCP:$beyond:7777 STDOUT)\" = beyond ] &&
        : >/tmp/rootlesskit-ready && exec $enter $server" 2>/tmp/rootlesskit-said &
    kit=$!
    holds "rootlesskit: $(cat /tmp/rootlesskit-said)" test -e /tmp/rootlesskit-ready
    ! none '/usr/lib/passt-python/bin/pasta ' || fail "the network is not that of our pasta"
    if [[ $line == *implicit* ]]; then
        holds "a port of rootlesskit" answers tcp 127.0.0.1 80 hello
    fi
    kill $kit
    wait $kit || true
    rm /tmp/rootlesskit-ready
    all_gone 80
done
echo "passed"
