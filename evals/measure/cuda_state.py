"""State of a CUDA device as its driver reports it: clocks, temperature, power, throttling. Imports without a device."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pynvml  # type: ignore[import-untyped]
import torch

THROTTLING = {
    pynvml.nvmlClocksEventReasonSwPowerCap: "power cap",
    pynvml.nvmlClocksEventReasonHwSlowdown: "hardware slowdown",
    pynvml.nvmlClocksEventReasonSwThermalSlowdown: "thermal slowdown by the driver",
    pynvml.nvmlClocksEventReasonHwThermalSlowdown: "thermal slowdown by the hardware",
    pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown: "power brake",
}
"""Involuntary reasons for lower clocks; idling and clocks that a user set are not among them."""

MAX_CLOCK_DROP = 0.05
"""A clock that fell by more than this fraction is throttled, whatever reason the driver gives."""


@dataclass(frozen=True)
class DeviceState:
    """One reading of the driver; None for a value that this device does not report."""

    sm_mhz: float | None  # clock of the processors
    memory_mhz: float | None
    temperature_c: float | None
    power_w: float | None
    reasons: int | None  # the driver's bits for why clocks are low


def read_state() -> DeviceState | None:
    """State of the current CUDA device; None without a device or its driver's library. Read it while the device works."""
    handle = _handle()
    if handle is None:
        return None
    milliwatts = _query(pynvml.nvmlDeviceGetPowerUsage, handle)
    return DeviceState(
        sm_mhz=_query(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_SM),
        memory_mhz=_query(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_MEM),
        temperature_c=_query(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU),
        power_w=None if milliwatts is None else milliwatts / 1e3,
        reasons=_query(pynvml.nvmlDeviceGetCurrentClocksEventReasons, handle),
    )


def throttle_reason(before: DeviceState | None, after: DeviceState | None) -> str | None:
    """Why times measured between two readings may be too long, with the numbers; None if there is no sign of it."""
    if before is None or after is None:
        return None
    bits = (before.reasons or 0) | (after.reasons or 0)
    reasons = [reason for bit, reason in THROTTLING.items() if bits & bit]
    idle = bool((after.reasons or 0) & pynvml.nvmlClocksEventReasonGpuIdle)
    for name, then, now in (("SM", before.sm_mhz, after.sm_mhz), ("memory", before.memory_mhz, after.memory_mhz)):
        # A device that has become idle lowers its clocks, too.
        if then is not None and now is not None and now < (1 - MAX_CLOCK_DROP) * then and not idle:
            reasons.append(f"{name} clock fell from {then:g} to {now:g} MHz")
    if not reasons:
        return None
    temperature = "" if after.temperature_c is None else f" at {after.temperature_c:g} °C"
    return f"throttled: {', '.join(reasons)}{temperature}"


def driver_version() -> str | None:
    """Version of the NVIDIA driver; None without one."""
    if not has_driver():
        return None
    version = _query(pynvml.nvmlSystemGetDriverVersion)
    return None if version is None else str(version)


@functools.cache
def has_driver() -> bool:
    """Whether the driver's library can be used. The answer is kept for the life of the process."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # there is no driver, or this user may not use it
        return False
    return True


def _handle() -> object | None:
    """The driver's handle of torch's current device, found by UUID because CUDA_VISIBLE_DEVICES renumbers torch's devices."""
    if not torch.cuda.is_available() or not has_driver():
        return None
    uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    name = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
    handle: object | None = _query(pynvml.nvmlDeviceGetHandleByUUID, name)
    return handle


def _query(function: Callable[..., Any], *arguments: Any) -> Any:
    """The driver's answer; None if this device has none."""
    try:
        return function(*arguments)
    except pynvml.NVMLError:
        return None
