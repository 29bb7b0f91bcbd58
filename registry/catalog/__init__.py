"""The catalog: what this installation serves and who may use it, in a database that outlives every process."""

from registry.catalog.catalog import Catalog
from registry.catalog.records import Alias, ApiKey, AuditEntry, ModelRecord, Role, VariantRecord

__all__ = ["Alias", "ApiKey", "AuditEntry", "Catalog", "ModelRecord", "Role", "VariantRecord"]
