"""Alembic's entry: applies revisions over the connection that `gpu_pool.store` hands in, inside its transaction."""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
context.run_migrations()
