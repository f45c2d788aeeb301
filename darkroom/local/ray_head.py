"""Ray head node: on loopback, behind a token, in a folder short enough for its sockets."""

import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from darkroom.local.data_dir import private_dir, read_or_create_secret
from darkroom.local.ports import LOOPBACK, accepts, free_ports
from darkroom.local.process import ProcessSpec

OBJECT_STORE_BYTES: Final = 256 * 2**20
#: Ray replaces 127.0.0.1 by the routable address, and so listens on every interface. With this
#: variable off it does not; drivers need the variable too, to find the head.
LOOPBACK_ONLY: Final = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


@dataclass(frozen=True)
class RayPorts:
    """Port of each part of Ray that listens; a restarted head keeps them."""

    gcs: int
    node_manager: int
    object_manager: int
    metrics: int
    agent_http: int
    agent_grpc: int
    runtime_env: int
    client: int
    dashboard_metrics: int


def choose_ray_ports() -> RayPorts:
    """Return free ports, for as long as the stack runs."""
    return RayPorts(*free_ports(9))


def client_environment(token: Path) -> dict[str, str]:
    """Return the environment with which a driver reaches this head."""
    return {
        **LOOPBACK_ONLY,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        # Seconds without Ray after which it kills a driver: the driver's warm shutdown comes first.
        "RAY_gcs_rpc_server_reconnect_timeout_s": "300",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def ray_head(
    folder: Path, *, ports: RayPorts, token: Path, cpus: int, env: Mapping[str, str], log: Path
) -> ProcessSpec:
    """Return the spec of one node, ready when GCS and raylet accept. Replicas inherit `env`."""

    def prepare() -> None:
        read_or_create_secret(token)
        private_dir(folder)  # Ray opens its own folder to all; the one around it stays private
        shutil.rmtree(folder / "r", ignore_errors=True)  # the last session's sockets and logs

    return ProcessSpec(
        name="ray",
        argv=(sys.executable, "-m", "ray.scripts.scripts", *_start(folder, ports, cpus)),
        env={
            **env,
            **client_environment(token),
            "RAY_worker_niceness": "0",  # its 15 would yield to every other process of the machine
            "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",  # its 0.1 costs 3 % of a core, idle or not
            "DASHBOARD_METRIC_PORT": str(ports.dashboard_metrics),
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # no other node takes over
        },
        log=log,
        prepare=prepare,
        ready=lambda: accepts(ports.gcs)() and accepts(ports.node_manager)(),
        where=f"{LOOPBACK}:{ports.gcs}",
        url=f"{LOOPBACK}:{ports.gcs}",
        grace_s=6,
    )


def _start(folder: Path, ports: RayPorts, cpus: int) -> list[str]:
    return [
        "start",
        "--head",
        "--block",
        "--disable-usage-stats",
        "--include-dashboard=false",
        "--include-log-monitor=false",
        "--no-monitor",  # the autoscaler's: there is one node
        f"--num-cpus={cpus}",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        f"--temp-dir={folder / 'r'}",
        f"--node-ip-address={LOOPBACK}",
        f"--port={ports.gcs}",
        f"--node-manager-port={ports.node_manager}",
        f"--object-manager-port={ports.object_manager}",
        f"--metrics-export-port={ports.metrics}",
        f"--dashboard-agent-listen-port={ports.agent_http}",
        f"--dashboard-agent-grpc-port={ports.agent_grpc}",
        f"--runtime-env-agent-port={ports.runtime_env}",
        f"--ray-client-server-port={ports.client}",
        "--min-worker-port=0",  # the kernel chooses
        "--max-worker-port=0",
    ]


def cpu_count() -> int:
    """Return the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0))
