"""vCPUs and memory that come and go while a stock Debian kernel runs, by the control socket's "resize"."""
import json
import os
import re
import socket
import time

import pytest
import vm


class Control:
    """A connection to the control socket that listens to events too."""

    def __init__(self, path):
        end = time.monotonic() + 10
        while True:
            self.socket = socket.socket(socket.AF_UNIX)
            try:
                self.socket.connect(str(path))
                break
            except OSError:
                assert time.monotonic() < end, "no control socket"
                time.sleep(0.02)
        self.stream = self.socket.makefile("r")
        self.events = []
        self.call("events", on=True)

    def _read(self, timeout):
        self.socket.settimeout(timeout)
        return json.loads(self.stream.readline())

    def call(self, method, **params):
        self.socket.sendall(json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode() + b"\n")
        while True:
            message = self._read(10)
            if "id" in message:
                return message
            self.events.append((message["method"], message["params"]))

    def resize(self, **params):
        answer = self.call("resize", **params)
        assert "result" in answer, answer
        return answer["result"]

    def wait_removed(self, names, timeout=30):
        """Until the guest has let go of all of these."""
        left, end = set(names), time.monotonic() + timeout * vm.SLOW
        while True:
            for method, params in self.events:
                if method.endswith("refused"):
                    raise vm.Failed(f"the guest refused {params}")
                left.discard(params.get("device"))
            self.events = []
            if not left:
                return
            message = self._read(max(0.1, end - time.monotonic()))
            self.events.append((message["method"], message["params"]))


def shell(v, command, timeout=30):
    """The output of a command in the test guest's shell."""
    v.send(f"({command}) >/tmp/out 2>&1; s=$?; echo BEG''IN; cat /tmp/out; echo END''OF $s\n")
    v.expect(r"^.*BEGIN$", timeout)
    begin = v.position
    match = v.expect(r"^ENDOF (\d+)$", timeout)
    text = v.text[begin:match.start()].strip()
    if match.group(1) != "0":
        v.fail(f"{command}: status {match.group(1)}, {text}")
    return text


def boot(tmp_path, *arguments, **options):
    # The kernel is quiet: its words would fall into the shell's.
    v = vm.guest(test="shell", extra="loglevel=1", arguments=("--engine", "bt", "--control", tmp_path / "control", *arguments),
                 **options)
    v.expect("GUEST READY", 60)
    v.send("stty -echo; PS1=; echo RE''ADY\n")
    v.expect("^.*READY$", 20)
    return v, Control(tmp_path / "control")


def until(v, command, wanted, timeout=20):
    end = time.monotonic() + timeout * vm.SLOW
    while (text := shell(v, command)) != wanted:
        if time.monotonic() > end:
            v.fail(f"{command}: {text!r} instead of {wanted!r}")
        time.sleep(0.1)


def slots_in_use(v):
    """Bytes of the process's mapping of 768 MiB (the slots) that are there. In a jail the machine is a child's."""
    pid = open(f"/proc/{v.process.pid}/task/{v.process.pid}/children").read().split() or [v.process.pid]
    for part in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", open(f"/proc/{pid[0]}/smaps").read()):
        if re.search(r"^Size: +786432 kB$", part, re.M):
            return int(re.search(r"^Rss: +(\d+) kB$", part, re.M).group(1)) << 10
    return 0


CPUS = "/sys/devices/system/cpu"
ONLINE = f"for c in {CPUS}/cpu[0-9]*/online; do echo 1 >$c; done; cat {CPUS}/online"


def check_cpus(v, control):
    assert shell(v, f"cat {CPUS}/possible {CPUS}/present") == "0-3\n0"
    assert control.resize(cpus=3)["cpus"] == 3
    until(v, f"cat {CPUS}/present", "0-2")
    assert shell(v, ONLINE) == "0-2"
    # Work that stays on the new ones, both at once, and comes out right.
    work = "i=0; while [ $i -lt 10000 ]; do i=$((i + 1)); done; echo $i"
    assert shell(v, f"taskset 2 sh -c '{work}' & taskset 4 sh -c '{work}'; wait") == "10000\n10000"
    busy = shell(v, "grep -E '^cpu[12] ' /proc/stat")
    assert all(int(line.split()[1]) + int(line.split()[3]) > 0 for line in busy.splitlines()), busy
    # Asked to go while they are busy.
    shell(v, "for m in 2 4 6; do taskset $m sh -c 'while :; do :; done' >/dev/null 2>&1 & echo $! >>/tmp/pids; done")
    control.resize(cpus=1)
    control.wait_removed(["cpu1", "cpu2"])
    assert control.call("status")["result"]["cpus"] == 1
    until(v, f"cat {CPUS}/present {CPUS}/online", "0\n0")
    shell(v, "kill $(cat /tmp/pids)")
    # Again, all of them.
    control.resize(cpus=4)
    until(v, f"cat {CPUS}/present", "0-3")
    assert shell(v, ONLINE) == "0-3"
    # What a guest's administrator ejects is gone as well.
    shell(v, "echo 1 >/sys/bus/acpi/devices/ACPI0007:03/eject")
    control.wait_removed(["cpu3"])
    control.resize(cpus=2)
    control.wait_removed(["cpu2"])


def total(v):
    return int(shell(v, "grep MemTotal /proc/meminfo").split()[1])


def check_memory(v, control):
    before = total(v)
    answer = control.resize(memory="512M")
    assert (answer["memory"], answer["memory-max"], answer["memory-unit"]) == (512 << 20, 1 << 30, 128 << 20)
    until(v, "ls -d /sys/devices/system/memory/memory* | wc -l", "4")
    shell(v, "cd /sys/devices/system/memory; for m in memory*; do grep -q online $m/state || echo online_movable >$m/state; done")
    assert total(v) - before > 250000
    # More than was there before fits, and stays what it is.
    shell(v, "mkdir /tmp/more; mount -t tmpfs -o size=320M more /tmp/more; cd /tmp/more; "
             "dd if=/dev/urandom of=a bs=1M count=10 2>/dev/null; for i in 1 2 3 4 5 6 7 8 9 10 11 12; do cat a; done >b", 60)
    assert slots_in_use(v) > 60 << 20
    copies = shell(v, "for i in 1 2 3 4 5 6 7 8 9 10 11 12; do cat /tmp/more/a; done | md5sum", 60)
    assert shell(v, "md5sum </tmp/more/b", 60) == copies
    # What is in it when it is asked to go is moved.
    shell(v, "truncate -s 50M /tmp/more/b")
    kept = shell(v, "md5sum </tmp/more/b")
    control.resize(memory="256M")
    control.wait_removed(["memory0", "memory1"])
    assert total(v) == before
    assert shell(v, "md5sum </tmp/more/b") == kept
    assert slots_in_use(v) == 0, "the host did not get the memory back"
    shell(v, "umount /tmp/more")


def test_cpus_and_memory(tmp_path):
    v, control = boot(tmp_path, cpus="1,max=4", memory="256M,max=1G")
    with v:
        check_cpus(v, control)
        check_memory(v, control)
        # A kernel that starts anew finds what is there.
        control.resize(cpus=3, memory="384M")
        v.send("reboot -f\n")
        v.expect("GUEST READY", 60)
        v.send("stty -echo; PS1=; echo RE''ADY\n")
        v.expect("^.*READY$", 20)
        assert shell(v, f"cat {CPUS}/online") == "0-2"
        until(v, "ls -d /sys/devices/system/memory/memory* | wc -l", "3")
        control.resize(cpus=1)
        control.wait_removed(["cpu1", "cpu2"])
        bad = [line for line in shell(v, "dmesg").splitlines() if vm.KERNEL_COMPLAINTS.search(line)]
        assert not bad, bad
        v.send("poweroff -f\n")
        assert v.wait(20) == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="--jail needs root")
def test_in_jail(tmp_path):
    v, control = boot(tmp_path, "--jail", cpus="1,max=4", memory="256M,max=1G")
    with v:
        control.resize(cpus=4)
        until(v, f"cat {CPUS}/present", "0-3")
        assert shell(v, ONLINE) == "0-3"
        check_memory(v, control)
        control.resize(cpus=1)
        control.wait_removed(["cpu1", "cpu2", "cpu3"])
        v.send("poweroff -f\n")
        assert v.wait(20) == 0


@pytest.mark.parametrize("arguments,params,message", [
    ({"cpus": "1,max=2", "memory": "256M,max=512M"}, {"cpus": 3}, "from 1 to 2"),
    ({"cpus": "1,max=2", "memory": "256M,max=512M"}, {"cpus": 0}, "from 1 to 2"),
    ({"cpus": "1,max=2", "memory": "256M,max=512M"}, {"memory": "300M"}, "steps of 128 MiB"),
    ({"cpus": "1,max=2", "memory": "256M,max=512M"}, {"memory": "640M"}, "from 256 to 512"),
    ({"cpus": "1", "memory": "256M"}, {"cpus": 2}, "max=MOST"),
    ({"cpus": "1", "memory": "256M"}, {"memory": "512M"}, "max=MOST"),
])
def test_refusals(tmp_path, arguments, params, message):
    with vm.guest(test="idle", arguments=("--engine", "bt", "--control", tmp_path / "control"), **arguments) as v:
        answer = Control(tmp_path / "control").call("resize", **params)
        assert message in answer["error"]["message"], answer
        assert v.process.poll() is None
