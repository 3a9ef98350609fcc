"""What "auto" is on machines that are not this one, and names of devices that are not there."""

from __future__ import annotations

import pytest
import torch

import swarm_notebook as sn
from swarm_notebook.connecting import place
from swarm_notebook.devices import best_device, cards, device_named, dtype_on
from swarm_notebook.errors import DeviceMissing


def machine(monkeypatch: pytest.MonkeyPatch, cuda: int, *, mps: bool = False) -> None:
    """Be on a machine with so many NVIDIA cards, and an Apple GPU or none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("cuda", "mps", "device"), [(2, False, "cuda"), (0, True, "mps"), (0, False, "cpu")]
)
def test_the_device_of_auto(
    monkeypatch: pytest.MonkeyPatch, cuda: int, mps: bool, device: str
) -> None:
    machine(monkeypatch, cuda, mps=mps)
    assert best_device() == device


def test_what_is_not_there_is_said_with_what_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_named("cpu") == device_named(torch.device("cpu")) == torch.device("cpu")
    for name in ("cuda:63", "gpu", "meta", "", "cuda:x"):
        with pytest.raises(DeviceMissing, match="finds cpu"):
            device_named(name)
    machine(monkeypatch, 0)
    assert device_named("auto") == torch.device("cpu")
    # Before a swarm of this machine is started.
    with pytest.raises(DeviceMissing, match="leave it out"):
        sn.connect(device="cuda:63")


@pytest.mark.parametrize(
    ("device", "packed", "dtype"),
    [("cpu", False, "float32"), ("cpu", True, "bfloat16"), ("cuda:1", True, "float16")],
)
def test_the_dtype_of_auto(device: str, packed: bool, dtype: str) -> None:
    found = dtype_on(torch.device(device), torch.float16, packed=packed)
    assert found == getattr(torch, dtype)
    assert dtype_on(torch.device("cuda"), None, packed=False) == torch.float32


@pytest.mark.parametrize("refused", [True, False])
def test_an_older_apple_gpu_computes_in_float32(
    monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    def empty(*_: object, dtype: torch.dtype, **__: object) -> None:
        if refused and dtype == torch.bfloat16:
            raise TypeError("BFloat16 is not supported on MPS")

    monkeypatch.setattr(torch, "empty", empty)
    device = torch.device("mps")
    expected = torch.float32 if refused else torch.bfloat16
    assert dtype_on(device, torch.bfloat16, packed=False) == expected
    assert dtype_on(device, torch.float16, packed=False) == torch.float16


@pytest.mark.parametrize(
    ("wanted", "found"),
    [(None, ["cuda:0", "cuda:1", "cuda:2"]), (range(2), ["cuda:0", "cuda:1"]), ([2], ["cuda:2"])],
)
def test_cards_of_a_machine(
    monkeypatch: pytest.MonkeyPatch, wanted: list[int] | None, found: list[str]
) -> None:
    machine(monkeypatch, 3)
    assert cards(wanted) == found
    with pytest.raises(DeviceMissing, match="finds cpu, cuda:0, cuda:1, cuda:2"):
        cards([0, 3])
    machine(monkeypatch, 0)
    with pytest.raises(DeviceMissing, match="leave --gpus out"):
        cards(wanted)


class Full(torch.nn.Linear):
    """A module that no card has room for."""

    def to(self, device: torch.device | str) -> Full:
        if device != "cpu":
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")
        return self


def test_a_full_card(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(DeviceMissing, match=r"cuda:1 has no room .* device='cpu'"):
        place(Full(1, 1), torch.device("cuda:1"), anywhere=False)
    place(Full(1, 1), torch.device("cuda:1"), anywhere=True)
    assert "cuda:1 has no room" in caplog.text
