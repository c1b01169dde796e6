"""The database's history: one Alembic revision a file under versions/, written by hand, applied by `Store.open`."""
