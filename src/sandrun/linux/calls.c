/* A zygote's loop, a sandbox's init, and the system calls that build a sandbox.
 *
 * Which calls these are, in which order and with which arguments, Python says (calls.py, sandbox/steps.py): it makes a
 * table of them once, in the zygote. This carries the table out in the child of a fork, where each line of Python
 * costs pages: a reference count is written to, and what the zygote shares must be copied first. So it is in the zygote
 * while sandboxes are there. Here nothing is written to but the stack and the slots.
 *
 * It needs no header and no library but strerror(3): `gcc -shared -nostdlib` builds it, any libc loads it.
 */

typedef unsigned long u64;
typedef long i64;
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

extern char *strerror(int);

/* One call. calls.py has the same structure. */
struct call {
    u64 argument[6];
    u64 slotted;       /* bit k: argument k is the number of a slot, whose value is passed */
    i64 number;        /* of the system call, or one of ours, below */
    i64 store;         /* the slot that gets the result, or -1 */
    i64 expected;      /* the one result that is not a failure, or SUCCESS, or ANYTHING */
    const char *step;
    const char *about; /* what a failure says beside the kernel's reason */
};

enum { COPY = -1, EQUAL = -2, CLOSE_FOREIGN = -3, PLACE = -4, DECIMAL = -5 };
enum { SUCCESS = -1000001, ANYTHING = -1000002 };

struct table {
    const struct call *calls;
    u64 n;
};

/* Slots that this file knows by number; calls.py gives the others. */
enum { CONTROL, GATE, SIGNALS, WISHES, OUTPUTS, ROLE, SYNC, STORAGE, INIT_ID, JOB_ID, NUMBER, SIZE, ENTRIES };
enum { MOST_ENTRIES = 12, SLOTS = 32, JOB = 1, COLLECTOR = 2 };

struct failure {
    const char *step;
    const char *about;
    i64 error;
};

/* ---- the kernel ----------------------------------------------------------------------------------------------- */

#if defined(__x86_64__)
enum {
    NR_write = 1, NR_read = 0, NR_close = 3, NR_poll = 7, NR_sendmsg = 46, NR_recvmsg = 47, NR_socketpair = 53,
    NR_clone = 56, NR_wait4 = 61, NR_kill = 62, NR_getrusage = 98, NR_statfs = 137, NR_clock_gettime = 228,
    NR_exit_group = 231, NR_openat = 257,
};
static inline i64 kernel(i64 number, u64 a, u64 b, u64 c, u64 d, u64 e, u64 f)
{
    i64 result;
    register u64 r10 __asm__("r10") = d;
    register u64 r8 __asm__("r8") = e;
    register u64 r9 __asm__("r9") = f;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
}
#elif defined(__aarch64__)
enum {
    NR_write = 64, NR_read = 63, NR_close = 57, NR_ppoll = 73, NR_sendmsg = 211, NR_recvmsg = 212, NR_socketpair = 199,
    NR_clone = 220, NR_wait4 = 260, NR_kill = 129, NR_getrusage = 165, NR_statfs = 43, NR_clock_gettime = 113,
    NR_exit_group = 94, NR_openat = 56,
};
static inline i64 kernel(i64 number, u64 a, u64 b, u64 c, u64 d, u64 e, u64 f)
{
    register u64 x8 __asm__("x8") = number;
    register u64 x0 __asm__("x0") = a;
    register u64 x1 __asm__("x1") = b;
    register u64 x2 __asm__("x2") = c;
    register u64 x3 __asm__("x3") = d;
    register u64 x4 __asm__("x4") = e;
    register u64 x5 __asm__("x5") = f;
    __asm__ volatile("svc 0"
                     : "+r"(x0)
                     : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5)
                     : "memory");
    return x0;
}
#else
#error "Sandrun runs on 64-bit x86_64 and aarch64 Linux"
#endif

enum { NR_close_range = 436, NR_clone3 = 435 };
enum { EINTR = 4, ESRCH = 3, ECHILD = 10, SIGKILL = 9, SIGCHLD = 17, WNOHANG = 1, POLLIN = 1 };
enum { CLONE_CHILD_CLEARTID = 0x00200000, CLONE_CHILD_SETTID = 0x01000000 };

#define KERNEL(number, a, b, c, d) kernel(number, (u64)(a), (u64)(b), (u64)(c), (u64)(d), 0, 0)

/* ---- text ------------------------------------------------------------------------------------------------------ */

static char *put(char *at, const char *end, const char *text)
{
    while (*text && at < end)
        *at++ = *text++;
    return at;
}

static char *put_number(char *at, const char *end, i64 number)
{
    char digits[24];
    char *first = digits + 23;
    *first = 0;
    do
        *--first = (char)('0' + number % 10);
    while (number /= 10);
    return put(at, end, first);
}

/* step NUL errno NUL text, as `messages.failure` has it. */
static char *put_failure(char *at, const char *end, const struct failure *why)
{
    at = put(at, end, why->step);
    *at++ = 0;
    at = put_number(at, end, why->error);
    *at++ = 0;
    at = put(at, end, "OSError: [Errno ");
    at = put_number(at, end, why->error);
    at = put(at, end, "] ");
    at = put(at, end, why->about);
    if (why->error) {
        at = put(at, end, ": ");
        at = put(at, end, strerror((int)why->error));
    }
    return at;
}

/* ---- a table of calls ------------------------------------------------------------------------------------------ */

/* Close all descriptors from 3 on but those in the slots of a bit set. */
static i64 close_foreign(u64 kept, const i64 *slots)
{
    i64 own[SLOTS], first = 3, result = 0;
    int n = 0;
    for (int slot = 0; slot < SLOTS; slot++) {
        if (!(kept >> slot & 1) || slots[slot] < first)
            continue;
        int at = n++;
        for (; at > 0 && own[at - 1] > slots[slot]; at--)
            own[at] = own[at - 1];
        own[at] = slots[slot];
    }
    for (int at = 0; at < n && result >= 0; at++) {
        if (first < own[at])
            result = KERNEL(NR_close_range, first, own[at] - 1, 0, 0);
        first = own[at] + 1;
    }
    return result < 0 ? result : KERNEL(NR_close_range, first, 0xFFFFFFFF, 0, 0);
}

/* Carry out a table. Returns 0, or -1 when one failed: `failed` then says which, and those behind it were not made. */
i64 run(const struct table *table, i64 *slots, struct failure *failed)
{
    for (const struct call *call = table->calls; call < table->calls + table->n; call++) {
        u64 a[6];
        i64 result = 0;
        for (int k = 0; k < 6; k++)
            a[k] = call->slotted >> k & 1 ? (u64)slots[call->argument[k]] : call->argument[k];
        failed->error = 0;
        if (call->number >= 0) {
            result = kernel(call->number, a[0], a[1], a[2], a[3], a[4], a[5]);
            if (result < 0)
                failed->error = -result;
        } else if (call->number == COPY) { /* to, from, how many bytes */
            for (u64 i = 0; i < a[2]; i++)
                ((volatile u8 *)a[0])[i] = ((const u8 *)a[1])[i];
        } else if (call->number == EQUAL) { /* this, that, how many bytes, the error if they are not */
            for (u64 i = 0; i < a[2]; i++)
                if (((const u8 *)a[0])[i] != ((const u8 *)a[1])[i])
                    result = -1;
            failed->error = a[3];
        } else if (call->number == PLACE) { /* where, an int */
            *(volatile int *)a[0] = (int)a[1];
        } else if (call->number == DECIMAL) { /* where, a number: 20 digits at most */
            put_number((char *)a[0], (char *)a[0] + 20, (i64)a[1]);
        } else if (call->number == CLOSE_FOREIGN) { /* the slots to keep */
            result = close_foreign(a[0], slots);
            failed->error = -result;
        } else {
            result = -1;
        }
        if (call->expected == SUCCESS ? result < 0 : call->expected != ANYTHING && result != call->expected) {
            failed->step = call->step;
            failed->about = call->about;
            return -1;
        }
        if (call->store >= 0)
            slots[call->store] = result;
    }
    return 0;
}

/* ---- init ------------------------------------------------------------------------------------------------------ */

/* What init and spawner say to each other: sandbox/messages.py. */
struct exited {
    u8 kind, hits;
    u16 unused;
    int status;
    i64 cpu_us, memory_peak;
    double ended;
};
enum { HIT_STORAGE = 2, SETUP_FAILED = 125 };

struct timespec { i64 seconds, nanoseconds; };
struct rusage { struct { i64 seconds, microseconds; } user, system; i64 maxrss, others[13]; };
struct statfs { i64 type, bsize, blocks, bfree, bavail, files, ffree, others[16]; };
struct iovec { void *base; u64 length; };
struct msghdr { void *name; u32 name_length; struct iovec *parts; u64 n; void *control; u64 control_length; u32 flags; };
enum { DESCRIPTORS = 24 };
struct rights { u64 length; int level, type; int descriptor[DESCRIPTORS]; };
struct pollfd { int descriptor; short wanted, seen; };

static void leave(int status)
{
    for (;;)
        KERNEL(NR_exit_group, status, 0, 0, 0);
}

static void give_up(i64 channel, const struct failure *why)
{
    char text[1040], *at = text; /* the two NUL of a failure may stand behind the end that it is given */
    *at++ = 'f';
    at = put_failure(at, text + 1024, why);
    KERNEL(NR_write, channel, text, at - text, 0);
    leave(SETUP_FAILED);
}

static void fail(const i64 *slots, const char *step, const char *about, i64 result)
{
    struct failure why = {step, about, result < 0 ? -result : 0};
    give_up(slots[CONTROL], &why);
}

/* fork(2), with the child's number renewed where libc keeps it, see process.thread_number. */
static i64 fork_child(u64 tid)
{
    u64 flags = SIGCHLD;
    if (tid)
        flags |= CLONE_CHILD_SETTID | CLONE_CHILD_CLEARTID;
#if defined(__x86_64__)
    return kernel(NR_clone, flags, 0, 0, tid, 0, 0);
#else
    return kernel(NR_clone, flags, 0, 0, 0, tid, 0);
#endif
}

static int readable(struct pollfd *polled, u64 n, int wait)
{
#if defined(__aarch64__)
    struct timespec none = {0, 0};
    return KERNEL(NR_ppoll, polled, n, wait ? 0 : &none, 0) > 0;
#else
    return KERNEL(NR_poll, polled, n, wait ? -1 : 0, 0) > 0;
#endif
}

/* One message and the descriptors that came with it, close-on-exec. Returns its length, 0 at end of file, or an error;
 * -1 if it, or what came with it, was cut. */
static i64 receive(i64 socket, void *message, u64 most, struct rights *rights, int *n)
{
    struct iovec part = {message, most};
    struct msghdr header = {0, 0, &part, 1, rights, sizeof *rights, 0};
    i64 got = KERNEL(NR_recvmsg, socket, &header, 0x40000000 /* MSG_CMSG_CLOEXEC */, 0);
    *n = 0;
    if (got < 0 || header.flags & 0x28 /* MSG_TRUNC, MSG_CTRUNC */)
        return got < 0 ? got : -1;
    if (header.control_length >= 16 && rights->level == 1 && rights->type == 1) /* SOL_SOCKET, SCM_RIGHTS */
        *n = (int)((rights->length - 16) / sizeof(int));
    return got;
}

/* One message of the spawner's: ASSIGN with its two descriptors, once. Returns 1 if the job is to end: END, anything
 * else, or end of file: the spawner is gone, and we with it in a moment. */
static int take_message(i64 *slots, int *collect)
{
    u8 message[16];
    struct rights rights;
    int n;
    i64 got = receive(slots[CONTROL], message, sizeof message, &rights, &n);
    if (got < 1 || (message[0] != 'a' && message[0] != 'A') || slots[WISHES] >= 0 || n != 2)
        return 1;
    slots[WISHES] = rights.descriptor[0];
    slots[OUTPUTS] = rights.descriptor[1];
    *collect = message[0] == 'A';
    return 0;
}

/* Reap whoever is dead. Returns 1 and the status of `pid` if it is among them. */
static int reap(i64 pid, int *status)
{
    for (;;) {
        int found = 0;
        i64 done = KERNEL(NR_wait4, -1, &found, WNOHANG, 0);
        if (done == -EINTR)
            continue;
        if (done == pid || done < 0) {
            *status = done == pid ? found : 0;
            return 1;
        }
        if (done == 0)
            return 0;
    }
}

/* All of this PID namespace but its PID 1, kill(2). */
static void kill_all(const i64 *slots)
{
    i64 result = KERNEL(NR_kill, -1, SIGKILL, 0, 0);
    if (result < 0 && result != -ESRCH)
        fail(slots, "supervise", "kill", result);
}

/* Reap until the entrypoint is over, then end every other process. Returns its status, waitpid(2). */
static int wait_for_the_end(i64 *slots, i64 pid, int *collect)
{
    struct pollfd polled[2] = {{(int)slots[SIGNALS], POLLIN, 0}, {(int)slots[CONTROL], POLLIN, 0}};
    int status = 0, n = 2;
    while (!reap(pid, &status)) {
        u8 information[128]; /* struct signalfd_siginfo: which signal does not matter, there is one */
        if (!readable(polled, n, 1))
            continue;
        if (polled[0].seen)
            KERNEL(NR_read, slots[SIGNALS], information, sizeof information, 0);
        if (n == 2 && polled[1].seen && take_message(slots, collect)) {
            kill_all(slots);
            n = 1;
        }
    }
    if (slots[WISHES] < 0 && n == 2 && readable(polled + 1, 1, 0))
        take_message(slots, collect); /* the job was over before we looked for the first time */
    for (;;) {
        int found = 0;
        kill_all(slots); /* before the last wait: a process may have been forked since the one before */
        i64 done = KERNEL(NR_wait4, -1, &found, 0, 0);
        if (done == -ECHILD)
            return status;
        if (done < 0 && done != -EINTR)
            fail(slots, "supervise", "wait4", done);
        if (done == pid)
            status = found;
    }
}

static void report_the_end(const i64 *slots, int status)
{
    struct timespec now = {0, 0};
    struct statfs left;
    struct rusage used;
    KERNEL(NR_clock_gettime, 1 /* CLOCK_MONOTONIC */, &now, 0, 0);
    i64 result = KERNEL(NR_statfs, "/job", &left, 0, 0);
    if (result < 0)
        fail(slots, "exit", "statfs: /job", result);
    result = KERNEL(NR_getrusage, -1 /* RUSAGE_CHILDREN */, &used, 0, 0);
    if (result < 0)
        fail(slots, "exit", "getrusage", result);
    struct exited told = {
        'e', left.bfree == 0 || left.ffree == 0 ? HIT_STORAGE : 0, 0, status,
        (used.user.seconds + used.system.seconds) * 1000000 + used.user.microseconds + used.system.microseconds,
        used.maxrss * 1024, (double)now.seconds + (double)now.nanoseconds * 1e-9,
    };
    KERNEL(NR_write, slots[CONTROL], &told, sizeof told, 0);
}

/* PID 1 once the job's process is there. Returns in the collector alone. */
static void supervise(const struct table *confine, const struct table *become_collector, i64 *slots, i64 pid, u64 tid)
{
    struct failure failed;
    int collect = 0;
    if (run(confine, slots, &failed))
        give_up(slots[CONTROL], &failed);
    report_the_end(slots, wait_for_the_end(slots, pid, &collect));
    if (collect) {
        i64 collector = fork_child(tid);
        if (collector == 0) {
            slots[ROLE] = COLLECTOR;
            if (run(become_collector, slots, &failed))
                give_up(slots[CONTROL], &failed);
            return;
        }
        if (collector < 0)
            fail(slots, "collector", "fork", collector);
        while (KERNEL(NR_wait4, collector, 0, 0, 0) == -EINTR)
            ;
    }
    if (slots[WISHES] >= 0) { /* the reader's end of file, before the answer */
        KERNEL(NR_close, slots[WISHES], 0, 0, 0);
        KERNEL(NR_close, slots[OUTPUTS], 0, 0, 0);
    }
    KERNEL(NR_write, slots[CONTROL], "d", 1, 0);
    leave(0);
}

/* ---- the zygote ------------------------------------------------------------------------------------------------ */

/* The same structure is in calls.py. */
struct fork_server {
    i64 connection;             /* to the spawner */
    i64 ended;                  /* signalfd of SIGCHLD */
    const struct table *tables; /* of init; of the job's process; of init when it has forked that; of the collector */
    u64 entries;                /* v1 `tasks` descriptors that come with each sandbox */
    u64 tid;                    /* where libc keeps the thread's number, or 0 */
    i64 init_uid, job_uid;      /* inside; -1 where a sandbox writes its own id maps */
    void (*before_fork)(void);
    void (*after_fork)(void);
};

/* What the spawner asks, and is answered: spawner/protocol.py. */
struct spawn {
    u8 kind, flags, entries, unused;
    u32 slot, init_id, job_id;
    u64 storage_bytes;
};
struct answer { char kind, unused[3]; u32 slot; };
enum { HAS_STORAGE = 1, HAS_CGROUP = 2, FIXED = 2 };

/* struct clone_args, all that Linux 5.7 knows. */
struct clone_args {
    u64 flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid, set_tid_size, cgroup;
};
enum { CLONE_PIDFD = 0x1000, CLONE_NEWPID = 0x20000000 };
#define CLONE_INTO_CGROUP 0x200000000ULL

static void refuse(i64 connection, u32 slot, const char *about, i64 result)
{
    struct failure why = {"clone3", about, -result};
    struct { struct answer head; char text[1040]; } said = {{'r', {0}, slot}, {0}};
    char *end = put_failure(said.text, said.text + 1024, &why);
    KERNEL(NR_write, connection, &said, end - (char *)&said, 0);
}

static void say_spawned(i64 connection, u32 slot, int pidfd)
{
    struct answer said = {'p', {0}, slot};
    struct { u64 length; int level, type; int descriptor[2]; } rights = {20, 1, 1, {pidfd, 0}};
    struct iovec part = {&said, sizeof said};
    struct msghdr header = {0, 0, &part, 1, &rights, sizeof rights, 0};
    KERNEL(NR_sendmsg, connection, &header, 0x4000 /* MSG_NOSIGNAL */, 0);
}

static i64 write_process_file(i64 pid, const char *name, const char *text, u64 n)
{
    char path[64], *end = path + 63, *at = put(path, end, "/proc/");
    at = put_number(at, end, pid);
    *put(put(at, end, "/"), end, name) = 0;
    i64 file = KERNEL(NR_openat, -100, path, 0x80001 /* O_WRONLY, O_CLOEXEC */, 0);
    if (file < 0)
        return file;
    i64 result = KERNEL(NR_write, file, text, n, 0);
    KERNEL(NR_close, file, 0, 0, 0);
    return result;
}

static char *put_map(char *at, const char *end, i64 inside, u32 outside)
{
    at = put(put_number(at, end, inside), end, " ");
    return put(put_number(at, end, outside), end, " 1\n");
}

/* Give a sandbox's user namespace its two ids. The pid cannot be another's: its process waits for us, unreaped. */
static i64 write_maps(const struct fork_server *us, i64 pid, const struct spawn *asked)
{
    char map[128], *end = map + sizeof map;
    char *at = put_map(put_map(map, end, us->init_uid, asked->init_id), end, us->job_uid, asked->job_id);
    i64 result = write_process_file(pid, "setgroups", "deny", 4);
    if (result >= 0)
        result = write_process_file(pid, "gid_map", map, at - map);
    return result >= 0 ? write_process_file(pid, "uid_map", map, at - map) : result;
}

/* Sandboxes that are over. Nowhere else: until then no other process has their pids. */
static void reap_sandboxes(i64 ended)
{
    u8 information[128];
    KERNEL(NR_read, ended, information, sizeof information, 0);
    while (KERNEL(NR_wait4, -1, 0, WNOHANG, 0) > 0)
        ;
}

/* In the child: be a sandbox's init. Returns in what that forks. */
static void be_init(const struct fork_server *us, i64 *slots)
{
    struct failure failed;
    if (run(us->tables, slots, &failed))
        give_up(slots[CONTROL], &failed);
    i64 pid = fork_child(us->tid);
    if (pid < 0)
        fail(slots, "fork", "fork", pid);
    if (pid > 0) {
        supervise(us->tables + 2, us->tables + 3, slots, pid, us->tid);
        return;
    }
    slots[ROLE] = JOB;
    if (run(us->tables + 1, slots, &failed))
        give_up(slots[GATE], &failed);
}

/* Wait for a sandbox to be asked for, and fork its init. Returns 0 in what init forks, the job's process and the
 * collector, with all slots; see ROLE. Ends the process with the spawner, or when the spawner is not itself. */
i64 serve(const struct fork_server *us, i64 *slots_out)
{
    struct pollfd polled[2] = {{(int)us->connection, POLLIN, 0}, {(int)us->ended, POLLIN, 0}};
    struct spawn asked;
    struct rights got;
    i64 slots[SLOTS];
    int sync[2], pidfd = -1, n, at = FIXED;
    do {
        polled[0].seen = 0;
        if (!readable(polled, 2, 1))
            continue;
        if (polled[1].seen)
            reap_sandboxes(us->ended);
    } while (!polled[0].seen);
    i64 length = receive(us->connection, &asked, sizeof asked, &got, &n);
    if (length == 0)
        leave(0);
    if (length != sizeof asked || asked.kind != 's' || asked.entries != us->entries)
        leave(1);
    int storage = asked.flags & HAS_STORAGE ? at++ : -1, cgroup = asked.flags & HAS_CGROUP ? at++ : -1;
    if (n != at + asked.entries || asked.entries > MOST_ENTRIES)
        leave(1);

    for (int slot = 0; slot < SLOTS; slot++)
        slots[slot] = -1;
    slots[CONTROL] = got.descriptor[0];
    slots[GATE] = got.descriptor[1];
    if (storage >= 0)
        slots[STORAGE] = got.descriptor[storage];
    slots[INIT_ID] = asked.init_id;
    slots[JOB_ID] = asked.job_id;
    slots[NUMBER] = asked.slot;
    slots[SIZE] = (i64)asked.storage_bytes;
    for (int entry = 0; entry < asked.entries; entry++)
        slots[ENTRIES + entry] = got.descriptor[at + entry];

    struct clone_args arguments = {CLONE_NEWPID | CLONE_PIDFD, (u64)&pidfd, 0, 0, SIGCHLD, 0, 0, 0, 0, 0, 0};
    if (us->tid) {
        arguments.flags |= CLONE_CHILD_SETTID | CLONE_CHILD_CLEARTID;
        arguments.child_tid = us->tid;
    }
    if (cgroup >= 0) {
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = got.descriptor[cgroup];
    }
    i64 pid = KERNEL(NR_socketpair, 1 /* AF_UNIX */, 0x80001 /* SOCK_STREAM, SOCK_CLOEXEC */, 0, sync);
    if (pid < 0) {
        refuse(us->connection, asked.slot, "socketpair", pid);
    } else {
        slots[SYNC] = sync[1];
        us->before_fork();
        pid = KERNEL(NR_clone3, &arguments, sizeof arguments, 0, 0);
        if (pid == 0) {
            be_init(us, slots);
            for (int slot = 0; slot < SLOTS; slot++)
                slots_out[slot] = slots[slot];
            return 0;
        }
        us->after_fork();
        KERNEL(NR_close, sync[1], 0, 0, 0);
        if (pid < 0) {
            refuse(us->connection, asked.slot, "clone3", pid);
        } else {
            u8 said = 0;
            say_spawned(us->connection, asked.slot, pidfd);
            KERNEL(NR_close, pidfd, 0, 0, 0);
            if (us->init_uid >= 0 && KERNEL(NR_read, sync[0], &said, 1, 0) == 1 && said == 'u')
                if (write_maps(us, pid, &asked) >= 0) /* else init says that there are none */
                    KERNEL(NR_write, sync[0], "m", 1, 0);
        }
        KERNEL(NR_close, sync[0], 0, 0, 0);
    }
    for (int each = 0; each < n; each++)
        KERNEL(NR_close, got.descriptor[each], 0, 0, 0);
    return 1;
}
