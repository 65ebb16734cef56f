#!/bin/sh
# Rounds of work whose results are printed; the same under every kernel and CPU.
#   sh workload.sh BUSYBOX PROGRAMS FOLDER FIRST ROUNDS SECONDS [LOAD]
# PROGRAMS are the chew programs, in one word with commas. Ends after ROUNDS, or when SECONDS are over.
busybox=$1 programs=$2 folder=$3 number=$4 end=$(($4 + $5)) seconds=$6 load=$7
uptime() { read -r up _ </proc/uptime; echo "${up%.*}"; }
limit=$(($(uptime) + seconds))
if [ -n "$load" ]; then
    "$load" &
    loaded=$!
fi
while [ "$number" -lt "$end" ] && [ "$(uptime)" -lt "$limit" ]; do
    for chew in $(echo "$programs" | $busybox tr , ' '); do
        echo "$number chew $("$chew" "$number" 2 | $busybox md5sum)"
        "$chew" text "$number" 120000 >"$folder/text"
        echo "$number text $($busybox sha256sum <"$folder/text")"
        echo "$number sort $($busybox sort "$folder/text" | $busybox sha1sum)"
        $busybox gzip -c <"$folder/text" >"$folder/text.gz"
        echo "$number gzip $($busybox sha256sum <"$folder/text.gz")"
        echo "$number back $($busybox gunzip -c <"$folder/text.gz" | $busybox md5sum)"
        # shellcheck disable=SC2016 # awk expands it
        echo "$number words $($busybox awk '{ for (i = 1; i <= NF; i++) n[$i]++ } END { for (w in n) print n[w], w }' \
            "$folder/text" | $busybox sort | $busybox sha512sum)"
    done
    i=0 sum=0
    while [ $i -lt 300 ]; do
        i=$((i + 1)) sum=$(((sum * 31 + i) % 65521))
    done
    echo "$number shell $sum"
    number=$((number + 1))
done
if [ -n "$load" ]; then
    kill -TERM "$loaded"
    wait "$loaded"
    echo "load $?"
fi
