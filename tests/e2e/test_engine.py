"""The choice of an engine on this machine, whatever KVM it has; engine kvm itself is tests/kvm's."""
import json
import os
import pathlib
import subprocess
import sys
import time

import pytest
import vm

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "kvm"))
import nested  # noqa: E402

pytestmark = [pytest.mark.quick, pytest.mark.skipif(vm.IS_QEMU, reason="QEMU has no --probe")]


def test_probe_is_quick_and_says_why():
    began = time.monotonic()
    result = subprocess.run([vm.VMM, "--probe=json"], stdout=subprocess.PIPE, timeout=10, check=True)
    took = time.monotonic() - began
    verdict = json.loads(result.stdout)
    engines = {e["name"]: e for e in verdict["engines"]}
    assert engines["bt"]["works"] is True
    assert verdict["engine"] == ("kvm" if engines["kvm"]["works"] else "bt")
    assert engines["kvm"]["works"] or "/dev/kvm" in engines["kvm"]["reason"], engines
    assert took < 0.5 * vm.SLOW, f"{took:.2f} s, of which {engines}"  # 0.2 s, and the rest of a busy machine


def test_internal_error_ends_the_vm(tmp_path):
    """A guest in a place where no KVM can go on: a report, exit status 1, no hang."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("no /dev/kvm that may be used")
    kernel = tmp_path / "bad"
    kernel.write_bytes(nested.bad_kernel())
    result = subprocess.run([vm.VMM, "--engine", "kvm", "--on-reset", "exit", "--kernel", kernel], stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=30)
    assert result.returncode == 1, result.stderr
    assert "KVM_EXIT_INTERNAL_ERROR" in result.stderr and "rip 00000000d0000000" in result.stderr, result.stderr
