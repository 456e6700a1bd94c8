# What the scripts of the e2e cluster share. Sourced, not run.
#
# Settings, all optional:
#   WHERRY_E2E_IMAGES     pull (from container registries), assemble (from Debian's and PyPI's packages), or auto
#   WHERRY_ASSETS         a directory with kind, kubectl, helm and, to assemble, Kubernetes' binaries
#   WHERRY_E2E_CA         an extra CA bundle that image builds trust
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
CLUSTER=wherry-e2e
STATE=$ROOT/.wherry/e2e
KUBECONFIG=$STATE/kubeconfig
IMAGES_FILE=$STATE/images.json
DEBIAN=bookworm
# What workers' containerd holds, kept between clusters; each worker's own lies beside it, for hard links.
STORE=${WHERRY_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/wherry}/e2e-store
STORES=("$STORE-1" "$STORE-2")
export KUBECONFIG
mkdir -p "$STATE"

log() { echo "e2e: $*" >&2; }

# quietly COMMAND…: shows its last line while it runs, and all of them when it fails.
quietly() { PYTHONPATH=$ROOT "$ROOT/.venv/bin/python" -m hack.progress "${1##*/} ${2:-}" "$@"; }

# step NAME COMMAND…: says what is being done, and how long it took.
step() {
  local name=$1 start=$SECONDS; shift
  log "$name …"
  "$@"
  log "$name: $((SECONDS - start)) s"
}

registry_reachable() {
  [[ $(curl -s -m 5 -o /dev/null -w '%{http_code}' https://registry-1.docker.io/v2/) =~ ^(200|401)$ ]]
}

# ENGINE: docker where its daemon answers, else podman. MODE: pull or assemble.
MODE=${WHERRY_E2E_IMAGES:-auto}
if [ -s "$STATE/mode" ] && [ "$MODE" = auto ]; then MODE=$(cat "$STATE/mode"); fi
if [ "$MODE" = auto ]; then if registry_reachable; then MODE=pull; else MODE=assemble; fi; fi
echo "$MODE" > "$STATE/mode"
if [ "$MODE" = pull ] && docker info >/dev/null 2>&1; then
  ENGINE=docker
else
  ENGINE=podman
  export KIND_EXPERIMENTAL_PROVIDER=podman
fi
if [ "$MODE" = assemble ]; then
  # Settings of ours alone: podman's own raise limits, which a machine without CAP_SYS_RESOURCE may not do.
  export CONTAINERS_CONF=$STATE/containers.conf
  printf '[containers]\ndefault_ulimits = ["nofile=%s:%s", "nproc=32768:32768"]\n[engine]\ncgroup_manager = "cgroupfs"\nruntime = "runc"\n' \
    "$(ulimit -Hn)" "$(ulimit -Hn)" > "$CONTAINERS_CONF"
fi

packages() {
  local need=(curl git)
  if [ "$MODE" = assemble ]; then
    need+=(podman runc containernetworking-plugins golang-github-containernetworking-plugin-dnsname dnsmasq-base
           debootstrap iptables iproute2 conntrack)
  elif [ "$ENGINE" = podman ]; then
    need+=(podman)
  fi
  dpkg -s "${need[@]}" >/dev/null 2>&1 && return
  command -v apt-get >/dev/null || { log "please install: ${need[*]}"; return 1; }
  quietly apt-get update -qq
  DEBIAN_FRONTEND=noninteractive quietly apt-get install -y -qq --no-install-recommends "${need[@]}"
}

# Sets ASSETS and puts kind, kubectl and helm on PATH. The same binaries serve local mode.
find_assets() {
  ASSETS=${WHERRY_ASSETS:-$("$ROOT/.venv/bin/wherry" local assets --for kind)}
  export PATH=$ASSETS:$PATH
}

workers() { "$ENGINE" ps --filter "label=io.x-k8s.kind.cluster=$CLUSTER" --filter label=io.x-k8s.kind.role=worker --format '{{.Names}}' | sort; }

# The base of everything that is assembled here: Debian, with its security updates.
debian_image() {
  "$ENGINE" image exists localhost/wherry-debian:$DEBIAN && return
  local root
  root=$(mktemp -d)
  quietly debootstrap --variant=minbase "$DEBIAN" "$root"
  local mirror
  mirror=$(awk '/^deb / {print $2; exit}' "$root/etc/apt/sources.list")
  printf 'deb %s %s-updates main\ndeb %s-security %s-security main\n' "$mirror" $DEBIAN "$mirror" $DEBIAN \
    >> "$root/etc/apt/sources.list"
  rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/usr/share/{doc,man,locale} "$root"/var/log/*
  tar -C "$root" -c . | podman import -q - localhost/wherry-debian:$DEBIAN >/dev/null
  rm -rf "$root"
}
