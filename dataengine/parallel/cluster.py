"""Ray as this project uses it: started on this machine or reached by its address, and ended by who began it."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from dataengine.errors import MissingPackage

PATIENCE = (
    5.0  # seconds that an address may take to answer; Ray itself waits for two minutes, then ends the process
)
# nothing is reported, and workers are as urgent as this process: Ray would make them so patient (nice 15) that they
# hardly run beside anything else
LOCAL = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
OBJECTS = 128 * 2**20  # bytes of Ray's own store, which tasks here hardly need: they return small values


def import_ray() -> ModuleType:
    """The package ray; MissingPackage, an ImportError in one sentence, where it is not installed."""
    try:
        import ray
    except ImportError:
        raise MissingPackage(
            'workers: expected the package ray for more than one worker, found none; pip install "enerverse[ray]"'
        ) from None
    return ray


@contextlib.contextmanager
def connected(workers: int, address: str | None) -> Iterator[Any]:
    """Ray, connected: where the caller has connected already, there; else to the cluster at `address`; else to a cluster
    of `workers` processes started on this machine, which no other machine can reach. What was begun here ends here.

    Raises:
        ImportError: ray is not installed.
        ConnectionError: no cluster answers at `address`, or none could be started here.
    """
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        _start(ray, workers, options)
    else:
        _connect(ray, address, options)
    try:
        yield ray
    finally:
        ray.shutdown()


def _start(ray: Any, workers: int, options: Mapping[str, Any]) -> None:
    try:
        with _environment(LOCAL), _loopback():
            ray.init(
                "local", num_cpus=workers, include_dashboard=False, object_store_memory=OBJECTS, **options
            )
    except Exception as cause:  # a bare one where a process of it does not answer in time
        ray.shutdown()
        raise ConnectionError(
            f"workers: expected Ray to start on this machine, got none ({cause}); try again when it is less busy, or "
            "leave workers out"
        ) from None


def _connect(ray: Any, address: str, options: Mapping[str, Any]) -> None:
    try:
        if ":" in address:
            host, _, port = address.rpartition("//")[2].rpartition(":")
            socket.create_connection((host, int(port)), timeout=PATIENCE).close()
        ray.init(address, **options)
    except (
        OSError,
        ValueError,
        RuntimeError,
        SystemExit,
    ) as cause:  # Ray exits where a port answers with other words
        raise ConnectionError(
            f"address: expected a Ray cluster at {address!r}, got no answer ({cause}); start one with "
            "`ray start --head --port=6379` there and pass HOST:6379, or leave the address out"
        ) from None


@contextlib.contextmanager
def _loopback() -> Iterator[None]:
    """Within a block Ray takes 127.0.0.1 for this machine, and so listens there alone.

    `ray.init` would turn a loopback address that it is given into a public one. Its switch against that is read from
    the environment when ray is imported, which may have been long ago.
    """
    from ray._private import ray_constants

    before = getattr(ray_constants, "ENABLE_RAY_CLUSTER", True)
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextlib.contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Environment variables within a block, for the processes started there."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
