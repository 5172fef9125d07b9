# Compiles primes.c and runs it, both inside the sandbox.
set -e
gcc -std=c11 -O2 -Wall -Wextra -Werror -o primes primes.c -lm
./primes "$1" >primes.txt
tail -n 3 primes.txt
