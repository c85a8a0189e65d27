"""The LoRA kernels as they were compiled: tensor cores, asynchronous loads, nothing in local memory.

It reads the built extension, whatever architectures it was built for; no GPU is needed.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from support.lora_variants import EVERY_KERNEL, name_of
from support.sass import Kernel, disassemble, find_cuobjdump, resources

import mtbert
from mtbert import installation

PACKAGE = Path(mtbert.__file__).parent
NAME = "mtbert4cuda4sm"
"""In the mangled names of all LoRA kernels: they are in the namespaces mtbert::cuda::sm80 and sm90."""


@pytest.fixture(scope="module")
def extension() -> Path:
    file = installation.extension_file(PACKAGE)
    if file is None:
        pytest.skip("the extension is not built")
    record = installation.build_record(PACKAGE)
    if record is None or record["extension"] is None or not record["extension"]["architectures"]:
        pytest.skip("the extension was built without nvcc")
    if record["sources"] != installation.fingerprint(PACKAGE.parent):
        pytest.skip("the extension was built from other sources")
    return file


@pytest.fixture(scope="module")
def cuobjdump() -> str:
    found = find_cuobjdump()
    if found is None:
        pytest.skip("neither CUDA's nor Triton's cuobjdump and nvdisasm are here")
    return found


@pytest.fixture(scope="module")
def kernels(extension: Path, cuobjdump: str) -> list[Kernel]:
    found = disassemble(cuobjdump, extension, NAME)
    assert found
    return found


def of(kernels: list[Kernel], architecture: str, *parts: str) -> list[Kernel]:
    """Those of one family (sm80, sm90) whose names hold one of the parts."""
    return [k for k in kernels if architecture in k.name and any(part in k.name for part in parts)]


def test_sm90_kernels_use_what_hopper_adds(kernels: list[Kernel]) -> None:
    found = of(kernels, "sm90", "forward_kernel", "input_kernel")
    if not found:
        pytest.skip("built without sm_90a")
    assert {kernel.architecture for kernel in found} == {"sm_90a"}
    for kernel in found:
        # Both products of a slice, wherever the compiler unrolled them; none of an older kind beside them.
        assert kernel.count("HGMMA") >= 8, kernel
        assert kernel.count("HMMA", "IMMA", "FFMA") <= kernel.count("HGMMA"), kernel
        assert kernel.count("HMMA") == 0, kernel
        assert kernel.count("UTMALDG") >= 4, kernel
        assert kernel.count("UTMASTG") >= 2, kernel
        assert any(".MULTICAST" in name for name in kernel.instructions), kernel
        # Registers go from the loading warpgroup to the others.
        assert kernel.count("USETMAXREG") == 2, kernel
        # Operands of the products and of TMA never go through ordinary loads of shared memory one by one.
        assert kernel.count("LDS") == 0, kernel
        assert kernel.count("STSM") >= 8, kernel
        # Where the compiler cannot leave the accumulators to the products it serialises them, with a wait behind each:
        # there are only the groups of products and the waits of the source.
        groups, waits = (5, 7) if "forward" in kernel.name else (10, 12)
        assert kernel.instructions["WARPGROUP.ARRIVE"] == groups, kernel
        assert kernel.instructions["WARPGROUP.DEPBAR.LE"] == waits, kernel
    # Every width of tiles, both types; x masked in registers, W by its columns.
    forward = of(found, "sm90", "forward_kernel")
    for columns in (128, 192, 256):
        for kind in ("F32.BF16", "F32"):
            assert any(f"HGMMA.64x{columns}x16.{kind}" in kernel.instructions for kernel in forward), columns
    for kernel in of(found, "sm90", "input_kernel"):
        assert kernel.count("SHFL") >= 4, kernel
    for kernel in forward:
        assert kernel.count("LDSM") >= 4, kernel


def test_sm80_kernels_use_tensor_cores_and_asynchronous_loads(kernels: list[Kernel]) -> None:
    products = of(
        kernels, "sm80", "forward_kernel", "thin_kernel", "low_kernel", "input_kernel", "grad_a_kernel"
    )
    assert products
    for kernel in products:
        kinds = {name for name in kernel.instructions if name.startswith("HMMA.")}
        assert kinds, kernel
        assert all(name.startswith(("HMMA.16816.F32", "HMMA.1688.F32.TF32")) for name in kinds), (
            kernel,
            kinds,
        )
        assert kernel.count("LDGSTS") >= 1, kernel
    assert any("HMMA.16816.F32.BF16" in kernel.instructions for kernel in products)
    assert any("HMMA.16816.F32" in kernel.instructions for kernel in products)
    assert any(name.startswith("HMMA.1688.F32.TF32") for kernel in products for name in kernel.instructions)


def test_nothing_lives_in_local_memory(kernels: list[Kernel]) -> None:
    assert [str(kernel) for kernel in kernels if kernel.count("LDL", "STL")] == []


def test_resources_fit(extension: Path, cuobjdump: str) -> None:
    usage = resources(cuobjdump, extension, NAME)
    assert usage
    families = {"sm80", "sm90"} if any("sm90" in name for name in usage) else {"sm80"}
    # Those that other tests hold the emulation and the check on a GPU to.
    assert {name_of(name) for name in usage} == {name for name in EVERY_KERNEL if name[:4] in families}
    for name, used in usage.items():
        assert used["STACK"] == used["LOCAL"] == 0, name
        # Static; what is asked for at a launch comes on top of it and is checked where it is planned.
        assert used["SHARED"] <= 48 * 1024, name
        assert used["REG"] <= 255, name
        if "sm90" in name:
            assert 384 * used["REG"] <= 65536, name


@pytest.mark.usefixtures("extension")
def test_no_kernel_spills() -> None:
    record = installation.build_record(PACKAGE)
    assert record is not None
    assert [name for name in record["extension"]["spilling"] if NAME in name] == []
