"""Releases: versions that aliases point to, with canaries and shadows."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_ALIAS_COLUMNS = (
    ("target_version", sa.Integer),
    ("canary_version", sa.Integer),
    ("canary_weight", sa.Float),
    ("shadow_version", sa.Integer),
)


def upgrade() -> None:
    op.create_table(
        "releases",
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("last_number", sa.Integer, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_releases"),
    )
    op.create_table(
        "versions",
        sa.Column("release", sa.String(200), nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("parent", sa.String(200), nullable=False),
        sa.Column("digest", sa.String(71), nullable=False),
        sa.Column("files", sa.JSON, nullable=False),
        sa.Column("quality", sa.JSON),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("error", sa.Text),
        sa.Column("created_by", sa.String(200), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["release"], ["releases.name"], name="fk_versions_release"),
        sa.PrimaryKeyConstraint("release", "number", name="pk_versions"),
    )
    op.add_column("variants", sa.Column("files", sa.JSON))
    for name, kind in _ALIAS_COLUMNS:
        op.add_column("aliases", sa.Column(name, kind))


def downgrade() -> None:
    # What only this schema understands: versions among the variants, and aliases that point to them.
    op.execute("DELETE FROM variants WHERE files IS NOT NULL")
    op.execute("DELETE FROM aliases WHERE target_version IS NOT NULL")
    for name, _ in reversed(_ALIAS_COLUMNS):
        op.drop_column("aliases", name)
    op.drop_column("variants", "files")
    op.drop_table("versions")
    op.drop_table("releases")
