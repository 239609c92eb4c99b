/* The board's chips, each driven by its registers as a kernel does it. */
#include "fixture.h"

static int run(const char *name, const struct CMUnitTest *tests, size_t count)
{
	return _cmocka_run_group_tests(name, tests, count, NULL, NULL);
}

int main(void)
{
	int failed = run("8259", pic_tests, pic_test_count);

	failed += run("ioapic", ioapic_tests, ioapic_test_count);
	failed += run("local apic", lapic_tests, lapic_test_count);
	failed += run("timers", timer_tests, timer_test_count);
	failed += run("legacy", legacy_tests, legacy_test_count);
	return failed != 0;
}
