"""Real KVM in software: Debian's qemu-system-x86_64 under TCG emulates AMD-V with nested paging, so that Debian's cloud
kernel with its own kvm-amd.ko inside has a working /dev/kvm. Everything that runs there is put into an initrd: the test
guest's (tests/guest), and behind it ours, whose files win."""
import os
import pathlib
import re
import select
import shutil
import signal
import stat
import struct
import subprocess
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
CACHE = ROOT / "cache"
QEMU = "qemu-system-x86_64"
KERNEL = CACHE / "kernels" / "cloud"
MODULES = ["virt/lib/irqbypass.ko", "arch/x86/kvm/kvm.ko", "arch/x86/kvm/kvm-amd.ko"]


class Cpio:
    """The kernel's initramfs format, "newc" (Documentation/driver-api/early-userspace/buffer-format.rst)."""

    def __init__(self, path):
        self.out = open(path, "wb")
        self.inode = 1000
        self.folders = set()

    def _add(self, name, mode, data=b""):
        self.inode += 1
        encoded = name.encode() + b"\0"
        fields = [self.inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0]
        header = b"070701" + b"".join(b"%08x" % f for f in fields)
        self.out.write(header + encoded + b"\0" * (-(len(header) + len(encoded)) % 4))
        self.out.write(data + b"\0" * (-len(data) % 4))

    def folder(self, name):
        if name and name not in self.folders:
            self.folder(os.path.dirname(name))
            self.folders.add(name)
            self._add(name, stat.S_IFDIR | 0o755)

    def file(self, name, source):
        name = str(name).lstrip("/")
        self.folder(os.path.dirname(name))
        self._add(name, stat.S_IFREG | 0o755, source if isinstance(source, bytes) else pathlib.Path(source).read_bytes())

    def program(self, name, source):
        """A program, and the libraries that it needs at their own places."""
        self.file(name, source)
        text = subprocess.run(["ldd", source], stdout=subprocess.PIPE, text=True).stdout
        for path in re.findall(r"(/\S+) \(0x", text):
            if path.lstrip("/") not in self.folders:
                self.folders.add(path.lstrip("/"))
                self.file(path, path)

    def close(self):
        self._add("TRAILER!!!", 0)
        self.out.close()


def missing():
    """Why this cannot run here, or None."""
    if not shutil.which(QEMU):
        return f"{QEMU} is not installed (apt-get install qemu-system-x86)"
    for path in (KERNEL / "vmlinux", CACHE / "initrd" / "cloud.cpio"):
        if not path.exists():
            raise FileNotFoundError(f"no {path}; run tests/tools/fetch-kernels and tests/guest/build-initrd")
    return None


def bad_kernel():
    """An ELF file that PVH starts and that jumps to where no memory is: KVM cannot go on there."""
    code = b"\xb8\x00\x00\x00\xd0\xff\xe0"  # mov eax, 0xd0000000; jmp eax
    address, headers = 0x100000, 64 + 2 * 56
    note = struct.pack("<III4sI", 4, 4, 18, b"Xen\0", address)  # XEN_ELFNOTE_PHYS32_ENTRY
    elf = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, 62, 1, address, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    load = struct.pack("<IIQQQQQQ", 1, 5, headers + len(note), address, address, len(code), len(code), 1)
    notes = struct.pack("<IIQQQQQQ", 4, 4, headers, 0, 0, len(note), len(note), 4)
    return elf + load + notes + note + code


class Nested:
    """The emulated machine, running script (busybox sh) as root's init after KVM's modules are loaded. Its console's
    lines are in self.lines with their times; use as a context manager."""

    def __init__(self, folder, script, programs=(), files=(), cpus=2, memory="1800M"):
        initrd = pathlib.Path(folder) / "nested.cpio"
        shutil.copyfile(CACHE / "initrd" / "cloud.cpio", initrd.with_suffix(".first"))
        archive = Cpio(initrd.with_suffix(".second"))
        archive.file("init", INIT.encode() + script.encode() + b"\npoweroff -f\n")
        for module in MODULES:
            archive.file("kvm/" + os.path.basename(module), KERNEL / "modules" / "kernel" / module)
        for name, source in programs:
            archive.program(name, source)
        for name, source in files:
            archive.file(name, source)
        archive.close()
        with open(initrd, "wb") as out:
            for part in (".first", ".second"):
                with open(initrd.with_suffix(part), "rb") as f:
                    shutil.copyfileobj(f, out)
                initrd.with_suffix(part).unlink()
        command = [QEMU, "-accel", "tcg,thread=multi", "-cpu", "max", "-m", memory, "-smp", str(cpus), "-nodefaults",
                   "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot",
                   "-kernel", KERNEL / "vmlinux", "-initrd", initrd,
                   "-append", "console=ttyS0 quiet panic=-1 mitigations=off tsc=nowatchdog"]
        self.lines = []
        self.started = time.monotonic()
        self.buffer = b""
        self.process = subprocess.Popen(list(map(str, command)), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT, start_new_session=True)

    def text(self):
        return "\n".join(line for _, line in self.lines)

    def run(self, seconds, silence=1000, echo=False):
        """Until it powers off; False if that takes longer, or nothing is said for so many seconds of silence."""
        end = time.monotonic() + seconds
        heard = time.monotonic()
        while time.monotonic() < min(end, heard + silence):
            ready, _, _ = select.select([self.process.stdout], [], [], 1)
            if not ready:
                continue
            data = os.read(self.process.stdout.fileno(), 65536)
            if not data:
                self.process.wait()
                return True
            heard = time.monotonic()
            self.buffer += data
            *whole, self.buffer = self.buffer.split(b"\n")
            for line in whole:
                line = line.decode("utf-8", "replace").rstrip("\r")
                self.lines.append((time.monotonic() - self.started, line))
                if echo:
                    print(f"{self.lines[-1][0]:7.2f} {line}", flush=True)
        return False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.process.stdout.close()


INIT = """#!/bin/busybox sh
export PATH=/bin HOME=/root
busybox mount -t proc proc /proc
busybox mount -t sysfs sys /sys
busybox mount -t devtmpfs dev /dev
for m in irqbypass kvm kvm-amd; do insmod /kvm/$m.ko || echo "NESTED no module $m"; done
echo "NESTED READY $(cat /proc/uptime)"
"""
