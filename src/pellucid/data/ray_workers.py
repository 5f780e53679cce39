"""Picture 2: the jobs of a build, done by a Ray cluster (Moritz et al. 2018). The bytes written are those of one machine.

Ray only runs the jobs: blocks and ledger lie in the build's folder, which every node must see under the same path, as
the sources. A worker or node that is lost costs the block it was at; the job goes on elsewhere.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from pellucid.config import UserError
from pellucid.data.pipeline import Report, Setup
from pellucid.data.workers import ONE_THREAD, TRIES, processors

CONNECT = 10  # seconds
OBJECT_STORE = 128 << 20  # bytes, of a cluster started here: only jobs and reports pass through it


class Ray:
    """`address`: "auto" (the cluster of this node), HOST:PORT, or "local": one started here for this build.

    `count`: jobs at once; None: as many as the cluster has cores. Raises UserError where there is no Ray or no cluster.
    """

    def __init__(self, address: str, count: int | None = None):
        if "://" in address:
            raise UserError(f"--ray {address}: Ray's client protocol does not stream results; run the command on a node of the "
                            "cluster (ray job submit -- pellucid data build ... --ray auto)")
        try:
            import ray
        except ImportError:
            raise UserError("--ray: Ray is not installed; pip install 'pellucid[ray]'") from None
        self._ray, self.address, self.count = ray, address, count

    def do(self, jobs: Iterable[Any], setup: Setup) -> Iterator[tuple[int, Report]]:
        waiting = deque((number, job, 1) for number, job in enumerate(jobs))
        if not waiting:
            return
        ray = self.connect()
        task = ray.remote(num_cpus=1, max_retries=0)(_run)
        shared = ray.put(setup)
        at_once = self.count or max(1, int(ray.cluster_resources().get("CPU", 1)))
        running: dict[Any, tuple[int, Any, int]] = {}
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    number, job, attempt = waiting.popleft()
                    running[task.remote(job, shared)] = number, job, attempt
                [reports], _ = ray.wait(list(running), num_returns=1, fetch_local=False)
                number, job, attempt = running[reports]
                try:
                    report = ray.get(next(reports))
                except StopIteration:
                    del running[reports]
                except ray.exceptions.RayTaskError as error:
                    raise error.cause if isinstance(error.cause, UserError | OSError) else RuntimeError(str(error)) from None
                except ray.exceptions.RayError as error:  # the worker or its node is gone
                    del running[reports]
                    if attempt == TRIES:
                        raise UserError(f"a Ray worker died {TRIES} times at the same work ({type(error).__name__}; out of "
                                        "memory?); give --workers fewer at once: what is done is kept") from None
                    waiting.appendleft((number, job, attempt + 1))
                else:
                    left = job.after(report)
                    running[reports] = number, left, attempt if left is job else 1
                    yield number, report
        finally:
            for reports in running:
                ray.cancel(reports, force=True)

    def connect(self) -> Any:
        """The module `ray`, connected. Raises UserError where no cluster answers."""
        ray = self._ray
        if ray.is_initialized():
            return ray
        quiet = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
        here = {"num_cpus": self.count or processors(), "object_store_memory": OBJECT_STORE}
        try:
            if self.address == "local":
                ray.init("local", include_dashboard=False, **here, **quiet)
            else:
                host, _, port = self.address.rpartition(":")
                if port.isdigit():  # Ray itself tries for minutes where nobody listens
                    socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT).close()
                ray.init(self.address, **quiet)
        except Exception as error:  # Ray raises a bare one where a node does not start in time
            raise UserError(f"--ray {self.address}: no Ray cluster answers there ({str(error).splitlines()[0][:160]}); start one "
                            "(ray start --head), set RAY_AUTH_MODE=token if that one wants a token, or give --ray local") from None
        return ray


def _run(job: Any, setup: Setup) -> Iterator[Report]:
    """Runs in a worker of the cluster, as a stream of reports."""
    for name, value in ONE_THREAD.items():
        os.environ.setdefault(name, value)
    yield from job.run(setup)
