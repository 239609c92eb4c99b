/* Confining the VM's process; see jail.h. Each step says what it takes away. */
#include "vmm/jail.h"

#include <dirent.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <linux/capability.h>
#include <linux/securebits.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "vmm/jail_internal.h"
#include "vmm/seccomp_filter.h"
#include "vmm/terminal.h"

#define INHERITED_MAX 1024
#define MIB (1ull << 20)

struct jail {
	struct sock_fprog filter[THREAD_KINDS];
};

/* Of the process, as descriptors are: noted before a VM exists. */
static struct {
	int fd[INHERITED_MAX];
	unsigned count;
} inherited;

/* ---- descriptors ---- */

int jail_note_inherited(struct error *err)
{
	DIR *folder = opendir("/proc/self/fd");
	struct dirent *entry;

	if (!folder)
		return error_errno(err, "--jail: /proc/self/fd (is /proc mounted?)");
	while ((entry = readdir(folder))) {
		int fd = atoi(entry->d_name);

		if (fd <= STDERR_FILENO || fd == dirfd(folder))
			continue;
		if (inherited.count == INHERITED_MAX) {
			closedir(folder);
			return error_set(err, EMFILE, "--jail: more than %d descriptors were handed over; close some",
				INHERITED_MAX);
		}
		inherited.fd[inherited.count++] = fd;
	}
	closedir(folder);
	return 0;
}

/* What was opened for the guest stays, and standard error for our messages. */
static int close_descriptors(const struct vmm_config *config, struct error *err)
{
	scope_fd int null = open("/dev/null", O_RDWR | O_CLOEXEC);

	if (null < 0)
		return error_errno(err, "--jail: /dev/null");
	for (unsigned i = 0; i < inherited.count; i++)
		close(inherited.fd[i]);
	inherited.count = 0;
	if (config->serial != VMM_SERIAL_STDIO && !(config->has_hvc && config->hvc == VMM_SERIAL_STDIO) && (dup2(null, STDIN_FILENO) < 0 || dup2(null, STDOUT_FILENO) < 0))
		return error_errno(err, "--jail: /dev/null as standard input and output");
	return 0;
}

static unsigned open_descriptors(void)
{
	DIR *folder = opendir("/proc/self/fd");
	unsigned count = 0;

	while (folder && readdir(folder))
		count++;
	if (folder)
		closedir(folder);
	return count;
}

/* ---- limits ---- */

static int limit(int which, const char *name, uint64_t value, struct error *err)
{
	struct rlimit now, wanted = {value, value};

	if (getrlimit(which, &now) < 0)
		return error_errno(err, "--jail: resource limit %s", name);
	if (now.rlim_max < value && setrlimit(which, &wanted) < 0) {
		terminal_say("hostel-vmm: --jail: resource limit %s stays at %llu, %llu was wanted: raising it needs "
			     "CAP_SYS_RESOURCE, which is missing here\n",
			name, (unsigned long long)now.rlim_max, (unsigned long long)value);
		wanted.rlim_cur = wanted.rlim_max = now.rlim_max;
	}
	if (setrlimit(which, &wanted) < 0)
		return error_errno(err, "--jail: resource limit %s of %llu", name, (unsigned long long)value);
	return 0;
}

/* Bytes mapped, and bytes of private memory: proc(5), statm. */
static int memory_now(uint64_t *mapped, uint64_t *private, struct error *err)
{
	unsigned long long pages[6];
	FILE *file = fopen("/proc/self/statm", "re");
	int found;

	if (!file)
		return error_errno(err, "--jail: /proc/self/statm");
	found = fscanf(file, "%llu %llu %llu %llu %llu %llu", &pages[0], &pages[1], &pages[2], &pages[3], &pages[4],
		&pages[5]);
	fclose(file);
	if (found != 6)
		return error_set(err, EIO, "--jail: /proc/self/statm has %d numbers, not 7", found);
	*mapped = pages[0] * 4096;
	*private = pages[5] * 4096;
	return 0;
}

/* A leak that a guest provokes ends its VM before it troubles the host. Guest memory and all that the engine reserves is
 * mapped by now; to come are stacks and allocator arenas of the threads, and what connections of a user-mode network
 * hold. The number of processes needs no limit: the filters let none be made. */
static int set_limits(unsigned threads, uint64_t load, bool user_net, struct error *err)
{
	uint64_t mapped = 0, private = 0, slack = load + (user_net ? 512 : 128) * MIB, files = user_net ? 4096 : 64;
	struct rlimit stack = {8 * MIB, 8 * MIB};
	int result = memory_now(&mapped, &private, err);

	getrlimit(RLIMIT_STACK, &stack);
	stack.rlim_cur = min((uint64_t)stack.rlim_cur, 64 * MIB);
	if (result == 0)
		result = limit(RLIMIT_AS, "of address space (RLIMIT_AS)",
			mapped + threads * (stack.rlim_cur + 128 * MIB) + slack, err);
	if (result == 0)
		result = limit(RLIMIT_DATA, "of private memory (RLIMIT_DATA)",
			private + threads * (stack.rlim_cur + 16 * MIB) + slack, err);
	if (result == 0)
		result = limit(RLIMIT_NOFILE, "of descriptors (RLIMIT_NOFILE)", open_descriptors() + files, err);
	/* A core dump would hold the guest's secrets. */
	if (result == 0)
		result = limit(RLIMIT_CORE, "of core dumps (RLIMIT_CORE)", 0, err);
	if (result == 0)
		result = limit(RLIMIT_MEMLOCK, "of locked memory (RLIMIT_MEMLOCK)", 0, err);
	if (result == 0)
		result = limit(RLIMIT_MSGQUEUE, "of message queues (RLIMIT_MSGQUEUE)", 0, err);
	return result;
}

/* ---- namespaces and root ---- */

/* libslirp asks the name servers that this file names. The host's changes to it do not reach the copy. */
static int copy_resolv_conf(struct error *err)
{
	char text[16384];
	scope_fd int from = open("/etc/resolv.conf", O_RDONLY | O_CLOEXEC), to = -1;
	ssize_t n = from < 0 ? 0 : read(from, text, sizeof(text));

	if (n < 0)
		return error_errno(err, "--jail: reading /etc/resolv.conf");
	if (mkdir("etc", 0755) < 0)
		return error_errno(err, "--jail: making etc in the empty root");
	to = open("etc/resolv.conf", O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
	if (to < 0 || fchmod(to, 0644) < 0 || write(to, text, (size_t)n) != n)
		return error_errno(err, "--jail: writing etc/resolv.conf into the empty root");
	return 0;
}

/* A guest that connects to the host by vsock does so to a socket beside --vsock's own. Its folder, read-only and at its own
 * path, is all of the host's files that is left: and of those only sockets that this id may write to answer. It is opened
 * before the empty root hides it. */
static int open_socket_folder(int *fd, const char *path, char folder[PATH_MAX], struct error *err)
{
	char *end;

	if (path[0] != '/' || strlen(path) >= PATH_MAX - 1 || strstr(path, "/../"))
		return error_set(err, EINVAL, "--vsock %s: in a jail give an absolute path, without '..'", path);
	snprintf(folder, PATH_MAX, "%s", path);
	end = strrchr(folder, '/');
	if (end == folder)
		return error_set(err, EINVAL, "--vsock %s: in a jail the socket needs a folder of its own", path);
	*end = '\0';
	*fd = open(folder, O_PATH | O_DIRECTORY | O_CLOEXEC);
	return *fd < 0 ? error_errno(err, "--vsock %s: opening its folder", path) : 0;
}

static int bind_socket_folder(int fd, const char *folder, struct error *err)
{
	char path[PATH_MAX], source[32];

	for (const char *at = folder; at; at = strchr(at + 1, '/')) {
		const char *next = strchr(at + 1, '/');

		snprintf(path, sizeof(path), ".%.*s", next ? (int)(next - folder) : (int)strlen(folder), folder);
		if (mkdir(path, 0755) < 0 && errno != EEXIST)
			return error_errno(err, "--vsock: making %s in the empty root", folder);
	}
	snprintf(source, sizeof(source), "/proc/self/fd/%d", fd);
	if (mount(source, path, NULL, MS_BIND, NULL) < 0 ||
		mount(NULL, path, NULL, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL) < 0)
		return error_errno(err, "--vsock: showing %s in the jail", folder);
	return 0;
}

/* An empty file system, read-only, without device nodes, programs or set-user-id bits, in place of the host's. It is
 * mounted over any folder: the mount namespace is ours, and the old root with the folder goes (pivot_root(2), "." twice). */
static int empty_root(bool user_net, const char *vsock, struct error *err)
{
	const unsigned long flags = MS_NOSUID | MS_NODEV | MS_NOEXEC;
	char folder[PATH_MAX];
	scope_fd int folder_fd = -1;
	int result = vsock ? open_socket_folder(&folder_fd, vsock, folder, err) : 0;

	if (result < 0)
		return result;
	if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0)
		return error_errno(err, "--jail: keeping mounts to itself");
	if (mount("hostel-jail", "/tmp", "tmpfs", flags, "size=64k,nr_inodes=64,mode=0755") < 0)
		return error_errno(err, "--jail: mounting the empty root over /tmp");
	if (chdir("/tmp") < 0)
		return error_errno(err, "--jail: entering the empty root");
	if (user_net)
		result = copy_resolv_conf(err);
	if (result == 0 && vsock)
		result = bind_socket_folder(folder_fd, folder, err);
	if (result < 0)
		return result;
	if (mount(NULL, ".", NULL, MS_REMOUNT | MS_RDONLY | flags, NULL) < 0)
		return error_errno(err, "--jail: making the empty root read-only");
	if (syscall(SYS_pivot_root, ".", ".") < 0)
		return error_errno(err, "--jail: changing to the empty root (pivot_root; a host that runs from its initramfs "
					"does not allow it)");
	if (umount2(".", MNT_DETACH) < 0 || chdir("/") < 0)
		return error_errno(err, "--jail: leaving the host's root");
	return 0;
}

static int enter_namespaces(bool user_net, struct error *err)
{
	/* The PID namespace is there since the fork. A user-mode network makes the guest's connections from here: it
	 * needs the host's network; a tap is open and works from any. */
	int flags = CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS | (user_net ? 0 : CLONE_NEWNET);

	if (unshare(flags) < 0)
		return error_errno(err, "--jail: namespaces of its own (is CAP_SYS_ADMIN there?)");
	if (sethostname("hostel-vmm", 10) < 0)
		return error_errno(err, "--jail: setting a host name of its own");
	return 0;
}

/* ---- rights ---- */

static int drop_rights(uint32_t id, struct error *err)
{
	const unsigned long bits = SECBIT_NOROOT | SECBIT_NOROOT_LOCKED | SECBIT_NO_SETUID_FIXUP_LOCKED |
				   SECBIT_KEEP_CAPS_LOCKED | SECBIT_NO_CAP_AMBIENT_RAISE |
				   SECBIT_NO_CAP_AMBIENT_RAISE_LOCKED;
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct none[2] = {0};

	for (int cap = 0; prctl(PR_CAPBSET_READ, cap) >= 0; cap++)
		if (prctl(PR_CAPBSET_DROP, cap) < 0)
			return error_errno(err, "--jail: giving up capability %d for good", cap);
	if (prctl(PR_SET_SECUREBITS, bits) < 0)
		return error_errno(err, "--jail: making root nobody special");
	if (setgroups(0, NULL) < 0 || setresgid(id, id, id) < 0 || setresuid(id, id, id) < 0)
		return error_errno(err, "--jail: becoming user and group %u", id);
	if (syscall(SYS_capset, &header, none) < 0)
		return error_errno(err, "--jail: giving up all capabilities");
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
		return error_errno(err, "--jail: no_new_privs");
	/* Nobody of the same id may attach to it or read its memory. */
	if (prctl(PR_SET_DUMPABLE, 0) < 0)
		return error_errno(err, "--jail: being not dumpable");
	/* The VM does not outlive its keeper. Now, since a change of user clears it. */
	if (prctl(PR_SET_PDEATHSIG, SIGKILL) < 0)
		return error_errno(err, "--jail: ending with its keeper");
	return 0;
}

/* ---- all of it ---- */

static int enter(struct jail *jail, const struct vmm_config *config, unsigned threads, uint64_t load, struct error *err)
{
	unsigned with = config->vsock_path ? CALLED_WITH_VSOCK : 0;
	bool user_net = false;
	int result;

	for (unsigned i = 0; i < config->nets; i++)
		user_net = user_net || !strncmp(config->net[i].spec, "user", 4);
	with |= user_net ? CALLED_WITH_USER_NET : 0;
	/* libc reads the time zone's file the first time that it makes a date, of UTC too; the CMOS clock makes dates. */
	tzset();
	result = close_descriptors(config, err);
	for (unsigned kind = 0; kind < THREAD_KINDS && result == 0; kind++)
		result = seccomp_compile(&jail->filter[kind], kind, with, err);
	if (result == 0)
		result = enter_namespaces(user_net, err);
	if (result == 0)
		result = set_limits(threads, load, user_net, err);
	if (result == 0)
		result = empty_root(user_net, config->vsock_path, err);
	if (result == 0)
		result = drop_rights(config->jail_first, err);
	return result;
}

int jail_enter(struct jail **entered, const struct vmm_config *config, unsigned threads, uint64_t load, struct error *err)
{
	struct jail *jail = calloc(1, sizeof(*jail));
	int result;

	if (!jail)
		return error_errno(err, "jail");
	result = enter(jail, config, threads, load, err);
	if (result < 0) {
		jail_forget(jail);
		return result;
	}
	seccomp_guard();
	*entered = jail;
	return 0;
}

void jail_forget(struct jail *jail)
{
	if (!jail)
		return;
	for (unsigned kind = 0; kind < THREAD_KINDS; kind++)
		free(jail->filter[kind].filter);
	free(jail);
}

void jail_thread_begin(void *opaque, enum thread_kind kind)
{
	struct jail *jail = opaque;
	int result = seccomp_install(&jail->filter[kind], kind);

	if (result == 0)
		return;
	/* Not one instruction of a guest's without it, and a thread has nobody to return an error to. */
	terminal_say("hostel-vmm: jail: a thread's filter is refused: %s\n", strerror(-result));
	terminal_restore();
	_exit(1);
}
