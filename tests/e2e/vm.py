"""Runs hostel-vmm for a test: the serial console as timestamped lines, input, the way it ended. The environment variable
VMM names another program with the same command line (tests/tools/qemu-as-hostel)."""
import codecs
import fcntl
import os
import pathlib
import pty
import re
import signal
import socket
import subprocess
import tempfile
import termios
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
CACHE = ROOT / "cache"
VMM = os.environ.get("VMM") or str(ROOT / "build" / "hostel-vmm")
ENGINE = os.environ.get("HOSTEL_TEST_ENGINE", "bt")  # what a test means that names none
IS_QEMU = VMM.endswith("qemu-as-hostel")
# Everything that waits is bounded; a slow machine can stretch the bounds.
SLOW = float(os.environ.get("HOSTEL_TEST_SLOW", "1"))

# What a healthy kernel never prints.
KERNEL_COMPLAINTS = re.compile(
    r"WARNING:|unable to handle|soft lockup|hard LOCKUP|clocksource.*unstable|clocksource: .*Marking|BUG:|kernel BUG|"
    r"Oops|unchecked MSR access|hrtimer: interrupt took|rcu: INFO|Kernel panic|general protection fault|"
    r"Call Trace|do_IRQ|No irq handler|spurious|TSC synchronization|Firmware Bug|I/O error|hung_task|"
    r"ACPI Error|ACPI BIOS Error|timed out waiting|not responding|MP-BIOS bug|Measured \d+ cycles TSC warp|failed to come online")


class Failed(AssertionError):
    """A test's expectation was not met; the text ends with the console's last lines."""


class Vm:
    """A running VM. The console is a pipe, or with terminal=True a pseudo-terminal whose other end is self.terminal.
    prefix is a command that runs it (unshare …). Use as a context manager: leaving it ends the process."""

    def __init__(self, *arguments, terminal=False, memory="512M", cpus=1, prefix=(), mirror=None, environment=None):
        self.lines = []  # (host time, text), without escape sequences and carriage returns
        self.partial = ""
        self.mirror = mirror  # called with each piece of text as it arrives
        self.condition = threading.Condition()
        self.position = 0  # first character of self.text that no expect() has passed
        self.text = ""
        self.eof = False
        self.terminal = None
        self.errors = tempfile.TemporaryFile()
        engine = [] if IS_QEMU or "--engine" in arguments else ["--engine", ENGINE]
        self.command = [*map(str, prefix), VMM, *engine, "--cpus", str(cpus), "--memory", str(memory), *map(str, arguments)]
        self.started = time.monotonic()
        environment = {**os.environ, **(environment or {})}
        if terminal:
            self.terminal, inner = pty.openpty()
            self.terminal_before = termios.tcgetattr(inner)
            # Its controlling terminal too, with the program in the foreground, as under a shell.
            self.process = subprocess.Popen(self.command, stdin=inner, stdout=inner, stderr=self.errors,
                                            env=environment, start_new_session=True,
                                            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
            self.inner = inner  # kept open, so that its settings can be read after the program has gone
            self.input = self.terminal
            output = self.terminal
        else:
            self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                            stderr=self.errors, env=environment, start_new_session=True)
            self.input = self.process.stdin.fileno()
            output = self.process.stdout.fileno()
        self.output = output
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        held = ""  # the beginning of an escape sequence whose rest has not arrived yet
        while True:
            try:
                data = os.read(self.output, 65536)
            except OSError:
                data = b""
            now = time.monotonic()
            with self.condition:
                if not data:
                    self.eof = True
                    self.condition.notify_all()
                    return
                raw = decoder.decode(data)
                text = re.sub(r"\x1b(\[[?0-9;]*[a-zA-Z]|[^\[])|\r", "", held + raw)
                held = ""
                begin = text.rfind("\x1b", max(0, len(text) - 20))
                if begin >= 0:
                    text, held = text[:begin], text[begin:]
                self.text += text
                *full, self.partial = (self.partial + text).split("\n")
                self.lines += [(now, line) for line in full]
                self.condition.notify_all()
            if self.mirror:
                self.mirror(raw)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def fail(self, message):
        tail = "\n".join("    " + line for _, line in self.lines[-25:])
        raise Failed(f"{message}\n  command: {' '.join(self.command)}\n  exit status: {self.process.poll()}, "
                     f"standard error: {self.stderr().strip()[-2000:] or '(nothing)'}\n  console:\n{tail}\n    {self.partial}")

    def expect(self, pattern, timeout=60):
        """Waits until the console has matched the pattern behind the last match; returns the match. A $ at the pattern's
        end stands for a line that is complete, not for the end of what has arrived so far."""
        if pattern.endswith("$"):
            pattern = pattern[:-1] + r"(?=\n)"
        end = time.monotonic() + timeout * SLOW
        expression = re.compile(pattern, re.M)
        with self.condition:
            while True:
                match = expression.search(self.text, self.position)
                if match:
                    self.position = match.end()
                    return match
                left = end - time.monotonic()
                if self.eof or left <= 0:
                    break
                self.condition.wait(min(left, 1))
        if self.eof:
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                pass
        self.fail(f"no /{pattern}/ on the console {'before it ended' if self.eof else f'within {timeout * SLOW:.0f} s'}")

    def send(self, text):
        os.write(self.input, text.encode())

    def log_in(self, timeout=120):
        """Logs in to the Debian image as root and makes its shell quiet, for command_output()."""
        self.expect(r"login: ", timeout)
        self.send("root\n")
        self.expect(r"root@hostel:~# ", timeout)
        self.send("PS1= PS2=; bind 'set enable-bracketed-paste off'; stty -echo cols 200; echo REA''DY\n")
        self.expect(r"^READY$", timeout)

    def command_output(self, command, timeout=60):
        """Types a command at the shell after log_in(); returns (exit status, output)."""
        self.send(f"{command}; echo END''OF $?\n")
        begin = self.position
        match = self.expect(r"^ENDOF (\d+)$", timeout)
        text = self.text[begin:match.start()].lstrip("\n")
        return int(match.group(1)), text

    def wait(self, timeout=60):
        """Waits for the end of the process; returns its exit status."""
        try:
            status = self.process.wait(timeout * SLOW)
        except subprocess.TimeoutExpired:
            self.fail(f"still running after {timeout * SLOW:.0f} s")
        self.reader.join(5)
        return status

    def stderr(self):
        return os.pread(self.errors.fileno(), 1 << 20, 0).decode("utf-8", "replace")

    def time_of(self, pattern):
        """The host's time at which the first line that matches arrived."""
        for when, line in self.lines:
            if re.search(pattern, line):
                return when
        self.fail(f"no line /{pattern}/")

    def values(self):
        """What the guest printed as VALUE name text."""
        found = {}
        for _, line in self.lines:
            match = re.match(r"VALUE (\S+) (.*)", line)
            if match:
                found[match.group(1)] = match.group(2).strip()
        return found

    def complaints(self):
        return [line for _, line in self.lines if KERNEL_COMPLAINTS.search(line)]

    def check_kernel_log(self):
        bad = self.complaints()
        if bad:
            self.fail("the kernel complained: " + " | ".join(bad[:5]))

    def kill(self):
        """Ends the process and what it started, if it still runs."""
        if self.process.poll() is None:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self.process.wait()
        if self.process.stdout:
            self.reader.join(2)
            self.process.stdin.close()
            self.process.stdout.close()
        elif self.terminal is not None:
            os.close(self.inner)
            self.reader.join(2)
            os.close(self.terminal)
            self.terminal = None
        self.errors.close()


class ChecksumServer:
    """The host's end of tests/guest/check_net.c: on loopback, in threads."""

    def __init__(self):
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.problems = []
        self.bytes = [0, 0]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection):
        import zlib
        try:
            with connection, connection.makefile("rb") as stream:
                direction, size = stream.readline().decode().split()
                size, crc = int(size), 0
                if direction == "UP":
                    left = size
                    while left:
                        data = stream.read1(min(left, 1 << 18))
                        if not data:
                            raise ValueError(f"upload ended with {left} bytes missing")
                        crc = zlib.crc32(data, crc)
                        left -= len(data)
                    connection.sendall(b"%08x\n" % crc)
                    self.bytes[0] += size
                else:
                    block = os.urandom(1 << 20)
                    left = size
                    while left:
                        data = block[:min(left, len(block))]
                        crc = zlib.crc32(data, crc)
                        connection.sendall(data)
                        left -= len(data)
                        block = block[7:] + block[:7]
                    answer = stream.readline().decode().strip()
                    if answer != f"{crc:08x}":
                        connection.sendall(b"%08x\n" % crc)
                        raise ValueError(f"download: guest computed {answer!r}, host {crc:08x}")
                    self.bytes[1] += size
        except (OSError, ValueError) as e:
            self.problems.append(str(e))

    def close(self):
        self.socket.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def kernel(name, form):
    return CACHE / "kernels" / name / form


def initrd(name):
    return CACHE / "initrd" / f"{name}.cpio.gz"


def guest(name="cloud", form="bzImage", test="true", extra="", arguments=(), **options):
    """The test guest (tests/guest/init) with one of Debian's kernels."""
    return Vm("--kernel", kernel(name, form), "--initrd", initrd(name),
              "--cmdline", f"console=ttyS0 hostel.test={test} {extra}".strip(), *arguments, **options)


def host_values():
    """What the guest's static programs compute on the host CPU."""
    found = {}
    for program in (["checks", "float"], ["checks32"]):
        text = subprocess.run([CACHE / "guest" / program[0], *program[1:]], stdout=subprocess.PIPE, text=True,
                              check=True, timeout=120).stdout
        for line in text.splitlines():
            match = re.match(r"VALUE (\S+) (.*)", line)
            if match:
                found[match.group(1)] = match.group(2)
    return found


def make_ext4(path, megabytes):
    with open(path, "wb") as f:
        f.truncate(megabytes << 20)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-F", path], check=True)


def check_ext4(path):
    """The file system in a raw file is clean: e2fsck finds nothing to do."""
    result = subprocess.run(["e2fsck", "-f", "-n", path], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, f"e2fsck: {result.stdout}"


def check_qcow2(path):
    result = subprocess.run(["qemu-img", "check", path], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, f"qemu-img check: {result.stdout}"
