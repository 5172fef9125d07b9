/* The waits that libc does not begin again by itself: an EINTR without a signal handler would be ours. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/prctl.h>
#include <sys/select.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static const struct timespec naptime = {0, 300000000};
static struct timespec begin;

static void start(void)
{
    clock_gettime(CLOCK_MONOTONIC, &begin);
}

static void check(const char *name, long answer, long wanted)
{
    struct timespec end;
    int failed = errno;
    clock_gettime(CLOCK_MONOTONIC, &end);
    double took = (end.tv_sec - begin.tv_sec) + (end.tv_nsec - begin.tv_nsec) / 1e9;
    if (answer != wanted || took < 0.29)
        printf("%s: %ld (%s) after %.3f s\n", name, answer, answer == -1 ? strerror(failed) : "", took);
}

static pid_t later(int descriptor)
{
    pid_t pid = fork();
    if (pid == 0) {
        nanosleep(&naptime, NULL);
        _exit(descriptor >= 0 && write(descriptor, "x", 1) < 0);
    }
    return pid;
}

int main(int count, char **words)
{
    int ends[2], status, word = 0;
    char byte;
    prctl(PR_SET_NAME, count > 1 ? words[1] : "waits");
    if (pipe(ends))
        return 1;
    struct pollfd one = {ends[0], POLLIN, 0};
    {
        start();
        check("nanosleep", nanosleep(&naptime, NULL), 0);
        start();
        check("clock_nanosleep", clock_nanosleep(CLOCK_MONOTONIC, 0, &naptime, NULL), 0);
        start();
        check("poll", poll(&one, 1, 300), 0);
        start();
        check("usleep", usleep(300000), 0);
        fd_set set;
        FD_ZERO(&set);
        FD_SET(ends[0], &set);
        struct timeval timeout = {0, 300000};
        start();
        check("select", select(ends[0] + 1, &set, NULL, NULL, &timeout), 0);
        start();
        errno = 0;
        check("futex", syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, &naptime, NULL, 0), -1);
        if (errno != ETIMEDOUT)
            printf("futex: %s\n", strerror(errno));
        start();
        pid_t pid = later(ends[1]);
        check("read", read(ends[0], &byte, 1), 1);
        waitpid(pid, &status, 0);
        start();
        pid = later(-1);
        check("waitpid", waitpid(pid, &status, 0) == pid, 1);
        int lock = open("lock", O_CREAT | O_RDWR, 0600), other = open("lock", O_RDWR);
        flock(other, LOCK_EX);
        start();
        if ((pid = fork()) == 0) {
            nanosleep(&naptime, NULL);
            flock(other, LOCK_UN);
            _exit(0);
        }
        check("flock", flock(lock, LOCK_EX), 0);
        waitpid(pid, &status, 0);
        close(lock);
        close(other);
    }
    puts("done");
    return 0;
}
