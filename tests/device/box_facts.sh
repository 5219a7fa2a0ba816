#!/bin/sh
# Records a box for tests/unit/boxes: its facts, and the files and programs they were read from. Run it on the box, from a
# checkout or a bundle's runtime/ folder:   sh box_facts.sh OUT [FOLDER THAT HOLDS runtimes/]
# Nothing personal is read: no host name, address or serial number. Look through OUT before you hand it over.
set -u
out=${1:?usage: box_facts.sh OUT [FOLDER]}
home=${2:-$(dirname "$0")/../..}
mkdir -p "$out/tree" || exit 9
python3 -I -B "$home/runtimes/check.py" --facts-only >"$out/facts.json" || exit 1
for file in /etc/nv_tegra_release /etc/os-release /etc/nvpmodel.conf /var/lib/nvpmodel/status /proc/meminfo \
    /proc/device-tree/model /proc/device-tree/compatible /proc/driver/nvidia/version /proc/sys/kernel/osrelease \
    /usr/local/cuda/version.json /usr/include/*-linux-gnu/NvInferVersion.h \
    /sys/class/devfreq/*gpu*/m??_freq /sys/class/devfreq/*.g*/m??_freq; do
    [ -r "$file" ] && mkdir -p "$out/tree$(dirname "$file")" && cat "$file" >"$out/tree$file"
done
mkdir -p "$out/tree/var/lib/dpkg"
dpkg-query -W -f 'Package: ${Package}\nStatus: ${Status}\nVersion: ${Version}\n\n' 'nvidia-*' 'libnvinfer*' 'cuda-*' \
    >"$out/tree/var/lib/dpkg/status" 2>/dev/null
nvidia-smi >"$out/nvidia-smi.txt" 2>&1
nvidia-smi --query-gpu=name,compute_cap,memory.total,memory.free,driver_version,mig.mode.current \
    --format=csv,noheader,nounits >"$out/nvidia-smi-query.txt" 2>&1
echo "status $?" >>"$out/nvidia-smi-query.txt"
python3 -I -B "$home/runtimes/box_probe.py" >"$out/probe.json" 2>&1
printf '{"recorded": true, "facts": "%s/facts.json", "tree": "%s/tree"}\n' "$out" "$out"
