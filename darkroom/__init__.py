"""The core that every process shares: data, rules, SQL, settings, storage, doorbell."""

__version__ = "0.1.0"
