#include "disk/backend.h"

int qcow2_open(struct disk **disk, struct image_file *file, const struct disk_chain *above, struct error *err)
{
	int result = error_set(err, ENOTSUP, "disk %s: qcow2 is being written; convert it: qemu-img convert -O raw", file->path);

	image_file_close(file);
	return result;
}
