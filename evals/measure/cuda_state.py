"""TODO: what lives here."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pynvml  # type: ignore[import-untyped]
import torch

# --- health -------------------------------------------------------------------------------------

THROTTLING = {
    pynvml.nvmlClocksEventReasonSwPowerCap: "power cap",
    pynvml.nvmlClocksEventReasonHwSlowdown: "hardware slowdown",
    pynvml.nvmlClocksEventReasonSwThermalSlowdown: "thermal slowdown by the driver",
    pynvml.nvmlClocksEventReasonHwThermalSlowdown: "thermal slowdown by the hardware",
    pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown: "power brake",
}
"""Reasons for lower clocks that are no one's choice; idling and clocks that a user set are not among them."""

FALL = 0.05
"""A clock that fell by more than this part is throttled, whatever the driver gives as reason."""


@dataclass(frozen=True)
class DeviceState:
    """A reading of the driver's; None is what this device does not tell. reasons: the driver's bits for why clocks are low."""

    sm_mhz: float | None
    memory_mhz: float | None
    temperature_c: float | None
    power_w: float | None
    reasons: int | None


def read_state() -> DeviceState | None:
    """Of the current CUDA device, now; None without a device or its driver's library. Best read while the device works."""
    handle = _handle()
    if handle is None:
        return None
    milliwatts = _ask(pynvml.nvmlDeviceGetPowerUsage, handle)
    return DeviceState(
        sm_mhz=_ask(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_SM),
        memory_mhz=_ask(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_MEM),
        temperature_c=_ask(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU),
        power_w=None if milliwatts is None else milliwatts / 1e3,
        reasons=_ask(pynvml.nvmlDeviceGetCurrentClocksEventReasons, handle),
    )


def throttle_reason(before: DeviceState | None, after: DeviceState | None) -> str | None:
    """Why times between the two readings may be too long, in words with the numbers; None if nothing speaks for it."""
    if before is None or after is None:
        return None
    bits = (before.reasons or 0) | (after.reasons or 0)
    said = [words for bit, words in THROTTLING.items() if bits & bit]
    idle = bool((after.reasons or 0) & pynvml.nvmlClocksEventReasonGpuIdle)
    for name, then, now in (("SM", before.sm_mhz, after.sm_mhz), ("memory", before.memory_mhz, after.memory_mhz)):
        # A device that has nothing to do any more lowers its clocks, too.
        if then is not None and now is not None and now < (1 - FALL) * then and not idle:
            said.append(f"{name} clock fell from {then:g} to {now:g} MHz")
    if not said:
        return None
    temperature = "" if after.temperature_c is None else f" at {after.temperature_c:g} °C"
    return f"throttled: {', '.join(said)}{temperature}"


def driver_version() -> str | None:
    """Of the NVIDIA driver; None where there is none."""
    if not _has_driver():
        return None
    version = _ask(pynvml.nvmlSystemGetDriverVersion)
    return None if version is None else str(version)


@functools.cache
def _has_driver() -> bool:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no driver, or one that this user may not ask
        return False
    return True


def _handle() -> object | None:
    """The driver's name for torch's current device: by its UUID, since CUDA_VISIBLE_DEVICES renumbers torch's."""
    if not torch.cuda.is_available() or not _has_driver():
        return None
    uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    name = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
    handle: object | None = _ask(pynvml.nvmlDeviceGetHandleByUUID, name)
    return handle


def _ask(question: Callable[..., Any], *arguments: Any) -> Any:
    """The driver's answer; None where it has none for this device."""
    try:
        return question(*arguments)
    except pynvml.NVMLError:
        return None
