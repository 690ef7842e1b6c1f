"""An engine process to measure in, and the machine as it was before that process took memory."""

from __future__ import annotations

from collections.abc import Callable

from ..config.environment import engine_environment
from ..engine.client import EngineProcess
from ..engine.protocol import DeviceList
from ..hardware.detect import detect
from ..hardware.machine import Machine
from ..hardware.system import SystemAccess


class MeasuringEngine:
    """An engine process without a model, and this machine as it was when the process started.

    Several planners may share it one after the other, so that a command looks at the machine once.
    On a machine without a GPU the process may then load the model itself. Where there is a GPU, the
    process holds memory of it, so the model needs another one. `on_warning` receives what is wrong
    with the machine, such as a GPU that lies idle; `on_log` receives llama.cpp's log lines.
    """

    def __init__(
        self,
        on_warning: Callable[[str], None] | None = None,
        on_log: Callable[[str], None] | None = None,
    ) -> None:
        self.process = EngineProcess(engine_environment(), on_log)
        self._devices: DeviceList | None = None
        try:
            self.machine = self.look_again()
            warn(self.machine, on_warning)
        except BaseException:
            self.process.kill()
            raise

    def look_again(self) -> Machine:
        """Returns the machine as it is now; llama.cpp lists its devices only the first time."""
        return detect(self._list_devices, SystemAccess(env=engine_environment()))

    def close(self) -> None:
        """Ends the process."""
        self.process.close()

    def _list_devices(self) -> DeviceList:
        """Called after the drivers said what is free: from then on, the process takes some."""
        if self._devices is None:
            self._devices = self.process.devices()
        return self._devices


def warn(machine: Machine, on_warning: Callable[[str], None] | None) -> None:
    """Reports what is wrong with a machine, in sentences with the command that mends it."""
    for finding in machine.findings:
        if on_warning and finding.severity in ("warning", "error"):
            command = "" if finding.command in finding.how_to_mend else f" {finding.command}"
            on_warning(f"{finding.what} {finding.how_to_mend}{command}")
