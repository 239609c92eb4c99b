"""Stock Debian kernels, as bzImage and vmlinux, with 1, 2 and 4 vCPUs, to the guest that checks itself."""
import re

import pytest
import vm

BYTES = 100 << 20  # each way


def verify_values(v, cpus, megabytes, host_values):
    values = v.values()
    assert values.get("cpus") == str(cpus), f"/proc/cpuinfo has {values.get('cpus')} processors instead of {cpus}"
    total = int(values["memory"]) / 1024
    # The kernel keeps some for itself.
    assert megabytes * 0.85 < total <= megabytes, f"MemTotal is {total:.0f} MiB of {megabytes}"
    compared = 0
    for name, text in values.items():
        if name.startswith(("float-", "i386-")):
            assert host_values.get(name) == text, f"{name}: guest {text}, host {host_values.get(name)}"
            compared += 1
    assert compared >= 5, f"only {sorted(values)} were computed"


def verify_clock(v):
    """The guest's clock against the host's over 10 s: within 1 %."""
    marks = [(when, re.search(r"CLOCK (begin|end) ([\d.]+)", line)) for when, line in v.lines if "CLOCK" in line]
    marks = {m.group(1): (when, float(m.group(2))) for when, m in marks if m}
    host = marks["end"][0] - marks["begin"][0]
    guest = marks["end"][1] - marks["begin"][1]
    assert host >= 9.9, f"the clock check lasted {host:.2f} s"
    assert abs(guest - host) <= 0.01 * host, f"guest's clock went {guest:.3f} s in {host:.3f} s of the host's"


def run_checks(tmp_path, host_values, kernel, form, cpus, extra=""):
    disk = tmp_path / "disk.raw"
    vm.make_ext4(disk, 64)
    with vm.ChecksumServer() as server, vm.guest(
            kernel, form, "checks", f"hostel.net={server.port} {extra}", cpus=cpus,
            arguments=["--disk", disk, "--net", "user"]) as v:
        v.expect(r"^CHECKS \d+ ok, \d+ failed", timeout=240)
        # Phase 1 reset the machine; phase 2 reads back what it wrote, in the same process.
        v.expect(r"GUEST PHASE 2", timeout=60)
        v.expect(r"^CHECKS 1 ok, 0 failed", timeout=60)
        status = v.wait(30)
        failed = [line for _, line in v.lines if re.match(r"CHECK \S+ FAIL", line)]
        if failed:
            v.fail("; ".join(failed))
        if status != 0:
            v.fail(f"exit status {status} after power-off")
        v.check_kernel_log()
        names = {line.split()[1] for _, line in v.lines if re.match(r"CHECK \S+ ok", line)}
        for name in ("cpuinfo", "memory", "clock", "forks", "signals", "float", "threads", "mmap", "selfmod",
                     "selfmod-threads", "i386", "net-tcp", "disk-write", "disk-read"):
            assert name in names, f"the check {name} did not run: {sorted(names)}"
        verify_values(v, cpus, 512, host_values)
        verify_clock(v)
        assert not server.problems, server.problems
        assert server.bytes == [BYTES, BYTES], server.bytes
        vm.check_ext4(disk)


@pytest.mark.parametrize("cpus", [1, 2, 4])
@pytest.mark.parametrize("form", ["bzImage", "vmlinux"])
@pytest.mark.parametrize("kernel", ["cloud", "generic"])
def test_checks(tmp_path, host_values, kernel, form, cpus):
    run_checks(tmp_path, host_values, kernel, form, cpus)


@pytest.mark.quick
def test_most_checks_quickly(tmp_path, host_values):
    """What the matrix does, without the slow ones, once."""
    disk = tmp_path / "disk.raw"
    vm.make_ext4(disk, 64)
    names = "cpuinfo,cpus-run,forks,signals,float,threads,futex,mmap,selfmod,selfmod-threads,selfmod-mapping,i386,disk-write,disk-read"
    with vm.guest("cloud", "vmlinux", "checks", f"hostel.only={names}", cpus=2, arguments=["--disk", disk]) as v:
        v.expect(r"^CHECKS 13 ok, 0 failed$", 40)
        v.expect(r"^CHECKS 1 ok, 0 failed$", 20)
        assert v.wait(20) == 0
        v.check_kernel_log()


@pytest.mark.parametrize("model", ["x86-64-v2", "x86-64-v3"])
def test_cpu_model(model, host_values):
    """A named model shows its flags, hides what is above it, and computes the same."""
    with vm.guest("cloud", "vmlinux", "checks", "hostel.only=cpuinfo,float,signals,i386", cpus=2,
                  arguments=["--cpu", model]) as v:
        v.expect(r"^CHECKS 4 ok, 0 failed", timeout=120)
        v.check_kernel_log()
        flags = set(v.values()["flags"].split())
        for name, text in v.values().items():
            if name.startswith(("float-", "i386-")):
                assert host_values.get(name) == text, f"{name}: guest {text}, host {host_values.get(name)}"
        assert {"sse4_2", "ssse3", "popcnt", "cx16"} <= flags, f"v2 flags missing in {sorted(flags)}"
        assert not any(f.startswith("avx512") for f in flags), f"AVX-512 shown under {model}"
        if model == "x86-64-v3":
            assert {"avx2", "fma", "bmi2", "movbe"} <= flags, f"v3 flags missing in {sorted(flags)}"
        else:
            assert "avx" not in flags, f"AVX shown under {model}"


@pytest.mark.skipif(vm.IS_QEMU, reason="TCG has no AVX-512")
def test_host_model_has_the_hosts_vectors(host_values):
    with vm.guest("cloud", "vmlinux", "checks", "hostel.only=float") as v:
        v.expect(r"^CHECKS 1 ok, 0 failed", timeout=60)
        computed = {n for n in v.values() if n.startswith("float-")}
        assert computed == {n for n in host_values if n.startswith("float-")}


def test_two_boots_of_one_disk(tmp_path):
    """Written by one process, read back by another."""
    disk = tmp_path / "disk.raw"
    vm.make_ext4(disk, 64)
    for phase in ("phase1", "phase2"):
        with vm.guest("cloud", "vmlinux", phase, arguments=["--disk", disk]) as v:
            v.expect(r"^CHECKS 1 ok, 0 failed")
            assert v.wait(20) == 0
    vm.check_ext4(disk)


@pytest.mark.parametrize("megabytes", [128, 3072, 5120])
def test_memory_sizes(megabytes):
    """Little memory; all of it below the PCI hole; more than 4 GiB."""
    with vm.guest("cloud", "vmlinux", "checks", "hostel.only=memory", memory=f"{megabytes}M") as v:
        v.expect(r"^CHECKS 1 ok, 0 failed", timeout=120)
        total = int(v.values()["memory"]) / 1024
        assert megabytes * 0.7 < total <= megabytes, f"MemTotal is {total:.0f} MiB of {megabytes}"
        v.check_kernel_log()


def test_ten_boots():
    """Ten boots in a row, no hang; the number of processors varies."""
    for i in range(10):
        with vm.guest("cloud", "vmlinux", "true", cpus=(1, 2, 4)[i % 3]) as v:
            v.expect(r"GUEST READY", timeout=40)
            status = v.wait(20)
            if status:
                v.fail(f"boot {i + 1} of 10: exit status {status}")
            v.check_kernel_log()
