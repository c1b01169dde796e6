"""What happened to each job, tags, idempotency keys, used retries, and when jobs ended."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_COUNTER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")  # only INTEGER counts up by itself on SQLite
_TIME = sa.DateTime(timezone=True)

# The history of jobs from before there was one, as far as it can be told from their attempts.
_KNOWN_HISTORY = """
INSERT INTO job_events (job_id, at, event, state, attempt, cause)
SELECT job_id, at, event, state, attempt, cause FROM (
    SELECT id AS job_id, created_at AS at, 'submitted' AS event, 'queued' AS state, 0 AS attempt, NULL AS cause
    FROM jobs
    UNION ALL SELECT job_id, started_at, 'started', 'running', number, NULL FROM attempts
    UNION ALL SELECT job_id, ended_at, 'requeued', 'queued', number, cause FROM attempts WHERE outcome = 'requeued'
    UNION ALL SELECT id, completed_at, state, state, attempt, error FROM jobs WHERE completed_at IS NOT NULL
) AS known ORDER BY at, attempt
"""


def upgrade() -> None:
    op.add_column("jobs", sa.Column("retries", sa.Integer, nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("idempotency_key", sa.String(255)))
    op.create_index("ix_jobs_idempotency_key", "jobs", ["idempotency_key"], unique=True)
    op.execute("CREATE INDEX ix_jobs_ended ON jobs (completed_at, sequence) WHERE completed_at IS NOT NULL")
    op.create_table(
        "job_tags",
        sa.Column("tag", sa.String(64), primary_key=True),
        sa.Column(
            "sequence",
            _COUNTER,
            sa.ForeignKey("jobs.sequence", ondelete="CASCADE"),
            primary_key=True,
            autoincrement=False,
        ),
    )
    op.create_index("ix_job_tags_sequence", "job_tags", ["sequence"])
    op.create_table(
        "job_events",
        sa.Column("sequence", _COUNTER, primary_key=True, autoincrement=True),
        sa.Column("job_id", sa.String(64), sa.ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
        sa.Column("at", _TIME, nullable=False),
        sa.Column("event", sa.String(16), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("cause", sa.Text),
    )
    op.create_index("ix_job_events_job", "job_events", ["job_id", "sequence"])
    op.execute(_KNOWN_HISTORY)
