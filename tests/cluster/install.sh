#!/usr/bin/env bash
# Installs the Debian packages that tests/cluster needs, where that can be done: else its tests are skipped. Not where
# systemd runs: that would start the ssh server, and a machine should not be opened by its tests. Without any init
# system Debian starts no daemon of a package, so Slurm's do not run either.
set -euo pipefail
packages=(openssh-server openssh-client pdsh iproute2 procps slurm-wlm munge)
programs=(sshd ssh pdsh ip ps munged slurmctld slurmd sbatch)
PATH="$PATH:/usr/sbin:/sbin"
if [ "$(command -v "${programs[@]}" | wc -l)" = "${#programs[@]}" ]; then exit 0; fi
if [ "$(id -u)" != 0 ] || [ -d /run/systemd/system ] || ! command -v apt-get > /dev/null; then exit 0; fi
echo "installing ${packages[*]} (once; half a minute)"
log="$(mktemp)"
{
    apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "${packages[@]}"
} > "$log" 2>&1 < /dev/null || { tail -n 3 "$log"; echo "not installed: tests/cluster will be skipped"; }
rm -f "$log"
