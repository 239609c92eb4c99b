#include "support.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/util.h"

static char scratch[256];

void scratch_enter(void)
{
	/* In memory if possible: thousands of flushes on a real disk take minutes. TMPDIR says where else. */
	const char *folder = getenv("TMPDIR");

	if (!folder)
		folder = access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp";
	snprintf(scratch, sizeof(scratch), "%s/hostel-disk-XXXXXX", folder);
	assert_non_null(mkdtemp(scratch));
	assert_int_equal(chdir(scratch), 0);
}

void scratch_leave(void)
{
	assert_int_equal(chdir("/"), 0);
	run("rm -rf %s", scratch);
}

static int run_command(const char *command, char *output, size_t room)
{
	FILE *pipe = popen(command, "r");
	size_t length;
	int status;

	assert_non_null(pipe);
	length = fread(output, 1, room - 1, pipe);
	output[length] = 0;
	while (fgetc(pipe) != EOF)
		;
	status = pclose(pipe);
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

int run_status(const char *format, ...)
{
	char command[4096], output[4096];
	va_list args;

	va_start(args, format);
	vsnprintf(command, sizeof(command), format, args);
	va_end(args);
	strcat(command, " 2>&1");
	return run_command(command, output, sizeof(output));
}

void run(const char *format, ...)
{
	char command[4096], output[4096];
	va_list args;
	int status;

	va_start(args, format);
	vsnprintf(command, sizeof(command) - 16, format, args);
	va_end(args);
	strcat(command, " 2>&1");
	status = run_command(command, output, sizeof(output));
	if (status)
		fail_msg("%s: exit %d: %s", command, status, output);
}

void write_file(const char *path, const void *data, size_t length)
{
	FILE *f = fopen(path, "w");

	assert_non_null(f);
	assert_int_equal(fwrite(data, 1, length, f), length);
	assert_int_equal(fclose(f), 0);
}

void *read_file(const char *path, size_t *length)
{
	FILE *f = fopen(path, "r");
	struct stat status;
	void *data;

	assert_non_null(f);
	fstat(fileno(f), &status);
	*length = status.st_size;
	data = malloc(*length + 1);
	assert_int_equal(fread(data, 1, *length, f), *length);
	fclose(f);
	return data;
}

static uint64_t random_state = 1;

void random_seed(uint64_t seed)
{
	random_state = seed * 2 + 1;
}

/* xorshift64* */
uint64_t random_u64(void)
{
	random_state ^= random_state >> 12;
	random_state ^= random_state << 25;
	random_state ^= random_state >> 27;
	return random_state * 0x2545f4914f6cdd1dull;
}

uint64_t random_below(uint64_t n)
{
	return (random_u64() >> 11) % n;
}

/* ---- disks ---- */

struct disk *open_disk(const char *path, enum disk_format format, bool read_only)
{
	struct disk_options options = {.format = format, .read_only = read_only};
	struct error err = {0};
	struct disk *disk = NULL;

	if (disk_open(&disk, path, &options, &err) < 0)
		fail_msg("opening %s: %s", path, err.text);
	return disk;
}

void open_fails(const char *path, enum disk_format format, bool read_only, const char *part)
{
	struct disk_options options = {.format = format, .read_only = read_only};
	struct error err = {0};
	struct disk *disk = NULL;
	int result = disk_open(&disk, path, &options, &err);

	if (result == 0)
		fail_msg("%s was opened, but \"%s\" was to be expected", path, part);
	assert_int_equal(result, -err.code);
	if (!strstr(err.text, part) || !strstr(err.text, path) || strchr(err.text, '\n'))
		fail_msg("%s: the message should have \"%s\" in it: %s", path, part, err.text);
}

void close_disk(struct disk *disk)
{
	struct error err = {0};

	if (disk_close(disk, &err) < 0)
		fail_msg("closing: %s", err.text);
}

void check_clean(const char *path)
{
	run("qemu-img check -f qcow2 %s", path);
}

/* ---- a disk and its model ---- */

static void load_model(struct modelled *m)
{
	size_t length;

	run("qemu-img convert -f %s -O raw %s model.raw", m->format == DISK_RAW ? "raw" : "qcow2", m->path);
	m->model = read_file("model.raw", &length);
	m->model = realloc(m->model, align_up(length, 512));
	memset(m->model + length, 0, align_up(length, 512) - length);
	m->size = align_up(length, 512);
}

void modelled_open(struct modelled *m, const char *path, enum disk_format format)
{
	*m = (struct modelled){.path = path, .format = format};
	load_model(m);
	m->disk = open_disk(path, format, false);
	assert_int_equal(disk_size(m->disk), m->size);
	assert_false(disk_read_only(m->disk));
}

/* A range of sectors, short or long, often near a boundary of 64 KiB. */
static void random_range(const struct modelled *m, uint64_t *offset, uint64_t *length)
{
	static const uint64_t most[] = {4, 16, 140, 300, 1500, 9000};
	uint64_t sectors = m->size / 512;
	uint64_t count = 1 + random_below(most[random_below(ARRAY_SIZE(most))]);
	uint64_t first = random_below(sectors);

	if (random_below(3) == 0)
		first = align_down(first, 128);
	if (random_below(8) == 0)
		count = align_up(count, 128);
	count = min(count, sectors - first);
	*offset = first * 512;
	*length = count * 512;
}

/* The buffer in pieces of odd sizes. */
static int random_pieces(uint8_t *buffer, uint64_t length, struct iovec *iov, int room)
{
	int count = 0;

	while (length) {
		uint64_t part = count == room - 1 ? length : 1 + random_below(length);

		if (random_below(2))
			part = length;
		iov[count++] = (struct iovec){buffer, part};
		buffer += part;
		length -= part;
	}
	return count;
}

static void expect_same(const struct modelled *m, const uint8_t *data, uint64_t offset, uint64_t length)
{
	for (uint64_t i = 0; i < length; i++) {
		if (data[i] != m->model[offset + i])
			fail_msg("%s: byte 0x%llx reads as 0x%02x and should be 0x%02x", m->path,
				(unsigned long long)(offset + i), data[i], m->model[offset + i]);
	}
}

static void one_step(struct modelled *m)
{
	struct iovec iov[9];
	uint64_t offset, length;
	uint8_t *data;
	int count;

	random_range(m, &offset, &length);
	data = malloc(length);
	count = random_pieces(data, length, iov, ARRAY_SIZE(iov));
	switch (random_below(12)) {
	case 0 ... 4:
		for (uint64_t i = 0; i < length; i += 8) {
			uint64_t value = random_u64();

			memcpy(data + i, &value, 8);
		}
		assert_int_equal(disk_writev(m->disk, offset, iov, count), 0);
		memcpy(m->model + offset, data, length);
		break;
	case 5 ... 7:
		assert_int_equal(disk_readv(m->disk, offset, iov, count), 0);
		expect_same(m, data, offset, length);
		break;
	case 8:
		assert_int_equal(disk_discard(m->disk, offset, length), 0);
		assert_int_equal(disk_readv(m->disk, offset, iov, count), 0);
		/* Each sector: zeroes or as before. */
		for (uint64_t i = 0; i < length; i += 512) {
			static const uint8_t zeroes[512];

			if (memcmp(data + i, zeroes, 512) == 0)
				memset(m->model + offset + i, 0, 512);
		}
		expect_same(m, data, offset, length);
		break;
	case 9:
	case 10:
		assert_int_equal(disk_write_zeroes(m->disk, offset, length, random_below(2)), 0);
		memset(m->model + offset, 0, length);
		break;
	case 11:
		if (random_below(4) == 0)
			assert_int_equal(disk_flush(m->disk), 0);
		break;
	}
	free(data);
}

void modelled_steps(struct modelled *m, unsigned steps)
{
	for (unsigned i = 0; i < steps; i++)
		one_step(m);
}

void modelled_judge(struct modelled *m)
{
	const char *format = m->format == DISK_RAW ? "raw" : "qcow2";
	uint8_t *data = malloc(m->size);
	struct iovec iov = {data, m->size};

	close_disk(m->disk);
	if (m->format == DISK_QCOW2)
		check_clean(m->path);
	write_file("model.raw", m->model, m->size);
	run("qemu-img compare -f %s -F raw %s model.raw", format, m->path);
	m->disk = open_disk(m->path, m->format, false);
	assert_int_equal(disk_readv(m->disk, 0, &iov, 1), 0);
	expect_same(m, data, 0, m->size);
	free(data);
}

void modelled_close(struct modelled *m)
{
	close_disk(m->disk);
	free(m->model);
}
