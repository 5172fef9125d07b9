/* Counts the primes up to N with the sieve of Eratosthenes and compares with N / log N. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

int main(int argc, char **argv)
{
    long n = argc > 1 ? strtol(argv[1], NULL, 10) : 0;
    if (n < 2 || n > 400000000) {
        fprintf(stderr, "usage: primes N, with N from 2 to 400000000\n");
        return 2;
    }
    char *composite = calloc(n + 1, 1);
    if (!composite) {
        perror("calloc");
        return 1;
    }
    long count = 0;
    for (long i = 2; i <= n; i++) {
        if (composite[i])
            continue;
        count++;
        for (long j = i * i; i <= n / i && j <= n; j += i)
            composite[j] = 1;
        if (count <= 10)
            printf("%ld\n", i);
    }
    printf("...\n%ld primes up to %ld\nn / log n = %.0f\n", count, n, n / log((double)n));
    free(composite);
    return 0;
}
