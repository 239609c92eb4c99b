/* Loading a kernel: reads the files, tells the formats apart, and places what both of them need. The formats themselves
 * are in boot_bzimage.c, boot_elf.c and boot_multiboot.c. A kernel file is not trusted: it may come with an image from anywhere.
 */
#include "machine/boot_internal.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/util.h"
#include "machine/board.h"

#define PAGE 4096
#define MIB(n) ((unsigned long long)((n) + (1 << 20) - 1) >> 20)

/* ---- files ---- */

static int open_regular(const char *what, const char *path, uint64_t most, uint64_t *size, struct error *err)
{
	/* O_NONBLOCK: a named pipe must not make us wait for a writer before we can refuse it */
	scope_fd int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
	struct stat st;

	if (fd < 0)
		return error_errno(err, "%s %s cannot be opened; check the path", what, path);
	if (fstat(fd, &st) < 0)
		return error_errno(err, "%s %s", what, path);
	if (!S_ISREG(st.st_mode))
		return error_set(err, EINVAL, "%s %s is not a regular file; give the path of a file", what, path);
	if (st.st_size == 0)
		return error_set(err, EINVAL, "%s %s is empty; copy or build it again", what, path);
	if ((uint64_t)st.st_size > most)
		return error_set(err, E2BIG,
			"%s %s of %llu MiB is larger than the guest's memory of %llu MiB; give --memory more", what,
			path, MIB(st.st_size), MIB(most));
	*size = st.st_size;
	return take_fd(&fd);
}

static int read_all(const char *what, const char *path, int fd, void *to, uint64_t size, struct error *err)
{
	uint64_t done = 0;

	while (done < size) {
		ssize_t n = pread(fd, (char *)to + done, size - done, done);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return error_errno(err, "%s %s: reading", what, path);
		if (n == 0)
			return error_set(err, EIO, "%s %s shrank to %llu bytes while it was read; try again", what,
				path, (unsigned long long)done);
		done += n;
	}
	return 0;
}

/* ---- guest memory ---- */

uint64_t boot_low_end(const struct guest_memory *memory)
{
	return min(memory->size, MEMORY_HOLE);
}

unsigned boot_memory_map(const struct guest_memory *memory, struct boot_range ranges[BOOT_RANGES_MAX])
{
	uint64_t low = boot_low_end(memory);
	unsigned n = 0;

	ranges[n++] = (struct boot_range){0, BOOT_LOW_END, BOOT_RAM};
	ranges[n++] = (struct boot_range){BOOT_LOW_END, 0xa0000 - BOOT_LOW_END, BOOT_RESERVED};
	ranges[n++] = (struct boot_range){0xe0000, 0x20000, BOOT_RESERVED}; /* ACPI tables */
	if (low > BOOT_KERNEL_MIN)
		ranges[n++] = (struct boot_range){BOOT_KERNEL_MIN, low - BOOT_KERNEL_MIN, BOOT_RAM};
	ranges[n++] = (struct boot_range){BOARD_ECAM_BASE, BOARD_ECAM_SIZE, BOOT_RESERVED};
	if (memory->size > low)
		ranges[n++] = (struct boot_range){MEMORY_HIGH, memory->size - low, BOOT_RAM};
	return n;
}

static int too_small(const struct boot_job *job, uint64_t gpa, uint64_t n, const char *what, struct error *err)
{
	return error_set(err, ENOSPC,
		"kernel %s: %s of %llu bytes at 0x%llx is outside the guest's memory of %llu MiB; give --memory more",
		job->kernel.path, what, (unsigned long long)n, (unsigned long long)gpa, MIB(job->memory->size));
}

int boot_put(
	const struct boot_job *job, uint64_t gpa, const void *bytes, uint64_t n, const char *what, struct error *err)
{
	if (!memory_write(job->memory, gpa, bytes, n))
		return too_small(job, gpa, n, what, err);
	return 0;
}

int boot_clear(const struct boot_job *job, uint64_t gpa, uint64_t n, const char *what, struct error *err)
{
	void *to = memory_for_write(job->memory, gpa, n);

	if (!to)
		return too_small(job, gpa, n, what, err);
	memset(to, 0, n);
	memory_wrote(job->memory, gpa, n);
	return 0;
}

int boot_read(const struct boot_job *job, const char *path, int fd, uint64_t gpa, uint64_t size, struct error *err)
{
	void *to = memory_for_write(job->memory, gpa, size);

	if (gpa >= boot_low_end(job->memory) || !to)
		return error_set(err, ENOSPC,
			"module %s does not fit: %llu MiB at %llu MiB, and the guest's memory there ends at %llu MiB; give "
			"--memory more",
			path, MIB(size), (unsigned long long)gpa >> 20, (unsigned long long)boot_low_end(job->memory) >> 20);
	int ret = read_all("module", path, fd, to, size, err);
	memory_wrote(job->memory, gpa, size);
	return ret;
}

int boot_place_initrd(const struct boot_job *job, uint64_t floor, uint64_t limit, uint64_t *gpa, struct error *err)
{
	uint64_t top = min(limit, boot_low_end(job->memory)), size = job->initrd_size;

	*gpa = 0;
	if (job->initrd_fd < 0)
		return 0;
	floor = align_up(floor, PAGE);
	if (size > top || align_down(top - size, PAGE) < floor)
		return error_set(err, ENOSPC,
			"initrd %s does not fit: %llu MiB are needed above the kernel's end at %llu MiB, and memory "
			"for it ends at "
			"%llu MiB; give --memory more",
			job->config->initrd, MIB(size), MIB(floor), (unsigned long long)top >> 20);
	*gpa = align_down(top - size, PAGE);

	void *to = memory_for_write(job->memory, *gpa, size);
	if (!to)
		return too_small(job, *gpa, size, "the initrd", err);
	int ret = read_all("initrd", job->config->initrd, job->initrd_fd, to, size, err);
	memory_wrote(job->memory, *gpa, size);
	return ret;
}

int boot_place_cmdline(const struct boot_job *job, uint64_t longest, struct error *err)
{
	const char *cmdline = job->config->cmdline ? job->config->cmdline : "";
	uint64_t n = strlen(cmdline), most = min(longest, BOOT_CMDLINE_MAX - 1);

	if (n > most)
		return error_set(err, E2BIG,
			"kernel %s takes a command line of at most %llu bytes, not %llu; shorten --cmdline",
			job->kernel.path, (unsigned long long)most, (unsigned long long)n);
	return boot_put(job, BOOT_CMDLINE, cmdline, n + 1, "the command line", err);
}

int boot_place_gdt(struct boot_entry *entry, const struct boot_job *job, bool long_mode, struct error *err)
{
	/* Present, ring 0, 4 GiB, accessed: readable code with L or with D, writable data (SDM volume 3, 3.4.5). */
	const uint64_t gdt[] = {0, 0, long_mode ? 0x00af9b000000ffff : 0x00cf9b000000ffff, 0x00cf93000000ffff};

	entry->gdt = BOOT_GDT;
	entry->gdt_limit = sizeof(gdt) - 1;
	return boot_put(job, BOOT_GDT, gdt, sizeof(gdt), "the descriptor table", err);
}

/* ---- which format ---- */

int boot_load_bytes(struct boot_entry *entry, const struct boot_job *job, struct error *err)
{
	const struct boot_file *k = &job->kernel;

	*entry = (struct boot_entry){0};
	if (boot_is_multiboot(k))
		return boot_load_multiboot(entry, job, err);
	if (job->config->modules)
		return error_set(err, EINVAL,
			"kernel %s takes no modules, only Multiboot kernels do; leave --module out", k->path);
	if (k->size >= 4 && !memcmp(k->bytes, "\177ELF", 4))
		return boot_load_elf(entry, job, err);
	if (k->size >= 0x206 && !memcmp(k->bytes + 0x202, "HdrS", 4))
		return boot_load_bzimage(entry, job, err);
	if (k->size < 0x206)
		return error_set(err, ENOEXEC,
			"kernel %s of %llu bytes is truncated or not a bzImage or ELF file; copy it again", k->path,
			(unsigned long long)k->size);
	return error_set(
		err, ENOEXEC, "kernel %s is not a bzImage or ELF file; give a vmlinuz or vmlinux for x86-64", k->path);
}

int boot_open(struct boot_files *files, const struct guest_memory *memory, const struct boot_config *config,
	struct error *err)
{
	*files = (struct boot_files){.kernel = -1, .initrd = -1};
	files->kernel = open_regular("kernel", config->kernel, memory->size, &files->kernel_size, err);
	if (files->kernel < 0)
		return files->kernel;
	if (config->initrd) {
		files->initrd = open_regular("initrd", config->initrd, memory->size, &files->initrd_size, err);
		if (files->initrd < 0)
			return files->initrd;
	}
	for (unsigned i = 0; i < config->modules; i++) {
		struct boot_opened *m = &files->module[i];

		m->fd = open_regular("module", config->module[i].path, memory->size, &m->size, err);
		if (m->fd < 0)
			return m->fd;
		files->modules++;
	}
	return 0;
}

void boot_close(struct boot_files *files)
{
	if (files->kernel >= 0)
		close(take_fd(&files->kernel));
	if (files->initrd >= 0)
		close(take_fd(&files->initrd));
	while (files->modules)
		close(files->module[--files->modules].fd);
}

static int load_files(struct boot_entry *entry, struct guest_memory *memory, const struct boot_config *config,
	const struct boot_files *files, struct error *err)
{
	struct boot_job job = {.memory = memory,
		.config = config,
		.initrd_fd = files->initrd,
		.initrd_size = files->initrd_size,
		.modules = files->modules,
		.module = files->module,
		.kernel = {.path = config->kernel, .size = files->kernel_size}};
	scope_free uint8_t *bytes = malloc(job.kernel.size);
	int ret;

	if (!bytes)
		return error_set(err, ENOMEM, "kernel %s: no memory on the host to read its %llu MiB", config->kernel,
			MIB(job.kernel.size));
	ret = read_all("kernel", config->kernel, files->kernel, bytes, job.kernel.size, err);
	if (ret)
		return ret;
	job.kernel.bytes = bytes;
	return boot_load_bytes(entry, &job, err);
}

int boot_load(
	struct boot_entry *entry, struct guest_memory *memory, const struct boot_config *config, struct error *err)
{
	struct boot_files files;
	int ret;

	if (config->files)
		return load_files(entry, memory, config, config->files, err);
	ret = boot_open(&files, memory, config, err);
	if (ret == 0)
		ret = load_files(entry, memory, config, &files, err);
	boot_close(&files);
	return ret;
}
