"""What the routers of one controller share; one object for each app, passed to each router's factory."""

from __future__ import annotations

from dataclasses import dataclass

from controller.auth import Authenticator
from controller.config import ControllerConfig
from controller.gateway import Gateway
from controller.key_rules import KeyRules
from controller.limits import ConcurrencyLimits
from controller.metrics import Metrics
from controller.publishing.gateway import ReleaseGateway
from controller.publishing.operations import ReleaseOperations
from controller.publishing.release_counts import ReleaseCounts
from controller.variants.directory import VariantDirectory
from controller.variants.operations import VariantOperations
from controller.variants.reconciler import VariantReconciler
from controller.workers import WorkerTable
from registry.catalog import Catalog


@dataclass(frozen=True, slots=True)
class ControllerState:
    """Attributes:
    release_gateway: what the public API speaks to: the gateway behind the names of releases.
    gateway: streams generate requests and relays tokenize and detokenize; see its docstring for what it raises.
    metrics: `metrics.start_request(route)` gives the RequestObserver of one request.
    auth, limits: applied by middleware to every route (see controller.app); a router need not call them.
    key_rules: what a request may ask for, by its key; the routes that generate check it.
    catalog: blocking; call it through asyncio.to_thread.
    directory, reconciler, variants: what is known of variants, what mends them, and what operators do with them.
    releases: what publishers and operators do with published versions and their aliases.
    release_counts: what was counted of each version.
    """

    config: ControllerConfig
    catalog: Catalog
    workers: WorkerTable
    directory: VariantDirectory
    reconciler: VariantReconciler
    variants: VariantOperations
    releases: ReleaseOperations
    release_counts: ReleaseCounts
    gateway: Gateway
    release_gateway: ReleaseGateway
    metrics: Metrics
    auth: Authenticator
    key_rules: KeyRules
    limits: ConcurrencyLimits
