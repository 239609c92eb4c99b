/* The kernel's interrupt chips under the board: 8259s, IOAPIC, local APICs and 8254 (api.rst: KVM_CREATE_IRQCHIP,
 * KVM_CREATE_PIT2, KVM_SET_GSI_ROUTING, KVM_IRQ_LINE, KVM_SIGNAL_MSI, KVM_IOEVENTFD).
 */
#include "engine/kvm/kvm.h"

#include <string.h>
#include <sys/ioctl.h>

#include "base/util.h"

#define IOAPIC_PINS 24
#define PIC_PINS 16
#define ELCR_SCI (1 << (BOARD_SCI_IRQ - 8)) /* in the second 8259's */

/* As the board has it: 0 to 15 reach both 8259s and the IOAPIC, where the timer (0) is on pin 2; the rest the IOAPIC.
 */
static int set_routing(int vm, struct error *err)
{
	struct {
		struct kvm_irq_routing header;
		struct kvm_irq_routing_entry entry[PIC_PINS + IOAPIC_PINS];
	} table = {0};
	struct kvm_irq_routing_entry *e = table.entry;

	for (unsigned gsi = 0; gsi < IOAPIC_PINS; gsi++) {
		if (gsi == 2) /* the 8259s' cascade */
			continue;
		if (gsi < PIC_PINS)
			*e++ = (struct kvm_irq_routing_entry){.gsi = gsi,
				.type = KVM_IRQ_ROUTING_IRQCHIP,
				.u.irqchip = {.irqchip = gsi < 8 ? KVM_IRQCHIP_PIC_MASTER : KVM_IRQCHIP_PIC_SLAVE,
					.pin = gsi % 8}};
		*e++ = (struct kvm_irq_routing_entry){.gsi = gsi,
			.type = KVM_IRQ_ROUTING_IRQCHIP,
			.u.irqchip = {.irqchip = KVM_IRQCHIP_IOAPIC, .pin = gsi ? gsi : 2}};
	}
	table.header.nr = (uint32_t)(e - table.entry);
	return ioctl(vm, KVM_SET_GSI_ROUTING, &table) < 0 ? error_errno(err, "KVM_SET_GSI_ROUTING") : 0;
}

int kvm_create_chips(int vm, struct error *err)
{
	struct kvm_pit_config pit = {.flags = KVM_PIT_SPEAKER_DUMMY}; /* port 0x61 too */

	if (ioctl(vm, KVM_CREATE_IRQCHIP, 0) < 0)
		return error_errno(err, "KVM_CREATE_IRQCHIP");
	if (ioctl(vm, KVM_CREATE_PIT2, &pit) < 0)
		return error_errno(err, "KVM_CREATE_PIT2");
	return set_routing(vm, err);
}

/* ---- what the board asks for; the descriptor is good and the arguments are ours: an error would be KVM's own, and
 * the guest's devices can do nothing about it ---- */

static void chips_irq(void *opaque, unsigned gsi, bool level)
{
	struct engine_vm *vm = opaque;
	struct kvm_irq_level line = {.irq = gsi, .level = level};

	if (gsi < IOAPIC_PINS)
		ioctl(vm->fd, KVM_IRQ_LINE, &line);
}

static void chips_msi(void *opaque, uint64_t address, uint32_t data)
{
	struct engine_vm *vm = opaque;
	struct kvm_msi msi = {.address_lo = (uint32_t)address, .address_hi = (uint32_t)(address >> 32), .data = data};

	ioctl(vm->fd, KVM_SIGNAL_MSI, &msi);
}

/* length 0: a write of any size, which KVM looks up before it decodes the instruction. */
static int chips_bell(void *opaque, uint64_t gpa, int fd, bool on)
{
	struct engine_vm *vm = opaque;
	struct kvm_ioeventfd bell = {.addr = gpa, .fd = fd, .flags = on ? 0 : KVM_IOEVENTFD_FLAG_DEASSIGN};

	return ioctl(vm->fd, KVM_IOEVENTFD, &bell) < 0 ? -errno : 0;
}

/* The vCPUs too: their local APICs must be as new before any other vCPU runs and sends them something. */
static void chips_reset(void *opaque)
{
	struct engine_vm *vm = opaque;

	ioctl(vm->fd, KVM_SET_IRQCHIP, &vm->pic[0]);
	ioctl(vm->fd, KVM_SET_IRQCHIP, &vm->pic[1]);
	ioctl(vm->fd, KVM_SET_IRQCHIP, &vm->ioapic);
	ioctl(vm->fd, KVM_SET_PIT2, &vm->pit);
	for (unsigned i = 0; i < vm->cpus; i++)
		if (vm->vcpu[i] && vm->vcpu[i]->changed)
			kvm_state_reset(vm->vcpu[i]);
}

int kvm_chips_init(struct engine_vm *vm, struct error *err)
{
	int result = kvm_create_chips(vm->fd, err);

	if (result < 0)
		return result;
	vm->pic[0].chip_id = KVM_IRQCHIP_PIC_MASTER;
	vm->pic[1].chip_id = KVM_IRQCHIP_PIC_SLAVE;
	vm->ioapic.chip_id = KVM_IRQCHIP_IOAPIC;
	if (ioctl(vm->fd, KVM_GET_IRQCHIP, &vm->pic[0]) < 0 || ioctl(vm->fd, KVM_GET_IRQCHIP, &vm->pic[1]) < 0 ||
		ioctl(vm->fd, KVM_GET_IRQCHIP, &vm->ioapic) < 0 || ioctl(vm->fd, KVM_GET_PIT2, &vm->pit) < 0)
		return error_errno(err, "KVM_GET_IRQCHIP, KVM_GET_PIT2");
	/* As firmware hands them over: the SCI is a level (the board's own 8259s do the same). */
	vm->pic[1].chip.pic.elcr |= ELCR_SCI;
	if (ioctl(vm->fd, KVM_SET_IRQCHIP, &vm->pic[1]) < 0)
		return error_errno(err, "KVM_SET_IRQCHIP");
	vm->chips = (struct board_chips){
		.opaque = vm, .reset = chips_reset, .irq = chips_irq, .msi = chips_msi, .bell = chips_bell};
	return 0;
}
