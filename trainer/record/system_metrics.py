"""How busy are processor, memory, disk, network and GPUs of this machine while the run trains?

Values and names are those of MLflow's own monitors, which its page "System metrics" shows. MLflow's thread around them
is not used: after the first request that fails, it ends for good and loses what it had.
"""

import logging
import threading
from collections.abc import Callable
from typing import Any

from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

from trainer.record.run_folder import SYSTEM

log = logging.getLogger(__name__)

SAMPLE_EVERY_SECONDS = 10.0
SAMPLES_A_POINT = 6


class SystemMetrics(threading.Thread):
    """Calls `record` once a minute with the values by name (`system/...`), until `stop`."""

    def __init__(self, record: Callable[[dict[str, float]], None]) -> None:
        super().__init__(name="system-metrics", daemon=True)
        self._record = record
        self._stopped = threading.Event()
        self._monitors: list[Any] = []
        for make in (CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor):
            try:
                self._monitors.append(make())
            except Exception as error:  # noqa: BLE001 (no GPU, no NVIDIA library, a driver's own errors)
                log.debug("no system metrics of %s: %s", make.__name__, error)

    def run(self) -> None:
        while True:
            for _ in range(SAMPLES_A_POINT):
                self._sample()
                if self._stopped.wait(SAMPLE_EVERY_SECONDS):
                    self._point()  # so that a short run has one, too
                    return
            self._point()

    def stop(self) -> None:
        """Record what was sampled last, and end."""
        self._stopped.set()
        self.join(timeout=SAMPLE_EVERY_SECONDS)

    def _sample(self) -> None:
        for monitor in list(self._monitors):
            try:
                monitor.collect_metrics()
            except Exception as error:  # noqa: BLE001 (a broken monitor must end neither the others nor the run)
                log.warning("no more system metrics of %s: %s", type(monitor).__name__, error)
                self._monitors.remove(monitor)

    def _point(self) -> None:
        values: dict[str, float] = {}
        for monitor in self._monitors:
            values |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        self._record({f"{SYSTEM}{name}": float(value) for name, value in values.items()})
