#!/usr/bin/env bash
# Unpack Mesa's Vulkan for the CPU (lavapipe, 25 or later) into a folder on Debian 12, without installing or upgrading anything: its package comes from the backports,
# where apt would exchange the system's whole Mesa with it. Prints the two variables that ManiSkill's renderer needs:
#   eval "$(scripts/lavapipe.sh ~/lavapipe)"
set -euo pipefail
[ $# = 1 ] || { echo "usage: scripts/lavapipe.sh FOLDER" >&2; exit 2; }
[ "$(. /etc/os-release; echo "${VERSION_CODENAME:-}")" = bookworm ] || { echo "this unpacks Debian 12's backports; elsewhere install mesa-vulkan-drivers 25 or later" >&2; exit 1; }
mkdir -p "$1/apt/lists/partial" "$1/apt/archives/partial" "$1/apt/sources" "$1/root"; folder=$(cd "$1" && pwd); lib=$folder/root/usr/lib/$(uname -m)-linux-gnu
if [ ! -f "$lib/libvulkan_lvp.so" ]; then
    from=$(cat /etc/apt/sources.list.d/*.sources /etc/apt/sources.list 2>/dev/null | sed -nE 's/^(URIs:|deb) +(\[[^]]*\] +)?(https?:[^ ]+).*/\3/p' | grep -m1 -E '/debian/?$' || true)
    [ -n "$from" ] || { echo "found no Debian mirror in /etc/apt; add the backports yourself: apt install -t bookworm-backports mesa-vulkan-drivers" >&2; exit 1; }
    printf 'deb %s bookworm main\ndeb %s bookworm-backports main\n' "$from" "$from" > "$folder/apt/sources/backports.list"
    apt=(apt-get -qq -o Dir::Etc::SourceList=/dev/null -o "Dir::Etc::SourceParts=$folder/apt/sources" -o "Dir::State::Lists=$folder/apt/lists" -o "Dir::Cache=$folder/apt" -o APT::Sandbox::User=root)
    "${apt[@]}" update >&2
    (cd "$folder/apt/archives" && "${apt[@]}" download {mesa-vulkan-drivers,libdrm2,libdrm-amdgpu1}/bookworm-backports libvulkan1 libllvm15 >&2)
    for package in "$folder"/apt/archives/*.deb; do dpkg -x "$package" "$folder/root"; done
fi
missing=$(LD_LIBRARY_PATH=$lib ldd "$lib/libvulkan_lvp.so" | sed -n 's/ => not found//p' | tr -d '\t' | tr '\n' ' ')
[ -z "$missing" ] || { echo "lavapipe needs $missing: apt-get install their packages" >&2; exit 1; }
printf 'export VK_ICD_FILENAMES=%q LD_LIBRARY_PATH=%q\n' "$(ls "$folder"/root/usr/share/vulkan/icd.d/lvp_icd*.json)" "$lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
