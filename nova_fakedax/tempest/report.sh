#!/bin/sh
# Licensed under the Apache License, Version 2.0 (the "License"); you may
# not use this file except in compliance with the License. You may obtain
# a copy of the License at
#
#      http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
# WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
# License for the specific language governing permissions and limitations
# under the License.
#
# Says what a guest sees of its root disk: "fakedax-report KEY=VALUE... MD5".
#
# report.sh MIB [watch]
#   MIB    size of the data that the guest writes to its root once, and reads
#          for each report
#   watch  report on the console again and again, in the background
set -u

mib=$1
mode=${2:-once}
directory=/var/lib/fakedax-tempest
data=$directory/data
log=$directory/log

# prepare: data of this guest alone, on the disk before the first report.
prepare() {
    if [ ! -e "$directory/ready" ]; then
        mkdir -p "$directory"
        dd if=/dev/urandom of="$data" bs=1M count="$mib" 2> /dev/null
        echo 0 > "$log"
        sync
        : > "$directory/ready"
        sync
    fi
}

# cached: prints the KiB of the page cache that are file data.
cached() {
    awk '$1 == "Cached:" || $1 == "Buffers:" { kib += $2 }
        $1 == "Shmem:" { kib -= $2 }
        END { print kib }' /proc/meminfo
}

# acknowledge NUMBER: append it to the log; once this returns, the kernel has
# promised that it is on the disk.
acknowledge() {
    echo "$1" | dd of="$log" oflag=append conv=notrunc,fsync 2> /dev/null
}

# report: all that is measured. What the log ends with is read again each time:
# a host that shows an old page is found out.
report() {
    found=$(tail -n 1 "$log")
    acknowledge $((found + 1)) || return 1
    echo 1 > /proc/sys/vm/drop_caches
    before=$(cached)
    sum=$(md5sum < "$data")
    after=$(cached)
    root=$(awk '$2 == "/" && $1 ~ "^/dev/" {
        print "device=" $1, "options=" $4 }' /proc/mounts)
    size=$(df -k / | awk 'END { print $2 }')
    words="boot=$(cat /proc/sys/kernel/random/boot_id) turn=$turn found=$found"
    words="$words acknowledged=$((found + 1)) $root root_kib=$size"
    words="$words data_kib=$((mib * 1024)) cached_kib=$((after - before))"
    words="$words sum=${sum%% *}"
    echo "fakedax-report $words $(printf %s "$words" | md5sum | cut -c 1-32)"
}

watch() {
    prepare
    while :; do
        turn=$((turn + 1))
        # At the begin of a line, also after a prompt.
        said=$(report) && printf '\n%s\n' "$said"
        sleep 2
    done
}

turn=0
case $mode in
    watch) watch > /dev/console 2>&1 < /dev/null & ;;
    *) prepare && report ;;
esac
