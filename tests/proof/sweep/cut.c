/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * cut: end a program, or have one of its calls fail, at the Nth system call that changes something.
 *
 *     cut [-n N] [-e ERRNO] [-c CALL,...] [-w TEXT] [-o FILE] PID
 *
 * It attaches to every thread of PID and says "attached". From then on it counts the calls of the process, over all
 * threads in the order in which they happen, and writes each into FILE: number, thread's name, call, what it is about.
 * At the Nth the process gets SIGKILL before the call has done anything; with -e the call isn't carried out and
 * returns that error (x86-64 only). -c: only these calls count. -w: only calls whose description has TEXT in it.
 * Without -n it only counts. SIGTERM ends it, and the process runs on.
 *
 * strace -e inject does nearly the same, but counts for each thread by itself: with several threads at work, not
 * every moment can be named that way. A process that has stopped itself with SIGSTOP is woken, once all is in place.
 */

#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>
#ifdef __x86_64__
#include <sys/user.h>
#endif

enum shape { PATH0, PATH1, TWO_PATHS, TWO_PATHS_AT, FD, OPENAT, OPEN, MESSAGE, TEXT, ADDRESS, PLAIN };

static const struct call {
    long number;
    const char *name;
    enum shape shape;
} CALLS[] = {
#define CALL(name, shape) {SYS_##name, #name, shape}
#ifdef SYS_open
    CALL(open, OPEN), CALL(rename, TWO_PATHS), CALL(unlink, PATH0), CALL(mkdir, PATH0), CALL(rmdir, PATH0),
    CALL(chmod, PATH0), CALL(chown, PATH0), CALL(link, TWO_PATHS), CALL(symlink, TWO_PATHS), CALL(mknod, PATH0),
#endif
    CALL(openat, OPENAT), CALL(renameat, TWO_PATHS_AT), CALL(renameat2, TWO_PATHS_AT), CALL(unlinkat, PATH1),
    CALL(mkdirat, PATH1), CALL(fchmodat, PATH1), CALL(fchownat, PATH1), CALL(fchmod, FD), CALL(fchown, FD),
    CALL(ftruncate, FD), CALL(fsync, FD), CALL(write, TEXT), CALL(pwrite64, TEXT), CALL(writev, FD),
    CALL(sendmsg, MESSAGE), CALL(sendto, TEXT), CALL(connect, ADDRESS), CALL(bind, ADDRESS), CALL(splice, FD),
    CALL(kill, PLAIN), CALL(pidfd_send_signal, PLAIN), CALL(pipe2, PLAIN), CALL(memfd_create, PLAIN),
    CALL(setxattr, PATH0), CALL(mount, PATH1), CALL(umount2, PATH0), CALL(mknodat, PATH1),
};

static long at, seen;
static int error;
static const char *wanted = "", *about = "";
static FILE *out;
static pid_t process;
static volatile sig_atomic_t over;

static void stop(int number) { (void)number; over = 1; }

static void die(const char *what) { perror(what); exit(1); }

/* The tracee's memory as printable text, 100 characters at most. */
static void text_at(pid_t tid, uint64_t address, size_t length, char *into, size_t room)
{
    char raw[256];
    size_t wanted_bytes = length < sizeof raw ? length : sizeof raw, used = 0;
    struct iovec local = {raw, wanted_bytes}, remote = {(void *)(uintptr_t)address, wanted_bytes};
    ssize_t got = wanted_bytes ? process_vm_readv(tid, &local, 1, &remote, 1, 0) : 0;
    for (ssize_t i = 0; i < got && used + 1 < room && used < 200; i++)
        if (raw[i] >= ' ' && raw[i] < 127)
            into[used++] = raw[i];
        else if (used && into[used - 1] != ' ')
            into[used++] = ' ';
    into[used] = 0;
}

static void path_at(pid_t tid, uint64_t address, char *into, size_t room)
{
    size_t used = 0;
    /* Byte by byte up to the end of a page would be slow, and beyond it may be nothing: two tries do. */
    for (size_t length = 256; length >= 16 && !used; length /= 4) {
        char raw[257] = {0};
        struct iovec local = {raw, length}, remote = {(void *)(uintptr_t)address, length};
        if (process_vm_readv(tid, &local, 1, &remote, 1, 0) > 0)
            used = (size_t)snprintf(into, room, "%s", raw);
    }
    if (!used)
        into[0] = 0;
}

static void file_of(int fd, char *into, size_t room)
{
    char link[64];
    snprintf(link, sizeof link, "/proc/%d/fd/%d", process, fd);
    ssize_t length = readlink(link, into, room - 1);
    into[length > 0 ? length : 0] = 0;
}

/* What the call is about; false for one that doesn't count after all. */
static int describe(pid_t tid, const struct call *call, const uint64_t *args, char *into, size_t room)
{
    char one[512] = "", two[512] = "";
    struct msghdr header;
    struct iovec part, local, remote;
    struct sockaddr_un address = {0};
    switch (call->shape) {
    case OPEN:
    case OPENAT: {
        int flags = (int)args[call->shape == OPEN ? 1 : 2];
        if ((flags & O_ACCMODE) == O_RDONLY && !(flags & O_CREAT))
            return 0;
        path_at(tid, args[call->shape == OPEN ? 0 : 1], one, sizeof one);
        snprintf(into, room, "%s", one);
        return strncmp(one, "/proc/", 6) && strncmp(one, "/dev/", 5);
    }
    case PATH0:
    case PATH1:
        path_at(tid, args[call->shape == PATH1], one, sizeof one);
        snprintf(into, room, "%s", one);
        return 1;
    case TWO_PATHS:
    case TWO_PATHS_AT: {
        int to = call->shape == TWO_PATHS_AT;
        path_at(tid, args[to], one, sizeof one);
        path_at(tid, args[to ? 3 : 1], two, sizeof two);
        snprintf(into, room, "%s -> %s", one, two);
        return 1;
    }
    case FD:
        file_of((int)args[0], one, sizeof one);
        snprintf(into, room, "%s", one);
        return 1;
    case TEXT:
        /* Wake-ups of other threads, by eventfd or pipe, are written all the time and change nothing. */
        file_of((int)args[0], one, sizeof one);
        if (call->number != SYS_sendto && one[0] != '/')
            return 0;
        if (args[2] <= 1 && call->number == SYS_sendto)
            return 0;
        text_at(tid, args[1], args[2], two, sizeof two);
        snprintf(into, room, "%s: %s", one, two);
        return 1;
    case MESSAGE:
        local = (struct iovec){&header, sizeof header};
        remote = (struct iovec){(void *)(uintptr_t)args[1], sizeof header};
        if (process_vm_readv(tid, &local, 1, &remote, 1, 0) == sizeof header && header.msg_iovlen) {
            local = (struct iovec){&part, sizeof part};
            remote = (struct iovec){header.msg_iov, sizeof part};
            if (process_vm_readv(tid, &local, 1, &remote, 1, 0) == sizeof part)
                text_at(tid, (uintptr_t)part.iov_base, part.iov_len, two, sizeof two);
        }
        snprintf(into, room, "%s", two);
        return 1;
    case ADDRESS:
        local = (struct iovec){&address, sizeof address};
        remote = (struct iovec){(void *)(uintptr_t)args[1], args[2] < sizeof address ? args[2] : sizeof address};
        local.iov_len = remote.iov_len;
        if (process_vm_readv(tid, &local, 1, &remote, 1, 0) > 0 && address.sun_family == AF_UNIX)
            snprintf(into, room, "%s", address.sun_path[0] ? address.sun_path : address.sun_path + 1);
        return 1;
    case PLAIN:
        into[0] = 0;
        return 1;
    }
    return 0;
}

static int chosen(const char *name)
{
    size_t length = strlen(name);
    for (const char *place = wanted; (place = strstr(place, name)); place += length)
        if ((place == wanted || place[-1] == ',') && (!place[length] || place[length] == ','))
            return 1;
    return !*wanted;
}

static void comm_of(pid_t tid, char *into, size_t room)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/task/%d/comm", process, tid);
    FILE *file = fopen(path, "re");
    if (!file || !fgets(into, (int)room, file))
        snprintf(into, room, "?");
    into[strcspn(into, "\n")] = 0;
    if (file)
        fclose(file);
}

#ifdef __x86_64__
/* Of the call that a thread is about to make: make it none, or say what it has returned. */
static void set_call(pid_t tid, int entering)
{
    struct user_regs_struct registers;
    if (ptrace(PTRACE_GETREGS, tid, 0, &registers) < 0)
        return;
    if (entering)
        registers.orig_rax = (unsigned long long)-1;
    else
        registers.rax = (unsigned long long)-error;
    ptrace(PTRACE_SETREGS, tid, 0, &registers);
}
#else
static void set_call(pid_t tid, int entering) { (void)tid; (void)entering; }
#endif

static pid_t failing; /* the thread whose call is to return the error */

/* A thread is about to make a call. Returns whether the process has been killed. */
static int entered(pid_t tid, const struct __ptrace_syscall_info *info)
{
    for (size_t i = 0; i < sizeof CALLS / sizeof CALLS[0]; i++) {
        const struct call *call = &CALLS[i];
        if ((long)info->entry.nr != call->number)
            continue;
        char what[1024] = "", comm[64];
        uint64_t args[6];
        for (int j = 0; j < 6; j++)
            args[j] = info->entry.args[j];
        if (!chosen(call->name) || !describe(tid, call, args, what, sizeof what) || !strstr(what, about))
            return 0;
        comm_of(tid, comm, sizeof comm);
        fprintf(out, "%ld\t%s\t%s\t%s\n", ++seen, comm, call->name, what);
        fflush(out);
        if (at && seen == at && error) {
            failing = tid;
            set_call(tid, 1);
        } else if (at && seen == at) {
            kill(process, SIGKILL);
            return 1;
        }
        return 0;
    }
    return 0;
}

static int seize_all(void)
{
    char path[64];
    static pid_t known[4096];
    static int count;
    int fresh = 0;
    snprintf(path, sizeof path, "/proc/%d/task", process);
    DIR *tasks = opendir(path);
    if (!tasks)
        die(path);
    for (struct dirent *entry; (entry = readdir(tasks));) {
        pid_t tid = atoi(entry->d_name);
        int have = tid <= 0;
        for (int i = 0; i < count && !have; i++)
            have = known[i] == tid;
        if (have)
            continue;
        if (count < 4096)
            known[count++] = tid;
        long options = PTRACE_O_TRACESYSGOOD | PTRACE_O_TRACECLONE | PTRACE_O_TRACEEXEC;
        if (ptrace(PTRACE_SEIZE, tid, 0, options) == 0) {
            ptrace(PTRACE_INTERRUPT, tid, 0, 0);
            fresh = 1;
        } else if (errno != ESRCH && errno != EPERM) {
            die("PTRACE_SEIZE");
        } else if (tid == process) {
            die("PTRACE_SEIZE");
        }
    }
    closedir(tasks);
    return fresh;
}

int main(int argc, char **argv)
{
    out = stderr;
    for (int option; (option = getopt(argc, argv, "n:e:c:w:o:")) != -1;)
        switch (option) {
        case 'n': at = atol(optarg); break;
        case 'e': error = atoi(optarg); break;
        case 'c': wanted = optarg; break;
        case 'w': about = optarg; break;
        case 'o':
            if (!(out = fopen(optarg, "we")))
                die(optarg);
            break;
        default: return 2;
        }
    if (optind + 1 != argc)
        return 2;
    process = atoi(argv[optind]);
    struct sigaction action = {.sa_handler = stop};
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);
    while (seize_all())
        ;
    puts("attached");
    fflush(stdout);
    kill(process, SIGCONT);
    while (!over) {
        int status;
        pid_t tid = waitpid(-1, &status, __WALL);
        if (tid < 0) {
            if (errno == EINTR)
                continue;
            break; /* all threads have ended */
        }
        if (!WIFSTOPPED(status))
            continue;
        int signal_ = WSTOPSIG(status), event = status >> 16;
        if (signal_ == (SIGTRAP | 0x80)) {
            struct __ptrace_syscall_info info;
            if (ptrace(PTRACE_GET_SYSCALL_INFO, tid, (void *)sizeof info, &info) > 0) {
                if (info.op == PTRACE_SYSCALL_INFO_ENTRY)
                    entered(tid, &info);
                else if (info.op == PTRACE_SYSCALL_INFO_EXIT && failing == tid) {
                    set_call(tid, 0);
                    failing = 0;
                }
            }
            ptrace(PTRACE_SYSCALL, tid, 0, 0);
        } else if (event == PTRACE_EVENT_STOP && signal_ != SIGTRAP) {
            ptrace(PTRACE_LISTEN, tid, 0, 0); /* stopped by a signal, and to stay so until SIGCONT */
        } else if (event) {
            ptrace(PTRACE_SYSCALL, tid, 0, 0);
        } else {
            ptrace(PTRACE_SYSCALL, tid, 0, signal_);
        }
    }
    fprintf(out, "end\t%ld\n", seen);
    return 0;
}
