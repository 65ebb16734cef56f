/*
 * The guest's PID 1 when nonroot runs a command: a freestanding static program (no libc) for 64- and 32-bit kernels.
 *
 *   cc -m64 -ffreestanding -nostdlib -static -fno-pie -no-pie -fno-stack-protector -Os -o agent64 agent.c
 *   cc -m32 -ffreestanding -nostdlib -static -fno-pie -no-pie -fno-stack-protector -Os -o agent32 agent.c
 *
 * It talks to the domain process in frames (u8 type, u32 little-endian length, payload), described in docs/agent.md, over
 * private I/O ports with string I/O; a byte on /dev/ttyS1 is the host's doorbell. Where the ports cannot be had, the same
 * frames go over ttyS1 itself. With -DTEST_STDIO the frames go over file descriptors 0 and 1 and nothing is mounted, so
 * that tests can run the same code as an ordinary process.
 */

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned long word;

#define PROTOCOL_VERSION 1
#define MAX_PAYLOAD (256 * 1024)
#define CHUNK (32 * 1024)
#define STDIN_WINDOW (64 * 1024)
#define MAX_STRINGS 8192
#define SELF "/.nonroot-agent" /* where the host puts this program */
#if !defined(SETUP) && !defined(TEST_STDIO)
#define SETUP "/.nonroot/setup"
#endif
#define PATH_MAX 4096

/* ---- system calls ---------------------------------------------------------------------------------------------------- */

#ifdef __x86_64__
enum {
    SYS_read = 0, SYS_write = 1, SYS_close = 3, SYS_poll = 7, SYS_rt_sigprocmask = 14, SYS_ioctl = 16, SYS_dup2 = 33,
    SYS_getpid = 39, SYS_socket = 41, SYS_fork = 57, SYS_execve = 59, SYS_wait4 = 61, SYS_kill = 62, SYS_uname = 63, SYS_fcntl = 72,
    SYS_chdir = 80, SYS_fchmod = 91, SYS_setsid = 112, SYS_prctl = 157, SYS_sync = 162, SYS_mount = 165,
    SYS_umount2 = 166, SYS_settimeofday = 164, SYS_reboot = 169, SYS_sethostname = 170, SYS_ioperm = 173, SYS_getdents64 = 217, SYS_exit_group = 231, SYS_openat = 257,
    SYS_mkdirat = 258, SYS_unlinkat = 263, SYS_symlinkat = 266, SYS_readlinkat = 267, SYS_fchmodat = 268,
    SYS_utimensat = 280, SYS_signalfd4 = 289, SYS_pipe2 = 293, SYS_statx = 332
};
static long call5(long n, word a, word b, word c, word d, word e)
{
    register word r10 __asm__("r10") = d;
    register word r8 __asm__("r8") = e;
    long r;
    __asm__ volatile("syscall" : "=a"(r) : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8) : "rcx", "r11", "memory");
    return r;
}
__asm__(".globl _start\n_start:\n\txor %ebp,%ebp\n\tand $-16,%rsp\n\tcall agent_main\n\thlt\n");
#else
enum {
    SYS_fork = 2, SYS_read = 3, SYS_write = 4, SYS_close = 6, SYS_execve = 11, SYS_chdir = 12, SYS_getpid = 20, SYS_mount = 21,
    SYS_sync = 36, SYS_kill = 37, SYS_umount2 = 52, SYS_ioctl = 54, SYS_dup2 = 63, SYS_setsid = 66, SYS_sethostname = 74, SYS_settimeofday = 79, SYS_reboot = 88,
    SYS_fchmod = 94, SYS_ioperm = 101, SYS_wait4 = 114, SYS_uname = 122, SYS_poll = 168, SYS_prctl = 172,
    SYS_rt_sigprocmask = 175, SYS_getdents64 = 220, SYS_fcntl = 221, SYS_exit_group = 252, SYS_openat = 295,
    SYS_mkdirat = 296, SYS_unlinkat = 301, SYS_symlinkat = 304, SYS_readlinkat = 305, SYS_fchmodat = 306, SYS_utimensat = 320,
    SYS_signalfd4 = 327, SYS_pipe2 = 331, SYS_socket = 359, SYS_statx = 383
};
static long call5(long n, word a, word b, word c, word d, word e)
{
    long r;
    __asm__ volatile("int $0x80" : "=a"(r) : "a"(n), "b"(a), "c"(b), "d"(c), "S"(d), "D"(e) : "memory");
    return r;
}
__asm__(".globl _start\n_start:\n\txor %ebp,%ebp\n\tand $-16,%esp\n\tcall agent_main\n\thlt\n");
#endif

#define W(x) ((word)(x))
#define call0(n) call5(n, 0, 0, 0, 0, 0)
#define call1(n, a) call5(n, W(a), 0, 0, 0, 0)
#define call2(n, a, b) call5(n, W(a), W(b), 0, 0, 0)
#define call3(n, a, b, c) call5(n, W(a), W(b), W(c), 0, 0)
#define call4(n, a, b, c, d) call5(n, W(a), W(b), W(c), W(d), 0)

enum { ENOENT = 2, EINTR = 4, EIO = 5, E2BIG = 7, ECHILD = 10, EAGAIN = 11, EACCES = 13, EBUSY = 16, EEXIST = 17, ENOTDIR = 20, EISDIR = 21,
       EINVAL = 22, ENAMETOOLONG = 36, ELOOP = 40, EPROTO = 71, ECANCELED = 125 };
enum { O_RDONLY = 0, O_WRONLY = 1, O_RDWR = 2, O_CREAT = 0100, O_NOCTTY = 0400, O_TRUNC = 01000, O_NONBLOCK = 04000,
       O_DIRECTORY = 0200000, O_NOFOLLOW = 0400000, O_CLOEXEC = 02000000,
#ifdef __x86_64__
       O_LARGEFILE = 0 };
#else
       O_LARGEFILE = 0100000 };
#endif
enum { AT_FDCWD = -100, AT_SYMLINK_NOFOLLOW = 0x100 };
enum { POLLIN = 1, POLLOUT = 4, POLLERR = 8, POLLHUP = 16 };
enum { SIGINT = 2, SIGKILL = 9, SIGUSR1 = 10, SIGUSR2 = 12, SIGPIPE = 13, SIGTERM = 15, SIGCHLD = 17 };
enum { RESTART = 0x01234567, HALT = 0xcdef0123, POWER_DOWN = 0x4321fedc }; /* of reboot() */
enum { S_IFMT = 0170000, S_IFDIR = 0040000, S_IFREG = 0100000, S_IFLNK = 0120000 };

struct pollfd { int fd; short events, revents; };
struct statx {
    u32 mask, blksize;
    u64 attributes;
    u32 nlink, uid, gid;
    u16 mode, pad1;
    u64 ino, size, blocks, attributes_mask;
    struct { long long sec; u32 nsec; int pad; } atime, btime, ctime, mtime;
    u32 rdev_major, rdev_minor, dev_major, dev_minor;
    u64 spare[14];
};
struct dirent { u64 ino; long long off; u16 reclen; u8 type; char name[]; };
struct utsname { char sysname[65], nodename[65], release[65], version[65], machine[65], domainname[65]; };
struct termios { u32 iflag, oflag, cflag, lflag; u8 line, cc[19]; };
struct winsize { u16 rows, cols, xpixel, ypixel; };

/* ---- the few library functions that are needed --------------------------------------------------------------------------- */

void *memcpy(void *to, const void *from, word n)
{
    void *start = to;
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(n) : : "memory");
    return start;
}
void *memset(void *to, int value, word n)
{
    void *start = to;
    __asm__ volatile("rep stosb" : "+D"(to), "+c"(n) : "a"(value) : "memory");
    return start;
}
void *memmove(void *to, const void *from, word n)
{
    u8 *t = to;
    const u8 *f = from;
    if (t <= f || t >= f + n)
        return memcpy(to, from, n);
    while (n--)
        t[n] = f[n];
    return to;
}
static word length(const char *s)
{
    word n = 0;
    while (s[n])
        n++;
    return n;
}
static int same(const char *a, const char *b)
{
    while (*a && *a == *b)
        a++, b++;
    return *a == *b;
}
/* Append `from` to the string in `to` (room for PATH_MAX bytes); false if it does not fit. */
static int append(char *to, const char *from)
{
    word a = length(to), b = length(from);
    if (a + b + 1 > PATH_MAX)
        return 0;
    memcpy(to + a, from, b + 1);
    return 1;
}
static u32 get32(const u8 *p) { return p[0] | p[1] << 8 | p[2] << 16 | (u32)p[3] << 24; }
static u16 get16(const u8 *p) { return (u16)(p[0] | p[1] << 8); }
static u64 get64(const u8 *p) { return get32(p) | (u64)get32(p + 4) << 32; }
static void put32(u8 *p, u32 v)
{
    for (int i = 0; i < 4; i++)
        p[i] = (u8)(v >> (8 * i));
}
static void put64(u8 *p, u64 v)
{
    put32(p, (u32)v);
    put32(p + 4, (u32)(v >> 32));
}

/* ---- the channel ------------------------------------------------------------------------------------------------------------ */

enum { PORT_DATA = 0x6e0, PORT_WAITING = 0x6e4, PORT_MAGIC = 0x6e8, MAGIC = 0x3141524e /* "NRA1" */ };
enum { BY_PORTS, BY_SERIAL, BY_STDIO };

enum { /* host to guest */
    START = 0x01, STDIN = 0x02, STDIN_EOF = 0x03, SIGNAL = 0x04, WINDOW_SIZE = 0x05, CREDIT = 0x06, COPY_IN = 0x07,
    ENTRY = 0x08, DATA = 0x09, COPY_IN_END = 0x0a, COPY_OUT = 0x0b, POWER_OFF = 0x0c, PING = 0x0d, CANCEL = 0x0e,
    FRESHEN = 0x0f
};
enum { /* guest to host */
    HELLO = 0x81, STDOUT = 0x82, STDERR = 0x83, STARTED = 0x84, EXIT = 0x85, STDIN_CREDIT = 0x86, OUT_ENTRY = 0x87,
    OUT_DATA = 0x88, RESULT = 0x89, LOG = 0x8a, BYE = 0x8b, PONG = 0x8c
};

static int transport;
static int read_fd = -1, write_fd = -1; /* the serial line or the test's pipes; with ports, read_fd is the doorbell */

static inline u32 in32(u16 port)
{
    u32 v;
    __asm__ volatile("inl %w1, %0" : "=a"(v) : "Nd"(port));
    return v;
}
static void out_string(const void *data, word n)
{
    __asm__ volatile("rep outsb" : "+S"(data), "+c"(n) : "d"(PORT_DATA) : "memory");
}
static void in_string(void *data, word n)
{
    __asm__ volatile("rep insb" : "+D"(data), "+c"(n) : "d"(PORT_DATA) : "memory");
}

static void power_off(void);

static void send_bytes(const void *data, word n)
{
    const u8 *p = data;
    if (transport == BY_PORTS) {
        out_string(p, n);
        return;
    }
    while (n) {
        long r = call3(SYS_write, write_fd, p, n);
        if (r == -EAGAIN) {
            struct pollfd w = { write_fd, POLLOUT, 0 };
            call3(SYS_poll, &w, 1, -1);
        } else if (r == -EINTR) {
            continue;
        } else if (r <= 0) {
            power_off(); /* nobody is listening any more */
        } else {
            p += r;
            n -= (word)r;
        }
    }
}
static void send2(u8 type, const void *a, u32 na, const void *b, u32 nb)
{
    u8 header[5] = { type };
    put32(header + 1, na + nb);
    send_bytes(header, 5);
    if (na)
        send_bytes(a, na);
    if (nb)
        send_bytes(b, nb);
}
static void send(u8 type, const void *data, u32 n) { send2(type, data, n, 0, 0); }
static void send_u32(u8 type, u32 value)
{
    u8 b[4];
    put32(b, value);
    send(type, b, 4);
}
static void send_log(const char *text) { send(LOG, text, (u32)length(text)); }
static void send_result(int error, const char *path)
{
    u8 b[4];
    put32(b, (u32)error);
    send2(RESULT, b, 4, path, (u32)length(path));
}

/* Up to n bytes that are there now; 0 if none, -1 if the host has gone. */
static long receive(u8 *to, word n)
{
    if (transport == BY_PORTS) {
        word waiting = in32(PORT_WAITING);
        if (waiting > n)
            waiting = n;
        in_string(to, waiting);
        return (long)waiting;
    }
    for (;;) {
        long r = call3(SYS_read, read_fd, to, n);
        if (r == -EINTR)
            continue;
        if (r == -EAGAIN)
            return 0;
        if (r == 0 && transport == BY_SERIAL)
            return 0;
        return r > 0 ? r : -1;
    }
}

/* ---- state ------------------------------------------------------------------------------------------------------------------- */

static u8 frame[5 + MAX_PAYLOAD + 1]; /* the frame being received; a NUL follows the payload */
static word frame_have;
static u8 chunk[CHUNK];
static char stdin_ring[STDIN_WINDOW];
static word stdin_head, stdin_fill; /* the ring's first byte and its fill */
static int stdin_ends;              /* the client's stdin has ended: close ours when the ring is empty */
static u32 stdin_used;              /* bytes consumed since the last STDIN_CREDIT frame */
static u32 credit;                  /* bytes that we may send before the host grants more */

static long child = 0; /* the command's process (and group) id, 0 if none */
static int child_done; /* it has ended; status below, its last output still to be sent */
static int child_status;
static int in_fd = -1, out_fd = -1, err_fd = -1, console_fd = -1;
static int is_pty;
static int pty_idle; /* nobody has the terminal open now; closing our end would send the command SIGHUP */
static int signal_fd = -1;
static int cancelled;
static int copying_out;

static char *strings[MAX_STRINGS + 2];

static void close_fd(int *fd)
{
    if (*fd >= 0)
        call1(SYS_close, *fd);
    *fd = -1;
}
static void nonblocking(int fd) { call3(SYS_fcntl, fd, 4 /* F_SETFL */, O_NONBLOCK); }

#ifndef TEST_STDIO
/* Send every process a signal, and wait up to half a second until none is left; false if some are. */
static int end_processes(int signal)
{
    call2(SYS_kill, -1, signal);
    for (int i = 0; i < 50; i++) {
        int status;
        long r;
        while ((r = call4(SYS_wait4, -1, &status, 1 /* WNOHANG */, 0)) > 0)
            ;
        if (r == -ECHILD)
            return 1;
        call3(SYS_poll, 0, 0, 10);
    }
    return 0;
}
/* Undo the escapes (\\040) of a path in /proc/mounts. */
static void unescape(char *path)
{
    char *to = path;
    for (; *path; path++)
        if (path[0] == '\\' && path[1] && path[2] && path[3]) {
            *to++ = (char)((path[1] - '0') << 6 | (path[2] - '0') << 3 | (path[3] - '0'));
            path += 3;
        } else {
            *to++ = *path;
        }
    *to = 0;
}
/* File systems on disks and shares, the last one mounted first: unmounted, or else read-only from now on. */
static void unmount_all(void)
{
    static char mounts[32 * 1024];
    long fd = call4(SYS_openat, AT_FDCWD, "/proc/self/mounts", O_RDONLY | O_CLOEXEC, 0), r;
    word size = 0;
    if (fd < 0)
        return;
    while (size < sizeof mounts - 1 && (r = call3(SYS_read, fd, mounts + size, sizeof mounts - 1 - size)) > 0)
        size += (word)r;
    call1(SYS_close, fd);
    while (size) {
        word at = size;
        char *field[3];
        int n = 0;
        while (at && mounts[at - 1] != '\n')
            at--;
        mounts[size] = 0;
        size = at ? at - 1 : 0;
        for (char *c = mounts + at; *c && n < 3; n++) {
            field[n] = c;
            while (*c && *c != ' ')
                c++;
            if (*c)
                *c++ = 0;
        }
        if (n < 3 || (field[0][0] != '/' && field[2][0] != '9' /* 9p */ && !same(field[2], "virtiofs")))
            continue;
        unescape(field[1]);
        if (call2(SYS_umount2, field[1], 0) < 0)
            call5(SYS_mount, 0, W(field[1]), 0, 33 /* MS_REMOUNT | MS_RDONLY */, 0);
    }
}
#endif

static void end_machine(u32 how)
{
#ifndef TEST_STDIO
    call0(SYS_sync);
    call4(SYS_reboot, 0xfee1dead, 0x28121969, how, 0);
    call4(SYS_reboot, 0xfee1dead, 0x28121969, HALT, 0);
#else
    (void)how;
#endif
    call1(SYS_exit_group, 0);
    for (;;)
        ;
}
static void power_off(void) { end_machine(POWER_DOWN); }

/* End as a system does: processes are asked, then killed; file systems are left clean. */
static void shut_down(u32 how)
{
    call0(SYS_sync);
    send(BYE, 0, 0);
#ifndef TEST_STDIO
    if (!end_processes(SIGTERM))
        end_processes(SIGKILL);
    unmount_all();
#endif
    end_machine(how);
}

/* ---- starting a command ------------------------------------------------------------------------------------------------------ */

enum { FLAG_PTY = 1, FLAG_CONSOLE = 2, FLAG_NO_STDIN = 4 };
enum { EXITED = 0, SIGNALLED = 1, EXEC_FAILED = 2, CHDIR_FAILED = 3, SETUP_FAILED = 4 };

static void send_exit(u32 kind, u32 value)
{
    u8 b[8];
    put32(b, kind);
    put32(b + 4, value);
    send(EXIT, b, 8);
}

/* execvp: the command's path as given if it has a slash, else along PATH of the environment it gets. Returns an errno. */
static int exec_path(char **argv, char **env)
{
    static char path[PATH_MAX];
    const char *list = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    int error = ENOENT;
    for (char *c = argv[0]; *c; c++)
        if (*c == '/')
            return (int)-call3(SYS_execve, argv[0], argv, env);
    if (!argv[0][0])
        return ENOENT;
    for (char **e = env; *e; e++)
        if ((*e)[0] == 'P' && (*e)[1] == 'A' && (*e)[2] == 'T' && (*e)[3] == 'H' && (*e)[4] == '=')
            list = *e + 5;
    for (;;) {
        word n = 0;
        while (list[n] && list[n] != ':')
            n++;
        if (n < PATH_MAX - 2) {
            memcpy(path, list, n);
            path[n] = 0;
            if (append(path, n ? "/" : "./") && append(path, argv[0])) {
                int e = (int)-call3(SYS_execve, path, argv, env);
                if (e != ENOENT && e != ENOTDIR && !(error == EACCES && e == EACCES))
                    error = e;
                if (e != ENOENT && e != ENOTDIR && e != EACCES)
                    return e;
            }
        }
        if (!list[n])
            return error;
        list += n + 1;
    }
}

static void set_window(int fd, u16 rows, u16 cols)
{
    struct winsize size = { rows, cols, 0, 0 };
    if (fd >= 0 && rows && cols)
        call3(SYS_ioctl, fd, 0x5414 /* TIOCSWINSZ */, &size);
}

/* The terminal behind /dev/console (which itself cannot be a controlling terminal). */
static int open_console(void)
{
    static char path[PATH_MAX], active[256];
    long fd = call4(SYS_openat, AT_FDCWD, "/sys/class/tty/console/active", O_RDONLY | O_CLOEXEC, 0);
    long n = fd >= 0 ? call3(SYS_read, fd, active, sizeof active - 1) : 0;
    char *last = active;
    if (fd >= 0)
        call1(SYS_close, fd);
    for (long i = 0; i < n; i++) {
        if (active[i] == '\n')
            active[i] = 0;
        if (active[i] == ' ')
            last = active + i + 1;
    }
    memcpy(path, "/dev/", 6);
    if (n > 0 && append(path, last)) {
        fd = call4(SYS_openat, AT_FDCWD, path, O_RDWR | O_NOCTTY | O_CLOEXEC, 0);
        if (fd >= 0)
            return (int)fd;
    }
    fd = call4(SYS_openat, AT_FDCWD, "/dev/ttyS0", O_RDWR | O_NOCTTY | O_CLOEXEC, 0);
    if (fd < 0)
        fd = call4(SYS_openat, AT_FDCWD, "/dev/console", O_RDWR | O_NOCTTY | O_CLOEXEC, 0);
    return (int)fd;
}

static int open_pty(int *slave)
{
    static char path[PATH_MAX];
    u32 number = 0, unlock = 0;
    char digits[12];
    int at = 11;
    long master = call4(SYS_openat, AT_FDCWD, "/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC, 0);
    if (master < 0)
        return (int)master;
    call3(SYS_ioctl, master, 0x40045431 /* TIOCSPTLCK */, &unlock);
    call3(SYS_ioctl, master, 0x80045430 /* TIOCGPTN */, &number);
    digits[at] = 0;
    do
        digits[--at] = (char)('0' + number % 10);
    while (number /= 10);
    memcpy(path, "/dev/pts/", 10);
    append(path, digits + at);
    *slave = (int)call4(SYS_openat, AT_FDCWD, path, O_RDWR | O_NOCTTY | O_CLOEXEC, 0);
    if (*slave < 0) {
        call1(SYS_close, master);
        return *slave;
    }
    return (int)master;
}

static void run_child(char **argv, char **env, const char *cwd, int in, int out, int err, int tty, int report)
{
    u64 none = 0;
    u32 failure[2] = { EXEC_FAILED, 0 };
    long r;
    call0(SYS_setsid);
#ifdef TEST_STDIO
    call2(SYS_prctl, 1 /* PR_SET_PDEATHSIG */, 9); /* a test's agent is killed, and no guest ends with it */
#endif
    if (transport == BY_PORTS)
        call3(SYS_ioperm, PORT_DATA, 16, 0); /* or the command would inherit it */
    if (tty)
        call3(SYS_ioctl, out, 0x540e /* TIOCSCTTY */, 1);
    call4(SYS_rt_sigprocmask, 2 /* SIG_SETMASK */, &none, 0, 8);
    /* The pipe ends were opened close-on-exec above 2 (main keeps 0-2 occupied); the copies are not. */
    call2(SYS_dup2, in, 0);
    call2(SYS_dup2, out, 1);
    call2(SYS_dup2, err, 2);
    if (*cwd && (r = call1(SYS_chdir, cwd)) < 0) {
        failure[0] = CHDIR_FAILED;
        failure[1] = (u32)-r;
    } else {
        failure[1] = (u32)exec_path(argv, env);
    }
    call3(SYS_write, report, failure, sizeof failure);
    call1(SYS_exit_group, 127);
}

static void start(u8 *p, u32 n)
{
    u32 flags, argc, envc, failure[2];
    char **argv = strings, **env;
    char *cwd;
    u8 *end = p + n;
    int in[2] = { -1, -1 }, out[2] = { -1, -1 }, err[2] = { -1, -1 }, report[2] = { -1, -1 };
    long r = 0;

    if (n < 20 || end[-1]) {
        send_exit(SETUP_FAILED, EPROTO);
        return;
    }
    flags = get32(p);
    u16 rows = get16(p + 4), cols = get16(p + 6);
    u32 window = get32(p + 8);
    argc = get32(p + 12);
    envc = get32(p + 16);
    p += 20;
    if (!argc || argc > MAX_STRINGS || envc > MAX_STRINGS - argc) {
        send_exit(SETUP_FAILED, E2BIG);
        return;
    }
    if (child || copying_out) {
        send_exit(SETUP_FAILED, EBUSY);
        return;
    }
    cwd = (char *)p;
    env = strings + argc + 1;
    for (u32 i = 0; i < 1 + argc + envc; i++) {
        if (p >= end) {
            send_exit(SETUP_FAILED, EPROTO);
            return;
        }
        if (i > argc)
            env[i - 1 - argc] = (char *)p;
        else if (i)
            argv[i - 1] = (char *)p;
        p += length((char *)p) + 1;
    }
    argv[argc] = 0;
    env[envc] = 0;

    credit = window;
    stdin_head = stdin_fill = 0;
    stdin_used = 0;
    stdin_ends = 0;
    child_done = 0;
    is_pty = pty_idle = 0;
    if ((r = call2(SYS_pipe2, report, O_CLOEXEC)) < 0)
        goto failed;
    if (flags & FLAG_PTY) {
        int slave = -1;
        if ((r = open_pty(&slave)) < 0)
            goto failed;
        is_pty = 1;
        out_fd = (int)r;
        in_fd = (int)call3(SYS_fcntl, out_fd, 1030 /* F_DUPFD_CLOEXEC */, 3);
        in[0] = out[1] = err[1] = slave;
        set_window(out_fd, rows, cols);
    } else if (flags & FLAG_CONSOLE) {
        if ((r = open_console()) < 0)
            goto failed;
        console_fd = (int)r;
        in[0] = out[1] = err[1] = (int)call3(SYS_fcntl, console_fd, 1030, 3);
        set_window(console_fd, rows, cols);
    } else {
        if (flags & FLAG_NO_STDIN)
            r = in[0] = (int)call4(SYS_openat, AT_FDCWD, "/dev/null", O_RDONLY | O_CLOEXEC, 0);
        else
            r = call2(SYS_pipe2, in, O_CLOEXEC);
        if (r >= 0)
            r = call2(SYS_pipe2, out, O_CLOEXEC);
        if (r >= 0)
            r = call2(SYS_pipe2, err, O_CLOEXEC);
        if (r < 0)
            goto failed;
        in_fd = in[1];
        out_fd = out[0];
        err_fd = err[0];
    }
    r = call0(SYS_fork);
    if (r == 0)
        run_child(argv, env, cwd, in[0], out[1], err[1], flags & (FLAG_PTY | FLAG_CONSOLE), report[1]);
failed:
    close_fd(&in[0]);
    if (!(flags & (FLAG_PTY | FLAG_CONSOLE))) { /* on a terminal all three are the same descriptor */
        close_fd(&out[1]);
        close_fd(&err[1]);
    }
    close_fd(&report[1]);
    if (r < 0) {
        close_fd(&report[0]);
        close_fd(&in_fd);
        close_fd(&out_fd);
        close_fd(&err_fd);
        close_fd(&console_fd);
        send_exit(SETUP_FAILED, (u32)-r);
        return;
    }
    child = r;
    do
        r = call3(SYS_read, report[0], failure, sizeof failure);
    while (r == -EINTR);
    close_fd(&report[0]);
    if (r == sizeof failure) {
        int status;
        while (call4(SYS_wait4, child, &status, 0, 0) == -EINTR)
            ;
        child = 0;
        close_fd(&in_fd);
        close_fd(&out_fd);
        close_fd(&err_fd);
        close_fd(&console_fd);
        send_exit(failure[0], failure[1]);
        return;
    }
    if (in_fd >= 0)
        nonblocking(in_fd);
    if (out_fd >= 0)
        nonblocking(out_fd);
    if (err_fd >= 0)
        nonblocking(err_fd);
    send_u32(STARTED, (u32)child);
    if (in_fd >= 0)
        send_u32(STDIN_CREDIT, STDIN_WINDOW);
}

/* ---- the running command ------------------------------------------------------------------------------------------------------- */

/* Returns true if some bytes were sent. */
static int pump_output(int *fd, u8 type)
{
    word n = credit < CHUNK ? credit : CHUNK;
    long r;
    if (*fd < 0 || !n)
        return 0;
    r = call3(SYS_read, *fd, chunk, n);
    if (r == -EINTR)
        return 1;
    if (r == -EAGAIN)
        return 0;
    if (r == -EIO && is_pty) { /* somebody may open it again, until the command has ended */
        pty_idle = 1;
        return 0;
    }
    if (r <= 0) {
        close_fd(fd);
        return 0;
    }
    pty_idle = 0;
    credit -= (u32)r;
    send(type, chunk, (u32)r);
    return 1;
}

static void pump_stdin(void)
{
    while (stdin_fill && in_fd >= 0) {
        word n = STDIN_WINDOW - stdin_head;
        long r;
        if (n > stdin_fill)
            n = stdin_fill;
        r = call3(SYS_write, in_fd, stdin_ring + stdin_head, n);
        if (r == -EINTR)
            continue;
        if (r == -EAGAIN)
            return;
        if (r < 0) { /* EPIPE: nobody reads it any more */
            close_fd(&in_fd);
            break;
        }
        stdin_head = (stdin_head + (word)r) % STDIN_WINDOW;
        stdin_fill -= (word)r;
        stdin_used += (u32)r;
        if (stdin_used >= STDIN_WINDOW / 4 || !stdin_fill) {
            send_u32(STDIN_CREDIT, stdin_used);
            stdin_used = 0;
        }
    }
    if (in_fd < 0 && (stdin_fill || stdin_used)) { /* keep the host's stdin flowing; it goes nowhere */
        send_u32(STDIN_CREDIT, (u32)stdin_fill + stdin_used);
        stdin_fill = 0;
        stdin_used = 0;
    }
    if (stdin_ends && !stdin_fill && in_fd >= 0) {
        if (is_pty)
            call3(SYS_write, in_fd, "\x04", 1);
        close_fd(&in_fd);
    }
}

static void take_stdin(const u8 *p, u32 n)
{
    if (!child)
        return;
    if (n > STDIN_WINDOW - stdin_fill) {
        send_log("the host sent more stdin than granted");
        return;
    }
    while (n) {
        word at = (stdin_head + stdin_fill) % STDIN_WINDOW, room = STDIN_WINDOW - at;
        if (room > n)
            room = n;
        memcpy(stdin_ring + at, p, room);
        stdin_fill += room;
        p += room;
        n -= (u32)room;
    }
    pump_stdin();
}

static void reap(void)
{
    int status;
    long pid;
    while ((pid = call4(SYS_wait4, -1, &status, 1 /* WNOHANG */, 0)) > 0)
        if (pid == child && !child_done) {
            child_done = 1;
            child_status = status;
        }
}

/* When the command has ended and all that it wrote is sent: say how it ended. Processes it left behind keep running. */
static void finish(void)
{
    int signal = child_status & 0x7f;
    close_fd(&in_fd);
    close_fd(&out_fd);
    close_fd(&err_fd);
    close_fd(&console_fd);
    child = 0;
    child_done = 0;
    if (signal)
        send_exit(SIGNALLED, (u32)signal);
    else
        send_exit(EXITED, (u32)(child_status >> 8) & 0xff);
}

/* ---- files in -------------------------------------------------------------------------------------------------------------------- */

static char in_root[PATH_MAX], in_path[PATH_MAX], in_failed[PATH_MAX];
static int in_error, in_file = -1;
static long long in_mtime;
static u32 in_mode;

static void in_fails(int error, const char *path)
{
    if (in_error)
        return;
    in_error = error;
    in_failed[0] = 0;
    append(in_failed, path);
}
static int path_mode(const char *path, int follow)
{
    static struct statx st;
    if (call5(SYS_statx, W(AT_FDCWD), W(path), W(follow ? 0 : AT_SYMLINK_NOFOLLOW), 0x7ff, W(&st)) < 0)
        return 0;
    return st.mode;
}
static void make_parents(char *path)
{
    for (char *c = path + 1; *path && *c; c++)
        if (*c == '/') {
            *c = 0;
            call3(SYS_mkdirat, AT_FDCWD, path, 0755);
            *c = '/';
        }
}
static void set_times(const char *path, long long mtime)
{
    long times[4] = { (long)mtime, 0, (long)mtime, 0 };
    if (sizeof(long) == 4 && (mtime < 0 || mtime > 0x7fffffff))
        return;
    call4(SYS_utimensat, AT_FDCWD, path, times, AT_SYMLINK_NOFOLLOW);
}
static void end_file(void)
{
    if (in_file < 0)
        return;
    call2(SYS_fchmod, in_file, in_mode);
    close_fd(&in_file);
    set_times(in_path, in_mtime);
}
/* Like cp -r: into `destination` if that is a directory (or ends in a slash), else as that name. Missing parents are made. */
static void copy_in(u8 *p, u32 n)
{
    char *destination = (char *)p + 4, *name;
    in_error = 0;
    in_failed[0] = 0;
    in_root[0] = 0;
    end_file();
    if (n < 6 || p[n - 1] || (word)(name = destination + length(destination) + 1) >= (word)(p + n)) {
        in_fails(EPROTO, "");
        return;
    }
    if (!append(in_root, destination)) {
        in_fails(ENAMETOOLONG, destination);
        return;
    }
    word last = length(in_root);
    if ((path_mode(in_root, 1) & S_IFMT) == S_IFDIR || (last && in_root[last - 1] == '/'))
        if ((last && in_root[last - 1] != '/' && !append(in_root, "/")) || !append(in_root, name))
            in_fails(ENAMETOOLONG, destination);
    make_parents(in_root);
}
static void in_entry(u8 *p, u32 n)
{
    char *path = (char *)p + 21, *target;
    long r = 0;
    end_file();
    if (in_error)
        return;
    if (n < 23 || p[n - 1] || (word)(target = path + length(path) + 1) >= (word)(p + n)) {
        in_fails(EPROTO, "");
        return;
    }
    in_mode = get32(p + 1) & 07777;
    in_mtime = (long long)get64(p + 5);
    in_path[0] = 0;
    append(in_path, in_root);
    if (*path && (!append(in_path, "/") || !append(in_path, path))) {
        in_fails(ENAMETOOLONG, path);
        return;
    }
    if (p[0] == 'd') {
        r = call3(SYS_mkdirat, AT_FDCWD, in_path, in_mode | 0700);
        if (r == -EEXIST && (path_mode(in_path, 1) & S_IFMT) == S_IFDIR)
            r = 0;
        else if (!r)
            call3(SYS_fchmodat, AT_FDCWD, in_path, in_mode | 0700);
    } else if (p[0] == 'l') {
        call3(SYS_unlinkat, AT_FDCWD, in_path, 0);
        r = call3(SYS_symlinkat, target, AT_FDCWD, in_path);
    } else if (p[0] == 'f') {
        r = call4(SYS_openat, AT_FDCWD, in_path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_LARGEFILE, in_mode | 0200);
        if (r >= 0)
            in_file = (int)r;
    } else {
        r = -EPROTO;
    }
    if (r < 0)
        in_fails((int)-r, in_path);
}
static void in_data(const u8 *p, u32 n)
{
    while (n && in_file >= 0) {
        long r = call3(SYS_write, in_file, p, n);
        if (r == -EINTR)
            continue;
        if (r <= 0) {
            in_fails(r ? (int)-r : EIO, in_path);
            close_fd(&in_file);
            return;
        }
        p += r;
        n -= (u32)r;
    }
}

/* ---- files out -------------------------------------------------------------------------------------------------------------------- */

static void pump_frames(void);
static void wait_for_host(int milliseconds);

static char out_path[PATH_MAX], out_link[PATH_MAX];
static word out_root; /* length of the root's path: what follows is relative */

static int out_wait(void)
{
    while (!credit && !cancelled) {
        wait_for_host(-1);
        pump_frames();
    }
    return cancelled ? ECANCELED : 0;
}
static int out_entry(int top)
{
    static struct statx st;
    static u8 header[21];
    const char *relative = out_path + out_root;
    u8 kind;
    int error;
    long n = 0;
    long r = call5(SYS_statx, W(AT_FDCWD), W(out_path), W(top ? 0 : AT_SYMLINK_NOFOLLOW), 0x7ff, W(&st));
    if (r < 0)
        return (int)-r;
    if ((st.mode & S_IFMT) == S_IFDIR)
        kind = 'd';
    else if ((st.mode & S_IFMT) == S_IFREG)
        kind = 'f';
    else if ((st.mode & S_IFMT) == S_IFLNK)
        kind = 'l';
    else
        kind = 'x'; /* a device, FIFO or socket: named, not copied */
    if (kind == 'l') {
        n = call4(SYS_readlinkat, AT_FDCWD, out_path, out_link, PATH_MAX - 1);
        if (n < 0)
            return (int)-n;
    }
    while (*relative == '/')
        relative++;
    header[0] = kind;
    put32(header + 1, st.mode & 07777);
    put64(header + 5, (u64)st.mtime.sec);
    put64(header + 13, st.size);
    out_link[n] = 0;
    if ((error = out_wait()))
        return error;
    {
        u8 lead[5] = { OUT_ENTRY };
        u32 a = (u32)length(relative) + 1, b = (u32)n + 1, all = 21 + a + b;
        put32(lead + 1, all);
        send_bytes(lead, 5);
        send_bytes(header, 21);
        send_bytes(relative, a);
        send_bytes(out_link, b);
        credit -= all < credit ? all : credit;
    }
    if (kind == 'f') {
        long fd = call4(SYS_openat, AT_FDCWD, out_path, O_RDONLY | O_CLOEXEC | O_LARGEFILE | (top ? 0 : O_NOFOLLOW), 0);
        if (fd < 0)
            return (int)-fd;
        for (;;) {
            if ((error = out_wait()))
                break;
            r = call3(SYS_read, fd, chunk, credit < CHUNK ? credit : CHUNK);
            if (r == -EINTR)
                continue;
            if (r <= 0) {
                error = (int)-r;
                break;
            }
            credit -= (u32)r;
            send(OUT_DATA, chunk, (u32)r);
        }
        call1(SYS_close, fd);
        return error;
    }
    if (kind == 'd') {
        /* Entries are read afresh at every level, so the depth costs file descriptors, not memory. */
        word stem = length(out_path);
        static u8 entries[256 * 1024];
        static word used; /* a stack of directory blocks, one on top of the other */
        word base = used;
        long fd = call4(SYS_openat, AT_FDCWD, out_path, O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0);
        if (fd < 0)
            return (int)-fd;
        error = 0;
        for (;;) {
            word room = sizeof entries - base;
            if (room < 512) {
                error = ELOOP;
                break;
            }
            r = call3(SYS_getdents64, fd, entries + base, room > 1024 ? 1024 : room);
            if (r <= 0) {
                error = (int)-r;
                break;
            }
            used = base + ((word)r + 7) / 8 * 8;
            for (long at = 0; at < r && !error;) {
                struct dirent *d = (struct dirent *)(entries + base + at);
                at += d->reclen;
                if (same(d->name, ".") || same(d->name, ".."))
                    continue;
                if ((stem && out_path[stem - 1] != '/' && !append(out_path, "/")) || !append(out_path, d->name))
                    error = ENAMETOOLONG;
                else
                    error = out_entry(0);
                if (!error)
                    out_path[stem] = 0;
            }
            used = base;
            if (error)
                break;
        }
        used = base;
        call1(SYS_close, fd);
        return error;
    }
    return 0;
}
static void copy_out(u8 *p, u32 n)
{
    int error;
    if (n < 6 || p[n - 1]) {
        send_result(EPROTO, "");
        return;
    }
    if (child || copying_out) {
        send_result(EBUSY, "");
        return;
    }
    credit = get32(p);
    out_path[0] = 0;
    if (!append(out_path, (char *)p + 4)) {
        send_result(ENAMETOOLONG, "");
        return;
    }
    out_root = length(out_path);
    cancelled = 0;
    copying_out = 1;
    error = out_entry(1);
    copying_out = 0;
    send_result(error, error ? out_path : "");
}

/* ---- after the guest was saved ---------------------------------------------------------------------------------------------- */

/* We go on from a saved state, perhaps with others beside us: u64 seconds and u32 microseconds since 1970, entropy. */
static void freshen(u8 *p, u32 n)
{
#ifdef TEST_STDIO
    (void)p; /* the clock would be the host's */
    (void)n;
#else
    struct { long seconds, micros; } now;
    struct { int bits, size; u8 data[64]; } seed = { 512, 64, { 0 } };
    long fd;
    if (n < 12 + sizeof seed.data)
        return;
    now.seconds = (long)get32(p);
    if (sizeof now.seconds == 8)
        now.seconds |= (long)((u64)get32(p + 4) << 32);
    now.micros = (long)get32(p + 8);
    call2(SYS_settimeofday, &now, 0);
    memcpy(seed.data, p + 12, sizeof seed.data);
    fd = call4(SYS_openat, AT_FDCWD, "/dev/urandom", O_RDWR | O_CLOEXEC, 0);
    if (fd < 0)
        return;
    call3(SYS_ioctl, fd, 0x40085203 /* RNDADDENTROPY */, &seed);
    call3(SYS_ioctl, fd, 0x5207 /* RNDRESEEDCRNG */, 0);
    call1(SYS_close, fd);
#endif
}

/* ---- frames from the host ------------------------------------------------------------------------------------------------------------ */

static void dispatch(u8 type, u8 *p, u32 n)
{
    switch (type) {
    case START:
        start(p, n);
        break;
    case STDIN:
        take_stdin(p, n);
        break;
    case STDIN_EOF:
        if (child) {
            stdin_ends = 1;
            pump_stdin();
        }
        break;
    case SIGNAL:
        if (n >= 4 && child && !child_done)
            call2(SYS_kill, -child, get32(p));
        break;
    case WINDOW_SIZE:
        if (n >= 4)
            set_window(is_pty ? out_fd : console_fd, get16(p), get16(p + 2));
        break;
    case CREDIT:
        if (n >= 4)
            credit += get32(p);
        break;
    case COPY_IN:
        copy_in(p, n);
        break;
    case ENTRY:
        in_entry(p, n);
        break;
    case DATA:
        in_data(p, n);
        break;
    case COPY_IN_END:
        end_file();
        send_result(in_error, in_failed);
        break;
    case COPY_OUT:
        copy_out(p, n);
        break;
    case CANCEL:
        cancelled = 1;
        break;
    case PING:
        send(PONG, p, n);
        break;
    case FRESHEN:
        freshen(p, n);
        break;
    case POWER_OFF:
        shut_down(POWER_DOWN);
        break;
    default:
        send_log("unknown frame");
    }
}

/* Read and act on everything that the host has sent. */
static void pump_frames(void)
{
    for (;;) {
        word want = 5;
        u32 n;
        long r;
        if (frame_have >= 5) {
            n = get32(frame + 1);
            if (n > MAX_PAYLOAD) {
                send_log("a frame from the host is too long");
                power_off();
            }
            want = 5 + n;
        }
        if (frame_have < want) {
            r = receive(frame + frame_have, want - frame_have);
            if (r < 0)
                power_off();
            if (r == 0)
                return;
            frame_have += (word)r;
            continue;
        }
        n = get32(frame + 1);
        frame[5 + n] = 0;
        frame_have = 0; /* before dispatch: copy_out reads further frames (its path has been copied by then) */
        dispatch(frame[0], frame + 5, n);
    }
}

/* ---- the main loop --------------------------------------------------------------------------------------------------------------------- */

static void drain(int fd)
{
    u8 bin[256];
    while (fd >= 0 && call3(SYS_read, fd, bin, sizeof bin) > 0)
        ;
}

/* What poweroff, halt and reboot send to PID 1, and the kernel on Ctrl-Alt-Del; a child that ended is for reap(). */
static void take_signals(void)
{
    static u32 info[32]; /* struct signalfd_siginfo */
    while (signal_fd >= 0 && call3(SYS_read, signal_fd, info, sizeof info) == (long)sizeof info)
        if (info[0] == SIGUSR1 || info[0] == SIGUSR2)
            shut_down(POWER_DOWN);
        else if (info[0] == SIGTERM || info[0] == SIGINT)
            shut_down(RESTART);
}

/* Sleep until the host rings (or sends), the command does something, or a child ends. */
static void wait_for_host(int milliseconds)
{
    struct pollfd set[5];
    int n = 0, doorbell = -1, signals = -1, input = -1;
    if (read_fd >= 0) {
        doorbell = n;
        set[n++] = (struct pollfd){ read_fd, POLLIN, 0 };
    } else {
        milliseconds = 10; /* no doorbell: look at the ports from time to time */
    }
    if (!copying_out) {
        if (signal_fd >= 0) {
            signals = n;
            set[n++] = (struct pollfd){ signal_fd, POLLIN, 0 };
        } else if (child && milliseconds < 0) {
            milliseconds = 20;
        }
        if (pty_idle && (milliseconds < 0 || milliseconds > 50))
            milliseconds = 50;
        if (out_fd >= 0 && credit && !pty_idle)
            set[n++] = (struct pollfd){ out_fd, POLLIN, 0 };
        if (err_fd >= 0 && credit)
            set[n++] = (struct pollfd){ err_fd, POLLIN, 0 };
        if (in_fd >= 0 && (stdin_fill || !is_pty)) { /* POLLERR: the reader has gone */
            input = n;
            set[n++] = (struct pollfd){ in_fd, stdin_fill ? POLLOUT : 0, 0 };
        }
    }
    call3(SYS_poll, set, n, milliseconds);
    if (doorbell >= 0 && set[doorbell].revents && transport == BY_PORTS)
        drain(read_fd); /* ring once, look at the ports: the order loses nothing */
    if (signals >= 0 && set[signals].revents)
        take_signals();
    if (input >= 0 && set[input].revents & POLLERR) {
        close_fd(&in_fd);
        pump_stdin();
    }
}

#ifndef TEST_STDIO
static void mount_one(const char *source, const char *target, const char *type, word flags, const char *data)
{
    call3(SYS_mkdirat, AT_FDCWD, target, 0755);
    call5(SYS_mount, W(source), W(target), W(type), flags, W(data)); /* already there or not in this kernel: carry on */
}
static void set_up_system(void)
{
    struct { char name[16]; short flags; char pad[22]; } loopback = { "lo", 0x41 /* UP | RUNNING */, { 0 } };
    enum { NOSUID = 2, NODEV = 4, NOEXEC = 8 };
    long fd;
    mount_one("devtmpfs", "/dev", "devtmpfs", NOSUID, "mode=0755");
    mount_one("proc", "/proc", "proc", NOSUID | NODEV | NOEXEC, 0);
    mount_one("sysfs", "/sys", "sysfs", NOSUID | NODEV | NOEXEC, 0);
    mount_one("devpts", "/dev/pts", "devpts", NOSUID | NOEXEC, "gid=5,mode=620,ptmxmode=666");
    mount_one("tmpfs", "/dev/shm", "tmpfs", NOSUID | NODEV, "mode=1777");
    mount_one("tmpfs", "/run", "tmpfs", NOSUID | NODEV, "mode=0755");
    mount_one("tmpfs", "/tmp", "tmpfs", NOSUID | NODEV, "mode=1777");
    call3(SYS_symlinkat, "/proc/self/fd", AT_FDCWD, "/dev/fd");
    call3(SYS_symlinkat, "/proc/self/fd/0", AT_FDCWD, "/dev/stdin");
    call3(SYS_symlinkat, "/proc/self/fd/1", AT_FDCWD, "/dev/stdout");
    call3(SYS_symlinkat, "/proc/self/fd/2", AT_FDCWD, "/dev/stderr");
    call3(SYS_mkdirat, AT_FDCWD, "/root", 0700);
    call2(SYS_sethostname, "nonroot", 7);
    fd = call3(SYS_socket, 2 /* AF_INET */, 2 /* SOCK_DGRAM */, 0);
    if (fd >= 0) {
        call3(SYS_ioctl, fd, 0x8914 /* SIOCSIFFLAGS */, &loopback);
        call1(SYS_close, fd);
    }
}
/* The kernel powers off by a program of its choice when its hypervisor asks it to: that is us (see agent_main). */
static void take_power_off(void)
{
    long fd = call4(SYS_openat, AT_FDCWD, "/proc/sys/kernel/poweroff_cmd", O_WRONLY | O_CLOEXEC, 0);
    if (fd < 0)
        return;
    call3(SYS_write, fd, SELF, sizeof SELF - 1);
    call1(SYS_close, fd);
}
static int open_channel(void)
{
    struct termios raw;
    memset(&raw, 0, sizeof raw);
    raw.cflag = 0x1002 /* B115200 */ | 0x30 /* CS8 */ | 0x80 /* CREAD */ | 0x800 /* CLOCAL */;
    raw.cc[6] = 1; /* VMIN */
    read_fd = (int)call4(SYS_openat, AT_FDCWD, "/dev/ttyS1", O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC, 0);
    if (read_fd >= 0 && call3(SYS_ioctl, read_fd, 0x5402 /* TCSETS */, &raw) < 0)
        close_fd(&read_fd); /* a ttyS1 without hardware behind it */
    if (call3(SYS_ioperm, PORT_DATA, 16, 1) == 0 && in32(PORT_MAGIC) == MAGIC) {
        transport = BY_PORTS;
        return 1;
    }
    transport = BY_SERIAL;
    write_fd = read_fd;
    return read_fd >= 0;
}
#endif

#ifdef SETUP
static char said[4096]; /* by the set-up program: its complaints */
static word said_size;

/* What the host put into the initramfs for its devices: loads modules, asks for addresses. Nothing happens without it. */
static void set_up_devices(void)
{
    static char *argv[] = { (char *)SETUP, 0 };
    static char *env[] = { (char *)"PATH=/usr/sbin:/usr/bin:/sbin:/bin", (char *)"HOME=/root", 0 };
    int out[2], status;
    long pid, r;
    if (!path_mode(SETUP, 1) || call2(SYS_pipe2, out, O_CLOEXEC) < 0)
        return;
    pid = call0(SYS_fork);
    if (pid == 0) {
        call2(SYS_dup2, out[1], 1);
        call2(SYS_dup2, out[1], 2);
        call3(SYS_execve, argv[0], argv, env);
        call1(SYS_exit_group, 127);
    }
    call1(SYS_close, out[1]);
    for (;;) {
        word room = sizeof said - said_size;
        r = room ? call3(SYS_read, out[0], said + said_size, room) : call3(SYS_read, out[0], chunk, sizeof chunk);
        if (r == -EINTR)
            continue;
        if (r <= 0)
            break;
        if (room)
            said_size += (word)r;
    }
    call1(SYS_close, out[0]);
    while (pid > 0 && call4(SYS_wait4, pid, &status, 0, 0) == -EINTR)
        ;
}
static void pass_on_complaints(void)
{
    for (word at = 0, end; at < said_size; at = end + 1) {
        for (end = at; end < said_size && said[end] != '\n'; end++)
            ;
        if (end > at)
            send(LOG, said + at, (u32)(end - at));
    }
}
#endif

static void say_hello(void)
{
    static struct utsname name;
    static u8 hello[12 + 3 * 66];
    u32 n = 12;
    const char *parts[3] = { name.sysname, name.release, name.machine };
    call1(SYS_uname, &name);
    put32(hello, PROTOCOL_VERSION);
    put32(hello + 4, 8 * sizeof(long));
    put32(hello + 8, (u32)transport);
    for (int i = 0; i < 3; i++) {
        u32 k = (u32)length(parts[i]) + 1;
        memcpy(hello + n, parts[i], k);
        n += k;
    }
    send(HELLO, hello, n);
}

__attribute__((used, noreturn)) void agent_main(void)
{
#ifdef TEST_STDIO
    u64 mask = 1ull << (SIGCHLD - 1), blocked = mask | 1ull << (SIGPIPE - 1);
    transport = BY_STDIO;
    read_fd = (int)call3(SYS_fcntl, 0, 1030 /* F_DUPFD_CLOEXEC */, 3);
    write_fd = (int)call3(SYS_fcntl, 1, 1030, 3);
    nonblocking(read_fd);
    nonblocking(write_fd);
#else
    u64 mask = 1ull << (SIGCHLD - 1) | 1ull << (SIGINT - 1) | 1ull << (SIGUSR1 - 1) | 1ull << (SIGUSR2 - 1)
               | 1ull << (SIGTERM - 1);
    u64 blocked = mask | 1ull << (SIGPIPE - 1);
    if (call0(SYS_getpid) != 1) { /* the kernel's program to power off */
        call2(SYS_kill, 1, SIGUSR2);
        call1(SYS_exit_group, 0);
    }
    set_up_system();
    take_power_off();
    /* File descriptors 0 to 2 must be taken (the kernel opened /dev/console, if it could). */
    for (;;) {
        long fd = call4(SYS_openat, AT_FDCWD, "/dev/null", O_RDWR, 0);
        if (fd > 2)
            call1(SYS_close, fd);
        if (fd < 0 || fd > 1)
            break;
    }
    set_up_devices();
    if (!open_channel()) {
        static const char message[] = "nonroot: this kernel offers neither I/O ports nor a second serial port to the agent\n";
        call3(SYS_write, 1, message, sizeof message - 1);
        power_off();
    }
#endif
#if defined(SETUP) && defined(TEST_STDIO)
    set_up_devices();
#endif
    call4(SYS_rt_sigprocmask, 0 /* SIG_BLOCK */, &blocked, 0, 8);
    signal_fd = (int)call4(SYS_signalfd4, -1, &mask, 8, O_NONBLOCK | O_CLOEXEC);
    say_hello();
#ifdef SETUP
    pass_on_complaints();
#endif
    for (;;) {
        int busy = 0;
        pump_frames();
        take_signals();
        reap();
        if (child) {
            busy |= pump_output(&out_fd, STDOUT);
            busy |= pump_output(&err_fd, STDERR);
            pump_stdin();
            if (child_done && !busy && (credit || (out_fd < 0 && err_fd < 0))) {
                finish();
                continue;
            }
        }
        if (!busy)
            wait_for_host(-1);
    }
}
