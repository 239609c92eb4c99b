/* hostel-vmm: runs one virtual machine. From here: options.c (command line) → vm.c (puts the machine together) → run.c
 * (vCPU threads and the exit switch).
 *
 * Exit status: 0 the guest powered off, or the user left the console; 1 it could not start or the VM failed; 2 wrong
 * usage; 128 + n stopped in order by signal n.
 */
#include <signal.h>
#include <stdio.h>

#include "vmm/jail.h"
#include "vmm/options.h"
#include "vmm/probe.h"
#include "vmm/terminal.h"
#include "vmm/vm.h"

static int complain(const struct error *err, int status)
{
	char line[sizeof(err->text)];
	size_t n = 0;

	/* A name given by the user may hold anything; a message is one line and does nothing to a terminal. */
	for (; err->text[n]; n++)
		line[n] = (unsigned char)err->text[n] < ' ' || err->text[n] == 0x7f ? '?' : err->text[n];
	line[n] = '\0';
	terminal_say("hostel-vmm: %s\n", line);
	return status;
}

int main(int argc, char *argv[])
{
	struct vmm_config config;
	struct error err = {0};
	struct vm *vm;
	int status;

	if (vmm_config_parse(&config, argc, argv, &err) < 0) {
		vmm_config_free(&config);
		/* Anything else is no wrong usage: this host cannot give what was rightly asked for. */
		return complain(&err, err.code == EINVAL || err.code == ERANGE ? 2 : 1);
	}
	switch (config.action) {
	case VMM_HELP:
		vmm_help(stdout);
		return fflush(stdout) ? 1 : 0;
	case VMM_VERSION:
		puts("hostel-vmm " HOSTEL_VERSION);
		return fflush(stdout) ? 1 : 0;
	case VMM_PROBE:
		return vmm_probe(stdout, config.probe_json) && !fflush(stdout) ? 0 : 1;
	case VMM_RUN:
		break;
	}

	if (config.jail) {
		enum jail_role role;

		if (jail_fork(&config, &role, &status, &err) < 0) {
			vmm_config_free(&config);
			return complain(&err, 1);
		}
		if (role == JAIL_KEEPER) {
			vmm_config_free(&config);
			return status;
		}
	}

	/* Before any thread is made, so that all inherit it: the signals that end or suspend us are read by the main
	 * thread's loop and interrupt nobody else. */
	vm_block_signals();
	terminal_guard();

	status = vm_create(&vm, &config, &err);
	if (status == 0) {
		struct error closing = {0};

		status = vm_run(vm, &err);
		/* Both are told: why the VM ended, and whether what it wrote is safe. */
		if (err.code)
			complain(&err, 1);
		if (vm_destroy(vm, &closing) < 0)
			status = complain(&closing, 1);
	} else {
		status = complain(&err, 1);
	}
	vmm_config_free(&config);
	return status;
}
