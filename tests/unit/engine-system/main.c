#include "fake.h"

int main(void)
{
	int failed = 0;

	failed += _cmocka_run_group_tests("exceptions", exception_tests, exception_count, fake_setup, fake_teardown);
	failed += _cmocka_run_group_tests(
		"instructions", instruction_tests, instruction_count, fake_setup, fake_teardown);
	failed += _cmocka_run_group_tests("models", model_tests, model_count, fake_setup, fake_teardown);
	return failed != 0;
}
