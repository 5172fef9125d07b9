# Makes a web server's log of $1 MB and answers three questions about it with awk, sort, uniq and friends.
set -euo pipefail
export LC_ALL=C
megabytes=${1:-50}

awk -v bytes=$((megabytes * 1000000)) 'BEGIN {
    srand(1)
    split("/ /about /news /search /download /api/status /api/items", pages)
    while (written < bytes) {
        status = rand() < 0.03 ? (rand() < 0.5 ? 404 : 500) : 200
        line = sprintf("10.%d.%d.%d [%02d:%02d:%02d] \"GET %s\" %d %d", rand() * 4, rand() * 16, rand() * 256,
            n / 40000 % 24, n / 700 % 60, n % 60, pages[1 + int(rand() * rand() * 7)], status, 200 + rand() * 90000)
        print line
        written += length(line) + 1
        n++
    }
}' >access.log
echo "$(wc -l <access.log) requests, $(stat -c %s access.log) bytes"

mkdir -p report
# Which pages are asked for most? (page, requests, megabytes sent)
awk '{ page = substr($4, 1, length($4) - 1); hits[page]++; sent[page] += $6 }
     END { for (page in hits) printf "%s %d %.1f\n", page, hits[page], sent[page] / 1e6 }' access.log |
    sort -k2,2nr >report/pages.txt
# Which clients get most errors?
awk '$5 >= 400 { print $1 }' access.log | sort | uniq -c | sort -k1,1nr -k2 | awk 'NR <= 20' >report/errors.txt
# How many errors an hour?
awk '{ hour = substr($2, 2, 2); all[hour]++; bad[hour] += $5 >= 500 }
     END { for (hour in all) printf "%s %d %.2f%%\n", hour, all[hour], 100 * bad[hour] / all[hour] }' access.log |
    sort >report/hours.txt
head -n 3 report/hours.txt
rm access.log
