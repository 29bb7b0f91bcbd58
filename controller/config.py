"""The controller's configuration: small frozen dataclasses from whose fields the command-line flags are generated."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

from registry.errors import InvalidRequestError
from registry.flags import flag


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Where the controller listens, and how it stops."""

    host: str = flag("127.0.0.1", "address to listen on")
    port: int = flag(8000, "port to listen on; 0 lets the system choose one")
    allowed_origins: str | None = flag(
        None,
        "origins (comma-separated, such as https://chat.example.org) whose web pages may call the API from browsers, "
        "or * for all (default: none)",
    )
    database: str | None = flag(None, "SQLAlchemy URL of the catalog (default: an SQLite file in the state directory)")
    log_level: str = flag("info", "log level", choices=("debug", "info", "warning", "error"))
    shutdown_timeout_s: float = flag(
        10.0, "seconds that open requests may still take after SIGTERM; then their streams end with an error event"
    )


@dataclass(frozen=True, slots=True)
class AuthConfig:
    """Who may call the public API."""

    auth: str = flag(
        "auto",
        "API keys: `auto` asks for them unless the address is a loopback one; to be open to a network, say `off`",
        choices=("auto", "required", "off"),
    )


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """How workers join, how long they are believed, and how requests are given to them."""

    worker_token: str | None = flag(
        None, "token that workers share with the controller (or set ROOTGRAFT_WORKER_TOKEN); without one, only "
        "workers on this machine may join",
    )  # fmt: skip
    trusted_workers: str = flag(
        "127.0.0.0/8,::1/128", "networks (CIDR, comma-separated) to which the controller connects for workers"
    )
    heartbeat_interval_s: float = flag(1.0, "seconds between two heartbeats of a worker")
    missed_heartbeats: int = flag(4, "heartbeats in a row that a worker may miss before it counts as gone")
    routing: str = flag(
        "least_load", "how a replica is chosen for a request", choices=("least_load", "lottery", "round_robin")
    )
    max_attempts: int = flag(3, "replicas that are tried for a request before its first token, each once")
    connect_timeout_s: float = flag(5.0, "seconds to connect to a worker")
    worker_timeout_s: float = flag(
        300.0,
        "seconds without a sign of life from a worker after which a request failed; one that waits in the worker's "
        "queue has one every 2 seconds while the engine computes",
    )


@dataclass(frozen=True, slots=True)
class LimitsConfig:
    """Bounds on what clients may ask of the controller itself; the engine has bounds of its own."""

    max_body_bytes: int = flag(16 * 1024 * 1024, "bytes of a request body; more is refused with 413")
    max_concurrent_requests: int = flag(1024, "requests in progress at once; more are refused with 429")
    max_concurrent_requests_per_key: int = flag(256, "requests in progress at once of one API key; more get 429")
    max_lora_combinations_per_key: int = flag(
        64, "different combinations of adapters and scales that one API key may use within 5 minutes; more get 429"
    )
    min_priority: int = flag(
        0, "least (that is, most urgent) priority that requests with an ordinary API key may have; admin keys, and "
        "clients where no keys are asked for, may give any",
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class PublishingConfig:
    """Where published fine-tunes are kept, and when a canary is given up."""

    store: str | None = flag(None, "directory of published files (default: `store` in the state directory)")
    max_blob_gib: float = flag(64.0, "GiB of one published file; more is refused with 413")
    canary_error_margin: float = flag(
        0.05,
        "by how much, 0 to 1, a canary's share of failed requests may exceed the stable version's before it is aborted",
    )
    canary_min_requests: int = flag(20, "requests of a canary before its errors are judged")


@dataclass(frozen=True, slots=True)
class ControllerConfig:
    server: ServerConfig = field(default_factory=ServerConfig)
    auth: AuthConfig = field(default_factory=AuthConfig)
    workers: WorkerConfig = field(default_factory=WorkerConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    publishing: PublishingConfig = field(default_factory=PublishingConfig)

    def __post_init__(self) -> None:
        """Raises InvalidRequestError where a number makes no sense; but for priorities they are counts or durations."""
        for part in (self.server, self.workers, self.limits, self.publishing):
            for bound in fields(part):
                if bound.name == "min_priority":
                    continue
                value = getattr(part, bound.name)
                if not isinstance(value, int | float):
                    continue
                name = "--" + bound.name.removesuffix("_s").replace("_", "-")
                if not (value > 0 or (bound.name in _MAY_BE_ZERO and value == 0)):
                    raise InvalidRequestError(f"{name} must be positive, not {value}", param=bound.name)
                if math.isinf(value):
                    raise InvalidRequestError(f"{name} must be a finite number", param=bound.name)
        if (margin := self.publishing.canary_error_margin) > 1:
            raise InvalidRequestError(
                f"--canary-error-margin is between two shares, so at most 1, not {margin}", param="canary_error_margin"
            )


_MAY_BE_ZERO = frozenset({"port", "shutdown_timeout_s", "canary_error_margin"})
