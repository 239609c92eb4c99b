"""Bad input: one clear line that names the thing, exit status 1 (2 for wrong usage), nothing left behind."""
import os
import pathlib
import resource
import struct
import subprocess

import pytest
import vm

pytestmark = [pytest.mark.quick, pytest.mark.skipif(vm.IS_QEMU, reason="hostel-vmm's own messages, not QEMU's")]


def refuse(tmp_path, arguments, expected_status=1, names=(), preexec=None, timeout=20):
    """Runs hostel-vmm in an empty folder: it must end by itself, complain in one line and leave nothing."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    result = subprocess.run([vm.VMM, *map(str, arguments)], cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, timeout=timeout * vm.SLOW, preexec_fn=preexec)
    text = result.stderr.decode("utf-8", "replace")
    assert result.returncode == expected_status, f"exit status {result.returncode} instead of {expected_status}: {text}"
    assert text.count("\n") == 1 and text.endswith("\n"), f"not one line: {text!r}"
    for name in names:
        assert str(name) in text, f"{name!r} is not named: {text!r}"
    assert not any(c in text for c in "\x00\x1b"), f"raw bytes in {text!r}"
    assert list(folder.iterdir()) == []
    return text


def boot_arguments(**replace):
    values = {"kernel": vm.kernel("cloud", "vmlinux"), "initrd": vm.initrd("cloud"), **replace}
    found = ["--cmdline", "console=ttyS0 hostel.test=true"]
    for name, value in values.items():
        if value is not None:
            found += [f"--{name}", value]
    return found


@pytest.mark.parametrize("what", ["kernel", "initrd", "disk"])
def test_missing_file(tmp_path, what):
    missing = tmp_path / "there-is-no-such-file"
    refuse(tmp_path, boot_arguments(**{what: missing}), names=[missing])


@pytest.mark.parametrize("what", ["kernel", "initrd", "disk"])
def test_folder_instead_of_a_file(tmp_path, what):
    folder = tmp_path / "folder"
    folder.mkdir()
    refuse(tmp_path, boot_arguments(**{what: folder}), names=[folder])


@pytest.mark.parametrize("form", ["bzImage", "vmlinux"])
@pytest.mark.parametrize("size", [0, 1, 100, 600, 4096, 100000, 5 << 20])
def test_truncated_kernel(tmp_path, form, size):
    data = vm.kernel("cloud", form).read_bytes()
    path = tmp_path / "kernel"
    path.write_bytes(data[:size])
    refuse(tmp_path, boot_arguments(kernel=path), names=[path])


def test_kernel_of_noise(tmp_path):
    path = tmp_path / "kernel"
    path.write_bytes(bytes(range(256)) * 4000)
    refuse(tmp_path, boot_arguments(kernel=path), names=[path])


def test_32_bit_program_as_kernel(tmp_path):
    path = vm.CACHE / "guest" / "checks32"
    refuse(tmp_path, boot_arguments(kernel=path), names=[path])


def test_empty_initrd(tmp_path):
    path = tmp_path / "initrd"
    path.touch()
    refuse(tmp_path, boot_arguments(initrd=path), names=[path])


def test_initrd_too_large_for_memory(tmp_path):
    path = tmp_path / "initrd"
    with open(path, "wb") as f:
        f.truncate(300 << 20)
    refuse(tmp_path, [*boot_arguments(initrd=path), "--memory", "256M"], names=[path])


@pytest.mark.parametrize("size", ["", "x", "-1", "0", "12Q", "1.5.5G", "99999999999999999999", "1 G", "16E", "4K"])
def test_bad_memory_size(tmp_path, size):
    refuse(tmp_path, [*boot_arguments(), f"--memory={size}"], expected_status=2, names=["memory"])


@pytest.mark.parametrize("cpus", ["0", "-1", "x", "65", "1.5", "", "4294967297"])
def test_bad_cpus(tmp_path, cpus):
    refuse(tmp_path, [*boot_arguments(), f"--cpus={cpus}"], expected_status=2, names=["cpus"])


@pytest.mark.parametrize("arguments, named", [
    ([], "kernel"),
    (["--no-such-option"], "no-such-option"),
    (["--kernel"], "kernel"),
    (["stray"], "stray"),
    (["--engine=nonsense"], "nonsense"),
    (["--cpu=pentium"], "pentium"),
    (["--serial=nonsense"], "nonsense"),
    (["--serial=file="], "serial"),
    (["--on-reset=explode"], "explode"),
    (["--net=nonsense"], "nonsense"),
    (["--net=user,forward=tcp:1:2"], "forward"),
    (["--net=user,forward=tcp:127.0.0.1:99999-:22"], "99999"),
    (["--net=tap="], "tap"),
    (["--net=tap=x,mac=nonsense"], "nonsense"),
    (["--net=tap=x,mac=01:00:00:00:00:01"], "01:00:00:00:00:01"),
    (["--disk="], "disk"),
    (["--disk=x,format=vmdk"], "vmdk"),
    (["--disk=x,nonsense"], "nonsense"),
])
def test_wrong_usage(tmp_path, arguments, named):
    prefix = boot_arguments() if arguments and arguments != ["--kernel"] else []
    refuse(tmp_path, [*prefix, *arguments], expected_status=2, names=[named])


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_help_and_version(argument):
    result = subprocess.run([vm.VMM, argument], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=10)
    assert result.returncode == 0 and result.stderr == "" and result.stdout
    if argument == "--help":
        for option in ("--engine", "--cpus", "--memory", "--kernel", "--initrd", "--cmdline", "--disk", "--net", "--serial",
                       "--cpu", "--on-reset", "--version"):
            assert option in result.stdout, f"{option} is missing in --help"
        assert max(map(len, result.stdout.splitlines())) <= 120
    else:
        assert result.stdout.startswith("hostel-vmm ")


def test_missing_tap(tmp_path):
    refuse(tmp_path, [*boot_arguments(), "--net", "tap=nosuchtap0"], names=["nosuchtap0"])


def test_port_in_use(tmp_path):
    import socket
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
        refuse(tmp_path, [*boot_arguments(), "--net", f"user,forward=tcp:127.0.0.1:{port}-:22"], names=[port])


def test_no_memory_left(tmp_path):
    refuse(tmp_path, [*boot_arguments(), "--memory", "64G"], names=["memory"],
           preexec=lambda: resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30)))


def test_serial_path_that_cannot_be_made(tmp_path):
    for kind in ("file", "socket"):
        path = tmp_path / "no" / "such" / "folder"
        refuse(tmp_path, [*boot_arguments(), "--serial", f"{kind}={path}"], names=[path])
        (tmp_path / "cwd").rmdir()


def test_control_characters_in_a_name(tmp_path):
    refuse(tmp_path, boot_arguments(kernel="/no/such\n\x1b[31mfile"))


# qcow2 files that are not what they should be. The header is described in the qcow2 specification
# (docs/interop/qcow2.txt in QEMU's source).

def qcow2(path, size="64M", *options):
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, path, size], check=True)


def patch(path, offset, data):
    with open(path, "r+b") as f:
        f.seek(offset)
        f.write(data)


@pytest.mark.parametrize("name, offset, data", [
    ("version 9", 4, struct.pack(">I", 9)),
    ("cluster bits 40", 20, struct.pack(">I", 40)),
    ("cluster bits 0", 20, struct.pack(">I", 0)),
    ("size near 2^64", 24, struct.pack(">Q", 0xfffffffffffff000)),
    ("encryption", 32, struct.pack(">I", 1)),
    ("L1 table beyond the end", 40, struct.pack(">Q", 1 << 50)),
    ("L1 table not aligned", 40, struct.pack(">Q", 0x30001)),
    ("L1 table too small", 36, struct.pack(">I", 0)),
    ("L1 table huge", 36, struct.pack(">I", 0xffffffff)),
    ("refcount table beyond the end", 48, struct.pack(">Q", 1 << 50)),
    ("refcount table huge", 56, struct.pack(">I", 0xffffffff)),
    ("unknown incompatible feature", 72, struct.pack(">Q", 1 << 40)),
    ("corrupt bit", 72, struct.pack(">Q", 2)),
    ("refcount order 20", 96, struct.pack(">I", 20)),
    ("header length 3", 100, struct.pack(">I", 3)),
    ("backing name beyond the header", 8, struct.pack(">QI", 1 << 40, 100)),
    ("backing name too long", 8, struct.pack(">QI", 0x200, 0xffffffff)),
])
def test_broken_qcow2_header(tmp_path, name, offset, data):
    disk = tmp_path / "disk.qcow2"
    qcow2(disk)
    patch(disk, offset, data)
    before = disk.read_bytes()
    refuse(tmp_path, boot_arguments(disk=disk), names=[disk])
    assert disk.read_bytes() == before, "a disk that was refused was written to"


@pytest.mark.parametrize("size", [0, 4, 50, 104, 70000])
def test_truncated_qcow2(tmp_path, size):
    disk = tmp_path / "disk.qcow2"
    qcow2(disk)
    with open(disk, "r+b") as f:
        f.truncate(size)
    refuse(tmp_path, boot_arguments(disk=f"{disk},format=qcow2"), names=[disk])


def test_empty_raw_disk(tmp_path):
    disk = tmp_path / "disk.raw"
    disk.touch()
    refuse(tmp_path, boot_arguments(disk=disk), names=[disk])


def test_cyclic_backing_chain(tmp_path):
    a, b = tmp_path / "a.qcow2", tmp_path / "b.qcow2"
    qcow2(a)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", a, "-F", "qcow2", b], check=True)
    subprocess.run(["qemu-img", "rebase", "-u", "-b", b, "-F", "qcow2", a], check=True)
    refuse(tmp_path, boot_arguments(disk=a), names=["backing"])


def test_backing_file_of_itself(tmp_path):
    a = tmp_path / "a.qcow2"
    qcow2(a)
    subprocess.run(["qemu-img", "rebase", "-u", "-b", a, "-F", "qcow2", a], check=True)
    refuse(tmp_path, boot_arguments(disk=a), names=["backing"])


def test_missing_backing_file(tmp_path):
    a, b = tmp_path / "base-that-goes.qcow2", tmp_path / "b.qcow2"
    qcow2(a)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", a, "-F", "qcow2", b], check=True)
    a.unlink()
    refuse(tmp_path, boot_arguments(disk=b), names=["base-that-goes"])


def test_disk_without_permission(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may open everything")
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(1 << 20))
    disk.chmod(0)
    refuse(tmp_path, boot_arguments(disk=disk), names=[disk])


def test_the_same_disk_twice_in_one_machine(tmp_path):
    disk = tmp_path / "disk.raw"
    vm.make_ext4(disk, 16)
    refuse(tmp_path, [*boot_arguments(), "--disk", disk, "--disk", disk], names=[disk])


def test_nothing_is_left_in_tmp(tmp_path):
    """No stray files beside the working directory either."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    result = subprocess.run([vm.VMM, "--kernel", "/dev/null"], env={**os.environ, "TMPDIR": str(folder)},
                            stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=20)
    assert result.returncode == 1 and list(pathlib.Path(folder).iterdir()) == []
