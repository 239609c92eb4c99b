"""The smaller devices and the other ways to boot, each with a real guest: identity and panics, vsock, virtio console,
balloon, tap with offloads and several queues, Multiboot kernels."""
import hashlib
import json
import os
import re
import socket
import subprocess
import threading
import time

import pytest
import vm

UUID = "123e4567-e89b-42d3-a456-426614174000"


def shell(*arguments, kernel="generic", extra="", **options):
    """A guest at its shell, quiet: see run()."""
    v = vm.guest(kernel, "vmlinux", "shell", f"quiet {extra}", arguments=arguments, **options)
    v.expect(r"^GUEST READY$", 60)
    v.send("PS1=; stty -echo; echo REA''DY\n")
    v.expect(r"^READY$", 20)
    return v


def run(v, command, timeout=30):
    """What a command in the guest printed."""
    begin = v.position
    v.send(f"{command}; echo END''OF $?\n")
    match = v.expect(r"ENDOF (\d+)$", timeout)  # not every file ends with a newline
    text = v.text[begin:match.start()].strip()
    assert match.group(1) == "0", f"{command}: status {match.group(1)}: {text}"
    return text


def power_off(v):
    v.send("poweroff -f\n")
    assert v.wait(30) == 0
    v.check_kernel_log()


class UnixChecksumServer(vm.ChecksumServer):
    """The same at a Unix socket."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.bind(str(path))
        self.socket.listen(16)
        self.problems = []
        self.bytes = [0, 0]
        threading.Thread(target=self._serve, daemon=True).start()


def test_identity_and_panic(tmp_path):
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(1 << 20))
    with shell("--name", "web-1", "--uuid", UUID, "--disk", f"{disk},serial=SN-0815", extra="panic=0") as v:
        def dmi(name):
            return run(v, f"cat /sys/class/dmi/id/{name}")
        assert dmi("product_uuid") == UUID
        assert dmi("chassis_asset_tag") == "web-1"
        assert dmi("sys_vendor") == "Hostel"
        assert run(v, "cat /sys/block/vda/serial") == "SN-0815"
        # The generation ID has its driver, which found no fault with it.
        assert "HSTL0001:00" in run(v, "ls /sys/bus/acpi/drivers/vmgenid")
        v.send("echo c >/proc/sysrq-trigger\n")
        v.expect(r"end Kernel panic", 20)
        end = time.monotonic() + 10 * vm.SLOW
        while "the guest's kernel panicked" not in v.stderr() and time.monotonic() < end:
            time.sleep(0.05)
        assert v.stderr().count("the guest's kernel panicked") == 1


def dial(path, port):
    s = socket.socket(socket.AF_UNIX)
    s.settimeout(30 * vm.SLOW)
    s.connect(str(path))
    s.sendall(b"CONNECT %d\n" % port)
    answer = b""
    while not answer.endswith(b"\n"):
        byte = s.recv(1)
        if not byte:
            s.close()
            return None
        answer += byte
    assert re.fullmatch(rb"OK \d+\n", answer), answer
    return s


def echo(path, data):
    """Sends data to the guest's echo server and returns what came back."""
    with dial(path, 7) as s:
        def send():
            s.sendall(data)
            s.shutdown(socket.SHUT_WR)
        threading.Thread(target=send, daemon=True).start()
        got = b""
        while True:
            part = s.recv(1 << 16)
            if not part:
                return got
            got += part


def test_vsock(tmp_path):
    path = tmp_path / "v"
    server = UnixChecksumServer(f"{path}_9000")
    with shell("--vsock", f"{path},cid=77", cpus=2) as v:
        assert dial(path, 7) is None  # nobody listens there yet
        v.send("checks vsock-echo 7 &\n")
        v.expect(r"listening$", 20)
        data = os.urandom(1 << 20) * 3
        assert echo(path, data) == data
        # Many at once, each with its own bytes.
        results = {}

        def one(i):
            mine = os.urandom(5000 + i)
            results[i] = echo(path, mine) == mine
        threads = [threading.Thread(target=one, args=(i,)) for i in range(60)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(60 * vm.SLOW)
        assert len(results) == 60 and all(results.values())
        # From the guest to the host, 10 MB each way with checksums; and to a port where nobody listens.
        run(v, "checks net vsock 9000 10485760", 60)
        assert server.bytes == [10485760, 10485760] and not server.problems
        v.send("checks net vsock 9001 10; echo status $?\n")
        v.expect(r"^status 1$", 20)
        # The guest resets: its connections end, and the next start has new ones.
        held = dial(path, 7)
        v.send("reboot -f\n")
        assert held.recv(1) == b""
        v.expect(r"^GUEST READY$", 60)
        v.send("poweroff -f\n")
        assert v.wait(30) == 0
    assert not path.exists()


def test_virtio_console(tmp_path):
    path = tmp_path / "hvc"
    with shell("--virtio-console", f"socket={path}") as v:
        s = socket.socket(socket.AF_UNIX)
        s.settimeout(30 * vm.SLOW)
        s.connect(str(path))
        data = os.urandom(40000)
        # Kept open: its settings end with the last descriptor.
        run(v, "exec 3<>/dev/hvc0; stty raw -echo <&3")
        v.send("head -c 40000 <&3 | md5sum >/tmp/sum; echo GO''T\n")
        s.sendall(data)
        v.expect(r"^GOT$", 60)
        assert run(v, "cut -c1-32 /tmp/sum") == hashlib.md5(data).hexdigest()
        v.send("head -c 20000 /dev/urandom >/tmp/r; cat /tmp/r >&3; echo SE''NT\n")
        got = b""
        while len(got) < 20000:
            got += s.recv(1 << 16)
        v.expect(r"^SENT$", 30)
        assert run(v, "md5sum /tmp/r | cut -c1-32") == hashlib.md5(got).hexdigest()
        power_off(v)


class Control:
    def __init__(self, path):
        end = time.monotonic() + 10 * vm.SLOW
        while True:
            self.socket = socket.socket(socket.AF_UNIX)
            try:
                self.socket.connect(str(path))
                break
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)
        self.stream = self.socket.makefile("rwb")

    def call(self, method, **params):
        self.stream.write(json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode() + b"\n")
        self.stream.flush()
        while True:
            answer = json.loads(self.stream.readline())
            if answer.get("id") == 1:
                assert "error" not in answer, answer
                return answer["result"]


def memory_file(v):
    """Path of the guest's memory, whose size on the host is what the guest really has."""
    folder = f"/proc/{v.process.pid}/fd"
    for name in os.listdir(folder):
        if "guest-memory" in os.readlink(f"{folder}/{name}"):
            return f"{folder}/{name}"
    raise AssertionError("no guest memory")


def resident(path):
    return os.stat(path).st_blocks * 512 >> 20


def until(condition, timeout, what):
    end = time.monotonic() + timeout * vm.SLOW
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.1)


@pytest.mark.skipif(vm.IS_QEMU, reason="the control socket is hostel-vmm's")
def test_balloon(tmp_path):
    with shell("--balloon", "0", "--control", tmp_path / "control") as v:
        control = Control(tmp_path / "control")
        memory = memory_file(v)
        # Free pages go back by themselves.
        before = resident(memory)
        run(v, "dd if=/dev/zero of=/tmp/big bs=1M count=250 2>/dev/null")
        full = resident(memory)
        assert full >= before + 200, f"{before} MiB, {full} with 250 MiB more in use"
        run(v, "rm /tmp/big")
        until(lambda: resident(memory) < full - 200, 15, "freed memory did not return to the host")
        # The balloon takes what it is told, and gives it back.
        control.call("balloon", target=300 << 20)
        until(lambda: control.call("balloon")["actual"] == 300 << 20, 20, "the balloon did not grow")
        assert resident(memory) < 512 - 300
        until(lambda: 0 < control.call("balloon")["guest"].get("free", 0) < 212 << 20, 5, "no statistics")
        assert control.call("balloon")["guest"]["total"] > 400 << 20
        control.call("balloon", target=100 << 20)
        until(lambda: control.call("balloon")["actual"] == 100 << 20, 20, "the balloon did not shrink")
        # A guest that runs out of memory takes its pages back instead of killing its programs.
        control.call("balloon", target=420 << 20)
        until(lambda: control.call("balloon")["actual"] > 350 << 20, 20, "the balloon did not grow again")
        run(v, "dd if=/dev/zero of=/tmp/big bs=1M count=150 2>/dev/null", 60)
        assert control.call("balloon")["actual"] < 320 << 20
        assert "Out of memory" not in run(v, "dmesg")
        power_off(v)


@pytest.fixture
def namespace():
    name = f"hostel-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], stderr=subprocess.PIPE, text=True)
    if made.returncode or not os.access("/dev/net/tun", os.W_OK):
        pytest.skip(f"no network namespaces or taps here: {made.stderr.strip()}")
    yield name
    subprocess.run(["ip", "netns", "del", name], check=True)


@pytest.mark.skipif(vm.IS_QEMU, reason="hostel-vmm's own tap options")
@pytest.mark.parametrize("queues", [1, 2])
def test_tap(tmp_path, namespace, queues):
    """40 MB each way, for each queue, through a tap; segments stay uncut, and each queue is used."""
    inside = ["ip", "netns", "exec", namespace]
    subprocess.run([*inside, "sh", "-ec",
                    f"ip tuntap add dev tap0 mode tap {'multi_queue' if queues > 1 else ''}; "
                    "ip addr add 10.9.0.1/24 dev tap0; ip link set tap0 up; ip link set lo up"], check=True)
    server = UnixChecksumServer(tmp_path / "server")
    relay = subprocess.Popen([*inside, "socat", "TCP-LISTEN:9000,bind=10.9.0.1,fork,reuseaddr",
                              f"UNIX-CONNECT:{tmp_path / 'server'}"])
    try:
        with shell("--net", f"tap=tap0,queues={queues}", kernel="cloud", cpus=2, prefix=inside,
                   extra="hostel.ip=10.9.0.2/24 hostel.gw=10.9.0.1") as v:
            for _ in range(queues):
                run(v, "checks net 10.9.0.1 9000 41943040", 60)
            assert not server.problems
            counts = subprocess.run([*inside, "cat", "/proc/net/dev"], stdout=subprocess.PIPE, text=True).stdout
            fields = re.search(r"tap0: *(.*)", counts).group(1).split()
            for name, byte, packets in (("from", fields[0], fields[1]), ("to", fields[8], fields[9])):
                assert int(byte) / int(packets) > 5000, f"frames {name} the guest: {byte} bytes in {packets}"
            interrupts = run(v, "cat /proc/interrupts")
            lines = [line for line in interrupts.splitlines() if re.search(r"virtio0-(in|out)put", line)]
            assert len(lines) == 2 * queues
            power_off(v)
    finally:
        relay.terminate()
        relay.wait()


@pytest.fixture(scope="module")
def multiboot(tmp_path_factory):
    """The test kernel as a 32-bit ELF file, and flat."""
    folder = tmp_path_factory.mktemp("multiboot")
    source = vm.ROOT / "tests" / "guest"
    for name, flags in (("elf", []), ("flat", ["-DFLAT"])):
        subprocess.run(["gcc", *flags, "-m32", "-O1", "-ffreestanding", "-fno-pie", "-no-pie", "-fno-stack-protector",
                        "-mno-sse", "-nostdlib", "-static", "-Wl,--build-id=none,--no-warn-rwx-segments",
                        f"-Wl,-T,{source / 'multiboot.ld'}", source / "multiboot.c", "-o", folder / name], check=True)
    subprocess.run(["objcopy", "-O", "binary", folder / "flat"], check=True)
    (folder / "one").write_text("first")
    (folder / "two").write_text("second")
    return folder


@pytest.mark.skipif(vm.IS_QEMU, reason="hostel-vmm's own options")
@pytest.mark.parametrize("form", ["elf", "flat"])
def test_multiboot(multiboot, form):
    with vm.Vm("--kernel", multiboot / form, "--cmdline", "root=none exit=4", "--initrd", multiboot / "one",
               "--module", f"{multiboot / 'two'},a=1,b=2", "--debug-exit", memory="64M") as v:
        assert v.wait(20) == 9
        lines = [line for _, line in v.lines]
        assert lines[:3] == ["MULTIBOOT", "lower 639", "upper 64512"], lines
        assert lines[3] == f"cmdline {multiboot / form} root=none exit=4"
        assert lines[4:] == [f"module {multiboot / 'one'} = first", "module a=1,b=2 = second"]


@pytest.mark.skipif(vm.IS_QEMU, reason="hostel-vmm's own messages")
@pytest.mark.parametrize("arguments, wanted", [
    (["--module", "/etc/passwd"], "takes no modules, only Multiboot kernels do"),
    (["--vsock", "/nonexistent/v"], "--vsock /nonexistent/v"),
    (["--vsock", "v,cid=2"], "a number from 3 to 4294967294"),
    (["--balloon", "1G"], "--balloon: 1024 MiB are to be given up of 512 MiB"),
    (["--uuid", "123"], "--uuid 123: give one such as"),
    (["--serial", "stdio", "--virtio-console", "stdio"], "one of them can have it"),
])
def test_bad_options(arguments, wanted):
    with vm.guest("cloud", "vmlinux", "true", arguments=arguments) as v:
        assert v.wait(20) in (1, 2)
        assert wanted in v.stderr()
        assert len(v.stderr().strip().splitlines()) <= 2
