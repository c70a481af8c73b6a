"""vLLM's offloading of blocks to the host where the blocks are on the host: it copies on a GPU's streams only."""

from __future__ import annotations

from typing import Any


def can_offload() -> bool:
    """Whether this vLLM has the interface of which :func:`offload_on_cpu` replaces the copies."""
    try:
        from vllm.v1.kv_offload.base import OffloadingWorker
        from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec
    except ImportError:
        return False
    return hasattr(OffloadingWorker, "submit_store") and hasattr(CPUOffloadingSpec, "get_worker")


class Copies:
    """Copies of single blocks, done at once; what is copied whence and whither is vLLM's decision."""

    def __init__(self, kv_caches: Any) -> None:
        self._blocks = [entry.tensor for entry in kv_caches.tensors]
        self._stored: dict[int, list[Any]] = {}
        self._finished: list[Any] = []

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        for block, place in zip(src_spec.block_ids, dst_spec.block_ids, strict=True):
            self._stored[int(place)] = [blocks[int(block)].clone() for blocks in self._blocks]
        return self._finish(job_id)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        for place, block in zip(src_spec.block_ids, dst_spec.block_ids, strict=True):
            for blocks, stored in zip(self._blocks, self._stored[int(place)], strict=True):
                blocks[int(block)] = stored
        return self._finish(job_id)

    def _finish(self, job_id: int) -> bool:
        from vllm.v1.kv_offload.base import TransferResult

        self._finished.append(TransferResult(job_id=job_id, success=True))
        return True

    def get_finished(self) -> list[Any]:
        finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        """Every copy is done when it is submitted."""

    def shutdown(self) -> None:
        self._stored.clear()


def offload_on_cpu() -> None:
    """Let ``OffloadingConnector`` run on a CPU, by :class:`Copies`."""
    if not can_offload():
        return
    from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

    CPUOffloadingSpec.get_worker = lambda self, kv_caches: Copies(kv_caches)
