"""A guest that hates its machine (tests/hostile/): hostel-vmm neither crashes, nor hangs, nor grows, nor lets anything out of
its jail. HOSTEL_HOSTILE_SECONDS=3600 for an hour; HOSTEL_HOSTILE_SEED=... (hexadecimal) repeats one start of the guest, of
which it prints the seed."""
import json
import os
import pathlib
import re
import signal
import subprocess
import time

import pytest
import vm

KERNEL = pathlib.Path(vm.VMM).parent / "tests" / "hostile" / "hostile-kernel"
SECONDS = float(os.environ.get("HOSTEL_HOSTILE_SECONDS", "20"))
SEED = os.environ.get("HOSTEL_HOSTILE_SEED")
MEMORY = 64  # MiB
PRIVATE_MOST = 160  # MiB beside guest memory and code cache
QUIET_MOST = 4  # seconds without a sign of the guest: it has hurt itself, and gets another start

pytestmark = [pytest.mark.skipif(vm.IS_QEMU, reason="hostel-vmm's own robustness, not QEMU's")]


def usable(engine):
    probe = subprocess.run([vm.VMM, "--probe=json"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, timeout=20)
    return any(e["name"] == engine and e["works"] for e in json.loads(probe.stdout)["engines"])


def process_of(v):
    """The VM's own process: behind the keeper, in a jail."""
    if "--jail" not in v.command:
        return v.process.pid
    children = pathlib.Path(f"/proc/{v.process.pid}/task/{v.process.pid}/children").read_text().split()
    return int(children[0]) if children else None


def megabytes(pid, field):
    text = pathlib.Path(f"/proc/{pid}/status").read_text()
    return int(re.search(rf"^{field}:\s*(\d+) kB", text, re.M).group(1)) / 1024


class Watch:
    """What must stay bounded over all starts."""

    def __init__(self):
        self.private = self.descriptors = self.starts = self.rounds = self.resets = 0

    def look(self, v):
        try:
            pid = process_of(v)
            if pid is None:
                return
            self.private = max(self.private, megabytes(pid, "RssAnon"))
            self.descriptors = max(self.descriptors, len(os.listdir(f"/proc/{pid}/fd")))
        except (OSError, AttributeError):
            return  # it has just ended
        if self.private > PRIVATE_MOST:
            v.fail(f"{self.private:.0f} MiB of private memory")
        if self.descriptors > 400:
            v.fail(f"{self.descriptors} descriptors")


def answers(v):
    """Every vCPU's thread still comes out of the guest's code."""
    before = len(v.stderr())
    v.process.send_signal(signal.SIGUSR1)
    end = time.monotonic() + 10 * vm.SLOW
    while time.monotonic() < end:
        answer = v.stderr()[before:]
        if v.process.poll() is not None or all(f"hostel-vmm: vCPU {i}\n" in answer for i in (0, 1)):
            return
        time.sleep(0.05)
    v.fail("it does not answer SIGUSR1 for all its vCPUs: a thread hangs")


def one_start(watch, engine, until, tmp_path):
    disk, image = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    if not disk.exists():
        disk.write_bytes(bytes(8 << 20))
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "32M"], check=True)
    arguments = ["--engine", engine, "--kernel", KERNEL, "--cmdline", f"s={SEED}" if SEED else "none",
                 "--disk", f"{disk},format=raw", "--disk", image, "--net", "user", "--balloon", "0M",
                 "--vsock", tmp_path / "vsock", "--virtio-console", "none"]
    if os.geteuid() == 0:
        arguments.append("--jail")
    with vm.Vm(*arguments, cpus=2, memory=f"{MEMORY}M") as v:
        watch.starts += 1
        seen, when = 0, time.monotonic()
        while v.process.poll() is None and time.monotonic() < until and time.monotonic() - when < QUIET_MOST * vm.SLOW:
            time.sleep(0.1)
            watch.look(v)
            if len(v.text) > seen:
                seen, when = len(v.text), time.monotonic()
        if v.process.poll() is None:
            answers(v)
            v.process.terminate()
        status = v.wait(20)
        watch.rounds += 4096 * v.text.count("alive ")
        watch.resets += v.text.count("hostile, seed ") - 1
        # Powering off is the guest's right; and so it is to be reset.
        if status not in (0, 128 + signal.SIGTERM):
            v.fail(f"exit status {status}; the last seed is {re.findall('seed ([0-9a-f]+)', v.text)[-1:]}")
        if "jail:" in v.stderr():
            v.fail("a thread ran into its filter")
    check = subprocess.run(["qemu-img", "check", image], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    # Leaked clusters waste room; errors are damage, which no request of a guest may do.
    assert check.returncode in (0, 3), check.stdout


@pytest.mark.parametrize("engine", ["bt", "kvm"])
def test_hostile_guest(tmp_path, engine):
    if not KERNEL.exists():
        pytest.fail(f"no {KERNEL}; build it first", pytrace=False)
    if not usable(engine):
        pytest.skip(f"engine {engine} does not run here")
    watch = Watch()
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        one_start(watch, engine, until, tmp_path)
    print(f"{engine}: {watch.starts} starts, {watch.resets} resets, {watch.rounds} rounds, at most {watch.private:.0f} MiB "
          f"private and {watch.descriptors} descriptors")
    assert watch.rounds > 10000 or SEED, f"the guest did only {watch.rounds} rounds"
