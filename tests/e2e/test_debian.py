"""The Debian image that ./run boots: systemd to "running", a person's session over the serial console, clean power-off."""
import re
import subprocess

import pytest
import vm

SCRIPT = r'''
import collections, hashlib, json, re, subprocess, threading, zlib, decimal
decimal.getcontext().prec = 60
words = collections.Counter(re.findall(r"[a-z]+", open("/usr/share/common-licenses/GPL-2").read().lower()))
data = json.dumps(sorted(words.items())).encode()
assert zlib.decompress(zlib.compress(data, 9)) == data
sums = []
def work(n):
    sums.append(hashlib.sha256(data * n).hexdigest())
threads = [threading.Thread(target=work, args=(n,)) for n in (1, 2, 3, 4)]
[t.start() for t in threads]; [t.join() for t in threads]
out = subprocess.run(["sort", "-n"], input="\n".join(map(str, range(2000, 0, -1))), capture_output=True, text=True).stdout
assert out.split() == [str(i) for i in range(1, 2001)]
print("words", words["the"], sum(words.values()), str(decimal.Decimal(2).sqrt()), len(set(sums)))
'''


def overlay(image, path):
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", image / "root.qcow2", "-F", "qcow2", path], check=True)


def boot(image, disk, cpus=2, extra=""):
    return vm.Vm("--kernel", image / "vmlinuz", "--initrd", image / "initrd.img",
                 "--cmdline", f"console=ttyS0 root=/dev/vda ro {extra}", "--disk", disk, "--net", "user",
                 memory="1G", cpus=cpus)


def check_root(disk, tmp_path):
    """qcow2 intact, and the file system in it clean."""
    vm.check_qcow2(disk)
    raw = tmp_path / "root.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", disk, raw], check=True)
    vm.check_ext4(raw)
    header = subprocess.run(["dumpe2fs", "-h", raw], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    assert re.search(r"Filesystem state:\s+clean$", header, re.M), header
    assert "needs_recovery" not in header, "the journal was not emptied"
    raw.unlink()


@pytest.mark.parametrize("cpus", [1, 2])
def test_session(debian_image, tmp_path, cpus):
    disk = tmp_path / "disk.qcow2"
    overlay(debian_image, disk)
    with vm.ChecksumServer() as server, boot(debian_image, disk, cpus) as v:
        v.log_in(timeout=150)
        status, text = v.command_output("systemctl is-system-running --wait", 120)
        if text.strip() != "running":
            v.fail(f"systemd is {text.strip()}: {v.command_output('systemctl --failed --no-pager')[1]}")
        status, text = v.command_output("apt-get --version")
        assert status == 0 and text.startswith("apt 2."), text
        v.send(f"cat >script.py <<'EOF'\n{SCRIPT}\nEOF\n")
        status, text = v.command_output("python3 script.py", 120)
        if status or not re.search(r"^words [1-9]\d* [1-9]\d* 1\.41421356237309504880168872420969807856967187537694807317668 4$",
                                   text, re.M):
            v.fail(f"python3 printed {text!r}, status {status}")
        status, text = v.command_output("perl -le 'my %h; $h{$_ % 97} .= $_ for 1..20000; print length(join q(), values %h)'")
        assert (status, text.strip()) == (0, "88894"), text
        # An address by DHCP, and TCP through user mode.
        v.command_output("for i in $(seq 60); do networkctl status 2>/dev/null | grep -q 'Address: 10' && break; sleep 0.5; done")
        status, text = v.command_output("ip -4 -brief address")
        assert "10.0.2." in text, text
        status, text = v.command_output(
            f"exec 3<>/dev/tcp/10.0.2.2/{server.port}; printf 'UP 5\\nhello' >&3; head -n 1 <&3; exec 3>&-", 30)
        assert (status, text.strip()) == (0, "3610a686"), text  # the CRC-32 of "hello"
        status, text = v.command_output("journalctl -b -p warning --no-pager -q -k | cat")
        v.check_kernel_log()
        bad = [line for line in text.splitlines() if vm.KERNEL_COMPLAINTS.search(line)]
        assert not bad, bad
        v.command_output("dd if=/dev/urandom of=/root/data bs=1M count=20 2>/dev/null; sha256sum /root/data >/root/sum; sync", 60)
        v.send("poweroff\n")
        status = v.wait(60)
        if status:
            v.fail(f"exit status {status} after poweroff")
    check_root(disk, tmp_path)
    if cpus == 1:
        return
    # A second boot of the same disk, with reboot(8) in between, finds what the first wrote.
    with boot(debian_image, disk) as v:
        v.log_in(timeout=150)
        status, text = v.command_output("sha256sum -c sum", 60)
        assert status == 0, text
        v.send("reboot\n")
        v.log_in(timeout=200)
        status, text = v.command_output("sha256sum -c sum", 60)
        assert status == 0, text
        v.send("poweroff\n")
        assert v.wait(60) == 0
    check_root(disk, tmp_path)
