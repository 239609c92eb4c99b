/* The main of a fuzzer where libFuzzer is not there to give it one: runs every file named, and every file in a folder
 * named, once. What a fuzzer once found so stays found. */
#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n);

static int run_file(const char *path)
{
	FILE *file = fopen(path, "rb");

	if (!file) {
		perror(path);
		return 1;
	}
	size_t n = 0, room = 1 << 16;
	uint8_t *bytes = malloc(room);
	while (bytes && (n += fread(bytes + n, 1, room - n, file)) == room)
		bytes = realloc(bytes, room *= 2);
	fclose(file);
	if (!bytes)
		return 1;
	uint8_t *exact = memcpy(malloc(n ? n : 1), bytes, n); /* so that a sanitizer sees a read behind the end */
	LLVMFuzzerTestOneInput(exact, n);
	free(exact);
	free(bytes);
	return 0;
}

int main(int argc, char **argv)
{
	int failed = 0, runs = 0;

	for (int i = 1; i < argc; i++) {
		DIR *folder = opendir(argv[i]);
		struct dirent *entry;
		char path[4096];

		if (!folder) {
			failed |= run_file(argv[i]);
			runs++;
			continue;
		}
		while ((entry = readdir(folder))) {
			if (entry->d_name[0] == '.')
				continue;
			snprintf(path, sizeof(path), "%s/%s", argv[i], entry->d_name);
			failed |= run_file(path);
			runs++;
		}
		closedir(folder);
	}
	printf("%d inputs\n", runs);
	return failed;
}
