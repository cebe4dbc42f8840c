"""A deterministic simulation: many workers at once over one store, and all that may go wrong."""
