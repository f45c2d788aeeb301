"""PostgreSQL: connections, tables, advisory locks."""
