/* Counts the calls that change the disk below one folder, and makes one of them fail. Loaded by LD_PRELOAD.

   A process arms it after a fork with disk_faults_arm(folder, mode, number). The calls are counted in memory that is
   shared with the parent, which reads their number and their names when the child is dead. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OFF, COUNT, KILL, FULL, BROKEN };       /* modes */
enum { FREES = 1, NEEDS_SPACE = 2, BYTES = 4 }; /* what a call does */
enum { GO = 0, HALF = -1 };                     /* else an error number */
enum { CALLS = 8192, LENGTH = 240 };

static struct shared {
    atomic_int mode, target, count;
    char root[PATH_MAX];
    char calls[CALLS][LENGTH];
} *shared;

__attribute__((constructor)) static void start(void) {
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
}

void disk_faults_arm(const char *root, int mode, int target) {
    snprintf(shared->root, sizeof shared->root, "%s", root);
    shared->count = 0;
    shared->target = target;
    shared->mode = mode;
}
int disk_faults_count(void) { return shared->count; }
const char *disk_faults_call(int number) { return shared->calls[(number - 1) % CALLS]; }

static void of_descriptor(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length < 0 ? 0 : length] = 0;
}

static int below_root(int folder, const char *name, char *path) {
    if (name == NULL) of_descriptor(folder, path);
    else if (name[0] == '/') snprintf(path, PATH_MAX, "%s", name);
    else {
        if (folder != AT_FDCWD) of_descriptor(folder, path);
        else if (getcwd(path, PATH_MAX) == NULL) path[0] = 0;
        size_t length = strlen(path);
        snprintf(path + length, PATH_MAX - length, "/%s", name);
    }
    size_t length = strlen(shared->root);
    return strncmp(path, shared->root, length) == 0 && (path[length] == '/' || path[length] == 0);
}

/* What becomes of a call: GO on, HALF of its bytes, or an error number. */
static int fault(const char *kind, int folder, const char *name, int does) {
    if (shared == NULL || shared->mode == OFF) return GO;
    int before = errno, mode = shared->mode;
    char path[PATH_MAX];
    if (!below_root(folder, name, path)) { errno = before; return GO; }
    int number = atomic_fetch_add(&shared->count, 1) + 1;
    snprintf(shared->calls[(number - 1) % CALLS], LENGTH, "%s %s", kind, path + strlen(shared->root));
    errno = before;
    if (number < shared->target || mode == COUNT) return GO;
    if (mode == KILL) {
        if (does & BYTES) return HALF; /* and is killed then */
        kill(getpid(), SIGKILL);
    }
    if (mode == FULL && !(does & FREES) && (does & NEEDS_SPACE || number == shared->target))
        return does & BYTES && number == shared->target ? HALF : ENOSPC;
    if (mode == BROKEN && number == shared->target) return EIO;
    return GO;
}

/* A process that is to be killed at a write has written half of it. */
static void after_half(void) {
    if (shared->mode == KILL) kill(getpid(), SIGKILL);
}

#define REAL(name) ((__typeof__(&name))real(#name))
static void *real(const char *name) { return dlsym(RTLD_NEXT, name); }
#define FAIL_IF(what) do { int wrong = what; if (wrong > 0) { errno = wrong; return -1; } } while (0)
#define HALF_OF(size) ((size) > 1 ? (size) / 2 : (size))

static int changes(int flags) { return (flags & O_ACCMODE) != O_RDONLY || flags & (O_CREAT | O_TRUNC); }
static int opening(int folder, const char *path, int flags) {
    if (!changes(flags)) return GO;
    int tmpfile = (flags & O_TMPFILE) == O_TMPFILE;
    return fault(tmpfile ? "open-unnamed" : flags & O_CREAT ? "create" : "open", folder, path,
                 flags & O_CREAT || tmpfile ? NEEDS_SPACE : 0);
}

#define MODE_OF(flags, last) \
    mode_t mode = 0; \
    if ((flags) & O_CREAT || ((flags) & O_TMPFILE) == O_TMPFILE) { \
        va_list more; va_start(more, last); mode = va_arg(more, mode_t); va_end(more); \
    }
#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        MODE_OF(flags, flags) FAIL_IF(opening(AT_FDCWD, path, flags)); \
        return REAL(name)(path, flags, mode); \
    }
#define OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        MODE_OF(flags, flags) FAIL_IF(opening(folder, path, flags)); \
        return REAL(name)(folder, path, flags, mode); \
    }
OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64)

int __open_2(const char *path, int flags) { return open(path, flags); }
int __open64_2(const char *path, int flags) { return open64(path, flags); }
int __openat_2(int folder, const char *path, int flags) { return openat(folder, path, flags); }
int __openat64_2(int folder, const char *path, int flags) { return openat64(folder, path, flags); }
int creat(const char *path, mode_t mode) { return open(path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return open64(path, O_CREAT | O_WRONLY | O_TRUNC, mode); }

#define FOPEN(name) \
    FILE *name(const char *path, const char *mode) { \
        int wrong = strpbrk(mode, "wa+") ? fault("create", AT_FDCWD, path, NEEDS_SPACE) : GO; \
        if (wrong > 0) { errno = wrong; return NULL; } \
        return REAL(name)(path, mode); \
    }
FOPEN(fopen) FOPEN(fopen64)

#define WRITE(name, parameters, arguments, half) \
    ssize_t name parameters { \
        int wrong = fault("write", fd, NULL, NEEDS_SPACE | BYTES); \
        FAIL_IF(wrong); \
        if (wrong == HALF) { half; after_half(); return done; } \
        return REAL(name) arguments; \
    }
WRITE(write, (int fd, const void *data, size_t size), (fd, data, size),
      ssize_t done = REAL(write)(fd, data, HALF_OF(size)))
WRITE(pwrite, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at),
      ssize_t done = REAL(pwrite)(fd, data, HALF_OF(size), at))
WRITE(pwrite64, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at),
      ssize_t done = REAL(pwrite64)(fd, data, HALF_OF(size), at))
WRITE(writev, (int fd, const struct iovec *parts, int count), (fd, parts, count),
      ssize_t done = REAL(writev)(fd, parts, HALF_OF(count)))
WRITE(pwritev, (int fd, const struct iovec *parts, int count, off_t at), (fd, parts, count, at),
      ssize_t done = REAL(pwritev)(fd, parts, HALF_OF(count), at))
WRITE(pwritev64, (int fd, const struct iovec *parts, int count, off64_t at), (fd, parts, count, at),
      ssize_t done = REAL(pwritev64)(fd, parts, HALF_OF(count), at))
ssize_t sendfile(int fd, int from, off_t *at, size_t size);
ssize_t sendfile64(int fd, int from, off64_t *at, size_t size);
WRITE(sendfile, (int fd, int from, off_t *at, size_t size), (fd, from, at, size),
      ssize_t done = REAL(sendfile)(fd, from, at, HALF_OF(size)))
WRITE(sendfile64, (int fd, int from, off64_t *at, size_t size), (fd, from, at, size),
      ssize_t done = REAL(sendfile64)(fd, from, at, HALF_OF(size)))
WRITE(copy_file_range, (int from, off64_t *at, int fd, off64_t *to, size_t size, unsigned flags),
      (from, at, fd, to, size, flags), ssize_t done = REAL(copy_file_range)(from, at, fd, to, HALF_OF(size), flags))

#define CALL(name, parameters, arguments, kind, folder, path, does) \
    int name parameters { \
        FAIL_IF(fault(kind, folder, path, does)); \
        return REAL(name) arguments; \
    }
CALL(ftruncate, (int fd, off_t size), (fd, size), "truncate", fd, NULL, 0)
CALL(ftruncate64, (int fd, off64_t size), (fd, size), "truncate", fd, NULL, 0)
CALL(truncate, (const char *path, off_t size), (path, size), "truncate", AT_FDCWD, path, 0)
CALL(truncate64, (const char *path, off64_t size), (path, size), "truncate", AT_FDCWD, path, 0)
CALL(fallocate, (int fd, int how, off_t at, off_t size), (fd, how, at, size), "write", fd, NULL, NEEDS_SPACE)
CALL(fallocate64, (int fd, int how, off64_t at, off64_t size), (fd, how, at, size), "write", fd, NULL, NEEDS_SPACE)
CALL(fsync, (int fd), (fd), "sync", fd, NULL, 0)
CALL(fdatasync, (int fd), (fd), "sync", fd, NULL, 0)
CALL(mkdir, (const char *path, mode_t mode), (path, mode), "mkdir", AT_FDCWD, path, NEEDS_SPACE)
CALL(mkdirat, (int folder, const char *path, mode_t mode), (folder, path, mode), "mkdir", folder, path, NEEDS_SPACE)
CALL(rmdir, (const char *path), (path), "remove", AT_FDCWD, path, FREES)
CALL(unlink, (const char *path), (path), "remove", AT_FDCWD, path, FREES)
CALL(unlinkat, (int folder, const char *path, int flags), (folder, path, flags), "remove", folder, path, FREES)
CALL(remove, (const char *path), (path), "remove", AT_FDCWD, path, FREES)
CALL(link, (const char *from, const char *to), (from, to), "link", AT_FDCWD, to, NEEDS_SPACE)
CALL(linkat, (int of, const char *from, int folder, const char *to, int flags), (of, from, folder, to, flags), "link",
     folder, to, NEEDS_SPACE)
CALL(symlink, (const char *from, const char *to), (from, to), "link", AT_FDCWD, to, NEEDS_SPACE)
CALL(symlinkat, (const char *from, int folder, const char *to), (from, folder, to), "link", folder, to, NEEDS_SPACE)
CALL(chmod, (const char *path, mode_t mode), (path, mode), "chmod", AT_FDCWD, path, 0)
CALL(fchmod, (int fd, mode_t mode), (fd, mode), "chmod", fd, NULL, 0)
CALL(fchmodat, (int folder, const char *path, mode_t mode, int flags), (folder, path, mode, flags), "chmod", folder,
     path, 0)
CALL(rename, (const char *from, const char *to), (from, to), "rename", AT_FDCWD, to, 0)
CALL(renameat, (int of, const char *from, int folder, const char *to), (of, from, folder, to), "rename", folder, to, 0)
CALL(renameat2, (int of, const char *from, int folder, const char *to, unsigned flags), (of, from, folder, to, flags),
     flags & RENAME_EXCHANGE ? "exchange" : "rename", folder, to, 0)

long syscall(long number, ...) {
    long a[6];
    va_list more;
    va_start(more, number);
    for (int i = 0; i < 6; i++) a[i] = va_arg(more, long);
    va_end(more);
    switch (number) {
    case SYS_renameat2: return renameat2(a[0], (char *)a[1], a[2], (char *)a[3], a[4]);
    case SYS_openat: return openat(a[0], (char *)a[1], a[2], (mode_t)a[3]);
    case SYS_copy_file_range:
        return copy_file_range(a[0], (off64_t *)a[1], a[2], (off64_t *)a[3], a[4], a[5]);
    }
    return REAL(syscall)(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
