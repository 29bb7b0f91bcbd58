"""What operators ask: the workers and their state."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel

from controller.protocol import ServedModel, WorkerStats
from controller.state import ControllerState
from controller.workers import WorkerState


class WorkerInfo(BaseModel):
    worker_id: str
    url: str
    state: WorkerState
    models: list[ServedModel]
    stats: WorkerStats  # of the last heartbeat
    last_heartbeat_age_s: float
    num_in_flight: int  # requests that this controller has open on it


class WorkerList(BaseModel):
    workers: list[WorkerInfo]


def create_router(state: ControllerState) -> APIRouter:
    router = APIRouter(prefix="/admin", tags=["admin"])

    @router.get("/workers")
    async def list_workers() -> WorkerList:
        return WorkerList(
            workers=[
                WorkerInfo(
                    worker_id=worker.worker_id,
                    url=worker.url,
                    state=worker.state,
                    models=list(worker.models),
                    stats=worker.stats,
                    last_heartbeat_age_s=round(state.workers.heartbeat_age_s(worker), 3),
                    num_in_flight=worker.num_in_flight,
                )
                for worker in state.workers
            ]
        )

    return router
