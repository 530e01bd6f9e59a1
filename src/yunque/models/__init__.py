"""Language models behind one adapter: loading, saving, scoring, value head, tiny and embedded models."""
