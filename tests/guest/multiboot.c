/* A Multiboot 1 kernel that says on the serial port what its loader gave it, and ends by the debug exit port with what its
 * command line's exit=N says. Built by tests/e2e/test_devices.py, with -DFLAT as a flat file that carries its addresses. */
#include <stdint.h>

#define MAGIC 0x1badb002
#define WANTED (0x3 | (FLAGS))
#ifdef FLAT
#define FLAGS 0x10000
#else
#define FLAGS 0
#endif

extern char load_start[], load_end[], bss_end[];
void start(void);

__attribute__((section(".header"), used, aligned(4))) static const struct {
	uint32_t magic, flags, checksum;
	const void *addresses[4];
	void (*entry)(void);
} header = {MAGIC, WANTED, -(uint32_t)(MAGIC + WANTED), {&header, load_start, load_end, bss_end}, start};

struct info {
	uint32_t flags, lower, upper, boot_device, cmdline, mods_count, mods;
};

struct module {
	uint32_t start, end, string, reserved;
};

static volatile char zeroes[5000]; /* .bss must be clear */

static void out(uint16_t port, uint8_t value)
{
	__asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static uint8_t in(uint16_t port)
{
	uint8_t value;

	__asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
	return value;
}

static void print(const char *text)
{
	for (; *text; text++) {
		while (!(in(0x3fd) & 0x20))
			;
		out(0x3f8, *text);
	}
}

static void print_number(uint32_t n)
{
	char text[11], *at = text + 10;

	*at = 0;
	do
		*--at = '0' + n % 10;
	while (n /= 10);
	print(at);
}

static void print_named(const char *name, uint32_t n)
{
	print(name);
	print_number(n);
	print("\n");
}

__attribute__((used)) static void run(uint32_t magic, const struct info *info)
{
	const struct module *modules = (const void *)info->mods;
	const char *cmdline = (const char *)info->cmdline;
	uint32_t sum = 0, status = 0;

	for (unsigned i = 0; i < sizeof(zeroes); i++)
		sum += zeroes[i];
	print(magic == 0x2badb002 && (info->flags & 0x4d) == 0x4d && !sum ? "MULTIBOOT\n" : "BAD\n");
	print_named("lower ", info->lower);
	print_named("upper ", info->upper);
	print("cmdline ");
	print(cmdline);
	print("\n");
	for (unsigned i = 0; i < info->mods_count; i++) {
		print("module ");
		print((const char *)modules[i].string);
		print(" = ");
		for (const char *c = (const char *)modules[i].start; c < (const char *)modules[i].end; c++)
			print((char[]){*c, 0});
		print("\n");
	}
	for (const char *c = cmdline; *c; c++)
		if (c[0] == 'e' && c[1] == 'x' && c[2] == 'i' && c[3] == 't' && c[4] == '=')
			status = c[5] - '0';
	out(0xf4, status);
	for (;;)
		__asm__ volatile("hlt");
}

__asm__(".pushsection .text\n.globl start\nstart:\n\tmov $stack_end, %esp\n\tpush %ebx\n\tpush %eax\n\tcall run\n.popsection\n"
	".pushsection .bss\n.balign 16\n.skip 16384\nstack_end:\n.popsection\n");
