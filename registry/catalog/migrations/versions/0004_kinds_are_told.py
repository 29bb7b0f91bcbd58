"""Variants without a kind: it is that of their files, which only workers read."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("variants") as table:  # SQLite drops no columns before its version 3.35
        table.drop_column("kind")


def downgrade() -> None:
    op.add_column("variants", sa.Column("kind", sa.String(16), nullable=False, server_default="lora"))
