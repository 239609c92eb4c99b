"""The serial console in all its forms, the terminal, power-off, reset and faults of the whole machine."""
import os
import pathlib
import signal
import socket
import stat
import subprocess
import termios
import time

import pytest
import vm

only_hostel = pytest.mark.skipif(vm.IS_QEMU, reason="hostel-vmm's own behaviour, not QEMU's")


def settings(v):
    return termios.tcgetattr(v.inner)


@pytest.mark.quick
def test_power_off_ends_with_0_and_no_complaint():
    with vm.guest("cloud", "vmlinux", "true") as v:
        v.expect(r"GUEST READY")
        status = v.wait(20)
        if status:
            v.fail(f"exit status {status}")
        v.check_kernel_log()
        # Where KVM cannot be used, it may say so.
        complaints = [line for line in v.stderr().splitlines() if not line.startswith("hostel-vmm: engine ")]
        assert not complaints, v.stderr()


def test_shell_on_a_terminal():
    """A person's session: echo, Ctrl-C reaches the guest, Ctrl-A x leaves, the terminal is as before."""
    with vm.guest("cloud", "vmlinux", "shell", terminal=True) as v:
        v.expect(r"GUEST READY")
        v.expect(r"# ")
        v.send("echo $((6*7))0\n")
        v.expect(r"^420$")
        v.send("sleep 1000\n")
        time.sleep(1)
        v.send("\x03")
        v.send("echo sta''tus $?\n")
        v.expect(r"^status 130$", 20)
        assert v.process.poll() is None, "Ctrl-C ended the VM instead of the guest's program"
        v.send("\x01x")
        status = v.wait(10)
        assert status == 0, f"exit status {status} after Ctrl-A x"
        assert settings(v) == v.terminal_before, "the terminal's settings were not restored"


def test_long_input_is_not_lost():
    """A pasted script of some kilobytes arrives whole."""
    with vm.guest("cloud", "vmlinux", "shell") as v:
        v.expect(r"GUEST READY")
        v.expect(r"# ")
        lines = [f"line {i} {'x' * 60}" for i in range(200)]
        v.send("stty -echo; cat >/tmp/paste\n")
        time.sleep(1)
        v.send("\n".join(lines) + "\n\x04")
        v.send("md5sum /tmp/paste | cut -c1-32; echo en''d\n")
        import hashlib
        v.expect(hashlib.md5(("\n".join(lines) + "\n").encode()).hexdigest(), 30)


@only_hostel
@pytest.mark.parametrize("how", ["power-off", "SIGTERM", "SIGINT", "SIGHUP", "failure"])
def test_terminal_is_restored(how, tmp_path):
    test = "true" if how == "power-off" else "idle"
    extra = ["--disk", tmp_path / "missing"] if how == "failure" else []
    with vm.guest("cloud", "vmlinux", test, terminal=True, arguments=extra) as v:
        if how != "failure":
            v.expect(r"GUEST READY")
        if how.startswith("SIG"):
            assert settings(v) != v.terminal_before, "the terminal was not in raw mode"
            v.process.send_signal(getattr(signal, how))
        status = v.wait(20)
        assert settings(v) == v.terminal_before, "the terminal's settings were not restored"
        if how == "power-off":
            assert status == 0
        elif how == "failure":
            assert status == 1


def test_serial_to_a_file(tmp_path):
    path = tmp_path / "console"
    with vm.guest("cloud", "vmlinux", "true", arguments=["--serial", f"file={path}"]) as v:
        assert v.wait(60) == 0
        text = path.read_text(errors="replace")
        assert "GUEST READY" in text and "reboot: Power down" in text, text[-1000:]


def test_serial_on_a_socket(tmp_path):
    path = tmp_path / "console.sock"
    with vm.guest("cloud", "vmlinux", "shell", arguments=["--serial", f"socket={path}"]) as v:
        end = time.monotonic() + 20
        while not path.exists() and time.monotonic() < end:
            time.sleep(0.05)
        assert stat.S_ISSOCK(path.stat().st_mode)
        for attempt in range(2):  # whoever leaves can come back
            with socket.socket(socket.AF_UNIX) as s:
                s.connect(str(path))
                s.settimeout(1)
                text, end = "", time.monotonic() + 60
                while f"ANSWER{attempt} 42" not in text:
                    assert time.monotonic() < end, text[-1000:]
                    try:
                        s.sendall(f"echo ANSWER{attempt} $((6*7))\n".encode())
                        time.sleep(0.3)
                        text += s.recv(65536).decode(errors="replace")
                    except socket.timeout:
                        pass
                if attempt == 1:
                    s.sendall(b"poweroff -f\n")
                    assert v.wait(30) == 0
    if not vm.IS_QEMU:
        assert not path.exists(), "the socket was left behind"


def test_serial_none():
    with vm.guest("cloud", "vmlinux", "true", arguments=["--serial", "none"]) as v:
        assert v.wait(60) == 0
        assert v.text == "", v.text


def test_reset_reboots():
    """The same process comes back, as often as it is reset, with every way to reset."""
    with vm.guest("cloud", "vmlinux", "reboot", cpus=2) as v:
        for _ in range(4):
            v.expect(r"GUEST REBOOT", 60)
        v.check_kernel_log()


@pytest.mark.parametrize("how", ["acpi", "kbd", "pci"])
def test_on_reset_exit(how):
    if how == "pci" and vm.IS_QEMU:
        pytest.skip("reboot=pci is 0xcf9, tried on hostel-vmm alone")
    with vm.guest("cloud", "vmlinux", "reboot", f"reboot={how}", arguments=["--on-reset", "exit"]) as v:
        v.expect(r"GUEST REBOOT", 60)
        assert v.wait(20) == 0
        assert v.text.count("GUEST REBOOT") == 1


@only_hostel
def test_triple_fault_is_reported():
    """Reported, and a reset as on real hardware; with --on-reset exit it ends the program with status 1."""
    with vm.guest("cloud", "vmlinux", "triple", "reboot=triple", arguments=["--on-reset", "exit"]) as v:
        v.expect(r"GUEST TRIPLE", 60)
        status = v.wait(30)
        if status != 1 or "triple fault" not in v.stderr() or v.stderr().count("\n") != 1:
            v.fail("a triple fault was not reported")
    with vm.guest("cloud", "vmlinux", "triple", "reboot=triple") as v:
        v.expect(r"GUEST TRIPLE", 60)
        v.expect(r"GUEST TRIPLE", 60)
        assert "triple fault" in v.stderr()


def test_panic_reboots_or_stays():
    """A guest kernel's panic is the guest's affair: with panic=1 it resets."""
    with vm.guest("cloud", "vmlinux", "panic", "panic=1", arguments=["--on-reset", "exit"]) as v:
        v.expect(r"GUEST PANIC", 60)
        v.expect(r"Kernel panic", 30)
        assert v.wait(30) == 0


@only_hostel
def test_a_host_that_is_stopped_and_continued():
    """SIGSTOP for some seconds: the guest goes on, its clock does not run backwards, no lock-up is reported."""
    with vm.guest("cloud", "vmlinux", "checks", "hostel.only=clock,timers", cpus=2) as v:
        v.expect(r"CLOCK begin", 60)
        time.sleep(1)
        v.process.send_signal(signal.SIGSTOP)
        time.sleep(3)
        v.process.send_signal(signal.SIGCONT)
        v.expect(r"^CHECKS 2 ok, 0 failed", 60)


@only_hostel
def test_idle_guest_uses_little_time():
    """An idle guest of two processors leaves the host's processor alone."""
    with vm.guest("cloud", "vmlinux", "idle", cpus=2) as v:
        v.expect(r"GUEST READY")
        time.sleep(3)

        def used():
            fields = pathlib.Path(f"/proc/{v.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        before = used()
        time.sleep(4)
        share = (used() - before) / 4
        assert share < 0.15, f"an idle guest uses {share:.0%} of a processor"


@only_hostel
def test_forwarded_port():
    """--net user,forward=: a connection to the host's port reaches the guest's server."""
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    with vm.guest("cloud", "vmlinux", "net", arguments=["--net", f"user,forward=tcp:127.0.0.1:{port}-:7"]) as v:
        v.expect(r"GUEST READY")
        end = time.monotonic() + 20
        while True:
            with socket.create_connection(("127.0.0.1", port), timeout=10) as c:
                data = os.urandom(30000)
                c.settimeout(5)
                try:
                    c.sendall(data)
                    got = b""
                    while len(got) < len(data):
                        piece = c.recv(65536)
                        if not piece:
                            break
                        got += piece
                except OSError:
                    got = b""
                if got == data:
                    break
            assert time.monotonic() < end, f"{len(got)} of {len(data)} bytes came back"
            time.sleep(0.5)


def in_namespace(script):
    """A shell script in a network namespace of its own; None if this machine forbids that."""
    if os.geteuid() or subprocess.run(["unshare", "-n", "true"], stderr=subprocess.DEVNULL).returncode:
        return None
    if not pathlib.Path("/dev/net/tun").exists():
        return None
    return ["unshare", "-n", "sh", "-c", script]


def test_tap(tmp_path):
    """A tap device in a network namespace: the guest reaches the namespace's address and moves 100 MB each way."""
    script = ("ip link set lo up; ip tuntap add dev tap0 mode tap && ip addr add 192.168.77.1/24 dev tap0 && "
              "ip link set tap0 up && exec \"$@\"")
    prefix = in_namespace(script)
    if not prefix:
        pytest.skip("no network namespaces or /dev/net/tun here")
    server = ("import sys; sys.path.insert(0, %r); import vm, socket, subprocess, threading\n"
              "server = vm.ChecksumServer.__new__(vm.ChecksumServer); server.problems = []; server.bytes = [0, 0]\n"
              "server.socket = socket.create_server(('192.168.77.1', 5000))\n"
              "threading.Thread(target=server._serve, daemon=True).start()\n"
              "with vm.guest('cloud', 'vmlinux', 'net', 'hostel.net=5000 hostel.ip=192.168.77.2/24 hostel.gw=192.168.77.1',\n"
              "              arguments=['--net', 'tap=tap0']) as v:\n"
              "    v.expect('^CHECKS 2 ok, 0 failed', 120)\n"
              "assert server.bytes == [104857600, 104857600] and not server.problems, server.problems\n"
              % str(pathlib.Path(vm.__file__).parent))
    result = subprocess.run([*prefix, "sh", "/usr/bin/python3", "-c", server], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, timeout=180)
    assert result.returncode == 0, result.stdout
