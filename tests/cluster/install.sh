#!/usr/bin/env bash
# Installs the Debian packages that tests/cluster needs, where that can be done: else its tests are skipped. Not where
# systemd runs: that would start the ssh server, and a machine should not be opened by its tests.
set -euo pipefail
packages=(openssh-server openssh-client pdsh iproute2 procps)
PATH="$PATH:/usr/sbin:/sbin"
if command -v sshd && command -v ssh && command -v pdsh && command -v ip && command -v ps; then exit 0; fi > /dev/null
if [ "$(id -u)" != 0 ] || [ -d /run/systemd/system ] || ! command -v apt-get > /dev/null; then exit 0; fi
echo "installing ${packages[*]} (once; half a minute)"
log="$(mktemp)"
{
    apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "${packages[@]}"
} > "$log" 2>&1 < /dev/null || { tail -n 3 "$log"; echo "not installed: tests/cluster will be skipped"; }
rm -f "$log"
