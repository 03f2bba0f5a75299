/* Count the operations by which a process changes files below one folder, and kill it at one of
 * them, or let the disk be full. Loaded with LD_PRELOAD, steered from Python through ctypes:
 *
 *   watch(folder, ignored)   count from now on; operations on paths with `ignored` in them pass
 *   arm(n, mode)             kill at operation n (from 1): mode 0 before it, mode 1 in the middle
 *   limit(bytes)             after so many bytes every write fails with ENOSPC
 *   operations(), operation(n)   what was counted: " kind bytes path", or "-kind ..." if it failed
 *
 * SIGKILL leaves what the kernel has already taken, which is what a killed process leaves. It says
 * nothing about a machine that loses power. fsync is listed, so that tests can look for it. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define MOST 20000
#define REAL(name) ((__typeof__(&name))real(#name))

enum { BEFORE = 0, MIDDLE = 1 };

static char root[PATH_MAX], ignored[256];
static char *log_lines[MOST];
static int counted, armed_at, armed_mode;
static long room = -1;
static pthread_mutex_t guard = PTHREAD_MUTEX_INITIALIZER;

static void *real(const char *name)
{
    void *function = dlsym(RTLD_NEXT, name);
    if (!function) {
        fprintf(stderr, "killer: there is no %s\n", name);
        abort();
    }
    return function;
}

/* ---- steering ---- */

void watch(const char *folder, const char *pass)
{
    snprintf(root, sizeof root, "%s", folder);
    snprintf(ignored, sizeof ignored, "%s", pass);
    counted = armed_at = 0;
    room = -1;
}

void arm(int n, int mode) { armed_at = n; armed_mode = mode; }
void limit(long bytes) { room = bytes; }
int operations(void) { return counted < MOST ? counted : MOST; }
const char *operation(int n) { return n >= 1 && n <= operations() ? log_lines[n - 1] : ""; }

/* ---- which paths count ---- */

static int is_watched(const char *path)
{
    size_t length = strlen(root);
    if (!length || strncmp(path, root, length) || (path[length] && path[length] != '/'))
        return 0;
    return !ignored[0] || !strstr(path, ignored);
}

/* The path of an open file. */
static int path_of(int fd, char *path)
{
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    if (length < 0)
        return 0;
    path[length] = 0;
    return 1;
}

/* The absolute form of a name that is relative to an open folder. */
static int absolute(int folder, const char *name, char *path)
{
    char base[PATH_MAX];
    if (!root[0] || !name)
        return 0;
    if (name[0] == '/') {
        snprintf(path, PATH_MAX, "%s", name);
        return 1;
    }
    if (folder == AT_FDCWD ? !getcwd(base, sizeof base) : !path_of(folder, base))
        return 0;
    return snprintf(path, PATH_MAX, "%s/%s", base, name) > 0;
}

/* ---- counting and killing ---- */

static void die(void)
{
    kill(getpid(), SIGKILL);
    for (;;)
        pause();
}

/* Count one operation. Returns 1 if it is to be cut in the middle. */
static __thread int latest;

static int count(const char *kind, const char *path, long bytes)
{
    int saved = errno;
    pthread_mutex_lock(&guard);
    int n = ++counted;
    if (n <= MOST && asprintf(&log_lines[n - 1], " %s %ld %s", kind, bytes, path) < 0)
        abort();
    pthread_mutex_unlock(&guard);
    latest = n;
    if (n == armed_at && armed_mode == BEFORE)
        die();
    errno = saved;
    return n == armed_at;
}

static int count_at(const char *kind, int folder, const char *name)
{
    char path[PATH_MAX];
    if (!absolute(folder, name, path) || !is_watched(path))
        return 0;
    count(kind, path, 0);
    return 1;
}

/* Mark the latest operation of this thread as one that changed nothing. */
static void mark_failed(void)
{
    if (latest <= MOST)
        log_lines[latest - 1][0] = '-'; /* in the place that count() left for it */
}

static int fd_counts(int fd, char *path) { return root[0] && path_of(fd, path) && is_watched(path); }

/* How many of `bytes` still fit; -1 if none do, and then errno says so. */
static long fitting(long bytes)
{
    long fits = bytes;
    pthread_mutex_lock(&guard);
    if (room >= 0) {
        fits = bytes < room ? bytes : room;
        room -= fits;
    }
    pthread_mutex_unlock(&guard);
    if (bytes > 0 && fits == 0) {
        errno = ENOSPC;
        return -1;
    }
    return fits;
}

/* ---- writing ---- */

#define BEGIN_WRITE(bytes)                                                        \
    char path[PATH_MAX];                                                          \
    int here = fd_counts(fd, path), middle = here && count("write", path, bytes); \
    long fits = here ? fitting(bytes) : (long)(bytes);                            \
    if (fits < 0)                                                                 \
        return -1;                                                                \
    if (middle)                                                                   \
        fits = (bytes) / 2;

#define END_WRITE(call)        \
    ssize_t written = (call);  \
    if (middle)                \
        die();                 \
    return written;

ssize_t write(int fd, const void *data, size_t size)
{
    BEGIN_WRITE(size)
    END_WRITE(REAL(write)(fd, data, fits))
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t at)
{
    BEGIN_WRITE(size)
    END_WRITE(REAL(pwrite)(fd, data, fits, at))
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at)
{
    BEGIN_WRITE(size)
    END_WRITE(REAL(pwrite64)(fd, data, fits, at))
}

static long total(const struct iovec *parts, int n)
{
    long bytes = 0;
    for (int i = 0; i < n; i++)
        bytes += parts[i].iov_len;
    return bytes;
}

/* What does not fit, or is to be cut, is written from the first part alone: a short write. */
static ssize_t write_parts(int fd, const struct iovec *parts, int n, long fits)
{
    if (fits == total(parts, n))
        return REAL(writev)(fd, parts, n);
    for (int i = 0; i < n; i++)
        if (parts[i].iov_len)
            return REAL(write)(fd, parts[i].iov_base, (long)parts[i].iov_len < fits ? (long)parts[i].iov_len : fits);
    return 0;
}

ssize_t writev(int fd, const struct iovec *parts, int n)
{
    BEGIN_WRITE(total(parts, n))
    END_WRITE(write_parts(fd, parts, n, fits))
}

size_t fwrite(const void *data, size_t size, size_t n, FILE *file)
{
    int fd = fileno(file);
    char path[PATH_MAX];
    if (fd < 0 || !fd_counts(fd, path))
        return REAL(fwrite)(data, size, n, file);
    int middle = count("write", path, size * n);
    long fits = fitting(size * n);
    if (fits < 0)
        return 0;
    size_t written = REAL(fwrite)(data, 1, middle ? size * n / 2 : (size_t)fits, file);
    fflush(file); /* what counts as written is with the kernel */
    if (middle)
        die();
    return size ? written / size : 0;
}

ssize_t sendfile(int fd, int from, off_t *at, size_t size)
{
    struct stat about;
    if (size > 0x7ff00000 || !fstat(from, &about))
        size = about.st_size < (off_t)size ? (size_t)about.st_size : size;
    BEGIN_WRITE(size)
    END_WRITE(((ssize_t(*)(int, int, off_t *, size_t))real("sendfile"))(fd, from, at, fits))
}

ssize_t sendfile64(int fd, int from, off64_t *at, size_t size) { return sendfile(fd, from, (off_t *)at, size); }

ssize_t copy_file_range(int from, off64_t *a, int fd, off64_t *b, size_t size, unsigned flags)
{
    BEGIN_WRITE(size)
    END_WRITE(((ssize_t(*)(int, off64_t *, int, off64_t *, size_t, unsigned))real("copy_file_range"))(from, a, fd, b, fits, flags))
}

/* ---- opening for writing ---- */

#define CHANGES(flags) ((flags) & (O_CREAT | O_TRUNC))
#define MODE(flags)                         \
    mode_t mode = 0;                        \
    if ((flags) & (O_CREAT | O_TMPFILE)) {  \
        va_list rest;                       \
        va_start(rest, flags);              \
        mode = va_arg(rest, mode_t);        \
        va_end(rest);                       \
    }

int open(const char *name, int flags, ...)
{
    MODE(flags)
    if (CHANGES(flags))
        count_at("open", AT_FDCWD, name);
    return ((int (*)(const char *, int, ...))real("open"))(name, flags, mode);
}

int open64(const char *name, int flags, ...)
{
    MODE(flags)
    if (CHANGES(flags))
        count_at("open", AT_FDCWD, name);
    return ((int (*)(const char *, int, ...))real("open64"))(name, flags, mode);
}

int openat(int folder, const char *name, int flags, ...)
{
    MODE(flags)
    if (CHANGES(flags))
        count_at("open", folder, name);
    return ((int (*)(int, const char *, int, ...))real("openat"))(folder, name, flags, mode);
}

int openat64(int folder, const char *name, int flags, ...)
{
    MODE(flags)
    if (CHANGES(flags))
        count_at("open", folder, name);
    return ((int (*)(int, const char *, int, ...))real("openat64"))(folder, name, flags, mode);
}

int creat(const char *name, mode_t mode)
{
    count_at("open", AT_FDCWD, name);
    return REAL(creat)(name, mode);
}

FILE *fopen(const char *name, const char *mode)
{
    if (mode[0] != 'r')
        count_at("open", AT_FDCWD, name);
    return REAL(fopen)(name, mode);
}

FILE *fopen64(const char *name, const char *mode)
{
    if (mode[0] != 'r')
        count_at("open", AT_FDCWD, name);
    return REAL(fopen64)(name, mode);
}

/* ---- names ---- */

#define NAME_CALL(type, function, declared, given, kind, folder, name) \
    type function declared                                             \
    {                                                                  \
        int here = count_at(kind, folder, name);                       \
        type result = REAL(function) given;                            \
        if (here && result)                                            \
            mark_failed();                                             \
        return result;                                                 \
    }

NAME_CALL(int, unlink, (const char *name), (name), "unlink", AT_FDCWD, name)
NAME_CALL(int, unlinkat, (int folder, const char *name, int flags), (folder, name, flags), "unlink", folder, name)
NAME_CALL(int, remove, (const char *name), (name), "unlink", AT_FDCWD, name)
NAME_CALL(int, rmdir, (const char *name), (name), "rmdir", AT_FDCWD, name)
NAME_CALL(int, mkdir, (const char *name, mode_t mode), (name, mode), "mkdir", AT_FDCWD, name)
NAME_CALL(int, mkdirat, (int folder, const char *name, mode_t mode), (folder, name, mode), "mkdir", folder, name)
NAME_CALL(int, rename, (const char *from, const char *to), (from, to), "rename", AT_FDCWD, to)
NAME_CALL(int, renameat, (int a, const char *from, int b, const char *to), (a, from, b, to), "rename", b, to)
NAME_CALL(int, renameat2, (int a, const char *from, int b, const char *to, unsigned flags), (a, from, b, to, flags), "rename", b, to)
NAME_CALL(int, link, (const char *from, const char *to), (from, to), "link", AT_FDCWD, to)
NAME_CALL(int, linkat, (int a, const char *from, int b, const char *to, int flags), (a, from, b, to, flags), "link", b, to)
NAME_CALL(int, symlink, (const char *from, const char *to), (from, to), "link", AT_FDCWD, to)
NAME_CALL(int, truncate, (const char *name, off_t size), (name, size), "truncate", AT_FDCWD, name)
NAME_CALL(int, truncate64, (const char *name, off64_t size), (name, size), "truncate", AT_FDCWD, name)

#define FD_CALL(function, declared, given, kind) \
    int function declared                        \
    {                                            \
        char path[PATH_MAX];                     \
        if (fd_counts(fd, path))                 \
            count(kind, path, 0);                \
        return REAL(function) given;             \
    }

FD_CALL(ftruncate, (int fd, off_t size), (fd, size), "truncate")
FD_CALL(ftruncate64, (int fd, off64_t size), (fd, size), "truncate")
FD_CALL(fsync, (int fd), (fd), "fsync")
FD_CALL(fdatasync, (int fd), (fd), "fsync")
