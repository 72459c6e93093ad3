#!/usr/bin/env bash
# Installs the Debian packages that tests/cluster/emulated_hosts needs, where possible; elsewhere its tests are skipped.
# Not on a machine run by systemd: that would start the ssh server, and tests should not open a machine to the network.
# Without an init system Debian starts no daemon when it installs a package, so Slurm's daemons do not run either.
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
} > "$log" 2>&1 < /dev/null || { tail -n 3 "$log"; echo "not installed: tests/cluster/emulated_hosts will be skipped"; }
rm -f "$log"
