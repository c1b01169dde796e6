"""A job's work is an evaluation or a merge."""

from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.execute("ALTER TABLE jobs RENAME COLUMN evaluation TO work")
