"""The control socket with a real guest: every method, answers in time whatever the guest does, and rounds of pause,
resume, limits and hot plug during heavy disk and network I/O with checksums (HOSTEL_ROUNDS=500 for more of them)."""
import hashlib
import json
import os
import socket
import time

import pytest
import vm

pytestmark = pytest.mark.skipif(vm.IS_QEMU, reason="hostel-vmm's own control socket")
ROUNDS = int(os.environ.get("HOSTEL_ROUNDS", "100"))
ANSWER_MS = 100


class Error(Exception):
    def __init__(self, error):
        super().__init__(error["message"])
        self.code = error["code"]


class Control:
    """A client; remembers how long each answer took."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        end = time.monotonic() + 10
        while True:
            try:
                self.socket.connect(str(path))
                break
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.005)
        self.socket.settimeout(20)
        self.stream = self.socket.makefile("rwb", 0)
        self.count = 0
        self.times = []
        self.events = []

    def receive(self):
        line = self.stream.readline()
        assert line, "the control socket was closed"
        return json.loads(line)

    def call(self, method, **params):
        self.count += 1
        began = time.monotonic()
        self.stream.write(json.dumps({"jsonrpc": "2.0", "id": self.count, "method": method, "params": params}).encode() + b"\n")
        while True:
            answer = self.receive()
            if "id" in answer:
                break
            self.events.append(answer)
        self.times.append(((time.monotonic() - began) * 1000, method))
        assert answer["id"] == self.count
        if "error" in answer:
            raise Error(answer["error"])
        return answer["result"]

    def event(self, name, timeout=20):
        """The next event of that name; others that come before are dropped."""
        self.socket.settimeout(timeout * vm.SLOW)
        while True:
            event = self.events.pop(0) if self.events else self.receive()
            if event["method"] == name:
                return event["params"]

    def pause(self):
        """Pauses for good: an answer of "pausing" is followed by the event."""
        if self.call("pause")["state"] != "paused":
            self.event("paused")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stream.close()
        self.socket.close()


def check_times(control):
    """Answers come within 100 ms. A machine with more work than processors wakes the client or us late now and then: one
    answer in fifty may be late for that, by no more than a second."""
    late = [(ms, method) for ms, method in control.times if ms >= ANSWER_MS * vm.SLOW]
    slowest = max(control.times)
    assert len(late) <= len(control.times) / 50 and slowest[0] < 1000 * vm.SLOW, \
        f"{len(late)} of {len(control.times)} answers took longer than {ANSWER_MS} ms; the slowest: {slowest}"
    return slowest


@pytest.mark.quick
def test_life(tmp_path):
    """State, pause, resume, reset, power button, console; the events of each; the socket file goes away."""
    path = tmp_path / "control"
    with vm.guest("cloud", "vmlinux", "shell", arguments=["--control", path, "--serial", "none"], cpus=2) as v, \
            Control(path) as c, Control(path) as console:
        assert c.call("events")["state"] == "running"
        console.call("console-attach")
        text = read_until(console.socket, b"GUEST READY")
        assert b"GUEST INIT" in text
        c.pause()
        assert c.call("status")["state"] == "paused"
        before = c.call("statistics")
        console.socket.sendall(b"echo he''llo\n")
        time.sleep(0.3)
        after = c.call("statistics")
        for a, b in zip(before["vcpus"], after["vcpus"]):
            assert a["engine"] == b["engine"] and a["exits"] == b["exits"], "a paused guest has run"
        c.call("resume")
        c.event("resumed")
        read_until(console.socket, b"\nhello")
        # Reset while paused: happens at once, runs on later.
        c.pause()
        c.call("reset")
        c.event("reset")
        assert c.call("status")["state"] == "paused"
        c.call("resume")
        read_until(console.socket, b"GUEST READY")
        # The guest's kernel hears of the power button; busybox has nobody to do more.
        console.socket.sendall(b"cat /proc/interrupts | grep acpi\n")
        read_until(console.socket, b"acpi")
        c.call("power-button")
        console.socket.sendall(b"poweroff -f\n")
        c.event("power-off")
        assert v.wait(20) == 0
        assert not path.exists()
        check_times(c)


def read_until(stream, wanted, timeout=60):
    stream.settimeout(timeout * vm.SLOW)
    text = b""
    while wanted not in text:
        data = stream.recv(65536)
        assert data, f"the console ended without {wanted}: {text[-500:]}"
        text += data
    return text


def test_quit_and_config_file(tmp_path):
    """--config says what the flags say; quit ends the VM with status 0 also when it is paused."""
    path = tmp_path / "control"
    disk = tmp_path / "a, disk"
    disk.write_bytes(bytes(1 << 20))
    config = tmp_path / "vm.json"
    config.write_text(json.dumps({
        "kernel": str(vm.kernel("cloud", "vmlinux")), "initrd": str(vm.initrd("cloud")), "memory": "256M", "cpus": 1,
        "cmdline": "console=ttyS0 hostel.test=idle", "control": str(path),
        "disk": [{"path": str(disk), "readonly": True, "format": "raw", "operations": "10:20"}],
        "net": {"user": True, "mac": "52:54:00:12:34:56"}}))
    with vm.Vm("--config", config, "--cpus", "2") as v, Control(path) as c:
        v.expect("GUEST READY")
        status = c.call("status")
        assert status["cpus"] == 2 and status["memory"] == 256 << 20
        device = status["devices"]["disk0"]
        assert device["path"] == str(disk) and device["readonly"] and device["limits"]["operations"] == {"rate": 10, "burst": 20}
        assert "net0" in status["devices"]
        c.pause()
        c.call("quit")
        assert v.wait(10) == 0
    for text, part in (("{", "line 1"), ("[]", "one JSON object"), ('{"kernl": "x"}', "kernl"), ('{"cpus": []}', "kernel"),
                       ('{"cpus": 1.5}', "cpus"), ('{"cpus": 0}', "--cpus 0"), ('{"config": "x"}', "command line"),
                       ('{"disk": {"path": "x", "speed": 3}}', "speed=3")):
        config.write_text(text)
        with vm.Vm("--config", config) as v:
            assert v.wait(10) == 2, text
            assert part in v.stderr() and v.stderr().count("\n") == 1, (text, v.stderr())


def test_busy_guest_answers_in_time(tmp_path):
    """A console that nobody reads holds a vCPU that prints; a disk limited to almost nothing holds requests: every
    answer comes in time, and the pause when it can."""
    path, disk = tmp_path / "control", tmp_path / "disk"
    disk.write_bytes(bytes(64 << 20))
    with vm.guest("cloud", "vmlinux", "shell", arguments=["--control", path, "--disk", f"{disk},format=raw"], cpus=2) as v, \
            Control(path) as c:
        v.expect("GUEST READY")
        c.call("events")
        v.send("(while :; do dd if=/dev/urandom of=/dev/vda bs=64k count=100 conv=fsync 2>/dev/null; done) &\n")
        v.send("(while :; do :; done) &\n")
        v.send("while :; do cat /proc/kallsyms; done\n")
        time.sleep(0.3)
        c.call("limit", device="disk0", bandwidth=1000, operations=1)
        for i in range(40):
            c.call("status")
            c.call("statistics")
            if i % 4 == 0:
                c.pause()
                c.call("resume")
        assert c.call("statistics")["devices"]["disk0"]["counters"]["delays"] > 0
        c.call("quit")
        assert v.wait(20) == 0
        check_times(c)


def test_rounds_under_load(tmp_path):
    """Pause, resume, limits and hot plug while the guest writes and verifies files and exchanges checksummed data."""
    path = tmp_path / "control"
    disk, hot = tmp_path / "disk", tmp_path / "hot"
    vm.make_ext4(disk, 64)
    hot.write_bytes(os.urandom(1 << 20))
    digest = hashlib.md5(hot.read_bytes()).hexdigest()
    with vm.ChecksumServer() as server, \
            vm.guest("cloud", "vmlinux", "shell", cpus=2, arguments=[
                "--control", path, "--disk", f"{disk},format=raw", "--net", "user,mtu=16000"]) as v, Control(path) as c:
        v.expect("GUEST READY")
        c.call("events")
        # Of the kernel's messages only warnings and worse, so that they do not tear the lines looked for here.
        v.send("PS1=; stty -echo; dmesg -n 5; mount -t ext4 /dev/vda /mnt; echo REA''DY\n")
        v.expect("READY$")
        # The jobs sleep at their end: busybox's shell takes the end of one for the end of its input.
        v.send("(while [ ! -e /tmp/stop ]; do checks pattern write /mnt/p 8388608 && sync && "
               "echo 1 >/proc/sys/vm/drop_caches && checks pattern verify /mnt/p 8388608 || echo BAD disk; "
               "echo >>/tmp/disk; done >/tmp/disk.log 2>&1; grep BAD /tmp/disk.log; echo disk END''ED $(wc -l </tmp/disk); sleep 9999) &\n"
               f"(while [ ! -e /tmp/stop ]; do checks net 10.0.2.2 {server.port} 4194304 || echo BAD net; "
               "echo >>/tmp/net; done >/tmp/net.log 2>&1; grep BAD /tmp/net.log; echo net END''ED $(wc -l </tmp/net); sleep 9999) &\n")
        v.send("hot() { i=0; while ! grep -lx hostel-disk-1 /sys/block/vd*/serial >/tmp/hot 2>/dev/null; do i=$((i+1)); "
               "[ $i -gt 100 ] && break; sleep 0.1; done; n=$(cut -d/ -f4 /tmp/hot); "
               "echo HOT $(md5sum </dev/$n); }\n")
        began = time.monotonic()
        for i in range(ROUNDS):
            c.call("limit", device="disk0", bandwidth=["4M", "64M", 0][i % 3], operations=[0, 500, 50][i % 3])
            c.call("limit", device="net0", bandwidth=[0, "8M", "64M"][i % 3])
            c.pause()
            paused = c.call("statistics")["devices"]
            if i % 10 == 0:
                time.sleep(0.05)
                assert c.call("statistics")["devices"] == paused, "a paused guest's devices went on"
            c.call("resume")
            if i % 5 == 0:
                added = c.call("disk-add", disk={"path": str(hot), "readonly": True, "format": "raw"})
                assert added["device"] == "disk1"
                v.send("hot\n")
                c.pause()
                c.call("resume")
                assert v.expect(r"HOT ([0-9a-f]{32})").group(1) == digest
                c.call("device-remove", device="disk1")
                assert c.event("removed")["device"] == "disk1"
            if i % 20 == 0:
                added = c.call("net-add", net="user")
                assert added["device"] == "net1"
                v.send("while [ ! -e /sys/class/net/eth1 ]; do sleep 0.1; done; echo NET re''ady\n")
                v.expect(r"NET ready")
                c.call("device-remove", device="net1")
                assert c.event("removed")["device"] == "net1"
        seconds = time.monotonic() - began
        c.call("limit", device="disk0", bandwidth=0, operations=0)
        c.call("limit", device="net0", bandwidth=0)
        counters = c.call("statistics")["devices"]
        v.send("echo >/tmp/stop\n")
        ended = {v.expect(r"(disk|net) ENDED (\d+)$").groups() for _ in range(2)}
        assert all(int(n) > 0 for _, n in ended), ended
        assert "BAD" not in v.text, v.text[-2000:]
        assert not server.problems, server.problems
        v.send("umount /mnt; poweroff -f\n")
        assert v.wait(30) == 0
        v.check_kernel_log()
        check_times(c)
        print(f"{ROUNDS} rounds in {seconds:.0f} s, slowest answer {check_times(c)}; {dict(ended)} passes; "
              f"{counters['disk0']['counters']}, {counters['net0']['counters']}")
    vm.check_ext4(disk)


def test_limits(tmp_path):
    """A disk and a network run at the rate they are given, and faster when it is raised while a request waits."""
    path, disk = tmp_path / "control", tmp_path / "disk"
    disk.write_bytes(bytes(64 << 20))
    with vm.ChecksumServer() as server, \
            vm.guest("cloud", "vmlinux", "shell", arguments=[
                "--control", path, "--disk", f"{disk},format=raw,bandwidth=8M:1M", "--net", "user,mtu=16000"]) as v, Control(path) as c:
        v.expect("GUEST READY")

        def seconds(command):
            v.send(f"a=$(cut -d' ' -f1 /proc/uptime); {command} >/dev/null 2>&1; b=$(cut -d' ' -f1 /proc/uptime); echo TO''OK $a $b\n")
            a, b = v.expect(r"TOOK (\S+) (\S+)$").groups()
            return float(b) - float(a)

        took = seconds("dd if=/dev/vda of=/dev/null bs=1M count=16")
        assert 1.6 < took < 2.6, f"16 MiB at 8 MiB a second took {took} s"
        c.call("limit", device="disk0", bandwidth=0, operations=50, **{"operations-burst": 1})
        took = seconds("dd if=/dev/vda of=/dev/null bs=4k count=50 iflag=direct")
        assert 0.8 < took < 1.6, f"50 reads at 50 a second took {took} s"
        c.call("limit", device="disk0", operations=1)
        v.send("dd if=/dev/vda of=/dev/null bs=4k count=1000 iflag=direct 2>/dev/null; echo DO''NE\n")
        time.sleep(0.5)
        c.call("limit", device="disk0", operations=0)  # what waits does not wait for the old rate
        v.expect("DONE", 5)
        c.call("limit", device="net0", bandwidth="4M", **{"bandwidth-burst": "64K"})
        took = seconds(f"checks net 10.0.2.2 {server.port} 4194304")  # up and down, each at that rate
        assert 1.6 < took < 5, f"4 MiB each way at 4 MiB a second took {took} s"
        assert not server.problems
        check_times(c)
