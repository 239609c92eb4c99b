"""KVM's para-virtual interfaces as engine bt offers them: a stock kernel takes each of them up, or none that is left out."""
import re
import time

import vm

FEATURES = ["clock", "steal-time", "eoi", "unhalt", "tlb-flush", "send-ipi", "sched-yield"]
TAKEN = {"clock": r"kvm-clock: Using msrs", "unhalt": r"kvm-guest: PV spinlocks enabled", "tlb-flush": r"KVM setup pv remote TLB flush",
         "send-ipi": r"kvm-guest: setup PV IPIs", "sched-yield": r"kvm-guest: setup PV sched yield"}


def boot(model="host", **options):
    v = vm.guest(test="shell", arguments=("--engine", "bt", "--cpu", model), cpus=2, **options)
    v.expect("GUEST READY", 90)
    v.send("stty -echo; PS1=; dmesg -n 1; echo RE''ADY\n")
    v.expect("^.*READY$", 20)
    return v


def output(v, command, timeout=30):
    v.send(f"echo BEG''IN; {command}; echo END''OF\n")
    v.expect(r"^.*BEGIN$", timeout)
    begin = v.position
    end = v.expect(r"^ENDOF$", timeout).start()
    return v.text[begin:end].strip()


def steal(v):
    return int(output(v, "grep '^cpu ' /proc/stat").split()[8])


def test_all():
    # Both vCPUs on one processor: each has to wait for the other half of the time.
    with boot(prefix=("taskset", "-c", "0")) as v:
        for name, pattern in TAKEN.items():
            assert re.search(pattern, v.text), f"the kernel does not use {name}"
        assert output(v, "cat /sys/devices/system/clocksource/clocksource0/current_clocksource") == "tsc"
        assert not re.search(r"TSC.*unstable|calibration failed", v.text)
        stolen = steal(v)
        loop = "taskset %d sh -c 'i=0; while [ $i -lt 20000 ]; do i=$((i + 1)); done'"
        output(v, f"{loop % 1} & {loop % 2}; wait")
        assert steal(v) - stolen >= 10, "no time was stolen from two vCPUs on one processor"
        # The guest's seconds are the host's.
        v.send("sed 's/^/NOW/' /proc/uptime; sleep 4; sed 's/^/NOW/' /proc/uptime\n")
        guest, host = [], []
        for _ in range(2):
            guest.append(float(v.expect(r"^NOW([\d.]+) [\d.]+$", 20).group(1)))
            host.append(time.monotonic())
        error = abs((guest[1] - guest[0]) / (host[1] - host[0]) - 1)
        assert error < 0.05, f"{error:.1%} off"
        v.check_kernel_log()


def test_left_out():
    with boot("host" + "".join(f",-kvm-{f}" for f in FEATURES)) as v:
        for name, pattern in TAKEN.items():
            assert not re.search(pattern, v.text), f"the kernel uses {name}, which was left out"
        assert steal(v) == 0
        v.check_kernel_log()


def test_unknown_feature():
    with vm.Vm("--kernel", vm.kernel("cloud", "vmlinux"), "--cpu", "host,-kvm-nonsense") as v:
        assert v.wait(10) != 0
        assert "kvm-nonsense" in v.stderr()
