"""What the doctor looks at, one part at a time, on machines that are made up."""

from __future__ import annotations

import os
import resource
from collections import namedtuple
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ds_lvx.distributed import interfaces as found_interfaces
from ds_lvx.distributed.interfaces import Interface
from ds_lvx.doctor import devices, kernels, measurements, network, system, versions
from ds_lvx.doctor.findings import Finding, Section, State, count

LO = Interface("lo", ("127.0.0.1", "::1"), True, 0, 65536)
ETH0 = Interface("eth0", ("192.0.2.7",), True, 10_000, 1500)
ETH1 = Interface("eth1", ("192.0.2.8",), False, 0, 1500)
ETH10 = Interface("eth10", ("192.0.2.9",), True, 100_000, 9000)
DOCKER = Interface("docker0", ("172.17.0.1",), True, 0, 1500)
BARE = Interface("ib0", (), True, 0, 1500)
KNOWN = {one.name: one for one in (LO, ETH0, ETH1, ETH10, DOCKER, BARE)}


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_a_section_is_plain_text_with_marks_and_advice() -> None:
    section = Section(
        "Things",
        [
            Finding("a", "good"),
            Finding("long name", "bad", State.ERROR, advice="mend it", details=["seen twice"]),
        ],
    )
    assert section.text().splitlines() == [
        "Things",
        "  ok    a          good",
        "  FAIL  long name  bad",
        "                   seen twice",
        "                   -> mend it",
    ]
    assert count([section], State.ERROR) == 1
    assert section.findings[1].record()["state"] == "error"


# ---- versions


def test_versions_of_this_environment_satisfy_the_metadata() -> None:
    found = by_name(versions.findings())
    assert found["torch"].value.startswith(torch.__version__)
    assert found["deepspeed"].facts["needs"] == ">=0.19"
    assert {found[name].state for name in ("python", "torch", "deepspeed")} == {State.OK}
    assert found["torch's build"].facts["cuda"] == torch.version.cuda


def test_versions_that_are_missing_or_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"ds_lvx": "0.1.0", "torch": "2.8.1", "deepspeed": "0.20.0.dev1"}

    def version(name: str) -> str:
        if name not in installed:
            raise PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(versions, "version", version)
    found = by_name(versions.findings())
    assert (found["torch"].state, found["deepspeed"].state) == (State.ERROR, State.OK)
    assert found["torch"].value == "2.8.1, where ds_lvx needs >=2.9"
    assert found["torch"].advice == "pip install 'torch>=2.9'"
    assert (found["transformers"].state, found["transformers"].value) == (State.ERROR, "missing")
    assert found["transformers"].advice == "pip install 'transformers>=5.17'"
    assert found["peft"].state is State.NOTE
    assert "ds_lvx[lora]" in found["peft"].value
    assert "pytest" not in found
    assert "flash_attn" not in found


def test_a_package_that_is_not_installed_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "flash_attn":
            return "2.8.0"
        raise PackageNotFoundError(name)

    monkeypatch.setattr(versions, "version", version)
    found = by_name(versions.findings())
    assert found["ds_lvx"].state is State.WARNING
    assert found["flash_attn"].value == "2.8.0"


# ---- devices


def test_devices_name_the_processor_and_its_memory() -> None:
    cpu = by_name(devices.findings())["cpu"]
    assert cpu.facts["memory_bytes"] > 2**28
    assert cpu.facts["usable_threads"] == len(os.sched_getaffinity(0))
    assert f"{cpu.facts['memory_bytes'] / 2**30:.1f} GiB" in cpu.value


def test_a_gpu_has_memory_capability_and_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(
        name="NVIDIA H200", total_memory=141 * 10**9, major=9, minor=0, multi_processor_count=132
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    gpu = by_name(devices.findings())["cuda:0"]
    expected = "NVIDIA H200, 131.3 GiB, compute capability 9.0, 132 multiprocessors"
    assert gpu.value == expected


def test_a_gpu_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(torch.version, "cuda", None)
    found = by_name(devices.findings())["GPU"]
    assert (found.state, "built for CPUs" in found.value) == (State.WARNING, True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = by_name(devices.findings())["GPU"]
    assert "CUDA_VISIBLE_DEVICES='' hides it" in found.value


# ---- network


def test_the_interfaces_of_this_machine() -> None:
    known = network.interfaces()
    assert known["lo"].is_loopback
    assert "127.0.0.1" in known["lo"].addresses


@pytest.mark.parametrize(
    ("setting", "fault"),
    [
        ("nonexistent", "there is no interface 'nonexistent'"),
        ("eth0,nonexistent", "there is no interface 'nonexistent'"),
        ("eth", "there is no interface 'eth'"),
        ("eth1", "'eth1' is down"),
        ("ib0", "'ib0' has no address"),
    ],
)
def test_gloo_cannot_take_what_is_not_there(setting: str, fault: str) -> None:
    found = network.gloo(KNOWN, {network.GLOO: setting})
    assert found.state is State.ERROR
    assert repr(setting) in found.value
    assert found.value.endswith(fault)
    assert found.advice.endswith("one of lo, eth0, eth10, docker0")


def test_gloo_takes_the_named_interface_or_that_of_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    named = network.gloo(KNOWN, {network.GLOO: "eth0,eth10"})
    assert (named.state, named.facts["interfaces"]) == (State.OK, ["eth0", "eth10"])

    def resolve_to(address: str) -> Finding:
        entry = (None, None, None, "", (address, 0))
        monkeypatch.setattr(network.socket, "getaddrinfo", lambda *_: [entry])
        return network.gloo(KNOWN, {})

    assert resolve_to("192.0.2.9").facts["interfaces"] == ["eth10"]
    for address in ("127.0.0.1", "127.0.1.1", "203.0.113.5"):
        found = resolve_to(address)
        assert (found.state, found.facts["interfaces"]) == (State.NOTE, ["lo"])
        assert network.GLOO in found.advice
    assert network.gloo({"eth1": ETH1}, {}).state is State.ERROR
    monkeypatch.setattr(found_interfaces, "towards", lambda host, known: known["eth10"])
    far = network.gloo(KNOWN, {"MASTER_ADDR": "192.0.2.1"})
    assert (far.state, far.value) == (State.OK, "eth10, which leads to MASTER_ADDR 192.0.2.1")
    monkeypatch.setattr(found_interfaces, "towards", lambda host, known: None)
    unknown = network.gloo(KNOWN, {"MASTER_ADDR": "127.0.0.1"})
    assert "set MASTER_ADDR (127.0.0.1 leads nowhere from here), or" in unknown.advice


@pytest.mark.parametrize(
    ("setting", "names"),
    [
        ("", ["eth0", "eth10"]),
        ("eth", ["eth0", "eth10"]),
        ("=eth0", ["eth0"]),
        ("docker,lo", ["lo", "docker0"]),
        ("^docker,lo", ["eth0", "eth10"]),
        ("^=eth0", ["lo", "eth10", "docker0"]),
        ("eth1", ["eth10"]),
        ("=eth1", []),
        ("enp", []),
    ],
)
def test_nccl_selects_by_prefix(setting: str, names: list[str]) -> None:
    assert network.nccl_selection(setting, KNOWN) == names
    found = network.nccl(KNOWN, {network.NCCL: setting} if setting else {}, "cuda")
    assert found.state is (State.OK if names else State.ERROR)


def test_nccl_matters_only_where_there_is_a_gpu() -> None:
    assert network.nccl(KNOWN, {network.NCCL: "enp"}, "cpu").state is State.WARNING
    assert network.nccl(KNOWN, {}, "cpu").state is State.NOTE


@pytest.mark.parametrize(
    ("accelerator", "has_gpu", "device", "state"),
    [
        ("cpu", False, "cpu", State.OK),
        ("cuda", True, "cuda", State.OK),
        ("cpu", True, "cpu", State.NOTE),  # DS_ACCELERATOR=cpu
        ("cuda", False, "cpu", State.ERROR),
        ("xpu", False, "cpu", State.ERROR),
    ],
)
def test_the_backend_is_the_accelerators(
    accelerator: str, has_gpu: bool, device: str, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = "gloo" if accelerator == "cpu" else "nccl"
    taken = SimpleNamespace(
        communication_backend_name=lambda: backend, device_name=lambda: accelerator
    )
    monkeypatch.setattr(network, "get_accelerator", lambda: taken)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert network.device_kind() == device
    found = by_name(network.findings(device))["backend"]
    assert (found.state, found.facts["backend"]) == (state, backend)
    assert ("DS_ACCELERATOR" in found.advice) == (state is not State.OK)


def test_infiniband_ports_have_a_rate(tmp_path: Path) -> None:
    port = tmp_path / "mlx5_0" / "ports" / "1"
    port.mkdir(parents=True)
    (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    (port / "state").write_text("4: ACTIVE\n")
    (found,) = network._infiniband(tmp_path)
    assert (found.name, found.state) == ("mlx5_0 port 1", State.OK)
    assert found.value.startswith("400 Gb/sec")


# ---- system


def test_little_shared_memory_and_few_files_are_warnings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(system.shutil, "disk_usage", lambda path: usage(2**26, 0, 2**26))
    found = system._shared_memory(tmp_path)
    assert (found.state, "--shm-size" in found.advice) == (State.WARNING, True)
    monkeypatch.setattr(system.shutil, "disk_usage", lambda path: usage(2**33, 0, 2**31))
    assert system._shared_memory(tmp_path).state is State.OK
    assert system._shared_memory(tmp_path / "no").state is State.ERROR
    assert system._files((256, 4096)).advice.endswith("ulimit -n 4096")
    assert system._files((resource.RLIM_INFINITY,) * 2).state is State.OK


def test_without_compiler_or_ninja_a_cpu_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(system, "_built_operators", list)
    on_cpu, on_gpu = (by_name(system.findings(device)) for device in ("cpu", "cuda"))
    for name in ("C++ compiler", "ninja"):
        assert on_cpu[name].state is State.ERROR
        assert on_gpu[name].state is State.WARNING
    assert "no-such-compiler" in on_cpu["C++ compiler"].advice
    assert "activate" in on_cpu["ninja"].advice or "pip install" in on_cpu["ninja"].advice
    # An operator that is built already needs no compiler, but PyTorch still asks for ninja.
    monkeypatch.setattr(system, "_built_operators", lambda: [Path("op.so")])
    found = by_name(system.findings("cpu"))
    assert (found["C++ compiler"].state, found["ninja"].state) == (State.WARNING, State.ERROR)


# ---- kernels and measurements


def test_a_kernel_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ds_lvx.kernels.choice.find_spec", lambda name: None)
    found = by_name(kernels.findings("cpu"))
    assert found["native"].value == "available for bf16 and fp32"
    assert found["reference"].facts == {"available": ["bf16", "fp32"]}
    triton = found["triton"]
    assert triton.state is State.NOTE
    assert "not installed; pip install triton" in triton.value
    assert found["cudnn"].state is State.NOTE
    assert found["auto, bf16"].value.startswith("native: ")
    assert kernels.available("cpu") == ["auto", "native", "flash", "reference"]
    monkeypatch.setattr(kernels, "why_not", lambda name, q: "16 bits" * (q.itemsize > 2) or None)
    some = by_name(kernels.findings("cpu"))["cudnn"]
    assert (some.state, some.value) == (State.OK, "available for bf16")
    assert some.details == ["not available for fp32: 16 bits"]


def test_the_files_of_measurements_have_an_age(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = by_name(measurements.findings("cpu"))
    assert found["planner"].state is State.NOTE
    assert "--calibrate" in found["planner"].value + found["planner"].advice
    assert "nothing yet" in found["cache"].value
    path = tmp_path / "ds_lvx" / "kernels-some-card.json"
    path.parent.mkdir()
    path.write_text("{}")
    os.utime(path, (path.stat().st_mtime - 3 * 86_400,) * 2)
    found = by_name(measurements.findings("cpu"))
    assert found["file"].value == f"{path}, 3.0 days old"
