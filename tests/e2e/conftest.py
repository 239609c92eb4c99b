"""Fixtures of the end-to-end tests. What cannot run on this machine is skipped with the reason in one line."""
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import vm  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def prepared():
    if not pathlib.Path(vm.VMM).exists():
        pytest.fail(f"no {vm.VMM}; build it first (./run --build)", pytrace=False)
    for name in ("cloud", "generic"):
        for path in (vm.kernel(name, "bzImage"), vm.kernel(name, "vmlinux"), vm.initrd(name)):
            if not path.exists():
                pytest.fail(f"no {path}; run tests/tools/fetch-kernels and tests/guest/build-initrd", pytrace=False)


@pytest.fixture(scope="session")
def host_values():
    return vm.host_values()


@pytest.fixture(scope="session")
def debian_image():
    """The folder with the Debian image that ./run also boots."""
    import subprocess
    folder = subprocess.run([vm.ROOT / "run", "--image"], stdout=subprocess.PIPE, text=True)
    if folder.returncode:
        pytest.fail("the Debian image cannot be built here (./run --image fails)", pytrace=False)
    return pathlib.Path(folder.stdout.strip().splitlines()[-1])
