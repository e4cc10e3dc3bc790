/* Which calls on files does a process make, and what if one of them fails? Preloaded before libc.

file_calls_watch(log) writes each file that is opened to read ("R") or changed ("W"), by its real path, and each address
that is connected to ("C"), as a line of the log. file_calls_fail(root, number, how) lets the call of that number on
files below a folder go wrong, in one of the ways below. Calls are counted from 1 on: file_calls_struck() says which one
went wrong, and file_calls_trace(trace) writes each of them as a line. All of it holds for one process: its children
begin without. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <arpa/inet.h>
#include <unistd.h>

enum { NOTHING, EIO_AT_ONCE, NO_SPACE, KILLED_AFTER, DONE_AND_FAILED, HALF_WRITTEN };

static char root[4096];
static size_t root_length;
static long strike_at;
static int how, log_file = -1, trace_file = -1, full_descriptor = -1;
static atomic_long calls;
static char struck[4400];
static pid_t owner;

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

static int mine(void) { return owner && owner == (pid_t)syscall(SYS_getpid); }

void file_calls_watch(const char *path) {
    owner = getpid();
    log_file = (int)syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
}

void file_calls_fail(const char *folder, long number, int kind) {
    snprintf(root, sizeof root, "%s", folder);
    root_length = strlen(root);
    strike_at = number;
    how = kind;
    calls = 0;
    full_descriptor = -1;
    struck[0] = 0;
    owner = getpid();
}

void file_calls_trace(const char *path) {
    trace_file = (int)syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC, 0600);
}

const char *file_calls_struck(void) { return struck; }

static void of_descriptor(int descriptor, char *into, size_t size) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    long length = syscall(SYS_readlinkat, AT_FDCWD, link, into, size - 1);
    into[length < 0 ? 0 : length] = 0;
}

/* The path of a name in a folder that is open, without resolving links in the name. */
static void of_name(int folder, const char *name, char *into, size_t size) {
    if (!name) name = "";
    if (name[0] == '/') { snprintf(into, size, "%s", name); return; }
    char base[4096];
    if (folder == AT_FDCWD) { if (!getcwd(base, sizeof base)) base[0] = 0; }
    else of_descriptor(folder, base, sizeof base);
    snprintf(into, size, name[0] ? "%s/%s" : "%s%s", base, name);
}

static void tell(const char *what, const char *path) {
    if (log_file < 0 || !mine()) return;
    char line[4400];
    int length = snprintf(line, sizeof line, "%s %s\n", what, path);
    if (length > 0) syscall(SYS_write, log_file, line, (size_t)length);
}

static int counts(const char *path) {
    return root_length && mine() && strncmp(path, root, root_length) == 0 &&
           (path[root_length] == '/' || path[root_length] == 0);
}

/* How this call goes wrong: NOTHING for all but one. `changes` says whether it may need space. */
static int fate(const char *call, const char *path, int changes) {
    if (!counts(path)) return NOTHING;
    if (trace_file >= 0) {
        char line[4400];
        int length = snprintf(line, sizeof line, "%s %s\n", call, path + root_length);
        if (length > 0) syscall(SYS_write, trace_file, line, (size_t)length);
    }
    if (++calls != strike_at) return NOTHING;
    snprintf(struck, sizeof struck, "%s %s", call, path + root_length);
    if (how == NO_SPACE && !changes) return NOTHING;
    if (how == HALF_WRITTEN && strcmp(call, "write")) return NOTHING;
    return how;
}

#define AROUND(call, path, changes, bad, act) \
    do { \
        int fate_ = fate(call, path, changes); \
        if (fate_ == EIO_AT_ONCE) { errno = EIO; return bad; } \
        if (fate_ == NO_SPACE) { errno = ENOSPC; return bad; } \
        act; \
        if (fate_ == KILLED_AFTER) raise(SIGKILL); \
        if (fate_ == DONE_AND_FAILED) { errno = EIO; return bad; } \
    } while (0)

static int opened(int descriptor, int flags) {
    if (descriptor >= 0 && log_file >= 0) {
        char path[4096];
        of_descriptor(descriptor, path, sizeof path);
        tell((flags & O_ACCMODE) == O_RDONLY ? "R" : "W", path);
    }
    return descriptor;
}

static int open_at(int (*real)(int, const char *, int, ...), int folder, const char *name, int flags, mode_t mode) {
    char path[4400];
    int result;
    of_name(folder, name, path, sizeof path);
    AROUND((flags & O_ACCMODE) == O_RDONLY ? "open" : "open to write", path, flags & O_CREAT, -1,
           result = real(folder, name, flags, mode));
    return opened(result, flags);
}

#define MODE mode_t mode = 0; if (flags & (O_CREAT | O_TMPFILE)) { va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); }
int open(const char *name, int flags, ...) { MODE REAL(int, "openat", int, const char *, int, ...); return open_at(real, AT_FDCWD, name, flags, mode); }
int open64(const char *name, int flags, ...) { MODE REAL(int, "openat64", int, const char *, int, ...); return open_at(real, AT_FDCWD, name, flags, mode); }
int openat(int folder, const char *name, int flags, ...) { MODE REAL(int, "openat", int, const char *, int, ...); return open_at(real, folder, name, flags, mode); }
int openat64(int folder, const char *name, int flags, ...) { MODE REAL(int, "openat64", int, const char *, int, ...); return open_at(real, folder, name, flags, mode); }

FILE *fopen(const char *name, const char *how_) {
    REAL(FILE *, "fopen", const char *, const char *);
    FILE *result = real(name, how_);
    if (result) opened(fileno(result), how_[0] == 'r' && !strchr(how_, '+') ? O_RDONLY : O_RDWR);
    return result;
}
FILE *fopen64(const char *name, const char *how_) {
    REAL(FILE *, "fopen64", const char *, const char *);
    FILE *result = real(name, how_);
    if (result) opened(fileno(result), how_[0] == 'r' && !strchr(how_, '+') ? O_RDONLY : O_RDWR);
    return result;
}

DIR *opendir(const char *name) {
    REAL(DIR *, "opendir", const char *);
    char path[4400];
    DIR *result;
    of_name(AT_FDCWD, name, path, sizeof path);
    AROUND("list", path, 0, NULL, result = real(name));
    if (result) opened(dirfd(result), O_RDONLY);
    return result;
}

/* Calls that change a name: where the change really happens, and what it is. */
static void changed(int result, const char *path) {
    if (result || log_file < 0) return;
    char folder[4400], real_path[4400], *slash;
    snprintf(folder, sizeof folder, "%s", path);
    if ((slash = strrchr(folder, '/'))) *slash = 0;
    int descriptor = (int)syscall(SYS_openat, AT_FDCWD, folder[0] ? folder : "/", O_PATH | O_DIRECTORY);
    if (descriptor < 0) { tell("W", path); return; }
    of_descriptor(descriptor, real_path, sizeof real_path - 300);
    syscall(SYS_close, descriptor);
    strncat(real_path, strrchr(path, '/') ? strrchr(path, '/') : path, 290);
    tell("W", real_path);
}

static int one_name(const char *call, int folder, const char *name, int changes, int (*act)(int, const char *, long), long extra) {
    char path[4400];
    int result;
    of_name(folder, name, path, sizeof path);
    AROUND(call, path, changes, -1, result = act(folder, name, extra));
    int error = errno;
    changed(result, path);
    errno = error;
    return result;
}
static int two_names(const char *call, int from, const char *old, int to, const char *new, int (*act)(int, const char *, int, const char *, long), long extra) {
    char path[4400], other[4400];
    int result;
    of_name(to, new, path, sizeof path);
    of_name(from, old, other, sizeof other);
    AROUND(call, counts(path) ? path : other, 1, -1, result = act(from, old, to, new, extra));
    int error = errno;
    changed(result, path);
    if (call[0] == 'r') changed(result, other);
    errno = error;
    return result;
}
static int act_mkdir(int folder, const char *name, long mode) { return (int)syscall(SYS_mkdirat, folder, name, mode); }
static int act_unlink(int folder, const char *name, long flags) { return (int)syscall(SYS_unlinkat, folder, name, flags); }
static int act_rename(int from, const char *old, int to, const char *new, long flags) { return (int)syscall(SYS_renameat2, from, old, to, new, flags); }
static int act_link(int from, const char *old, int to, const char *new, long flags) { return (int)syscall(SYS_linkat, from, old, to, new, flags); }
static int act_symlink(int from, const char *old, int to, const char *new, long flags) { (void)from; (void)flags; return (int)syscall(SYS_symlinkat, old, to, new); }
int mkdir(const char *name, mode_t mode) { return one_name("mkdir", AT_FDCWD, name, 1, act_mkdir, mode); }
int mkdirat(int folder, const char *name, mode_t mode) { return one_name("mkdir", folder, name, 1, act_mkdir, mode); }
int unlink(const char *name) { return one_name("unlink", AT_FDCWD, name, 0, act_unlink, 0); }
int unlinkat(int folder, const char *name, int flags) { return one_name("unlink", folder, name, 0, act_unlink, flags); }
int rmdir(const char *name) { return one_name("rmdir", AT_FDCWD, name, 0, act_unlink, AT_REMOVEDIR); }
int rename(const char *old, const char *new) { return two_names("rename", AT_FDCWD, old, AT_FDCWD, new, act_rename, 0); }
int renameat(int from, const char *old, int to, const char *new) { return two_names("rename", from, old, to, new, act_rename, 0); }
int link(const char *old, const char *new) { return two_names("link", AT_FDCWD, old, AT_FDCWD, new, act_link, 0); }
int linkat(int from, const char *old, int to, const char *new, int flags) { return two_names("link", from, old, to, new, act_link, flags); }
int symlink(const char *old, const char *new) { return two_names("symlink", AT_FDCWD, old, AT_FDCWD, new, act_symlink, 0); }
int symlinkat(const char *old, int folder, const char *new) { return two_names("symlink", AT_FDCWD, old, folder, new, act_symlink, 0); }

#define STAT(symbol, type) \
    int symbol(const char *name, type *into) { \
        REAL(int, #symbol, const char *, type *); \
        char path[4400]; int result; \
        of_name(AT_FDCWD, name, path, sizeof path); \
        AROUND("stat", path, 0, -1, result = real(name, into)); \
        return result; \
    }
STAT(stat, struct stat)
STAT(stat64, struct stat64)
STAT(lstat, struct stat)
STAT(lstat64, struct stat64)
#define STATAT(symbol, type) \
    int symbol(int folder, const char *name, type *into, int flags) { \
        REAL(int, #symbol, int, const char *, type *, int); \
        char path[4400]; int result; \
        of_name(folder, name, path, sizeof path); \
        AROUND("stat", path, 0, -1, result = real(folder, name, into, flags)); \
        return result; \
    }
STATAT(fstatat, struct stat)
STATAT(fstatat64, struct stat64)

static int on_descriptor(const char *call, int descriptor, int changes, int (*act)(int, long), long extra) {
    char path[4096] = "";
    int result;
    if (root_length && mine()) of_descriptor(descriptor, path, sizeof path);
    AROUND(call, path, changes, -1, result = act(descriptor, extra));
    return result;
}
static int act_fsync(int descriptor, long extra) { (void)extra; return (int)syscall(SYS_fsync, descriptor); }
static int act_truncate(int descriptor, long length) { return (int)syscall(SYS_ftruncate, descriptor, length); }
static int act_flock(int descriptor, long what) { return (int)syscall(SYS_flock, descriptor, what); }
int fsync(int descriptor) { return on_descriptor("fsync", descriptor, 1, act_fsync, 0); }
int fdatasync(int descriptor) { return on_descriptor("fsync", descriptor, 1, act_fsync, 0); }
int ftruncate(int descriptor, off_t length) { return on_descriptor("truncate", descriptor, 0, act_truncate, length); }
int ftruncate64(int descriptor, off64_t length) { return on_descriptor("truncate", descriptor, 0, act_truncate, length); }
int flock(int descriptor, int what) { return on_descriptor("flock", descriptor, 0, act_flock, what); }

/* What is written at once: bytes of memory, of several pieces of memory (at a place), or of another file. */
#define WRITE(symbol, parameters, half, full) \
    ssize_t symbol parameters { \
        char path[4096] = ""; ssize_t result; \
        if (!root_length || !mine()) return full; \
        of_descriptor(descriptor, path, sizeof path); \
        if (descriptor == full_descriptor) { full_descriptor = -1; errno = ENOSPC; return -1; } \
        int fate_ = fate("write", path, 1); \
        if (fate_ == EIO_AT_ONCE || fate_ == NO_SPACE) { errno = fate_ == NO_SPACE ? ENOSPC : EIO; return -1; } \
        if (fate_ == HALF_WRITTEN) { full_descriptor = descriptor; return half; } \
        result = full; \
        if (fate_ == KILLED_AFTER) raise(SIGKILL); \
        if (fate_ == DONE_AND_FAILED) { errno = EIO; return -1; } \
        return result; \
    }
#define BYTES const void *bytes, size_t size
WRITE(write, (int descriptor, BYTES), syscall(SYS_write, descriptor, bytes, size / 2), syscall(SYS_write, descriptor, bytes, size))
WRITE(pwrite, (int descriptor, BYTES, off_t at), syscall(SYS_pwrite64, descriptor, bytes, size / 2, at), syscall(SYS_pwrite64, descriptor, bytes, size, at))
WRITE(pwrite64, (int descriptor, BYTES, off64_t at), syscall(SYS_pwrite64, descriptor, bytes, size / 2, at), syscall(SYS_pwrite64, descriptor, bytes, size, at))
WRITE(writev, (int descriptor, const struct iovec *pieces, int count), syscall(SYS_writev, descriptor, pieces, count / 2), syscall(SYS_writev, descriptor, pieces, count))
WRITE(sendfile, (int descriptor, int from, off_t *at, size_t size), syscall(SYS_sendfile, descriptor, from, at, size / 2), syscall(SYS_sendfile, descriptor, from, at, size))
WRITE(sendfile64, (int descriptor, int from, off64_t *at, size_t size), syscall(SYS_sendfile, descriptor, from, at, size / 2), syscall(SYS_sendfile, descriptor, from, at, size))

/* Returns the number of the error. */
static int allocate(int descriptor, off64_t at, off64_t size) {
    char path[4096] = "";
    if (root_length && mine()) of_descriptor(descriptor, path, sizeof path);
    AROUND("allocate", path, 1, errno, if (syscall(SYS_fallocate, descriptor, 0, at, size)) return errno);
    return 0;
}
int posix_fallocate(int descriptor, off_t at, off_t size) { return allocate(descriptor, at, size); }
int posix_fallocate64(int descriptor, off64_t at, off64_t size) { return allocate(descriptor, at, size); }

#define READ(symbol, parameters, call) \
    ssize_t symbol parameters { \
        char path[4096] = ""; ssize_t result; \
        if (!root_length || !mine()) return call; \
        of_descriptor(descriptor, path, sizeof path); \
        AROUND("read", path, 0, -1, result = call); \
        return result; \
    }
READ(read, (int descriptor, void *into, size_t size), syscall(SYS_read, descriptor, into, size))
READ(pread, (int descriptor, void *into, size_t size, off_t at), syscall(SYS_pread64, descriptor, into, size, at))
READ(pread64, (int descriptor, void *into, size_t size, off64_t at), syscall(SYS_pread64, descriptor, into, size, at))

int connect(int descriptor, const struct sockaddr *address, socklen_t length) {
    char text[200] = "somewhere";
    if (address->sa_family == AF_INET) {
        const struct sockaddr_in *ip = (const struct sockaddr_in *)address;
        char host[64];
        inet_ntop(AF_INET, &ip->sin_addr, host, sizeof host);
        snprintf(text, sizeof text, "%s:%d", host, ntohs(ip->sin_port));
    } else if (address->sa_family == AF_UNIX) snprintf(text, sizeof text, "unix:%.100s", ((const struct sockaddr_un *)address)->sun_path);
    tell("C", text);
    REAL(int, "connect", int, const struct sockaddr *, socklen_t);
    return real(descriptor, address, length);
}
