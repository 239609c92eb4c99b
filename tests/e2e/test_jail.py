"""The jail of --jail: what a guest that has taken the process over is refused, how the process looks from outside, and that
a VM does in it all that it does outside."""
import json
import os
import pathlib
import re
import resource
import signal
import socket
import subprocess
import time

import pytest
import vm

pytestmark = [pytest.mark.skipif(vm.IS_QEMU, reason="QEMU has no jail of ours"),
              pytest.mark.skipif(os.geteuid() != 0, reason="a jail is built by root")]

ATTEMPTS = pathlib.Path(vm.VMM).parent / "tests" / "jail" / "hostel-vmm-attempts"
KINDS = ("main", "vcpu", "worker")
# With a network in user mode the main thread makes the guest's connections.
USER_NET = {("main", "socket_tcp"), ("main", "socket_udp")}


def kernel_arguments(test):
    return ["--kernel", vm.kernel("cloud", "vmlinux"), "--initrd", vm.initrd("cloud"),
            "--cmdline", f"console=ttyS0 hostel.test={test}"]


def jailed(test="idle", *arguments, form="vmlinux", **options):
    return vm.guest("cloud", form, test, arguments=["--jail", "--engine", "bt", *arguments], **options)


def inner(v, timeout=5):
    """The process id of the VM itself: the keeper's only child."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        children = pathlib.Path(f"/proc/{v.process.pid}/task/{v.process.pid}/children").read_text().split()
        if children:
            return int(children[0])
        time.sleep(0.01)
    v.fail("the keeper has no child")


def status_of(pid, field, task=None):
    text = pathlib.Path(f"/proc/{pid}/task/{task or pid}/status").read_text()
    return re.search(rf"^{field}:[ \t]*(.*)$", text, re.M).group(1)


@pytest.mark.quick
@pytest.mark.parametrize("net", ["none", "user"])
def test_attempts_are_refused(tmp_path, net):
    if not ATTEMPTS.exists():
        pytest.fail(f"no {ATTEMPTS}; build it first", pytrace=False)
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    result = subprocess.run([ATTEMPTS, "--jail", "--engine", "bt", *kernel_arguments("true"), "--disk", f"{disk},format=raw",
                             *(["--net", "user"] if net == "user" else [])],
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60 * vm.SLOW)
    errors = result.stderr.decode()
    made = dict(re.findall(r"^ATTEMPTS (\w+) (\d+) made$", errors, re.M))
    assert set(made) == set(KINDS) and len(set(made.values())) == 1, errors[-2000:]
    passed = {(kind, name) for kind, name in re.findall(r"^ATTEMPT (\w+) (\w+) PASSED", errors, re.M)}
    assert passed == (USER_NET if net == "user" else set()), passed
    refused = re.findall(r"^ATTEMPT \w+ \w+ refused", errors, re.M)
    assert len(refused) == sum(map(int, made.values())) - len(passed)
    # The guest did not notice.
    assert result.returncode == 0 and b"GUEST POWEROFF" in result.stdout, errors[-2000:]


@pytest.mark.quick
@pytest.mark.parametrize("kind, name", [("main", "main"), ("vcpu", "vCPU"), ("worker", "worker")])
def test_a_refused_call_ends_the_vm_and_is_named(kind, name):
    """Without the handler of the attempts' own."""
    result = subprocess.run([ATTEMPTS, "--jail", "--engine", "bt", *kernel_arguments("idle")], stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=30 * vm.SLOW,
                            env={**os.environ, "HOSTEL_JAIL_BREAK": kind})
    assert result.returncode == 1, result.stderr
    assert f"jail: a {name} thread made system call 102, which its filter refuses" in result.stderr.decode()


@pytest.mark.quick
@pytest.mark.parametrize("net", ["none", "user"])
def test_the_process_from_outside(tmp_path, net):
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    arguments = ["--disk", f"{disk},format=raw", *(["--net", "user"] if net == "user" else [])]
    # A descriptor too many, as a careless starter leaves it.
    with jailed("idle", *arguments, cpus=2, prefix=["/bin/sh", "-c", 'exec "$@" 7</etc/passwd', "sh"]) as v:
        v.expect("GUEST READY")
        pid = inner(v)
        ids = set(status_of(pid, "Uid").split()) | set(status_of(pid, "Gid").split())
        assert len(ids) == 1 and 1900000000 <= int(min(ids)) <= 1900065535, ids
        assert status_of(pid, "Groups") == ""
        tasks = os.listdir(f"/proc/{pid}/task")
        assert len(tasks) == 1 + 2 + 2 + 1  # main, vCPUs, disk queues, console
        for task in tasks:
            for capabilities in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
                assert int(status_of(pid, capabilities, task), 16) == 0, capabilities
            assert status_of(pid, "NoNewPrivs", task) == "1"
            assert status_of(pid, "Seccomp", task) == "2" and status_of(pid, "Seccomp_filters", task) == "1"
            assert set(status_of(pid, "Uid", task).split()) == ids
            for name in ("mnt", "pid", "ipc", "uts", "net"):
                same = os.readlink(f"/proc/{pid}/task/{task}/ns/{name}") == os.readlink(f"/proc/self/ns/{name}")
                assert same == (name == "net" and net == "user"), name
        # The first in its PID namespace, and nothing of the host's name or files.
        assert status_of(pid, "NSpid").split()[-1] == "1"
        root = pathlib.Path(f"/proc/{pid}/root")
        assert [str(p.relative_to(root)) for p in root.rglob("*")] == (["etc", "etc/resolv.conf"] if net == "user" else [])
        with pytest.raises(OSError):
            (root / "x").touch()
        mounts = pathlib.Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
        assert len(mounts) == 1 and " / / ro," in mounts[0], mounts
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        # Descriptors: what the VM was given, and what it made itself.
        links = {int(fd): os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
        assert "/etc/passwd" not in links.values(), links
        allowed = re.compile(r"pipe:|anon_inode:|/memfd:(guest-memory|hostel-code)|/tmp/|/dev/null$|"
                             + ("socket:|" if net == "user" else "") + re.escape(str(tmp_path))
                             + "|" + re.escape(str(vm.CACHE.resolve())))
        for fd, link in links.items():
            assert allowed.match(link), f"descriptor {fd} is {link}"
        # No memory can be written and run.
        for line in pathlib.Path(f"/proc/{pid}/maps").read_text().splitlines():
            permissions = line.split()[1]
            assert not ("w" in permissions and "x" in permissions), line
        limits = pathlib.Path(f"/proc/{pid}/limits").read_text()
        assert re.search(r"^Max core file size\s+0\s+0", limits, re.M)
        for name in ("Max address space", "Max data size", "Max open files"):
            assert re.search(rf"^{name}\s+(\d+)\s+\1\s", limits, re.M), limits
        # A second one is somebody else.
        with jailed() as other:
            other.expect("GUEST READY")
            assert status_of(inner(other), "Uid").split()[0] not in ids
        v.process.terminate()
        assert v.wait(10) == 128 + signal.SIGTERM


def test_checks_in_the_jail(tmp_path, host_values):
    """Disk, network both ways, and a reset that loads the kernel again."""
    disk = tmp_path / "disk.raw"
    vm.make_ext4(disk, 64)
    with vm.ChecksumServer() as server, vm.guest(
            "cloud", "bzImage", "checks",
            f"hostel.net={server.port} hostel.only=net-up,net-tcp,disk-write,disk-read,rng,float", cpus=2,
            arguments=["--jail", "--engine", "bt", "--disk", disk, "--net", "user"]) as v:
        v.expect(r"^CHECKS 5 ok, 0 failed", timeout=120)
        v.expect(r"GUEST PHASE 2", timeout=60)
        v.expect(r"^CHECKS 1 ok, 0 failed", timeout=60)
        assert v.wait(30) == 0
        v.check_kernel_log()
        assert v.stderr() == "", v.stderr()
        assert server.bytes == [100 << 20, 100 << 20] and not server.problems, server.problems
        vm.check_ext4(disk)


def test_resets_and_statistics():
    with jailed("reboot") as v:
        for _ in range(3):
            v.expect("GUEST REBOOT", timeout=30)
        v.process.send_signal(signal.SIGUSR1)  # statistics, on standard error
        deadline = time.monotonic() + 10
        while "vCPU 0" not in v.stderr() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert "vCPU 0" in v.stderr()
        v.process.send_signal(signal.SIGINT)
        assert v.wait(10) == 128 + signal.SIGINT


def test_console_and_control_sockets(tmp_path):
    console, control = tmp_path / "console", tmp_path / "control"
    with jailed("shell", "--serial", f"socket={console}", "--control", control) as v:
        deadline = time.monotonic() + 20
        while not (console.exists() and control.exists()) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert os.stat(console).st_mode & 0o777 == 0o600
        with socket.socket(socket.AF_UNIX) as s:
            s.connect(str(console))
            s.settimeout(30)
            text = b""
            while b"GUEST READY" not in text:
                data = s.recv(65536)
                assert data, text
                text += data
        with socket.socket(socket.AF_UNIX) as s:
            s.connect(str(control))
            s.settimeout(5)
            stream = s.makefile("rb")
            for number, method in enumerate(["status", "pause", "resume", "statistics", "quit"]):
                s.sendall(json.dumps({"jsonrpc": "2.0", "id": number, "method": method}).encode() + b"\n")
                while True:
                    answer = json.loads(stream.readline())
                    if answer.get("id") == number:
                        break
                assert "error" not in answer, answer
        v.wait(10)
        assert "jail:" not in v.stderr(), v.stderr()
        assert not console.exists() and not control.exists()


def test_vsock_from_the_guest(tmp_path):
    """The one thing that a jailed VM still connects to: sockets beside --vsock's own, those that its id may write to."""
    path, received = tmp_path / "vsock", {}
    tmp_path.chmod(0o755)  # the folder as it is seen in the jail
    listeners = {}
    for port, mode in ((5000, 0o666), (5001, 0o600)):
        listeners[port] = socket.socket(socket.AF_UNIX)
        listeners[port].bind(f"{path}_{port}")
        os.chmod(f"{path}_{port}", mode)
        listeners[port].listen(1)
        listeners[port].settimeout(60)
    with jailed("shell", "--vsock", path, form="bzImage") as v:
        v.expect("GUEST READY")
        v.send("checks net vsock 5001 100; echo STATUS1 $?\n")  # not to be reached
        assert v.expect(r"^STATUS1 (\d+)").group(1) != "0"
        v.send("checks net vsock 5000 100; echo STATUS2 $?\n")
        connection, _ = listeners[5000].accept()
        with connection:
            connection.settimeout(30)
            received = connection.recv(100)
        v.expect(r"^STATUS2 ")
        assert received.startswith(b"UP 100\n"), received
        listeners[5001].setblocking(False)
        with pytest.raises(BlockingIOError):
            listeners[5001].accept()
        v.process.terminate()
        assert v.wait(10) == 128 + signal.SIGTERM
        assert v.stderr() == "", v.stderr()
    assert not path.exists()
    for listener in listeners.values():
        listener.close()


def test_signals_reach_the_vm_and_none_is_left_behind():
    with jailed() as v:  # the VM is killed: the keeper says so
        v.expect("GUEST READY")
        os.kill(inner(v), signal.SIGKILL)
        assert v.wait(10) == 128 + signal.SIGKILL
        assert "ended by signal 9" in v.stderr()
    with jailed() as v:  # the keeper is killed: the VM goes with it
        v.expect("GUEST READY")
        pid = inner(v)
        v.process.kill()
        deadline = time.monotonic() + 5
        while pathlib.Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not pathlib.Path(f"/proc/{pid}").exists()


def test_terminal_and_suspending():
    """Raw while it runs; given back when it is suspended, taken again, and given back when the VM is killed."""
    import termios

    def settings(v):
        return termios.tcgetattr(v.inner)

    def state(pid):
        return status_of(pid, "State")[0]

    def wait_for(what, v):
        deadline = time.monotonic() + 5
        while not what():
            if time.monotonic() > deadline:
                v.fail("it does not happen")
            time.sleep(0.01)

    with jailed("idle", terminal=True) as v:
        v.expect("GUEST READY")
        pid = inner(v)
        assert not settings(v)[3] & termios.ICANON
        v.process.send_signal(signal.SIGTSTP)
        wait_for(lambda: state(v.process.pid) == "T" and state(pid) == "T", v)
        assert settings(v)[3] & termios.ICANON
        v.process.send_signal(signal.SIGCONT)
        wait_for(lambda: not settings(v)[3] & termios.ICANON, v)
        os.kill(pid, signal.SIGKILL)
        assert v.wait(10) == 128 + signal.SIGKILL
        assert settings(v)[3] & termios.ICANON


def test_leaving_by_the_console():
    with jailed("idle", terminal=True) as v:
        v.expect("GUEST READY")
        v.send("\x01x")
        assert v.wait(10) == 0


@pytest.mark.quick
@pytest.mark.parametrize("ids", ["0", "-1", "x", "5-4", "4294967295", "1-", "1-2-3", " 1"])
def test_bad_ids(ids):
    result = subprocess.run([vm.VMM, *kernel_arguments("true"), "--jail", f"--jail-ids={ids}"], stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=20)
    assert result.returncode == 2 and b"--jail-ids" in result.stderr, result.stderr


def test_given_id():
    with jailed("idle", "--jail-ids", "4000123") as v:
        v.expect("GUEST READY")
        assert set(status_of(inner(v), "Uid").split()) == {"4000123"}


@pytest.mark.quick
def test_needs_root():
    result = subprocess.run(["setpriv", "--reuid=65534", "--clear-groups", vm.VMM, *kernel_arguments("true"), "--jail"],
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=20)
    assert result.returncode == 1 and b"--jail needs root" in result.stderr, result.stderr


def test_a_limit_that_cannot_be_raised_is_told():
    """Where the hard limit is below what is wanted and CAP_SYS_RESOURCE is missing, one line says so, and the VM runs."""
    def lower():
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))

    result = subprocess.run(["setpriv", "--inh-caps=-sys_resource", "--bounding-set=-sys_resource", vm.VMM, "--jail", "--net",
                             "user", *kernel_arguments("true")], stdin=subprocess.DEVNULL, preexec_fn=lower,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60 * vm.SLOW)
    assert result.returncode == 0, result.stderr
    assert re.search(rb"descriptors \(RLIMIT_NOFILE\) stays at 100, \d+ was wanted: .*CAP_SYS_RESOURCE", result.stderr)


def test_ending_by_two_signals_of_one_group():
    """`timeout` and an interrupt at a terminal tell keeper and VM alike: that is one signal, not the second that ends
    without writing disks back."""
    with jailed() as v:
        v.expect("GUEST READY")
        os.killpg(v.process.pid, signal.SIGTERM)
        assert v.wait(10) == 128 + signal.SIGTERM
